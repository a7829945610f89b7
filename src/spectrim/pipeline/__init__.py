"""The verbs in order: compress, recipes, runs."""
