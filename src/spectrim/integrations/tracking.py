"""Logs of a run for accelerate's trackers: TensorBoard and the others that accelerate supports."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.errors import SettingError
from spectrim.forms.form import ranks_in
from spectrim.layers import named_factors
from spectrim.layers.sharded import whole_values


class Tracking:
    """A callback of `fit` that gives each epoch to accelerate's trackers.

    Scalars go by the names they have in the log (``loss``, each penalty, ``eval_accuracy``, ...), ranks by ``rank/LAYER``. TensorBoard also
    gets ``|S|`` of each factorized weight as a histogram, ``spectrum/LAYER``: its spectrum as far as factors are orthonormal. The step is
    the number of finished epochs. With several processes all call it and the main one writes.

    Args:
        folder: where trackers that write files do so, under ``project``; None with an accelerator of your own.
        project: name of the run.
        log_with: names of trackers that accelerate knows, for example ``tensorboard`` or ``wandb``.
        accelerator: your own, on which you have called ``init_trackers``; the other arguments are unused then.

    Raises:
        SettingError: for both or none of `folder` and `accelerator`, or an accelerator without trackers.
        ImportError: when the package of a tracker is not installed.

    Examples:
        >>> with Tracking("runs/tb", project="resnet20") as tracking:  # doctest: +SKIP
        ...     fit(low, data, loss, optimizer, epochs=10, callbacks=[tracking])
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        project: str = "spectrim",
        log_with: str | list[str] = "tensorboard",
        accelerator: Any = None,
    ) -> None:
        """Start the trackers, or take those of `accelerator`."""
        if (folder is None) == (accelerator is None):
            given = "neither" if folder is None else "both"
            raise SettingError("Tracking", "folder and accelerator", got=given, rule="one of them")
        self.own = accelerator is None
        if accelerator is None:
            accelerator = _accelerator(Path(str(folder)), log_with)
            accelerator.init_trackers(project)
        if not accelerator.trackers and accelerator.is_main_process:
            hint = "make it with log_with=... and call init_trackers"
            raise SettingError("Tracking", "accelerator", got="one without trackers", rule="one with trackers", hint=hint)
        self.accelerator = accelerator

    def __call__(self, epoch: int, metrics: dict[str, float], model: nn.Module) -> None:
        """Log one epoch.

        Args:
            epoch: number of finished epochs.
            metrics: the epoch's line of the log.
            model: factorized or dense.
        """
        ranks = {f"rank/{name}": sum(held := ranks_in([form.size])) / len(held) for name, form in named_factors(model)}
        self.accelerator.log({**metrics, **ranks}, step=epoch)
        writers = [tracker.tracker for tracker in self.accelerator.trackers if tracker.name == "tensorboard"]
        for name, factors in named_factors(model):
            spectrum = whole_values(factors)[0].abs().flatten().to("cpu", torch.float64)  # every process gathers
            for writer in writers if self.accelerator.is_main_process else ():
                writer.add_histogram(f"spectrum/{name}", spectrum, epoch)
        for writer in writers if self.accelerator.is_main_process else ():
            writer.flush()

    def close(self) -> None:
        """Finish the trackers that were started here; those of your own accelerator stay open."""
        if self.own:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def __enter__(self) -> "Tracking":
        """Return the callback."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def _accelerator(folder: Path, log_with: str | list[str]) -> Any:
    """Make an accelerator for its trackers only."""
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    wanted = [log_with] if isinstance(log_with, str) else log_with
    missing = [name for name in wanted if name not in [str(tracker) for tracker in get_available_trackers()]]
    if missing:
        hint = f"pip install {' '.join(missing)}"
        raise ImportError(f"the trackers {missing} are not installed, or accelerate does not know them: {hint}")
    return Accelerator(log_with=wanted, project_dir=folder)
