"""The training loop and its parts: courses, lessons, checkpoints, progress, several processes."""
