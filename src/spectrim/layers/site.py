"""`Site`: this weight of this layer under this name."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from spectrim.forms.form import Form
from spectrim.layers.base import FactorizedLayer


@dataclass(frozen=True, eq=False)
class Site:
    """One use of a factorized weight.

    Attributes:
        name: the layer's name, with the weight's where the layer has several: ``layer1.0.conv1``, ``lstm.weight_ih_l0``.
        layer_name: of the layer.
        layer: that holds the weight.
        key: the weight's name in the layer.
        factors: the weight; tied ones are the same object at several sites.
    """

    name: str
    layer_name: str
    layer: FactorizedLayer
    key: str
    factors: Form


def named_layers(model: nn.Module) -> Iterator[tuple[str, FactorizedLayer]]:
    """Yield ``(name, layer)`` of every factorized layer, shared ones once."""
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            yield name, module


def sites(model: nn.Module) -> Iterator[Site]:
    """Yield every use of a factorized weight, tied ones each, weights of a shared layer once.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> [(site.name, site.key) for site in sites(factorize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))]
        [('0', 'weight')]
    """
    for name, layer in named_layers(model):
        for key, factors in layer.named_factors():
            yield Site(factor_name(name, key), name, layer, key, factors)


def named_factors(model: nn.Module) -> Iterator[tuple[str, Form]]:
    """Yield ``(name, factors)`` of every factorized weight, tied ones once, under the first name.

    The name is the layer's (``layer1.0.conv1``); layers with several weights add the weight's (``lstm.weight_ih_l0``).
    """
    seen: set[Form] = set()
    for site in sites(model):
        if site.factors not in seen:
            seen.add(site.factors)
            yield site.name, site.factors


def factor_name(layer: str, weight: str) -> str:
    """Join a layer's and a weight's name; a sole ``weight`` goes by the layer's."""
    return layer if weight == "weight" else f"{layer}.{weight}".removeprefix(".")


def factors_in(module: nn.Module) -> list[tuple[str, Form]]:
    """Return ``(weight name, factors)`` of a factorized layer; none for any other module."""
    return module.named_factors() if isinstance(module, FactorizedLayer) else []
