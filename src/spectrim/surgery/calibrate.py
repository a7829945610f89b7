"""`calibrate`: second moments of the inputs of each factorized weight, and of the gradients at its outputs."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.checks.words import worded
from spectrim.errors import BackwardError, LayerError, SettingError, SpectrimError
from spectrim.forms.form import Form
from spectrim.layers import named_factors
from spectrim.metrics.batch import BatchDims, stated
from spectrim.metrics.calls import call_model, loss_of
from spectrim.metrics.distance import Unlabeled
from spectrim.metrics.inputs import batch_size_of
from spectrim.surgery.moments import Calibration, Sums
from spectrim.surgery.observing import absorbing, batches_of, check_examples, isolated, observable

Loss = Callable[[Any, Any], Tensor]


@outside_inference_mode
@worded
def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss | None = None,
    *,
    examples: int | None = 1024,
    seconds: float | None = None,
    centered: bool = True,
    batch_dims: BatchDims | None = None,
    progress: bool = False,
    accelerator: Any = None,
) -> Calibration:
    """Run a factorized model in eval mode and measure the second moments at each of its weights.

    ``A = 1/n sum_examples sum_positions x x^T`` of each weight's inputs, less their mean where a bias absorbs it; with a loss also ``G``,
    the same mean, over positions too, of the gradients at its outputs, for one backward pass a batch.

    Runs on a copy of the model, in which recurrent layers loop over time and attention calls its projections one by one: the same function
    in layers that can be observed. Nothing about the model changes, nor do torch's random generators.

    Args:
        model: factorized, at any rank.
        data: batches ``(inputs, target)``; without a loss bare inputs too (a tuple or list of two is taken for inputs and target).
        loss: called as ``loss(output, target)``, gives the mean over a batch; None for `inputs` alone. A loss without labels
            (`spectrim.metrics.distance`) is probed in random directions of the output instead: at the dense network it has no slope.
        examples: stop after the batch that completes this number, counted along the leading dimension, >= 1; None for all data.
        seconds: stop after the batch in which so much time has passed, > 0; None for no limit.
        centered: whether to take the mean out of the inputs where a bias absorbs it (see `absorbing`); the sources do not.
        batch_dims: states the batch axes of the inputs, see `spectrim.metrics.batch.BatchDims`; found by agreement of sizes when omitted.
        progress: whether to show a progress bar, on stderr and on a terminal only.
        accelerator: an `accelerate.Accelerator`, when all of its processes call this with the same model and data: each takes every n-th
            batch, all of its own of a divided loader, and all return the moments of all examples. Without one a process calibrates alone.

    Returns:
        The moments, on the model's device.

    Raises:
        LayerError: when nothing is factorized, or when inputs of a weight are not finite.
        SettingError: for `examples` below 1, or when `data` is empty, or has no targets for a loss.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> inputs = [torch.tensor([[1.0, 0.0], [3.0, 0.0]])]
        >>> calibrate(factorize(nn.Linear(2, 2, bias=False)), inputs).inputs[""].tolist()
        [[5.0, 0.0], [0.0, 0.0]]
        >>> calibrate(factorize(nn.Linear(2, 2)), inputs).inputs[""].tolist()
        [[1.0, 0.0], [0.0, 0.0]]

    Source: Martens and Grosse, arXiv 1503.05671; Grosse and Martens, arXiv 1602.01407.
    """
    check("calibrate", optional=("loss",), model=model, batches=data, loss=loss)
    model = unwrapped(model)
    if next(named_factors(model), None) is None:
        raise LayerError(type(model).__name__, "has no factorized layer", hint="call factorize(model) first")
    check_examples("calibrate", examples)
    observed, held = observable(model)
    sums = Sums({factors: name for name, factors in held.items()}, absorbing(model) if centered else ())
    for parameter in (parameter for factors in held.values() for parameter in factors.slope_parameters()):
        parameter.requires_grad_(loss is not None)
    seen, start = 0, time.monotonic()
    labels = loss is not None and not isinstance(loss, Unlabeled)
    share = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    with isolated(observed), torch.set_grad_enabled(loss is not None), sums.watching(observed):
        batches = batches_of(data, observed, examples, targets=labels, progress=progress, title="calibrate", dims=batch_dims, share=share)
        for number, (inputs, target) in enumerate(batches):
            if not labels and loss is not None:  # directions of a batch, whoever has it; the caller's generators are put back
                torch.manual_seed(share[0] + number * share[1])
            output = call_model(observed, inputs)
            size = None if batch_dims is None else stated(inputs, batch_dims, "calibrate").size
            count = batch_size_of(inputs, size, target=target, output=output)
            if loss is not None:
                total = loss.probe(output) if isinstance(loss, Unlabeled) else loss_of(loss, output, target, "calibrate") * count
                _differentiate(model, sums, held, total)
            seen += count
            if seconds is not None and time.monotonic() - start > seconds:
                break
    if share[1] > 1:
        sums.together(accelerator)
        seen = int(accelerator.reduce(torch.tensor(seen, device=accelerator.device), "sum"))
    if not seen:
        got, hint = f"nothing from {type(data).__name__}", "a generator can be read only once: give a list or a DataLoader"
        raise SettingError("calibrate", "data", got=got, rule="at least one batch", hint=hint)
    return sums.result(held, seen)


def _differentiate(model: nn.Module, sums: Sums, held: dict[str, Form], total: Any) -> None:
    try:
        sums.add_slopes(held, total)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:  # of the model's own backward pass
        if isinstance(error, SpectrimError | torch.OutOfMemoryError):
            raise
        told = f"its backward pass fails in eval mode ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        hint = "calibrate without a loss, or compress with cut='whitened', which needs no gradient"
        raise BackwardError(type(model).__name__, told, hint=hint) from error
