"""Networks as files: save and load."""
