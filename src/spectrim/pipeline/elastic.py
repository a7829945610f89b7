"""`load`: a saved network, whole or sliced to a budget; one file for every budget."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.budget.allocate import allocate
from spectrim.budget.budget import Budget
from spectrim.checks import check, naming
from spectrim.errors import SettingError
from spectrim.layers import named_factors
from spectrim.protocols import Importance
from spectrim.runtimes.crossbar import Crossbars
from spectrim.storage.save import load as load_whole
from spectrim.surgery.prune import prune


@naming
def load(
    folder: str | Path,
    model: nn.Module,
    budget: Budget | float | Mapping[str, Any] | None = None,
    *,
    inputs: Any = None,
    importance: Importance | None = None,
    crossbars: Crossbars | None = None,
) -> nn.Module:
    """Return the network that `save` wrote; with a budget sliced to it.

    Factorized weights hold their singular values in descending order, so that a network that was saved once, uncut, serves every budget:
    ranks are allocated and the factors are sliced, without data. `merge` then writes ordinary layers; `recalibrate` renews the BatchNorm
    statistics of the sliced network.

    Args:
        folder: what `save` wrote.
        model: the original architecture, dense; its weights do not matter. It is left untouched.
        budget: what the network may keep of the dense one, as for `allocate`; None for the network as it was saved.
        inputs: one batch of inputs, for the layers' sizes; with a budget.
        importance: as for `allocate`.
        crossbars: as for `allocate`.

    Returns:
        The factorized (or merged) model, on the device of `model`; parameters that were frozen are frozen again. A model that was saved
        in eval mode is in eval mode; else the training flags are those of `model`.

    Raises:
        FormatError: for a missing, truncated, altered or foreign file, or for another architecture; nothing is changed then.
        SettingError: for a budget without inputs or for a merged network, or one that no ranks reach.

    Examples:
        >>> import tempfile, torch
        >>> from spectrim.storage.save import save
        >>> from spectrim.surgery.factorize import factorize
        >>> dense = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(factorize(dense), folder)
        ...     small, smaller = (load(folder, dense, budget, inputs=torch.zeros(1, 16)) for budget in (0.7, 0.5))
        >>> small[0].rank + small[2].rank > smaller[0].rank + smaller[2].rank
        True
    """
    check("load", optional=("inputs",), inputs=inputs, crossbars=crossbars)
    if budget is not None and inputs is None:
        raise SettingError("load", "inputs", got=None, rule="one batch of inputs, with a budget", hint="load(folder, model, 0.5, inputs=x)")
    low = load_whole(folder, model)
    if budget is None:
        return low
    if next(named_factors(low), None) is None:
        hint = "save the factorized network before merge"
        raise SettingError("load", "budget", got=budget, rule="left out for a merged network, which has no ranks to slice", hint=hint)
    return prune(low, allocate(low, budget, inputs, importance=importance, crossbars=crossbars))
