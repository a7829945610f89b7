"""Models that follow another one, averages of its weights (EMA, SWA), through a cut of its ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from spectrim.errors import LayerError
from spectrim.forms.following import followed
from spectrim.forms.form import Form

WRAPPERS = 3
"""How many wrappers with a ``module`` (`AveragedModel`, `DataParallel`) are looked into."""


def cuts_of(follower: nn.Module, cuts: Mapping[str, tuple[Form, Form]]) -> dict[str, tuple[Form, Form]]:
    """Return the present and the cut factors of a follower, by module name; nothing is changed.

    Args:
        follower: what `inner_of` returned.
        cuts: those of the model that it follows.

    Raises:
        LayerError: for factors that the follower has not, or has in another size.
    """
    found: dict[str, tuple[Form, Form]] = {}
    modules = dict(follower.named_modules())
    for name, (old, new) in cuts.items():
        own = modules.get(name)
        if not isinstance(own, Form) or type(own) is not type(old) or (own.folded_shape, own.size) != (old.folded_shape, old.size):
            got = f"factors of rank {own.size}" if isinstance(own, Form) else "no such factors"
            hint = f"a follower must have the layers and ranks of the model: rank {old.size} here; copy the factorized model and cut both"
            raise LayerError(name, f"the follower {type(follower).__name__} has {got}", hint=hint)
        found[name] = own, followed(own, new)
    return found


def inner_of(follower: Any, names: Sequence[str]) -> nn.Module:
    """Return the module inside a follower whose modules have the names of the model's.

    Args:
        follower: a copy of the model, or what wraps one as ``module``.
        names: of modules that hold factors.

    Raises:
        LayerError: for anything else.
    """
    inner = follower
    for _ in range(WRAPPERS):
        if isinstance(inner, nn.Module) and set(names) <= {name for name, _ in inner.named_modules()}:
            return inner
        inner = getattr(inner, "module", None)
    problem = f"is not in the follower, a {type(follower).__name__}"
    raise LayerError(names[0] if names else "model", problem, hint="pass models with the same layers: a deepcopy, AveragedModel(model)")
