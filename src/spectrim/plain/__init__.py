"""What is shipped: plain layers that `merge` writes. This package imports torch and nothing else."""
