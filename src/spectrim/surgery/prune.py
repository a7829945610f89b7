"""`prune` and `prune_` cut ranks."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.errors import LayerError
from spectrim.forms import Factors, Form
from spectrim.forms.derived import product_with
from spectrim.layers import named_factors
from spectrim.layers.sharded import refuse_shards
from spectrim.protocols import Sizes
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.followers import cuts_of, inner_of
from spectrim.surgery.moments import Calibration
from spectrim.surgery.observing import absorbing
from spectrim.surgery.optimizer_state import _check_trained, _move
from spectrim.surgery.ranks import check_names, chooser


@outside_inference_mode
def prune(model: nn.Module, ranks: Sizes, *, calibration: Calibration | None = None) -> nn.Module:
    """Return a copy of a factorized model whose factors are cut to smaller ranks; the tensors become smaller.

    Before cutting, every product ``U diag(S) Vh`` is re-orthogonalized exactly (QR of both factors, SVD of the core), so that what is
    sorted and cut are true singular values: the squared error of each weight equals its discarded energy.

    With a calibration each weight ``W`` is cut where its output changes least on the calibration data, or the loss, when the calibration
    was made with one: ``W_r = argmin ||G^1/2 (W - W_r) A^1/2||_F`` with ``A`` the second moment of its inputs and ``G`` that of the loss's
    gradient at its outputs (none without a loss, or where it is not known). A weight that the calibration skipped is cut plainly. Where
    the calibration took the inputs' mean ``m`` out of ``A``, the layer's bias becomes ``b + (W - W_r) m``, so that the mean of the output
    is unchanged.

    Args:
        model: factorized; it is left untouched.
        ranks: a rank rule, applied to each weight's true singular values (with a calibration, to those of ``G^1/2 W A^1/2``), or a mapping
            ``{name: rank}`` with the names of `coverage`; weights that it does not name keep their rank. A weight in a Tucker form takes
            two ranks, ``(outputs, inputs)``; a rule is applied to the spectrum along each.
        calibration: what `calibrate` measured on this model.

    Returns:
        The cut model. Factors have orthonormal columns and rows, values descending and positive.

    Raises:
        RankError: for a rank outside ``[1, present rank]``.
        LayerError: for a name that is not a factorized weight, for factors that are not finite, when nothing is factorized, for a
            calibration of another model, or for a model that FSDP2 shards.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> from spectrim.budget.rules import Fixed
        >>> cut = prune(factorize(nn.Linear(8, 6)), Fixed(2))
        >>> cut.U.shape, cut.rank
        (torch.Size([6, 2]), 2)

    Source: Yang et al., arXiv 2004.09031, section 3.3; with inputs, Yuan et al., arXiv 2312.05821, and Wang et al., arXiv 2403.07378; with
    gradients, the curvature of Grosse and Martens, arXiv 1602.01407.
    Deviation: the published code sorts the trained ``S`` as it is; here it is made exact first. No Cholesky factors, see
    `linalg.weighted_svd`.
    """
    check("prune", model=model, ranks=ranks, calibration=calibration)
    model = unwrapped(model)
    refuse_shards(model, "prune")
    cut = duplicate(model)
    cuts = _cuts(cut, ranks, calibration)
    _shift_biases(cut, cuts, calibration)
    for old, new in cuts.values():
        old.become(new)
    return cut


@outside_inference_mode
def prune_(
    model: nn.Module,
    ranks: Sizes,
    optimizer: Optimizer | None = None,
    *,
    calibration: Calibration | None = None,
    followers: Sequence[Any] = (),
) -> None:
    """Cut a factorized model to smaller ranks in place, with its optimizer: `prune` for use during training.

    Args:
        model: factorized; its factors get new, smaller parameters.
        ranks: as for `prune`.
        optimizer: trains `model`; its moments are carried over as by `prune_optimizer_state`.
        calibration: as for `prune`.
        followers: averages of `model` (EMA, SWA): copies with the same layers, or `AveragedModel` and the like around one. Each is cut to
            the same ranks, at the least error to its own weights, and can be averaged further.

    Raises:
        RankError, LayerError: as `prune`, and for a follower of another structure; nothing is changed then.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> from spectrim.budget.rules import Fixed
        >>> low = factorize(nn.Linear(8, 6))
        >>> prune_(low, Fixed(2), torch.optim.Adam(low.parameters()))
        >>> low.rank
        2
    """
    check("prune_", optional=("optimizer",), model=model, ranks=ranks, optimizer=optimizer, calibration=calibration)
    model = unwrapped(model)
    refuse_shards(model, "prune")
    cuts = _cuts(model, ranks, calibration)
    before = dict(model.named_parameters())
    if optimizer is not None:
        _check_trained(optimizer, before, before)
    behind = [(inner := inner_of(follower, list(cuts)), cuts_of(inner, cuts)) for follower in followers]
    originals = {name: (copy.copy(old), new) for name, (old, new) in cuts.items()}
    for original, _ in originals.values():
        original._parameters = dict(original._parameters)
    for network, made in [(model, cuts), *behind]:
        _shift_biases(network, made, calibration)
        for old, new in made.values():
            old.become(new)
    if optimizer is not None:
        _move(optimizer, before, dict(model.named_parameters()), originals)


def _cuts(model: nn.Module, ranks: Sizes, calibration: Calibration | None) -> dict[str, tuple[Form, Form]]:
    """Return the present and the cut factors of each factorized weight, tied ones once, by the module's name; nothing is changed."""
    if next(named_factors(model), None) is None:
        raise LayerError(type(model).__name__, "has no factorized layer", hint="call factorize(model) first")
    if isinstance(ranks, Mapping):
        check_names(model, ranks)
    modules = {module: name for name, module in model.named_modules()}
    cuts: dict[str, tuple[Form, Form]] = {}
    for name, factors in named_factors(model):
        cuts[modules[factors]] = factors, _cut(name, factors, ranks, calibration)
    return cuts


def _cut(name: str, factors: Form, ranks: Sizes, calibration: Calibration | None) -> Form:
    left, right = (None, None) if calibration is None else calibration.metrics(name, factors.shape)
    try:
        if isinstance(ranks, Mapping):
            return factors.cut_to(factors.checked(name, ranks.get(name, factors.size)), left, right)
        return factors.cut(chooser(ranks, name, factors.shape), left, right)
    except LayerError as error:
        raise LayerError(name, str(error)) from None


@torch.no_grad()
def _shift_biases(model: nn.Module, cuts: Mapping[str, tuple[Form, Form]], calibration: Calibration | None) -> None:
    """Let the biases absorb the change of each output's mean by the cuts that follow."""
    means = {} if calibration is None else calibration.means
    after = dict(cuts.values())
    for name, layer in absorbing(model).items() if means else ():
        old, new = layer.factors_of("weight"), after[layer.factors_of("weight")]
        if name in means and new.rank < old.rank:
            mean = means[name].unsqueeze(-1)
            before, now = (product_with(cast(Factors, form), mean) for form in (old, new))
            bias: Any = layer.bias
            bias.add_((before - now).reshape(bias.shape).to(bias))
