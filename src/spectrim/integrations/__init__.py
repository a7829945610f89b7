"""Adapters for other people's tools; each file is imported only by those who ask for it."""
