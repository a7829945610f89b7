"""`priced`: a factorized network is compared with the dense one, and its ranks are priced."""

from typing import Any

from torch import nn

from spectrim.budget.costs import calls
from spectrim.budget.ladder import Ladder, ladder
from spectrim.layers.uses import Call
from spectrim.protocols import Latencies
from spectrim.runtimes.crossbar import Crossbars
from spectrim.surgery.same_function import same_function


def priced(
    dense: nn.Module, inputs: Any, latency: Latencies | None, crossbars: Crossbars | None, batch: Any, low: nn.Module
) -> tuple[list[Call], Ladder]:
    """Return the uses of the weights of a factorized network and its `ladder`; both it and its pairs compute what the dense one does.

    Args:
        dense: the network that it was made from.
        inputs: one batch, for the costs.
        latency: see `ladder`.
        crossbars: see `ladder`.
        batch: one batch on which the two networks are compared.
        low: the factorized network.

    Raises:
        LayerError: for another function, with the layer.
    """
    same_function(dense, low, batch, names=("dense", "factorized"))
    used = calls(low, inputs)
    return used, ladder(low, inputs, latency, crossbars=crossbars, dense_model=dense, check=True, own=True, used=used)
