"""SIGTERM ends training as Ctrl-C does: by an exception, so that files are closed and half-written ones are removed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from spectrim.signals import may_raise


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """Inside, SIGTERM raises ``SystemExit(143)`` where it would end the process at once; a handler that is set already stays.

    Nothing changes in a thread other than the main one, which alone may set handlers.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    came = list[int]()

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if may_raise(number, frame):
            raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except Exception as error:
        if came:
            raise SystemExit(128 + came[0]) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
