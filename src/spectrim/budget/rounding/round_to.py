"""`round_to`: the weights of a network on levels, so that its coded file takes no more than a number of bytes."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from spectrim.budget.budget import ABSOLUTE, FRACTIONS, Budget, BudgetError
from spectrim.budget.rounding.attempts import Rounded, Search
from spectrim.budget.rounding.pairs import with_pairs
from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.checks.words import worded
from spectrim.errors import LayerError, SettingError
from spectrim.layers import named_layers
from spectrim.metrics.macs import count_macs
from spectrim.metrics.measurement import size_bytes_of
from spectrim.surgery.batchnorm import fold_batchnorms
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.observing import batches_of, isolated

__all__ = ["Rounded", "round_to"]


@outside_inference_mode
@worded
def round_to(
    model: nn.Module,
    data: Iterable[Any],
    coded_bytes: int | float | Budget,
    *,
    examples: int = 1024,
    sequential: bool = True,
    fold: bool = True,
    low_rank: bool = False,
    sparse: bool = False,
    progress: bool = True,
) -> Rounded:
    """Put the weights of a network on levels, so that `pack` writes it in no more than `coded_bytes`; without training and labels.

    One price of a bit chooses the step of each weight: where a bit lowers the predicted change of the outputs most. Each weight is then
    rounded entry by entry, and later entries make up for the errors of earlier ones, in the second moments of its inputs and of the
    gradients of the outputs. Weights follow in the order in which they are called, on the inputs of the network rounded so far; each is
    first fitted to what its output lacks, the drift of a skip path beside it included. Biases take up the mean. Zeros of a network that
    was pruned stay zero.

    Linear layers and convolutions are rounded so. Other weights (embeddings, recurrent, packed attention, tied ones) are rounded to the
    nearest level, with a curvature that is measured. Buffers are left as they are. What a parametrization computes becomes an ordinary
    weight. Of several tensors in an output each counts alike, by its variance; where there are ``logits`` they alone count.

    Args:
        model: dense or merged. It is left untouched.
        data: batches of inputs or of ``(inputs, target)``; targets are not used.
        coded_bytes: a fraction in (0, 1) of the bytes of the tensors, or a number of bytes of at least 1000. Or a `Budget` with
            ``coded_bytes`` and limits on ``macs``, ``params``, ``size`` or ``size_bytes``: then one knapsack chooses the rank, the
            zeros and the step of each weight, and low ranks are kept whatever the outputs say, as those limits need them.
        examples: of `data` to use, from its beginning.
        sequential: False to round all weights on the dense network's inputs: fewer passes, larger change.
        fold: whether BatchNorms are folded into the layers before them first.
        low_rank: whether a weight may become two small ones, where distortion and bits together are predicted to cost less: rank and steps
            of all weights by one price of a bit. Kept where the outputs change less than with the weights as they are, at the same bytes.
        sparse: whether a weight may be pruned before it is rounded, where distortion and bits together are predicted to cost less, the
            positions included; chosen with the steps, and with the ranks under ``low_rank``. Kept, as low ranks, where the outputs
            change less.
        progress: show a progress bar, on stderr and on a terminal only.

    Returns:
        The network, and the sizes of its file.

    Raises:
        SettingError: for an argument outside its range, a factorized network, BatchNorms that cannot be folded as the network cannot be
            traced, or a budget that no steps meet.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> made = round_to(model, [torch.randn(256, 64)], coded_bytes=3500, progress=False)
        >>> made.packed.coded_bytes <= 3500, made.unexplained < 0.1
        (True, True)

    Source: steps by one Lagrangian: Shoham and Gersho, IEEE Trans. ASSP 36 (1988); feedback: Frantar et al., arXiv 2210.17323; curvature of
    outputs: Martens and Grosse, arXiv 1503.05671.
    Deviation: feedback over inputs and outputs at once; the Jacobian of the outputs instead of the loss; skip paths.
    """
    check("round_to", model=model, batches=data, examples=examples)
    model = unwrapped(model)
    budget = coded_bytes if isinstance(coded_bytes, Budget) else None
    if budget is not None:
        _check_budget(budget)
        coded_bytes = budget.coded_bytes or 0
    if isinstance(coded_bytes, Budget | bool) or not (0 < coded_bytes < 1 or coded_bytes >= 1000):
        raise SettingError("round_to", "coded_bytes", got=coded_bytes, rule="a fraction in (0, 1), or a number of bytes of at least 1000")
    if next(named_layers(model), None) is not None:
        raise SettingError("round_to", "model", got="a factorized network", rule="of ordinary layers", hint="call merge(model) first")
    dense = duplicate(model).eval()
    _settle(dense)
    if fold:
        try:
            fold_batchnorms(dense)
        except LayerError as error:
            raise SettingError("round_to", "fold", got=True, rule="False for this network", hint=str(error)) from error
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    limit = int(coded_bytes * held if coded_bytes < 1 else coded_bytes)
    batches = [inputs for inputs, _ in batches_of(data, dense, examples, targets=False, progress=progress, title="round_to")]
    if not batches:
        raise SettingError("round_to", "data", got="no batches", rule="at least one batch")
    limited = budget is not None and bool(budget.limits)
    with isolated(dense):
        search = Search(dense, batches, sequential, progress)
        if limited or sparse:
            options = search.together(limit, budget or Budget(coded_bytes=coded_bytes), sparse=sparse, low_rank=low_rank or limited)
        else:
            options = search.joint(limit) if low_rank else {}
        pairs = {name: option for name, option in options.items() if option.rank is not None}
        keeps = {name: option.keep for name, option in options.items() if option.keep < 1}
        made = None if limited else search.within(limit)
        if not pairs and not keeps:
            return made or search.within(limit)
        cut, counterparts = with_pairs(dense, pairs) if pairs else (dense, {})
        if limited and budget is not None:
            _check_met(budget, cut, dense, batches[0])
        with isolated(cut):
            again = Search(cut, batches, sequential, progress, (search, counterparts) if pairs else None)
            again.keep_(keeps)
            other = replace(again.within(limit), ranks={name: option.rank or 0 for name, option in pairs.items()}, keeps=keeps)
        if made is None:
            return other
        tried = (made.unexplained, other.unexplained)
        return replace(other if other.unexplained < made.unexplained else made, tried=tried)


def _settle(model: nn.Module) -> None:
    """Make what parametrizations compute ordinary weights, in place: the originals on levels would not put it on levels."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):  # torch's own remove_parametrizations changes the class, which the original shares
            computed = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
            for name, value in computed.items():
                module.register_parameter(name, nn.Parameter(value))


def _check_budget(budget: Budget) -> None:
    """Raise a SettingError for a budget without coded bytes, or with limits that no ranks of ordinary layers decide."""
    known = ("coded_bytes", "macs", "params", "size", "size_bytes")
    if budget.coded_bytes is None or any(field not in known for field in budget.asked):
        raise SettingError(
            "round_to", "coded_bytes", got=budget, rule=f"a Budget with coded_bytes, and no more than {', '.join(known[1:])}"
        )


def _check_met(budget: Budget, cut: nn.Module, dense: nn.Module, batch: Any) -> None:
    """Raise a BudgetError where the network with pairs costs more than a budget allows; it is counted, not predicted."""
    counts: dict[str, Callable[[nn.Module], float]] = {
        "macs": lambda model: float(count_macs(model, batch)),
        "params": lambda model: float(sum(parameter.numel() for parameter in model.parameters())),
        "size": lambda model: float(size_bytes_of(model)),
    }
    for field, value in budget.limits.items():
        count = counts[(FRACTIONS | ABSOLUTE)[field]]
        most = value * count(dense) if field in FRACTIONS else value
        if count(cut) > most + 1:
            raise BudgetError(f"{field}={value:g} allows {most:,.0f}, and the network with the chosen ranks has {count(cut):,.0f}")
