"""Runs that were saved: their folders are read, compared, listed and run again."""
