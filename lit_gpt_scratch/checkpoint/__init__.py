"""Run folders and checkpoints: atomic I/O, metadata, loading, export and comparison."""
