"""Budgets: what each rank costs, what it distorts, and the ranks that fit."""
