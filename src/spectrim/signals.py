"""What a handler of signals does before it raises."""

import os
import signal
import threading
from types import FrameType


def may_raise(number: int, frame: FrameType | None) -> bool:
    """Return whether a handler may raise where the signal came; else the signal is sent again a moment later.

    In a finalizer, such as that of a loader's iterator, Python would drop the exception. A loader's workers may have got the same signal:
    torch, which raises an error for each wherever this process is then, is not told of their end from here on.

    Args:
        number: of the signal.
        frame: that it interrupted.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, lambda *_: None)
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    if frame is not None:
        again = threading.Timer(0.1, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
    return frame is None
