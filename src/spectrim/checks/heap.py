"""`heap_set_aside`: long work on many small layers without passes of the garbage collector over all that was there before."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heap_set_aside() -> Iterator[None]:
    """Let the garbage collector look at new objects alone inside; afterwards at all, as before.

    A process that has imported torch holds a million objects. The thousands that copies of a network consist of make Python go through
    all of them several times, which takes a quarter of the time of planning 500 small layers. Where somebody else has frozen objects,
    nothing happens. Also a decorator.

    Examples:
        >>> with heap_set_aside():
        ...     gc.get_freeze_count() > 0
        True
        >>> gc.get_freeze_count()
        0
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
