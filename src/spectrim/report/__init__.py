"""One self-contained HTML page for a plan or a run, and a summary as text."""

from spectrim.report.page import PLAN, text_report, write_report

__all__ = ["PLAN", "text_report", "write_report"]
