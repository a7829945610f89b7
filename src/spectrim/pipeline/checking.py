"""What `compress` refuses before any work, and data without labels."""

from typing import Any

from torch import Tensor, nn

from spectrim.budget.budget import Budget
from spectrim.checks import check
from spectrim.errors import SettingError
from spectrim.layers import named_factors
from spectrim.metrics.batch import BatchDims
from spectrim.metrics.distance import Unlabeled, relative_distance, with_outputs
from spectrim.metrics.inputs import batch_size_of, first_examples, one_example
from spectrim.training.distillation import Distillation
from spectrim.training.parts import Reconstruction
from spectrim.training.stopping import Best
from spectrim.training.tuning import Schedule, Tuning


def check_unlabeled(data: Any, eval_data: Any, epochs: int) -> Any:
    """Return data without labels as batches; refuse to train on them."""
    if epochs:
        hint = "reconstruct=Reconstruction() trains without labels; fit(..., distill=Distillation(model, weight=1.0)) too"
        raise SettingError("compress", "epochs", got=epochs, rule="0 without a loss", hint=hint)
    batches = [data] if isinstance(data, Tensor) else data
    check("compress", batches_again=batches, eval_batches=eval_data)
    return batches


def step_count(auto: bool, recovery: int, *more: object) -> int:
    """Return how many steps a call has: of all calls, those of the cuts, and one for each of the others that is asked for."""
    return 6 + (4 + 4 * (recovery > 0) if auto else 1) + sum(bool(step) for step in more)


def example_of(model: nn.Module, data: Any, loss: Any, given: Any, dims: BatchDims | None) -> tuple[Any, int]:
    """Return one batch for costs and latency, and how many examples it has: what was given, else the first example of the data."""
    if given is not None:
        return given, batch_size_of(given, model=model, unknown=1)
    unlabeled = loss is None or isinstance(loss, Unlabeled)
    pairs = with_outputs(model, first_examples(data, 1, dims=dims)) if unlabeled else data
    return one_example(pairs, model, dims=dims, owner="compress"), 1


def without_labels(
    model: nn.Module, data: Any, eval_data: Any, loss: Unlabeled | None, examples: int, dims: BatchDims | None
) -> tuple[list[Any], list[Any] | None, Unlabeled]:
    """Return the calibration set and the validation split with the dense network's outputs as targets, and the distance from these."""
    known = with_outputs(model, first_examples(data, examples, dims=dims))
    return known, None if eval_data is None else with_outputs(model, eval_data), loss or relative_distance(known)


def check_settings(model: nn.Module, budget: Budget, epochs: int, distill: Any, reconstruct: Any) -> None:
    """Raise a SettingError for a model or a setting that is none of the allowed ones."""
    if next(named_factors(model), None) is not None:
        hint = "merge(model) makes it dense; to cut it as it is, allocate ranks and prune"
        raise SettingError("compress", "model", got="one that is factorized already", rule="dense", hint=hint)
    if not (distill is None or distill == "auto" or isinstance(distill, Distillation)):
        raise SettingError("compress", "distill", got=distill, rule="'auto', a Distillation, or None")
    if not (reconstruct is None or isinstance(reconstruct, Reconstruction)):
        raise SettingError("compress", "reconstruct", got=reconstruct, rule="a Reconstruction, or None")
    if not budget.limits and (epochs or reconstruct is not None):
        hint = "limit macs or params too, or train before"
        field, got = ("epochs", epochs) if epochs else ("reconstruct", reconstruct)
        raise SettingError("compress", field, got=got, rule="left out where coded_bytes alone is limited and nothing is cut", hint=hint)


def check_recovery(recovery: int, cut: str, epochs: int, squeeze: float) -> None:
    """Raise a SettingError for a recovery where no candidates are compared, or nothing is trained after them."""
    check("compress", recovery=recovery)
    if recovery and (cut != "auto" or not epochs or squeeze):
        rule = 'left out without epochs, with squeeze, and with another cut than "auto": no candidates are compared then'
        raise SettingError("compress", "recovery", got=recovery, rule=rule)


def check_tuning(tuning: Tuning, judged: bool) -> None:
    """Raise a SettingError for what only `fit` takes: a schedule of an optimizer that `compress` does not have."""
    if isinstance(tuning.scheduler, Schedule):
        rule = "a function (optimizer, steps) -> schedule"
        raise SettingError("compress", "scheduler", got=tuning.scheduler, rule=rule, hint="the optimizer is made inside")
    if tuning.keep_best:
        Best(tuning.keep_best, judged)
