"""The table of the method card is that of the result file."""

from scripts import error_of


def test_the_card_is_up_to_date() -> None:
    assert error_of("narrowing.py", "--check") == ""
