"""What a long call is doing: the name of each step, on stderr and in the log, from the first second."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LOGGER = logging.getLogger("spectrim")
"""The logger of the library: steps at level INFO, what should not be overlooked at level WARNING."""


class Steps:
    """Names the steps of a call: a bar on a terminal, a line for each step anywhere else.

    Args:
        verb: that was called.
        total: number of steps.
        progress: the bar; None to show nothing.
    """

    def __init__(self, verb: str, total: int, progress: Progress | None) -> None:
        self.verb, self.total, self.progress, self.done = verb, total, progress, 0
        self.start = time.monotonic()
        self.task = None if progress is None else progress.add_task(verb, total=total)

    def __call__(self, title: str, *, has_bar: bool = False) -> None:
        """Begin a step.

        Args:
            title: what is done, for people.
            has_bar: whether the step shows a bar, too; this one is hidden then.
        """
        self.done = min(self.done + 1, self.total)
        LOGGER.info("%s: %s (%.1f s)", self.verb, title, time.monotonic() - self.start)
        if self.progress is None or self.task is None:
            return
        if has_bar or not self.progress.console.is_terminal:
            self.progress.console.print(f"{self.verb} {self.done}/{self.total}: {title}", highlight=False, markup=False)
        if has_bar:
            self.progress.stop()
        else:
            self.progress.update(self.task, description=f"{self.verb}: {title}", completed=self.done - 1)
            self.progress.start()


@contextmanager
def steps(verb: str, total: int, show: bool) -> Iterator[Steps]:
    """Name the steps of a call while it runs.

    Args:
        verb: that was called.
        total: number of steps.
        show: whether to show them; the log gets them in any case.

    Examples:
        >>> with steps("compress", 2, show=False) as step:
        ...     step("reading data")
        ...     step("cutting")
        >>> step.done
        2
    """
    if not show:
        yield Steps(verb, total, None)
        return
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    try:
        yield Steps(verb, total, progress)
    finally:
        progress.stop()
