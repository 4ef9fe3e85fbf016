"""Composition and checking of a run's configuration; imports nothing heavy."""
