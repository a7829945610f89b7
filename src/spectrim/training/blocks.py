"""The blocks of a network: the parts that are reconstructed one after the other."""

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from spectrim.errors import LayerError
from spectrim.layers import is_factorized, named_factors

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(model: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """Return the names of a network's residual or transformer blocks, in the order of its modules.

    A block is a module of a user's class that holds factorized layers, lies in an `nn.Sequential` or a list of modules, and holds no such
    block itself: ``layer1.0`` of a ResNet, ``layers.3`` of a transformer. Without any, modules of a class that occurs several times are the
    blocks, the outermost ones; and a network without these is its only block, ``""``.

    Args:
        model: factorized.
        names: names or globs, in place of the search.

    Raises:
        LayerError: when a name matches no module that holds factorized layers.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> from spectrim.zoo import resnet20
        >>> blocks_of(factorize(resnet20()))[:4]
        ['layer1.0', 'layer1.1', 'layer1.2', 'layer2.0']
        >>> blocks_of(factorize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))
        ['']
    """
    holding = {name: module for name, module in model.named_modules() if next(named_factors(module), None) is not None}
    if names is None:
        found = [name for name in holding if _is_block(name, holding)]
        inner = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
        return inner or _repeated(holding) or [""]
    chosen: list[str] = []
    for pattern in names:
        matching = [name for name in holding if fnmatchcase(name, pattern) and name not in chosen]
        if not matching:
            raise LayerError(pattern, "matches no module with factorized layers", hint="see dict(model.named_modules())")
        chosen += matching
    return [name for name in holding if name in chosen]


def _is_block(name: str, holding: dict[str, nn.Module]) -> bool:
    parent = name.rpartition(".")[0]
    module = holding[name]
    return bool(name) and _is_own(module) and isinstance(holding.get(parent), CONTAINERS)


def _is_own(module: nn.Module) -> bool:
    return not isinstance(module, CONTAINERS) and not is_factorized(module)


def _repeated(holding: dict[str, nn.Module]) -> list[str]:
    """Return the outermost modules whose class occurs several times."""
    counts = Counter(type(module) for module in holding.values() if _is_own(module))
    found = [name for name, module in holding.items() if name and counts[type(module)] > 1]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
