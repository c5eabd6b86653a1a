"""The run directory: its files, its metrics, its reward statistics."""
