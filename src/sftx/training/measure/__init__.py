"""Measurements of a run: evaluation, progress, speed, and where time goes."""
