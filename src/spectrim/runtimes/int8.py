"""int8 on top of low rank: a float network becomes an ONNX file with 8-bit weights and activations, by ONNX Runtime's own toolkit.

Added to the toolkit are: names of layers, a report of what became int8 and what did not, one exact change of scale inside low-rank pairs,
and a check that the written file runs.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.checks import check, unwrapped
from spectrim.errors import ExportError, LayerError, SettingError
from spectrim.files import new_files
from spectrim.metrics.table import Summarized, markdown_table
from spectrim.protocols import LayerFilter
from spectrim.runtimes.int8_file import _operators, _states, _write
from spectrim.runtimes.int8_network import _Network, _prepare
from spectrim.runtimes.int8_settings import Int8
from spectrim.runtimes.onnx_digest import seal
from spectrim.runtimes.quiet import quietly


@dataclass(frozen=True)
class Quantized(Summarized):
    """An int8 file, and its difference to the float network.

    Attributes:
        path: of the file.
        method: ``static`` or ``dynamic``.
        size_bytes: of the file.
        float_bytes: of the same network in float, as an ONNX file without the exporter's notes, as the int8 file is.
        difference: largest difference of the outputs on the calibration examples, as a fraction of the output's largest magnitude.
        error: root mean square of the difference over that of the outputs, over all calibration examples and outputs.
        layers: each layer that has a weight: ``int8``, or why it stayed in float.
        operators: how often each operator stands in the graph that ONNX Runtime makes of the file on this machine; names with ``Q`` or
            ``Integer`` in them compute in int8.
        equalized: the low-rank pairs whose middle was rescaled, by the name of their second layer.
    """

    path: Path
    method: str
    size_bytes: int
    float_bytes: int
    difference: float
    error: float
    layers: dict[str, str]
    operators: dict[str, int]
    equalized: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that `json.dumps` takes."""
        return asdict(self) | {"path": str(self.path)}

    def summary(self) -> str:
        """Return a table of what was written, as text; layers in float are listed with their reasons."""
        done = sum(state == "int8" for state in self.layers.values())
        rows = [
            ["method", self.method],
            ["size", f"{self.size_bytes:,} B ({self.float_bytes / self.size_bytes:.2f}x smaller than float)"],
            ["layers in int8", f"{done} of {len(self.layers)}"],
            ["error, root mean square", f"{100 * self.error:.2f} %"],
            ["error, largest", f"{100 * self.difference:.2f} %"],
        ]
        return markdown_table(rows + [[f"float: {name}", state] for name, state in self.layers.items() if state != "int8"])


def quantize(
    model: nn.Module | str | Path,
    data: Iterable[Any],
    path: str | Path,
    how: Int8 | None = None,
    *,
    keep: LayerFilter | None = None,
    tolerance: float | None = None,
) -> Quantized:
    """Write a network as an int8 ONNX file; it is run and compared with the float network before it is kept.

    Weights are symmetric with one scale per output channel, activations one scale and one zero point per tensor. BatchNorm is folded into
    the layer before it. A factorized model is merged first; both layers of a pair become int8, and so do the activations between them.

    Args:
        model: dense, factorized or merged, which is left untouched; or a float ONNX file.
        data: training batches, ``(inputs, target)`` or bare inputs. The first ones are for calibration and for the comparison of outputs.
        path: of the file, with the suffix ``.onnx``.
        how: see `Int8`; its defaults when omitted.
        keep: layers that stay in float, by name in the merged network; a pair's name selects both of its layers. See `sensitivity`.
        tolerance: largest `Quantized.error` allowed, above 0; None allows any.

    Returns:
        The file and its difference to float.

    Raises:
        ExportError: nothing in the network can become int8, the toolkit fails, or the error is above `tolerance`; it names the operator
            and the layer where they are known. No file is written then.
        LayerError: `keep` selects no layer.
        SettingError: an argument is outside its range, or `data` is empty.
        FormatError: `model` is a file that is not there or not ONNX.
        ImportError: onnx or onnxruntime is not installed.

    Source: Jacob et al., arXiv 1712.05877 (integer arithmetic); https://onnxruntime.ai, "Quantize ONNX models".
    """
    check("quantize", network=model, batches_again=data, path=path, keep=keep, tolerance=tolerance)
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    how, path = how or Int8(), Path(path)
    if path.suffix != ".onnx":
        raise SettingError("quantize", "path", got=str(path), rule="a file with the suffix .onnx")
    if tolerance is not None and not tolerance > 0:
        raise SettingError("quantize", "tolerance", got=tolerance, rule="above 0")
    with new_files(path) as made, quietly():
        folder, file = made / "between", made / path.name
        folder.mkdir()
        network = _prepare(model, data, folder, how)
        kept = _kept(model, network, keep)
        _write(network, file, how, without=kept)
        states = _states(network, file, kept)
        if "int8" not in states.values():
            raise ExportError("int8", "nothing became int8: " + "; ".join(f"'{name}' {state}" for name, state in states.items()))
        difference, error = network.compare(file)
        if tolerance is not None and not error <= tolerance:
            hint = "see sensitivity() for the layers to keep in float, or try other ranges"
            raise ExportError("int8", f"its error, {error:.3g}, is above the tolerance, {tolerance:.3g}", hint=hint)
        operators = _operators(file, folder)
        seal(file)
        size, plain = file.stat().st_size, network.file.stat().st_size
    return Quantized(path, network.method, size, plain, difference, error, states, operators, network.equalized)


def sensitivity(model: nn.Module | str | Path, data: Iterable[Any], how: Int8 | None = None) -> dict[str, float]:
    """Return for each layer the error of the network's outputs when that layer alone is int8, the largest first.

    Each layer takes one quantization and one pass over the calibration examples: some tenths of a second for a small network.

    Args:
        model: as for `quantize`.
        data: as for `quantize`; a few dozen examples suffice.
        how: see `Int8`; its defaults when omitted.

    Returns:
        Layer name to root mean square of the difference over that of the outputs. To keep the three worst in float:
        ``worst = list(sensitivity(model, data))[:3]``, then ``quantize(model, data, path, keep=match(*worst))``.

    Raises:
        ExportError, SettingError, FormatError, ImportError: as `quantize`.
    """
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory(suffix=".tmp") as folder, quietly():
        network = _prepare(model, data, Path(folder), how or Int8())
        for layer in network.layers:
            file = Path(folder) / "one.onnx"
            _write(network, file, how or Int8(), without=[other for other in network.layers if other != layer], only=layer)
            errors[layer] = network.compare(file)[1]
    return dict(sorted(errors.items(), key=lambda entry: -entry[1]))


def _kept(model: nn.Module | str | Path, network: _Network, keep: LayerFilter | None) -> list[str]:
    """Return the layers that `keep` selects, by their own name or that of a module around them."""
    if keep is None:
        return []
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}

    def selected(layer: str) -> bool:
        parts = layer.split(".")
        return any(keep(name, modules.get(name, nn.Identity())) for name in (".".join(parts[:end]) for end in range(1, len(parts) + 1)))

    found = [layer for layer in network.layers if selected(layer)]
    if not found:
        raise LayerError("keep", "selects no layer", hint=f"layers are: {', '.join(list(network.layers)[:12])}")
    return found
