"""Coded bytes as a unit of the ladder: of weights that are held pruned or rounded, by the entropy of their values and positions."""

from torch import nn

from spectrim.budget.costs import RankCosts, UnitCost
from spectrim.errors import SettingError, SpectrimError
from spectrim.forms.constrained import kind_of_form
from spectrim.layers import named_factors


def coded_unit(model: nn.Module, costs: dict[str, RankCosts], whole: float) -> UnitCost | SpectrimError:
    """Return what each weight takes in a coded file at each rung, or why that is not known.

    Of what is neither pruned nor rounded, and of the rest of the network, all bytes count. A weight that `merge` writes as one dense layer,
    composed of rounded factors, is on no levels, and counts whole, too. The file itself is what counts in the end.

    Args:
        model: factorized.
        costs: of its weights.
        whole: bytes of the dense network.
    """
    forms = dict(named_factors(model))
    if not any(kind_of_form(form) for form in forms.values()):
        hint = 'allocate(constrain(factorize(model, "dense"), bits=32), ...) chooses bits; compress and round_to round without forms'
        return SettingError("allocate", "coded_bytes", got="weights in float", rule="of weights that are pruned or rounded", hint=hint)
    weights, dense = {}, 0.0
    for name, form in forms.items():
        cost, item = costs[name], form.dtype.itemsize
        whole_weight = float(cost.dense_params * item)
        dense += whole_weight
        plain = [float(params * item) for params in cost.params]
        bits = form.ladder()[1] if kind_of_form(form) else None  # type: ignore[operator]
        if bits is not None and (not form.splits or cost.params[-1] != cost.dense_params):
            plain = [count / 8 for count in bits]
        weights[name] = plain
    return UnitCost(weights, dense, whole - dense, whole)
