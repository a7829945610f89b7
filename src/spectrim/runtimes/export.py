"""Files for other runtimes: `torch.export`, ONNX, ExecuTorch, OpenVINO and LiteRT, each compared with the model before it is written.

What one format needs stands in three functions side by side: one that writes it, one that opens it, one row in `_WRITERS` and `_READERS`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

from spectrim.checks import check, unwrapped
from spectrim.checks.words import worded
from spectrim.errors import ExportError, FormatError, SettingError
from spectrim.files import check_room, new_files
from spectrim.layers import named_layers
from spectrim.locks import writing_to
from spectrim.metrics.clock import Latency, compare_latency
from spectrim.metrics.inputs import batch_size_of
from spectrim.metrics.table import Summarized, markdown_table
from spectrim.runtimes.blame import first_line
from spectrim.runtimes.finite import check_finite
from spectrim.runtimes.formats import TITLES, Runner, _format_of, _require
from spectrim.runtimes.level_weights import put_levels
from spectrim.runtimes.quiet import _quiet
from spectrim.runtimes.readers import open_exported
from spectrim.runtimes.tensors import compare_outputs
from spectrim.runtimes.trace import _outputs, _trace
from spectrim.runtimes.writers import _OTHER, _WRITERS, _onnx_node
from spectrim.steps import steps
from spectrim.surgery.exchange import duplicate
from spectrim.surgery.merge import merge
from spectrim.tables import Format

TOLERANCE = 1e-4
"""Largest difference allowed in float32, as a fraction of the output's largest magnitude: other kernels add in another order."""


@dataclass(frozen=True)
class Exported(Summarized):
    """A file that was written, and its comparison with the model.

    Attributes:
        path: of the file; OpenVINO writes its weights beside it, ``.bin``, and ONNX those above 2 GB, ``.onnx.data``.
        format: ``pt2``, ``onnx``, ``executorch``, ``openvino`` or ``litert``.
        size_bytes: of all files together.
        difference: largest difference to the model's outputs, over all outputs and `batches`, as a fraction of the output's largest
            magnitude.
        tolerance: what was allowed.
        batches: batch sizes that were compared.
        operators: how often each operator stands in the file; for ExecuTorch, in what XNNPACK does not run.
        delegated: for ExecuTorch, share of the operators that XNNPACK runs, in [0, 1].
        latency: of the file in its own runtime, where asked for.
        eager: of the model in torch, timed in turns with it.
    """

    path: Path
    format: Format
    size_bytes: int
    difference: float
    tolerance: float
    batches: tuple[int, ...]
    operators: dict[str, int] = field(default_factory=dict)
    delegated: float | None = None
    latency: Latency | None = None
    eager: Latency | None = None

    def summary(self) -> str:
        """Return a table of the file, as text."""
        rows = [
            ["file", str(self.path)],
            ["format", TITLES[self.format]],
            ["size", f"{self.size_bytes:,} B"],
            ["largest difference", f"{self.difference:.2g} (tolerance {self.tolerance:.2g}, batch {', '.join(map(str, self.batches))})"],
        ]
        if self.delegated is not None:
            outside = ", ".join(sorted(self.operators))
            rows.append(["run by XNNPACK", f"{100 * self.delegated:.0f} % of the operators" + (f"; not: {outside}" if outside else "")])
        for name, timed in (("latency", self.latency), ("latency in torch", self.eager)):
            if timed is not None:
                spread = f"IQR {1e3 * timed.iqr_s:,.3f}, batch {timed.batch}, {timed.threads} thread{'' if timed.threads == 1 else 's'}"
                rows.append([name, f"{1e3 * timed.median_s:,.3f} ms ({spread})"])
        return markdown_table(rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that `json.dumps` takes."""
        return asdict(self) | {"path": str(self.path)}


@worded
def export(
    model: nn.Module,
    inputs: Any,
    path: str | Path,
    format: Format | None = None,
    *,
    dynamic_batch: bool = True,
    max_batch: int = 8,
    tolerance: float | None = None,
    half_weights: bool = False,
    int8_weights: bool = False,
    latency: bool = False,
    threads: int = 1,
    progress: bool = True,
) -> Exported:
    """Write a model for another runtime; the file is loaded there and compared with the model before it is kept.

    What is written is a copy in eval mode, on the CPU; a factorized model is merged first. Compared are the outputs on `inputs`, on one
    example, and on a batch of another size made of the same examples. Outputs are the tensors among what the model returns, in order; a
    dict of arguments keeps its keys as the names of the inputs. A recurrent layer with low-rank hidden projections is a loop over time, so
    the file is for sequences as long as those of `inputs`.

    Args:
        model: any module; it is left untouched. Its dtype is kept.
        inputs: one batch: a tensor, a tuple of arguments or a dict of keyword arguments. Values that are not tensors become part of the
            file, and so does every size but the batch.
        path: of the file, in a folder that exists or can be made.
        format: ``pt2`` (`torch.export`), ``onnx``, ``executorch`` (with XNNPACK), ``openvino`` or ``litert``; by the suffix when omitted:
            ``.pt2``, ``.onnx``, ``.pte``, ``.xml``, ``.tflite``.
        dynamic_batch: let the leading dimension of each tensor that holds the batch be of any size, else the one of `inputs`. A LiteRT
            file is for the batch of `inputs`: its converter takes no other.
        max_batch: largest batch that an ExecuTorch file takes, at least the one of `inputs`: its memory is laid out for it. Other formats
            have no limit.
        tolerance: largest difference allowed, as a fraction of the output's largest magnitude, above 0; when omitted `TOLERANCE`, and
            8 steps of the outputs' dtype where that is half precision.
        half_weights: store OpenVINO's weights in float16: half the size; the default tolerance is then 8 steps of float16.
        int8_weights: in an ONNX file, hold weights that lie on levels (of `round_to`, or of `Rounded` forms) as int8, with the same values to
            the bit: a quarter of their bytes. They are computed in float, on each call, so that nothing gets faster.
        latency: time the file and the model in turns (about two seconds), on `inputs`.
        threads: CPU threads of that timing, at least 1.
        progress: whether to name each step on stderr.

    Returns:
        The file, and its difference to the model.

    Raises:
        ExportError: the model cannot be written in this format, refuses a dynamic batch, gives NaN on `inputs`, or its file computes
            something else; it names the operator and the layer where they are known.
        SettingError: an argument is outside its range.
        WriteError: the file cannot be written, or another process still writes it after a minute.
        ImportError: the format's package is not installed.

    Examples:
        >>> import tempfile
        >>> from spectrim.runtimes import run_exported
        >>> made = export(nn.Linear(4, 2), torch.randn(3, 4), Path(tempfile.mkdtemp()) / "linear.pt2", progress=False)
        >>> made.batches, made.difference <= made.tolerance
        ((1, 3, 4), True)
        >>> run_exported(made.path, torch.zeros(5, 4)).shape
        torch.Size([5, 2])
    """
    check("export", model=model, inputs=inputs, path=path, max_batch=max_batch, tolerance=tolerance, threads=threads)
    model = unwrapped(model)
    path = Path(path)
    format = _format_of(path, format)
    batch = batch_size_of(inputs, model=model)
    if max_batch < 1 or (format == "executorch" and dynamic_batch and max_batch < batch):
        raise SettingError("export", "max_batch", got=max_batch, rule=f"at least the batch of the inputs ({batch})")
    if tolerance is not None and not tolerance > 0:
        raise SettingError("export", "tolerance", got=tolerance, rule="above 0")
    if threads < 1:
        raise SettingError("export", "threads", got=threads, rule="at least 1")
    if any(map(_is_packed, tree_leaves(inputs, is_leaf=_is_packed))):
        hint = "give padded = pad_packed_sequence(packed, batch_first=...)[0]; outputs at padded positions are the model's to ignore"
        raise SettingError(
            "export", "inputs", got="a PackedSequence", rule="padded tensors, whose sizes do not depend on values", hint=hint
        )
    _require(format)
    reference = duplicate(model).to("cpu").eval().requires_grad_(False)
    network = merge(reference) if next(named_layers(reference), None) else reference
    inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().contiguous(), inputs)
    outputs = _outputs(format, reference, inputs)
    check_finite(format, reference, inputs, outputs)
    limit = max_batch if format == "executorch" else None
    dynamic_batch = dynamic_batch and format != "litert"
    batches = _batches(batch, limit) if dynamic_batch else (batch,)
    allowed = tolerance or _tolerance(outputs, half_weights and format == "openvino")

    with steps("export", 3 + latency, progress) as step:
        with new_files(path) as folder, _quiet():
            step("tracing")
            file = folder / path.name
            traced = max(batch, 2) if dynamic_batch and limit != 1 else None
            example = _resized(inputs, batch, traced or batch)
            program, names = _trace(format, network, example, traced, limit)
            check_room(
                folder,
                sum(tensor.nbytes for tensor in network.state_dict().values() if isinstance(tensor, Tensor)) // (2 if half_weights else 1),
            )
            step(f"writing {TITLES[format]}")
            with writing_to(path):
                content = _WRITERS[format](program, file, names, half_weights)
                if int8_weights and format == "onnx":
                    put_levels(file)
            step("comparing outputs")
            difference = _proved(format, file, reference, inputs, batch, batches, allowed)
            size = sum(part.stat().st_size for part in folder.iterdir() if part.is_file())
        if format == "onnx" and size == path.stat().st_size:
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # of a larger model that was here before
        timed = {}
        if latency:
            step("timing", has_bar=True)
            timed = _timed(path, network, inputs, threads)
    return Exported(path, format, size, difference, allowed, batches, content.operators, content.delegated, **timed)


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _batches(batch: int, limit: int | None) -> tuple[int, ...]:
    """Return the batch sizes to compare at: one example, the batch given, and the limit or one more."""
    return tuple(sorted({1, batch, batch + 1 if limit is None else limit}))


def _resized(inputs: Any, batch: int, count: int) -> Any:
    """Return inputs with `count` examples, the given ones over and over; tensors whose leading dimension is not the batch stay."""
    order = torch.arange(count) % batch

    def resize(tensor: Tensor) -> Tensor:
        return tensor[order] if tensor.dim() and tensor.size(0) == batch and count != batch else tensor

    return tree_map_only(Tensor, resize, inputs)


def _tolerance(outputs: Sequence[Tensor], half: bool) -> float:
    steps = [torch.finfo(tensor.dtype).eps for tensor in outputs if tensor.dtype in (torch.float16, torch.bfloat16)]
    return max([TOLERANCE, *(8 * step for step in steps), *([8 * torch.finfo(torch.float16).eps] if half else [])])


# Proof and time


def _proved(format: Format, file: Path, reference: nn.Module, inputs: Any, batch: int, batches: Sequence[int], allowed: float) -> float:
    """Return the largest difference between a file and the model.

    Raises:
        ExportError: the file cannot be run, or differs by more than is allowed.
    """
    try:
        run = open_exported(file, threads=1)
    except FormatError as error:
        raise _refused(format, file, error, "its own runtime cannot read the file") from error
    worst = 0.0
    for count in batches:
        given = _resized(inputs, batch, count)
        try:
            found = run(given)
        except SettingError as error:
            raise ExportError(format, str(error)) from error
        except Exception as error:  # each runtime has its own errors
            raise _refused(format, file, error, f"its own runtime fails at batch {count}") from error
        expected = _outputs(format, reference, given)
        check_finite(format, reference, given, expected)
        difference = compare_outputs(found, expected)
        if not difference <= allowed:
            problem = f"at batch {count} the file differs from the model by {difference:.2g} of the output's largest magnitude"
            hint = f"allowed is {allowed:.2g} (tolerance=); does the model draw random numbers in eval mode?"
            raise ExportError(format, problem, hint=hint)
        worst = max(worst, difference)
    return worst


def _refused(format: Format, file: Path, error: BaseException, problem: str) -> ExportError:
    """Return the error for a file that its own runtime does not run, with the operator and layer that the runtime's message names."""
    operator, layer = _onnx_node(file, str(error)) if format == "onnx" else ("", "")
    return ExportError(format, f"{problem}: {first_line(error)}", operator=operator, layer=layer, hint=_OTHER)


class _Running(nn.Module):
    """A file as a module, for the clock."""

    def __init__(self, run: Runner) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Call the runtime."""
        return self.run(kwargs or args)


def _timed(path: Path, network: nn.Module, inputs: Any, threads: int) -> dict[str, Latency]:
    """Time a file and the network in torch, in turns."""
    with _quiet():
        models = {"latency": _Running(open_exported(path, threads)), "eager": network}
        return compare_latency(models, inputs, threads=threads)
