"""The tables of the method card are those of the result files."""

from scripts import error_of


def test_the_card_is_up_to_date() -> None:
    assert error_of("tasks.py", "report", "--check") == ""
