"""What commands share: reading options, printing results."""

import json
import traceback
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from spectrim.errors import SettingError, SpectrimError, UsageError

CROSSBARS = ("rows", "columns", "bits", "cell_bits")
"""What `crossbars` reads."""

POSITIONAL = ("recipe", "target")
"""Arguments that are no options."""


def told(error: Exception) -> str:
    """Return an error in a line: a message of this package as it is, any other with its type and the line that raised it."""
    text = str(error)
    if "Original Traceback" in text:  # of a worker of a loader
        lines = text.strip().splitlines()
        return f"{lines[0]} {lines[-1]}"
    frames = traceback.extract_tb(error.__traceback__)
    own = str(Path(__file__).parents[1])
    if isinstance(error, SpectrimError) or (text and frames[-1].filename.startswith(own)):
        return text
    place = next((frame for frame in reversed(frames) if "site-packages" not in frame.filename and own not in frame.filename), frames[-1])
    return f"{type(error).__name__}: {text} ({place.filename}, line {place.lineno}); --verbose shows the whole trace"


def check_options(options: dict[str, object]) -> None:
    """Raise for an empty option, as an unset variable of a shell leaves it, and for an output that would overwrite what is read."""
    for name, value in options.items():
        if value == "":
            raise UsageError(name if name in POSITIONAL else f"--{name.replace('_', '-')}", "is empty")
    read = [Path(str(options[name])) for name in (*POSITIONAL, "table", "weights") if options.get(name) is not None]
    for name in ("out", "kit"):
        path = Path(str(options[name])) if options.get(name) is not None else None
        if path is not None and any(path.is_file() and other.is_file() and path.samefile(other) for other in read):
            raise UsageError(f"--{name}", f"{path} is read by this command", allowed="another path")


def fractions(option: str, text: str) -> list[float]:
    """Return the numbers of a list with commas."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value <= 1 for value in values) or len(set(values)) < len(values):
        raise UsageError(option, f"got {text!r}", allowed="fractions kept, in (0, 1], each once, with commas: 0.5,0.33")
    return values


def coded_bytes(option: str, text: str) -> list[float]:
    """Return the sizes of coded files in a list with commas: fractions of the dense network's bytes, or bytes."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if (
        not values
        or not all(0 < value < 1 or (value >= 1000 and value == int(value)) for value in values)
        or len(set(values)) < len(values)
    ):
        allowed = "fractions of the dense network's bytes, in (0, 1), or bytes from 1000 on, each once, with commas: 0.1,0.05"
        raise UsageError(option, f"got {text!r}", allowed=allowed)
    return [value if value < 1 else int(value) for value in values]


def crossbars(text: str | None) -> Any:
    """Return the crossbars that an option describes; None without it."""
    if text is None:
        return None
    from spectrim.runtimes.crossbar import Crossbars, Device, Mapping

    allowed = "rows=, columns=, bits= and cell_bits=, each once, with commas: rows=32,columns=32,bits=4,cell_bits=4"
    pairs = [part.partition("=") for part in text.split(",")]
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names) or not all(name in CROSSBARS and value.isdecimal() for name, _, value in pairs):
        raise UsageError("--crossbars", f"got {text!r}", allowed=allowed)
    given = {name: int(value) for name, _, value in pairs}
    try:
        device = Device(bits=given.pop("cell_bits", Device.bits))
        return Crossbars(device, Mapping(**given))
    except SettingError as error:
        raise UsageError("--crossbars", str(error)) from error


def show(args: Namespace, text: str, values: Any) -> None:
    """Print a result: for people, or as JSON alone."""
    print(json.dumps(values) if args.json else text)


def note(text: str) -> None:
    """Print a remark on stderr."""
    Console(stderr=True).print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def changes(args: Namespace) -> list[str]:
    """Return the changes of a recipe that the options ask for."""
    own = [*(args.set or []), *([] if args.seed is None else [f"seed={args.seed}"])]
    return own if args.weights is None else [*own, f"weights={json.dumps(str(Path(args.weights).resolve()))}"]
