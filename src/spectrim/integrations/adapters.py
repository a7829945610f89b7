"""Target names for adapters of peft, which selects layers by class."""

from torch import nn

from spectrim.plain.chain import PlainPair


def adapter_targets(model: nn.Module) -> list[str]:
    """Return the names of all linear layers that an adapter can wrap: peft's ``target_modules`` for a merged network.

    A merged layer is still an instance of its original class, so ``target_modules="all-linear"`` finds the pair *and* its two layers, and
    fails. These names are those of the two layers and of the linear layers that stayed dense, without the output embedding, as in peft.

    Args:
        model: merged.

    Examples:
        >>> from spectrim import factorize, merge
        >>> small = merge(factorize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), rank=2))
        >>> adapter_targets(small)
        ['0.0', '0.1', '2']
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inside = {id(part) for part in head.modules()} if isinstance(head, nn.Module) else set()
    linear = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    return [name for name, module in linear if not isinstance(module, PlainPair) and id(module) not in inside]
