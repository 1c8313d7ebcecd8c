"""The run folder, and what a checkpoint holds."""
