"""`preset_`: random values for a factorized network that is to be trained from scratch at its present sizes."""

import torch
from torch import nn

from spectrim.errors import LayerError
from spectrim.forms import Form
from spectrim.layers import named_factors, sites
from spectrim.surgery.states import exchange_factors


@torch.no_grad()
def preset_(model: nn.Module, dense: nn.Module) -> None:
    """Give every factorized weight random parts whose product has the mean square of the dense weight, in place.

    For training in a fixed format from scratch: activations start at the scale that the dense network's own initialization gives them. Of
    a decomposition of the random weights the scale would be lower, the more so the smaller the size.

    Args:
        model: factorized and cut to the sizes that it is trained at. What is not factorized stays as it is.
        dense: the same network before `factorize`, freshly initialized.

    Raises:
        LayerError: for a weight that `dense` does not have.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> dense = nn.Sequential(nn.Linear(64, 64))
        >>> low = factorize(dense, rank=4, where="*")
        >>> preset_(low, dense)
        >>> bool(torch.isclose(low[0].weight.square().mean(), dense[0].weight.square().mean()))
        True
    """
    parameters, new = dict(dense.named_parameters(remove_duplicate=False)), {}
    keys: dict[Form, str] = {}
    for site in sites(model):
        keys.setdefault(site.factors, f"{site.layer_name}.{site.key}".removeprefix("."))
    for name, form in named_factors(model):
        reference = parameters.get(keys[form])
        if reference is None:
            raise LayerError(name, "is not in the dense network", hint="give the network that was factorized")
        drawn = form.like(*(torch.randn_like(part) for part in form.parameters(recurse=False)))
        energy = reference.detach().double().square().mean()
        scale = (energy / drawn.product().double().square().mean()).sqrt()
        drawn.slope_parameters()[0].mul_(scale.to(drawn.device))  # the product is linear in it
        new[name] = drawn.in_order()
    exchange_factors(model, new)
