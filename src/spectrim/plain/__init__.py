"""Layers for deployment, which `merge` writes. This package imports torch only."""
