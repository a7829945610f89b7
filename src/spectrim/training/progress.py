"""The progress bar."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class _Bar:
    """Progress of an epoch: a bar on a terminal, a line for each epoch anywhere else."""

    def __init__(self, progress: Progress | None, length: int | None) -> None:
        self.progress, self.length = progress, length
        self.task: Any = None
        self.shown = 0.0

    def start(self, epoch: int, epochs: int) -> None:
        self.title = f"epoch {epoch + 1}/{epochs}"
        if self.progress is not None:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.task = self.progress.add_task(self.title, total=self.length, status="")

    def advance(self, sums: dict[str, float], done: int, rate: float, mean: Callable[[], float]) -> None:
        if self.progress is None or (done != self.length and time.monotonic() - self.shown < 0.2):
            return
        self.shown, rank = time.monotonic(), mean()
        terms = "  ".join(f"{name} {value / done:.4g}" for name, value in sums.items())
        status = f"{terms}  {f'mean rank {rank:.1f}  ' if rank else ''}{rate:,.0f} examples/s"
        self.progress.update(self.task, completed=done, status=status)

    def finish(self, line: dict[str, float]) -> None:
        if self.progress is not None:
            shown = {key: value for key, value in line.items() if key not in ("seconds", "learning_rate") and (key != "mean_rank" or value)}
            terms = "  ".join(f"{key} {value:,.4g}" for key, value in shown.items())
            self.progress.console.print(f"{self.title}  {terms}", highlight=False, soft_wrap=True)


@contextmanager
def _bar(accelerator: Any, show: bool, length: int | None) -> Iterator[_Bar]:
    """Show progress on the main process, on stderr so that standard output stays for results."""
    if not (show and accelerator.is_main_process):
        yield _Bar(None, length)
        return
    from rich.console import Console

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bar(progress, length)
