"""`description`: what the price of a weight depends on, so that alike ones are priced once."""

from collections.abc import Hashable
from typing import Any

from torch import nn

from spectrim.layers.site import Site

OWN = frozenset(vars(nn.Module())) | {"training", "execution"}
"""Attributes of every module, and one on which no price depends."""

PLAIN = (int, float, str, bool, type(None))


def description(site: Site) -> Hashable | None:
    """Return what two weights have in common whose prices are the same at inputs of the same shape; None where that is not known.

    That is the class and the plain settings of the layer, the shapes of its other parameters, and form and size of the weight. A layer with
    children or buffers of its own, or with an attribute that is no number, text or tuple of these, is like no other.

    Args:
        site: of the weight.

    Examples:
        >>> from spectrim.layers import sites
        >>> from spectrim.surgery.factorize import factorize
        >>> layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 3))
        >>> a, b, c = (description(site) for site in sites(factorize(layers)))
        >>> a == b, a == c
        (True, False)
    """
    layer, form = site.layer, site.factors
    if len(layer._modules) > 1 or layer._buffers:
        return None
    settings = []
    for name, value in vars(layer).items():
        if name not in OWN:
            plain = _plain(value)
            if plain is NotImplemented:
                return None
            settings.append((name, plain))
    own = tuple([(name, None if tensor is None else tuple(tensor.shape)) for name, tensor in layer._parameters.items()])
    held = (type(form), form.dtype, form.folded_shape, form.size, None if isinstance(form.full_size, int) else form.path())
    return (type(layer), site.key, tuple(settings), own, held)


def _plain(value: Any) -> Any:
    """Return a setting as one that can be a key; NotImplemented for what is no plain data."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple):
        parts = tuple([_plain(part) for part in value])
        return NotImplemented if NotImplemented in parts else parts
    return NotImplemented
