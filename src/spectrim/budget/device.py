"""`latency_kit`: what another device needs to time the layers of a network, as one file that Python runs there."""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from torch import nn

from spectrim.budget.latency_table import checked, operations_of
from spectrim.budget.onnx_layer import _onnx_model
from spectrim.budget.timed import MARGIN
from spectrim.budget.timing import _example, _forms, _onnxruntime, _Operation
from spectrim.budget.whole_network import as_onnx, unobserved, why_untimed
from spectrim.errors import SettingError
from spectrim.files import whole_file


def latency_kit(
    model: nn.Module,
    inputs: Any,
    path: str | Path,
    *,
    threads: int = 1,
    multiple: int | None = None,
    margin: float = MARGIN,
    time_box: float = 2.0,
    progress: bool = False,
) -> Path:
    """Write the questions of a latency table as one file, to be answered on another device.

    There, ``pip install numpy onnxruntime`` and ``python KIT.pyz TABLE.json`` time every distinct layer, dense and as a pair at a few
    ranks, and the dense network in ONNX Runtime, as `latency_table` does here. A run that was stopped goes on where it was. What comes back
    is read by `spectrim.budget.table_file.read_table`, and `compress`, `plan`, `allocate`, `merge` and `coverage` take it as ``latency``.

    The file holds the dense network with its weights; of the layers only sizes.

    Args:
        model: factorized; ranks may have been cut.
        inputs: one batch as in use on the device: batch and sizes matter.
        path: of the file to write, ``.pyz``.
        threads: CPU threads, at least 1; the device's command can change it.
        multiple: as for `latency_table`.
        margin: as for `latency_table`.
        time_box: seconds for each distinct layer, above 0; the device's command can change it.
        progress: show a progress bar.

    Returns:
        The path.

    Raises:
        SettingError: for an argument outside its range, when onnx is not installed, or when no layer has an ONNX form.
        LayerError: when nothing is factorized.

    Examples:
        >>> import tempfile, torch
        >>> from spectrim.surgery.factorize import factorize
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kit = latency_kit(factorize(nn.Linear(64, 64)), torch.zeros(1, 64), f"{folder}/net.pyz")
        ...     zipfile.ZipFile(kit).namelist()[:3]
        ['__main__.py', 'questions.json', 'network.onnx']
    """
    path = Path(path)
    model = checked("latency_kit", model, inputs, "onnx", threads=threads, multiple=multiple, margin=margin, time_box=time_box)
    if path.suffix != ".pyz":
        raise SettingError("latency_kit", "path", got=str(path), rule="a file that ends in .pyz, which Python runs")
    _onnxruntime()
    work, weights = operations_of(model, inputs, "onnx", multiple)
    if not work:
        why = next(f"'{name}': {weight.untimed}" for name, weight in weights.items())
        raise SettingError("latency_kit", "model", got=type(model).__name__, rule="one whose layers have an ONNX form", hint=why)
    network, feed, untimed = _network(model, inputs)
    asked = [_question(number, key, operation) for number, (key, operation) in enumerate(work.items())]
    questions = {
        "threads": threads,
        "time_box": time_box,
        "margin": margin,
        "weights": {name: asdict(weight) for name, weight in weights.items()},
        "operations": asked,
        "network": "network.onnx" if network else None,
        "dense_untimed": untimed,
    }
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(Path(__file__).with_name("device_script.py"), "__main__.py")
        archive.writestr("questions.json", json.dumps(questions))
        if network:
            archive.writestr("network.onnx", network)
            archive.writestr("inputs.npz", feed)
        for question, operation in zip(track(asked, "writing layers", disable=not progress), work.values(), strict=True):
            for name, graph in zip(question["graphs"], _written(operation), strict=True):
                archive.writestr(name, graph)
    return path


def _network(model: nn.Module, inputs: Any) -> tuple[bytes, bytes, str]:
    """Return the dense network as ONNX and its inputs as arrays; or none, and why."""
    arrays = io.BytesIO()
    try:
        graph, feed = as_onnx(unobserved(model), inputs)
    except Exception as error:  # whatever an exporter raises for a network that it cannot take
        return b"", b"", why_untimed("onnx", error)
    np.savez(arrays, **feed)
    return graph, arrays.getvalue(), ""


def _question(number: int, key: str, operation: _Operation) -> Mapping[str, Any]:
    x = _example(operation.call, "meta")
    kind, graphs = str(x.dtype).removeprefix("torch."), [f"{number}-{rank or 'dense'}.onnx" for rank in (0, *operation.ranks)]
    return {"key": key, "ranks": operation.ranks, "graphs": graphs, "shape": list(x.shape), "dtype": kind}


def _written(operation: _Operation) -> list[bytes]:
    """Return the graphs of a layer, dense and as a pair of each rank."""
    modules = [_forms(operation.call, 1)[0], *(_forms(operation.call, rank)[1] for rank in operation.ranks)]
    return [_onnx_model(module, _example(operation.call, "meta"), filled=True) for module in modules]
