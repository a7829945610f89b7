"""The command line: each body checks, calls one function, prints."""

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console

from spectrim.cli.arguments import parser
from spectrim.cli.commands import BODIES
from spectrim.errors import RecipeError


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM end what runs inside as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exit codes: 0, 2 for wrong usage (a bad recipe too), 1 for a failure, 130 after Ctrl-C, 143 after SIGTERM."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    args = parser().parse_args(argv)
    errors = Console(stderr=True)
    try:
        with _termination():
            BODIES[args.command](args[args.command])
    except RecipeError as error:
        errors.print(f"spectrim: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        more = "; the same command resumes from the last checkpoint" if args.command in ("run", "compress") else ""
        errors.print(f"stopped{more}", markup=False)
        sys.exit(143 if isinstance(stopped, _Terminated) else 130)
    except (ValueError, RuntimeError, OSError, ImportError, torch.OutOfMemoryError) as error:
        errors.print(f"spectrim: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
