"""The latency table of `compress`: given, or made where the budget limits seconds."""

from typing import Any

from torch import nn

from spectrim.budget.budget import Budget
from spectrim.budget.latency_cache import describe_machine
from spectrim.budget.latency_table import latency_table
from spectrim.budget.table_file import read_table, save_table
from spectrim.budget.timed import LatencyTable
from spectrim.budget.timing import Backend
from spectrim.budget.whole_network import Exported
from spectrim.errors import SettingError
from spectrim.pipeline.store import Store
from spectrim.protocols import Latencies
from spectrim.steps import LOGGER

TABLE = "latency.json"
"""In the folder of a call: the table that it made, for the call that goes on from there."""


def backend_of(budget: Budget, latency: Latencies | None, backend: Backend | None) -> Backend | None:
    """Return the backend in which a call times its layers itself; None where a table is given, or nobody asks for seconds.

    Raises:
        SettingError: for a backend beside a table.
    """
    if backend is not None and latency is not None:
        raise SettingError("compress", "backend", got=backend, rule="left out where latency= has been timed already")
    asked = "eager" if {"latency", "latency_s"} & set(budget.limits) and latency is None else None
    return backend or asked  # type: ignore[return-value]


def own_table(low: nn.Module, inputs: Any, backend: Backend, store: Store, progress: bool) -> LatencyTable:
    """Time the layers, or return the table of a stopped call of the same folder.

    Args:
        low: factorized.
        inputs: one batch.
        backend: that runs the layers.
        store: of the call; the table is kept there.
        progress: whether to show a bar.
    """
    path = store.path(TABLE)
    if path is not None and path.exists():
        return read_table(path)
    table = latency_table(low, inputs, backend=backend, progress=progress)
    if path is not None:
        save_table(table, path)
    return table


def in_its_runtime(networks: dict[str, nn.Module], inputs: Any, latency: Latencies | None) -> dict[str, nn.Module]:
    """Return networks as ONNX Runtime runs them, where the layers were timed in it on this machine; else as they are."""
    if not isinstance(latency, LatencyTable) or latency.backend != "onnx" or dict(latency.machine) != describe_machine("onnx"):
        return networks
    try:
        return {name: Exported(network, inputs, latency.threads) for name, network in networks.items()}
    except Exception as error:  # whatever an exporter raises for a network that it cannot take
        LOGGER.warning(
            "compress: the networks are timed in torch, since ONNX Runtime does not take them: %s", str(error).partition("\n")[0]
        )
        return networks
