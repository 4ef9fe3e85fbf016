"""Faster ways to compute parts of a step, each probed against the plain one before it is used."""
