"""The tables of the analysis pages are those of the result files."""

from scripts import error_of


def test_the_pages_are_up_to_date() -> None:
    assert error_of("analysis/pages.py", "--check") == ""
