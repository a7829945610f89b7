"""Integrations with other libraries; each file is imported on request only."""
