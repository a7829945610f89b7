"""`measure`: cost and quality of a model, in one row."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spectrim.checks import check, unwrapped
from spectrim.checks.words import worded
from spectrim.errors import FormatError, SettingError
from spectrim.forms.form import Size, ranks_in
from spectrim.layers import named_factors
from spectrim.metrics.batch import BatchDims, stated
from spectrim.metrics.clock import compare_latency
from spectrim.metrics.evaluate import Scores, evaluate
from spectrim.metrics.macs import count_macs
from spectrim.metrics.table import Summarized, markdown_table
from spectrim.protocols import Hardware


@dataclasses.dataclass(frozen=True)
class Measurement(Summarized):
    """The costs and merits of one model; None stands for what was not measured.

    Attributes:
        params: numbers in the parameters, tied ones once.
        macs: multiply-accumulates for one example.
        size_bytes: bytes of the state dict: parameters and persistent buffers, shared ones once.
        ranks: rank of each factorized weight; of a Tucker form the ranks of outputs and inputs.
        accuracy: fraction in [0, 1] of correct predictions.
        loss: mean over targets.
        latency_s: median time of one call, in seconds.
        latency_iqr_s: its interquartile range, in seconds.
        batch: examples in the call that was timed.
        threads: CPU threads it was timed with.
        targets: number of class labels that the accuracy is a mean over.
        chance: accuracy of the most frequent label as a constant answer.
        loss_error: standard error of the loss, from its spread over batches.
        coded_bytes: of the coded file that `pack` writes, everything in it.
        data_bytes: of the values in it, by their code lengths.
        index_bytes: of the positions of zeros in it, likewise.
        tiles: of the crossbars that the network is mapped to, both of each pair and all slices.
        tile_reads: products of one input with one of them, for one example.

    Examples:
        >>> m = Measurement(params=270_256, macs=40_813_184, size_bytes=1_081_024, accuracy=0.9173)
        >>> print(m.summary())
        | accuracy   |               91.73 % |
        | parameters |               270,256 |
        | MACs       |            40,813,184 |
        | size       | 1,081,024 B (1.0 MiB) |
        >>> Measurement.from_dict(m.to_dict()) == m
        True
    """

    params: int
    macs: int | None
    size_bytes: int
    ranks: dict[str, Size] = dataclasses.field(default_factory=dict)
    accuracy: float | None = None
    loss: float | None = None
    latency_s: float | None = None
    latency_iqr_s: float | None = None
    batch: int | None = None
    threads: int | None = None
    targets: int | None = None
    chance: float | None = None
    loss_error: float | None = None
    coded_bytes: int | None = None
    data_bytes: int | None = None
    index_bytes: int | None = None
    tiles: int | None = None
    tile_reads: int | None = None

    def scored(self, scores: Scores) -> "Measurement":
        """Return this measurement with the scores of `evaluate`, and how sure they are, in place of its scores."""
        return dataclasses.replace(
            self,
            loss=scores["loss"],
            accuracy=scores.get("accuracy"),
            targets=scores.targets,
            chance=scores.chance,
            loss_error=scores.loss_error,
        )

    def summary(self) -> str:
        """Return a table of what was measured, as text."""
        return markdown_table([[name, text] for name, text in _texts(self).items() if text])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that `json.dumps` takes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Measurement":
        """Return the measurement that `to_dict` described.

        Raises:
            FormatError: a field is unknown, or a required one is missing.
        """
        known = {
            field.name: field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            for field in dataclasses.fields(cls)
        }
        unknown = sorted(set(fields) - set(known))
        missing = sorted(name for name, required in known.items() if required and name not in fields)
        if unknown or missing:
            raise FormatError("Measurement", f"unknown fields {unknown}, missing fields {missing}")
        return cls(**fields)


@worded
def measure(
    model: nn.Module,
    inputs: Any = None,
    *,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    threads: int = 1,
    latency: bool = True,
    batch_size: int | None = None,
    batch_dims: BatchDims | None = None,
    crossbars: Hardware | None = None,
) -> Measurement:
    """Measure a model; values that the arguments do not allow stay None.

    Args:
        model: any module; its training flags are as before afterwards.
        inputs: one batch for MACs and latency: a tensor, a tuple of arguments or a dict of keyword arguments.
        data: batches ``(inputs, target)`` for loss and accuracy, see `evaluate`; together with `loss`.
        loss: called as ``loss(output, target)``, gives the mean over targets; together with `data`.
        threads: CPU threads for latency, at least 1.
        latency: whether to time the model (about a second).
        batch_size: examples in `inputs`; None to find it by agreement of sizes, see `batch_size_of`.
        batch_dims: states the batch axes of `inputs` instead, and of those in `data`, see `spectrim.metrics.batch.BatchDims`.
        crossbars: `spectrim.runtimes.crossbar.Crossbars`, to count tiles on and, with inputs, their reads; not of a factorized model.

    Returns:
        The measurement.

    Raises:
        LayerError: with `crossbars`, a layer is not mapped to them.
        SettingError: only one of `data` and `loss` is given, or an argument is of the wrong kind.

    Examples:
        >>> import torch
        >>> m = measure(nn.Linear(10, 4), torch.zeros(2, 10), latency=False)
        >>> m.params, m.macs, m.size_bytes
        (44, 40, 176)
    """
    if (data is None) != (loss is None):
        got = "data alone" if loss is None else "loss alone"
        raise SettingError("measure", "data and loss", got=got, rule="given together or not at all")
    check("measure", optional=("inputs", "data_once", "loss"), model=model, inputs=inputs, data_once=data, loss=loss, threads=threads)
    check("measure", batch_size=batch_size, crossbars=crossbars)
    if batch_dims is not None and inputs is not None:
        size = stated(inputs, batch_dims, "measure").size
        if batch_size not in (None, size):
            raise SettingError("measure", "batch_size", got=batch_size, rule=f"the length of the axes of batch_dims= ({size}), or left out")
        batch_size = size
    fields: dict[str, Any] = {"macs": None}
    scores: Scores | None = None
    if inputs is not None:
        fields["macs"] = count_macs(model, inputs, batch_size=batch_size)
        if latency:
            timed = compare_latency({"model": model}, inputs, threads=threads, batch_size=batch_size)["model"]
            fields |= {"latency_s": timed.median_s, "latency_iqr_s": timed.iqr_s, "batch": timed.batch, "threads": timed.threads}
    if data is not None and loss is not None:
        scores = evaluate(model, data, loss, batch_dims=batch_dims)
    model = unwrapped(model)
    if crossbars is not None:
        price = crossbars.price(model, inputs, batch_size)
        fields |= {"tiles": price.tiles, "tile_reads": price.reads}
    found = Measurement(
        params=sum(tensor.numel() for tensor in _distinct(model.parameters())),
        size_bytes=size_bytes_of(model),
        ranks={name: factors.size for name, factors in named_factors(model)},
        **fields,
    )
    return found if scores is None else found.scored(scores)


def size_bytes_of(model: nn.Module) -> int:
    """Return the bytes of a model's state dict, shared tensors once.

    Args:
        model: any module.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in _distinct(tree_leaves(model.state_dict())))


def measure_together(
    models: Mapping[str, nn.Module],
    inputs: Any,
    data: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    threads: int = 1,
    batch_size: int | None = None,
) -> dict[str, Measurement]:
    """Measure several models: latencies side by side, see `compare_latency`; the rest as `measure` does.

    Args:
        models: name to module.
        inputs: one batch for costs and latency.
        data: batches ``(inputs, target)`` for loss and accuracy.
        loss: ``(output, target) -> scalar``.
        threads: CPU threads of the latencies.
        batch_size: examples in `inputs`; None to find it, see `batch_size_of`.
    """
    times = compare_latency(models, inputs, threads=threads, batch_size=batch_size)
    measured = {name: measure(model, inputs, data=data, loss=loss, latency=False, batch_size=batch_size) for name, model in models.items()}
    return {
        name: dataclasses.replace(entry, latency_s=time.median_s, latency_iqr_s=time.iqr_s, batch=time.batch, threads=time.threads)
        for (name, entry), time in zip(measured.items(), times.values(), strict=True)
    }


def compare_table(measurements: Mapping[str, Measurement]) -> str:
    """Return measurements side by side, as a Markdown table; the first is what the ratios compare with.

    The ratios: ``compression`` in bytes, ``MAC reduction``, and ``speedup`` in seconds, which needs the same batch and threads.

    Examples:
        >>> dense, low = Measurement(1000, 900, 4000, accuracy=0.9), Measurement(400, 300, 1600, accuracy=0.895)
        >>> print(compare_table({"dense": dense, "low-rank": low}))
        |               |   dense | low-rank |
        |---------------|---------|----------|
        | accuracy      | 90.00 % |  89.50 % |
        | parameters    |   1,000 |      400 |
        | MACs          |     900 |      300 |
        | size          | 4,000 B |  1,600 B |
        | compression   |   1.00x |    2.50x |
        | MAC reduction |   1.00x |    3.00x |
    """
    check("compare_table", measurements=measurements)
    first = next(iter(measurements.values()), None)
    if first is None:
        return ""
    columns = []
    for m in measurements.values():
        same = (m.batch, m.threads) == (first.batch, first.threads)
        columns.append(
            _texts(m)
            | {
                "compression": _ratio(first.size_bytes, m.size_bytes),
                "compression, coded": _ratio(first.size_bytes, m.coded_bytes),
                "MAC reduction": _ratio(first.macs, m.macs),
                "tile reduction": _ratio(first.tiles, m.tiles),
                "speedup": _ratio(first.latency_s, m.latency_s) if same else "",
            }
        )
    rows = [[name, *(column[name] or "-" for column in columns)] for name in columns[0] if any(column[name] for column in columns)]
    return markdown_table(rows, header=["", *measurements])


# Texts


def _texts(m: Measurement) -> dict[str, str]:
    """Return each figure with its unit; an empty string for what was not measured."""
    ranks = ranks_in(m.ranks.values())
    spread = (
        f"{min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.1f}, {len(m.ranks)} weight{'s' * (len(m.ranks) > 1)}"
        if ranks
        else ""
    )
    mib = f" ({m.size_bytes / 2**20:.1f} MiB)" if m.size_bytes >= 2**19 else ""
    return {
        "accuracy": "" if m.accuracy is None else f"{100 * m.accuracy:.2f} %",
        "loss": "" if m.loss is None else f"{m.loss:.4f}",
        "parameters": f"{m.params:,}",
        "MACs": "" if m.macs is None else f"{m.macs:,}",
        "size": f"{m.size_bytes:,} B{mib}",
        "coded file": "" if m.coded_bytes is None else f"{m.coded_bytes:,} B",
        "values in it": "" if m.data_bytes is None else f"{m.data_bytes:,} B",
        "zeros' positions": "" if m.index_bytes is None else f"{m.index_bytes:,} B",
        "tiles": "" if m.tiles is None else f"{m.tiles:,}",
        "tile reads": "" if m.tile_reads is None else f"{m.tile_reads:,}",
        "ranks": spread,
        "latency": "" if m.latency_s is None else f"{1e3 * m.latency_s:,.3f} ms",
        "latency IQR": "" if m.latency_iqr_s is None else f"{1e3 * m.latency_iqr_s:,.3f} ms",
        "timed with": "" if m.batch is None else f"batch {m.batch}, {m.threads} thread{'' if m.threads == 1 else 's'}",
    }


def _ratio(before: int | float | None, after: int | float | None) -> str:
    return f"{before / after:.2f}x" if before and after else ""


def _distinct(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among `values`, those that show the same memory once."""
    seen = set()
    for tensor in values:
        if isinstance(tensor, Tensor):
            key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
            if key not in seen:
                seen.add(key)
                yield tensor
