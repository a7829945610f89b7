"""What the scripts of this folder share: where results are, what they depend on, and how they are written."""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "analysis"
SEEDS = (0, 1, 2)


def write(name: str, content: dict[str, Any]) -> None:
    """Write one result file."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from micro.harness import environment  # here, as it imports torch and reading does not need it
    from spectrim.files import write_text

    RESULTS.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS / f"{name}.json", json.dumps({"environment": environment()} | content, indent=1) + "\n")


def read(name: str) -> dict[str, Any]:
    """Read one result file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and sample standard deviation as text."""
    mean = statistics.mean(values)
    return f"{mean:.{digits}g} ± {statistics.stdev(values):.2g}" if len(values) > 1 else f"{mean:.{digits}g}"
