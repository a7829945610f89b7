"""``python -m spectrim.cli``."""

from spectrim.cli import main

main()
