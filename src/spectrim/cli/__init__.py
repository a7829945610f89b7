"""The command line: each body checks, calls one function, prints. What needs torch is imported after the arguments are read."""

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from spectrim.cli.arguments import parser
from spectrim.errors import UsageError
from spectrim.signals import may_raise


class _Terminated(KeyboardInterrupt):
    """SIGINT came, SIGTERM, or SIGHUP: the terminal was closed."""


@contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP where it is not ignored, end what runs inside as Ctrl-C does; errors that follow a signal do, too."""
    came = list[int]()

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if may_raise(number, frame):
            raise _Terminated(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in wanted if signal.getsignal(number) is not signal.SIG_IGN}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    try:
        yield
    except Exception as error:
        if came:
            raise _Terminated(128 + came[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    """Show the log of the library, or of its warnings nothing: the verdict names them."""
    logger = logging.getLogger("spectrim")
    level, handler = logger.level, logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.setLevel(logging.INFO if verbose else logging.ERROR)
    if verbose:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


@contextmanager
def _device(name: str | None) -> Iterator[None]:
    """Let training see one device alone; before torch looks for devices."""
    if name is None:
        yield
        return
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and (kind != "cuda" or not number.isdigit())):
        raise UsageError("--device", f"got {name!r}", allowed="cpu, cuda, cuda:N, mps")
    wanted = {"ACCELERATE_USE_CPU": "true"} if kind == "cpu" else {"CUDA_VISIBLE_DEVICES": number} if number else {}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        import torch

        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if kind in there and not there[kind]:
            raise UsageError("--device", f"got {name!r}, which this machine does not have", allowed="cpu")
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _print_error(text: str, style: str | None = "red") -> None:
    from rich.console import Console

    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exit codes: 0, 2 for wrong usage (a bad recipe too), 1 for a failure; after Ctrl-C 130, SIGTERM 143, SIGHUP 129."""
    args = parser().parse_args(argv)
    options = args[args.command]
    try:
        with _termination(), _logging(options.verbose), _device(options.get("device")):
            from spectrim.cli.shared import check_options

            check_options(vars(options))
            from spectrim.cli.commands import BODIES

            logging.getLogger("torch").setLevel(logging.ERROR)
            BODIES[args.command](options)
    except UsageError as error:
        _print_error(f"spectrim: {error}")
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        more = "; the same command resumes from the last checkpoint" if args.command in ("run", "compress") else ""
        _print_error(f"stopped{more}", None)
        sys.exit(stopped.args[0] if isinstance(stopped, _Terminated) else 130)
    except Exception as error:  # what a recipe names may raise anything
        from spectrim.cli.shared import told

        if options.verbose:
            traceback.print_exc()
        _print_error(f"spectrim: {told(error)}")
        sys.exit(1)
