"""`refold_`: other schemes for layers that are factorized, before anything is cut."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from spectrim.forms import FORMS, Form
from spectrim.layers import named_layers, sites
from spectrim.linalg.fold import Fold


@torch.no_grad()
def refold_(
    model: nn.Module, schemes: Mapping[str, Fold], dense: nn.Module | None = None, made: Mapping[tuple[str, Fold], Form] | None = None
) -> list[str]:
    """Hold the weights of some layers in the forms of other schemes, at full size; in place.

    Args:
        model: factorized, nothing of it cut.
        schemes: by the names of layers. Layers that are not named, that have the scheme already or whose weight is tied stay as they are.
        dense: the network before `factorize`, whose weights are decomposed; those of the model are composed otherwise.
        made: forms of weights that are decomposed already, by layer and scheme.

    Returns:
        The names of the layers that were changed.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> dense = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> low = factorize(dense, scheme="channel")
        >>> refold_(low, {"0": "input"}, dense), low[0].scheme, tuple(low[0].U.shape)
        (['0'], 'input', (72, 3))
    """
    users, changed = Counter(site.factors for site in sites(model)), []
    for name, layer in named_layers(model):
        scheme = schemes.get(name, layer.scheme)
        if scheme == layer.scheme or list(layer.factors) != ["weight"] or users[layer.factors_of("weight")] > 1:
            continue
        held = layer.factors_of("weight")
        weight = layer.dense_weight("weight") if dense is None else dense.get_parameter(f"{name}.weight".removeprefix(".")).detach()
        form = (made or {}).get((name, scheme)) or FORMS[scheme].of(weight, layer.fold(layer, "weight", weight, scheme), name=name)
        layer.factors["weight"] = form.requires_grad_(held.trained).train(held.training)
        layer.__dict__["scheme"] = scheme
        layer.execution.clear()
        changed.append(name)
    return changed
