"""The tables of the method card are those of the result files."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_card_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tasks.py", "report", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
