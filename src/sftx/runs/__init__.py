"""The run folder, its manifest and metrics, and trackers."""
