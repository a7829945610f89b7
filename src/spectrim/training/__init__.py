"""The training loop and what it takes: courses, lessons, checkpoints, progress, several processes."""
