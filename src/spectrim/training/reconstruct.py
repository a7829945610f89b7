"""`Reconstruction`: after the cut, each block in turn is trained for a few steps to compute what the dense block computes; no labels."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import nn

from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.errors import SettingError
from spectrim.metrics.calls import evaluating
from spectrim.metrics.inputs import inputs_of
from spectrim.metrics.tensors import send
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.observing import isolated
from spectrim.surgery.states import orthonormalize_
from spectrim.training.blocks import blocks_of
from spectrim.training.parts import Part, Reconstructed, Reconstruction


@outside_inference_mode
def reconstruct(
    cut: nn.Module, dense: nn.Module, data: Sequence[Any], settings: Reconstruction | None = None, *, progress: bool = False
) -> tuple[nn.Module, list[Reconstructed]]:
    """Return a copy of a cut network whose blocks are trained toward the dense network's, and how each went; see `Reconstruction`.

    Args:
        cut: factorized, at its final ranks; it is left untouched.
        dense: the network before the cut.
        data: batches ``(inputs, target)``, or bare inputs; targets are not looked at.
        settings: the defaults of `Reconstruction` when omitted.
        progress: whether to show a progress bar, on stderr and on a terminal only.

    Raises:
        LayerError: when the dense network has no block of a name, or a block is not called, or not with tensors.
        SettingError: when there are no data.
    """
    check("reconstruct", cut_model=cut, dense=dense, batches=data)
    made = duplicate(unwrapped(cut))
    told = reconstruct_(made, unwrapped(dense), data, settings or Reconstruction(), progress=progress)
    orthonormalize_(made)
    return made, told


def reconstruct_(
    low: nn.Module, dense: nn.Module, data: Sequence[Any], settings: Reconstruction, *, progress: bool = False
) -> list[Reconstructed]:
    """Reconstruct in place, otherwise as `reconstruct`; the factors are balanced and not orthonormal afterwards."""
    batches = [send(inputs_of(batch), low) for batch in data]
    if not batches:
        hint = "a generator can be read only once: give a list or a DataLoader"
        raise SettingError("reconstruct", "data", got=f"nothing from {type(data).__name__}", rule="at least one batch", hint=hint)
    names = blocks_of(low, settings.blocks) if settings.steps else []
    counts = dict.fromkeys(names, settings.steps) | ({"output": settings.whole} if settings.whole else {})
    deadline = None if settings.seconds is None else time.monotonic() + settings.seconds
    told: list[Reconstructed] = []
    with isolated(low), evaluating(dense), evaluating(low, gradients=True), _bar(counts, progress) as tick:
        for name, steps in counts.items():
            if deadline is not None and time.monotonic() > deadline:
                break
            part = Part.output(low, dense, batches, settings) if name == "output" else Part.block(name, low, dense, batches, settings)
            told.append(part.train(steps, deadline, partial(tick, name)))
    return told


@contextmanager
def _bar(counts: dict[str, int], progress: bool) -> Iterator[Callable[[str], None]]:
    """Yield what is called after each step."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("reconstruct", total=sum(counts.values()))
        yield lambda name: bar.update(task, advance=1, description=f"reconstruct {name}")
