"""What a model costs and what it achieves: parameters, multiply-accumulates, bytes, ranks, accuracy, loss, latency."""

import dataclasses
import functools
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from spectrim.errors import FormatError, SettingError, SpectrimError
from spectrim.layers import named_factors


@dataclasses.dataclass(frozen=True)
class Latency:
    """Time of one call on a whole batch.

    Attributes:
        median_s: median, in seconds.
        iqr_s: interquartile range, in seconds.
        batch: examples in the batch.
        threads: CPU threads of torch.
        runs: how many timed runs the median is taken over.
    """

    median_s: float
    iqr_s: float
    batch: int
    threads: int
    runs: int


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The costs and merits of one model; None stands for what was not measured.

    Attributes:
        params: numbers in the parameters, tied ones once.
        macs: multiply-accumulates for one example.
        size_bytes: bytes of the state dict: parameters and persistent buffers, shared ones once.
        ranks: rank of each factorized weight.
        accuracy: fraction in [0, 1] of correct predictions.
        loss: mean over targets.
        latency_s: median time of one call, in seconds.
        latency_iqr_s: its interquartile range, in seconds.
        batch: examples in the call that was timed.
        threads: CPU threads it was timed with.

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
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    accuracy: float | None = None
    loss: float | None = None
    latency_s: float | None = None
    latency_iqr_s: float | None = None
    batch: int | None = None
    threads: int | None = None

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


def measure(
    model: nn.Module,
    inputs: Any = None,
    *,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    threads: int = 1,
    latency: bool = True,
    batch_size: int | None = None,
) -> Measurement:
    """Measure a model; what its arguments do not allow stays None.

    Args:
        model: any module; its training flags are as before afterwards.
        inputs: one batch for MACs and latency: a tensor, a tuple of arguments or a dict of keyword arguments.
        data: batches ``(inputs, target)`` for loss and accuracy, see `evaluate`; together with `loss`.
        loss: called as ``loss(output, target)``, gives the mean over targets; together with `data`.
        threads: CPU threads for latency, at least 1.
        latency: whether to time the model (about a second).
        batch_size: examples in `inputs`; None for the leading dimension of its first tensor.

    Returns:
        The measurement.

    Raises:
        SettingError: only one of `data` and `loss` is given, or an argument is of the wrong kind.

    Examples:
        >>> m = measure(nn.Linear(10, 4), torch.zeros(2, 10), latency=False)
        >>> m.params, m.macs, m.size_bytes
        (44, 40, 176)
    """
    if (data is None) != (loss is None):
        raise SettingError(
            "measure", "data and loss", got="data alone" if loss is None else "loss alone", rule="given together or not at all"
        )
    fields: dict[str, Any] = {"macs": None}
    if inputs is not None:
        fields["macs"] = count_macs(model, inputs, batch_size=batch_size)
        if latency:
            timed = compare_latency({"model": model}, inputs, threads=threads, batch_size=batch_size)["model"]
            fields |= {"latency_s": timed.median_s, "latency_iqr_s": timed.iqr_s, "batch": timed.batch, "threads": timed.threads}
    if data is not None and loss is not None:
        fields |= evaluate(model, data, loss)
    return Measurement(
        params=sum(tensor.numel() for tensor in _distinct(model.parameters())),
        size_bytes=sum(tensor.numel() * tensor.element_size() for tensor in _distinct(tree_leaves(model.state_dict()))),
        ranks={name: factors.rank for name, factors in named_factors(model)},
        **fields,
    )


def evaluate(model: nn.Module, data: Iterable[Any], loss: Callable[[Any, Any], Tensor]) -> dict[str, float]:
    """Compute loss and accuracy in eval mode, without gradients; training flags are as before afterwards.

    Args:
        model: any module; batches are moved to its device.
        data: batches ``(inputs, target)``; `inputs` is a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        loss: called as ``loss(output, target)``, gives a scalar: the mean over the targets of a batch.

    Returns:
        ``loss``, the mean over all targets (each batch weighs ``target.numel()``), and ``accuracy``, a fraction, where the output (or its
        ``logits``, see `scores_of`) is ``(N, classes)`` and the target ``(N,)`` integers.

    Raises:
        SettingError: `data` yields nothing, or something that is not ``(inputs, target)``.

    Examples:
        >>> data = [(torch.eye(2), torch.tensor([0, 0]))]
        >>> evaluate(nn.Identity(), data, nn.CrossEntropyLoss())["accuracy"]
        0.5
    """
    total, count, correct, judged = 0.0, 0, 0, 0
    with evaluating(model):
        for batch in data:
            inputs, target = pair_of(batch, "evaluate")
            if not isinstance(target, Tensor):
                raise SettingError("evaluate", "data", got=type(target), rule="batches (inputs, target) with a tensor as target")
            (args, kwargs), target = _send((_arguments(inputs), target), model)
            output = model(*args, **kwargs)
            total += float(loss_of(loss, output, target, "evaluate")) * target.numel()
            count += target.numel()
            scores = scores_of(output)
            if _is_classification(scores, target):
                correct += int((scores.argmax(1) == target).sum())
                judged += len(target)
    if not count:
        hint = "a generator can be read only once: give a list or a DataLoader"
        raise SettingError("evaluate", "data", got=f"no targets from {type(data).__name__}", rule="at least one batch", hint=hint)
    return {"loss": total / count} | ({"accuracy": correct / judged} if judged else {})


def count_macs(model: nn.Module, inputs: Any, *, batch_size: int | None = None) -> int:
    """Count the multiply-accumulates for one example, in eval mode; training flags are as before afterwards.

    Counted are matrix products and convolutions (padding included; bias and what works element by element left out), by torch's
    `FlopCounterMode` with formulas for the kernels that it does not know: fused attention and recurrent layers, the fast paths of
    `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, products with vectors, distances, `nn.Bilinear`, quantized linear layers.
    Masked and causal attention counts in full; of nested tensors only what is there. Looking up an embedding costs nothing. Sparse matrices
    count as dense ones. Not seen, hence counted as nothing: Fourier transforms, decompositions of `torch.linalg`, and one's own kernels
    (C++ or Triton extensions that have registered no formula).

    Args:
        model: any module; of a compiled one the original is run.
        inputs: one batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        batch_size: examples in `inputs`; None for the leading dimension of its first tensor. Give 1 for an unbatched input, and the batch
            where time comes first.

    Returns:
        Multiply-accumulates divided by the batch, to the nearest integer (sequences of different length may differ in cost).

    Raises:
        SettingError: the batch size cannot be read off `inputs`.
        SpectrimError: the model runs a kernel that is known to work but cannot be counted (quantized convolutions and recurrent layers).

    Examples:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 10, 10))
        21600
    """
    batch = batch_size_of(inputs, batch_size)
    args, kwargs = _send(_arguments(inputs), model)
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with evaluating(model), _frozen(model), counter:  # the counter fails for a parameter that a model hands to one of its layers
        getattr(model, "_orig_mod", model)(*args, **kwargs)
    return (counter.get_total_flops() + batch) // (2 * batch)


def latency(
    model: nn.Module, inputs: Any, *, threads: int = 1, repeats: int = 5, min_time: float = 0.2, batch_size: int | None = None
) -> Latency:
    """Time one call in eval mode, without gradients, after a warm-up, synchronised on accelerators; see `compare_latency`."""
    models = {"model": model}
    return compare_latency(models, inputs, threads=threads, repeats=repeats, min_time=min_time, batch_size=batch_size)["model"]


def measure_together(
    models: Mapping[str, nn.Module], inputs: Any, data: Iterable[Any], loss: Callable[[Any, Any], Tensor], threads: int = 1
) -> dict[str, Measurement]:
    """Measure several models: latencies side by side, see `compare_latency`; the rest as `measure` does.

    Args:
        models: name to module.
        inputs: one batch for costs and latency.
        data: batches ``(inputs, target)`` for loss and accuracy.
        loss: ``(output, target) -> scalar``.
        threads: CPU threads of the latencies.
    """
    times = compare_latency(models, inputs, threads=threads)
    measured = {name: measure(model, inputs, data=data, loss=loss, latency=False) for name, model in models.items()}
    return {
        name: dataclasses.replace(entry, latency_s=time.median_s, latency_iqr_s=time.iqr_s, batch=time.batch, threads=time.threads)
        for (name, entry), time in zip(measured.items(), times.values(), strict=True)
    }


def compare_latency(
    models: Mapping[str, nn.Module],
    inputs: Any,
    *,
    threads: int = 1,
    repeats: int = 5,
    min_time: float = 0.2,
    batch_size: int | None = None,
) -> dict[str, Latency]:
    """Time several models in turns, so that whatever slows the machine down meets them all.

    Args:
        models: name to module; training flags and torch's thread count are as before afterwards.
        inputs: one batch for all of them: a tensor, a tuple of arguments or a dict of keyword arguments.
        threads: CPU threads of torch, at least 1.
        repeats: rounds, at least 1; in each every model is warmed up and timed.
        min_time: seconds that a model is timed in each round, above 0; it is called at least once.
        batch_size: examples in `inputs`; None for the leading dimension of its first tensor.

    Returns:
        Name to latency.

    Raises:
        SettingError: an argument is outside its range.

    Examples:
        >>> times = compare_latency({"a": nn.Linear(8, 8), "b": nn.Identity()}, torch.zeros(4, 8), repeats=2, min_time=0.01)
        >>> list(times), times["a"].batch, times["a"].median_s > 0
        (['a', 'b'], 4, True)
    """
    for name, value, rule in (("threads", threads, "at least 1"), ("repeats", repeats, "at least 1"), ("min_time", min_time, "above 0")):
        if value <= 0:
            raise SettingError("latency", name, got=value, rule=rule)
    batch = batch_size_of(inputs, batch_size)
    timers, runs = {}, {}
    with ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(evaluating(model))
            args, kwargs = _send(_arguments(inputs), model)
            timers[name] = Timer("call()", globals={"call": functools.partial(model, *args, **kwargs)}, num_threads=threads)
            runs[name] = list[float]()
        for _ in range(repeats):
            for name, timer in timers.items():
                runs[name] += timer.blocked_autorange(min_run_time=min_time).times
    result = {}
    for name, times in runs.items():
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
        result[name] = Latency(float(median), float(high - low), batch, threads, len(times))
    return result


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
                "MAC reduction": _ratio(first.macs, m.macs),
                "speedup": _ratio(first.latency_s, m.latency_s) if same else "",
            }
        )
    rows = [[name, *(column[name] or "-" for column in columns)] for name in columns[0] if any(column[name] for column in columns)]
    return markdown_table(rows, header=["", *measurements])


# Texts


def _texts(m: Measurement) -> dict[str, str]:
    """Return each figure with its unit; an empty string for what was not measured."""
    ranks = list(m.ranks.values())
    mib = f" ({m.size_bytes / 2**20:.1f} MiB)" if m.size_bytes >= 2**19 else ""
    return {
        "accuracy": "" if m.accuracy is None else f"{100 * m.accuracy:.2f} %",
        "loss": "" if m.loss is None else f"{m.loss:.4f}",
        "parameters": f"{m.params:,}",
        "MACs": "" if m.macs is None else f"{m.macs:,}",
        "size": f"{m.size_bytes:,} B{mib}",
        "ranks": f"{min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.1f} ({len(ranks)})" if ranks else "",
        "latency": "" if m.latency_s is None else f"{1e3 * m.latency_s:,.3f} ms",
        "latency IQR": "" if m.latency_iqr_s is None else f"{1e3 * m.latency_iqr_s:,.3f} ms",
        "timed with": "" if m.batch is None else f"batch {m.batch}, {m.threads} thread{'' if m.threads == 1 else 's'}",
    }


def _ratio(before: int | float | None, after: int | float | None) -> str:
    return f"{before / after:.2f}x" if before and after else ""


def markdown_table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None) -> str:
    """Return rows as a Markdown table, numbers to the right."""
    table = Table(box=box.MARKDOWN, show_header=header is not None)
    for index, name in enumerate(header or rows[0]):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None, markup=False, emoji=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())


# Models and inputs, also for training and costs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; each module's own training flag again afterwards."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside; afterwards those do that did before."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def unfused() -> Iterator[None]:
    """Let torch's transformer layers call their children inside, instead of one fused kernel that calls none of them."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model on inputs as a data set gives them.

    Args:
        model: a module or any function.
        inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments.

    Raises:
        SettingError: `inputs` is none of these.

    Examples:
        >>> call_model(torch.add, {"input": torch.tensor(1), "other": torch.tensor(2)})
        tensor(3)
    """
    args, kwargs = _arguments(inputs)
    return model(*args, **kwargs)


def scores_of(output: Any) -> Any:
    """Return the scores in what a model puts out: its ``logits``, an attribute or a key, as models of transformers have; else all of it.

    Args:
        output: of a forward pass.

    Examples:
        >>> scores_of({"logits": torch.tensor(1), "hidden_states": torch.tensor(2)})
        tensor(1)
        >>> scores_of(torch.tensor(3))
        tensor(3)
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else output


def loss_of(loss: Callable[[Any, Any], Tensor], output: Any, target: Any, owner: str) -> Tensor:
    """Return the loss of a forward pass.

    Args:
        loss: called as ``loss(output, target)``.
        output: whatever the model puts out.
        target: of the batch.
        owner: what an error names.

    Raises:
        SettingError: where a loss of tensors gets an output that only holds one, as those of transformers' models do.
    """
    try:
        return loss(output, target)
    except (TypeError, AttributeError) as error:
        if scores_of(output) is output:
            raise
        rule = f"(output, target) -> scalar for an output of type {type(output).__name__}"
        hint = "which holds its scores as logits: give lambda output, target: loss(output.logits, target)"
        raise SettingError(owner, "loss", got=loss, rule=rule, hint=hint) from error


def batch_size_of(inputs: Any, given: int | None = None) -> int:
    """Return the number of examples: the one given, or the leading dimension of the first tensor.

    Raises:
        SettingError: there is none to read, or it is below 1.

    Examples:
        >>> batch_size_of((torch.zeros(8, 3), torch.zeros(2)))
        8
    """
    if given is None:
        leaves = tree_leaves(_arguments(inputs), is_leaf=lambda leaf: isinstance(leaf, PackedSequence))
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor | PackedSequence)), None)
        if isinstance(first, PackedSequence):
            batch = int(first.batch_sizes[0])
        else:
            batch = 0 if first is None or first.dim() == 0 else first.size(0)
    else:
        batch = given
    if batch < 1:
        hint = "" if given is not None else "it cannot be read off the inputs"
        raise SettingError("measure", "batch_size", got=given, rule="an integer of at least 1", hint=hint)
    return batch


def one_example(batches: Iterable[Any]) -> Any:
    """Return the inputs of the first batch, cut to one example.

    Examples:
        >>> one_example([({"x": torch.zeros(8, 3)}, torch.zeros(8))])["x"].shape
        torch.Size([1, 3])
    """
    inputs, _ = pair_of(next(iter(batches)), "one_example")
    return tree_map_only(Tensor, lambda tensor: tensor[:1], inputs)


def pair_of(batch: Any, owner: str) -> tuple[Any, Any]:
    """Return ``(inputs, target)`` of a batch; `owner` is named in the error for any other."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    hint = "for a dict that holds its labels: spectrim.integrations.batches.pairs(data)" if isinstance(batch, Mapping) else ""
    raise SettingError(owner, "data", got=type(batch), rule="batches (inputs, target)", hint=hint)


def inputs_of(batch: Any) -> Any:
    """Return the inputs of a batch ``(inputs, target)``, or of bare inputs."""
    return batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch


def first_examples(data: Iterable[Any], count: int) -> list[Any]:
    """Return the first batches until they hold `count` examples, counted along the leading dimension; the last one is whole."""
    taken, seen = [], 0
    for batch in data:
        taken.append(batch)
        seen += batch_size_of(inputs_of(batch))
        if seen >= count:
            break
    return taken


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor | PackedSequence):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise SettingError("measure", "inputs", got=type(inputs), rule="a tensor, a tuple of arguments or a dict of keyword arguments")


def _send(value: Any, model: nn.Module) -> Any:
    """Move tensors, in whatever they are nested, to the model's device."""
    first = next((tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors), None)
    if first is None or all(leaf.device == first.device for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
        return value
    from accelerate.utils import send_to_device

    return send_to_device(value, first.device)


def _is_classification(output: Any, target: Tensor) -> bool:
    whole = target.dim() == 1 and target.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return whole and isinstance(output, Tensor) and output.dim() == 2 and len(output) == len(target)


def _distinct(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among `values`, those that show the same memory once."""
    seen = set()
    for tensor in values:
        if isinstance(tensor, Tensor):
            key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
            if key not in seen:
                seen.add(key)
                yield tensor


# Formulas for the kernels that torch's counter does not know. Each returns the multiply-accumulates of one call.


@dataclasses.dataclass(frozen=True)
class _Formula:
    """Calls a formula as the counter wants it: with the tensors themselves, for floating-point operations."""

    macs: Callable[..., int]
    _get_raw: bool = True

    def __call__(self, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 2 * self.macs(out_val, *args, **kwargs)


def _attention(out: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores and their product with the values."""
    return math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _lengths(x: Tensor) -> list[int]:
    """Return the length of each sequence of ``(batch, time, features)``, nested or not."""
    return x._nested_tensor_size()[:, 0].tolist() if x.is_nested else [x.shape[1]] * x.shape[0]


def _multihead(out: Any, query: Tensor, key: Tensor, value: Tensor, embed: int, *_: Any, **__: Any) -> int:
    """Projections of query, key, value and output, scores and their product with the values."""
    pairs = zip(_lengths(query), _lengths(key), strict=True)
    return sum(2 * embed * (embed * (target + source) + target * source) for target, source in pairs)


def _encoder_layer(out: Any, x: Tensor, embed: int, *rest: Any, **__: Any) -> int:
    """Attention, and the two linear layers behind it."""
    first, second = rest[12], rest[14]
    behind: int = sum(_lengths(x)) * (first.numel() + second.numel())
    return _multihead(out, x, x, x, embed) + behind


def _recurrent_layer(out: Any, x: Tensor, weight_ih: Tensor, weight_hh: Tensor, *_: Any, **__: Any) -> int:
    """Both matrices at each time step of each sequence."""
    return math.prod(x.shape[:-1]) * (weight_ih.numel() + weight_hh.numel())


def _recurrent(out: Any, x: Tensor, weights: list[Tensor], *_: Any, **__: Any) -> int:
    """All matrices, of all layers and directions, at each time step of each sequence."""
    return math.prod(x.shape[:-1]) * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _linear(out: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    """Every feature of `x` in every feature of the output."""
    return x.numel() * out.shape[-1]


def _grouped(out: Any, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """A product for each group: of the rows of `a`, of the columns of `b`, or of both batches."""
    return (a.shape[0] if a.dim() == b.dim() == 3 else 1) * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _bilinear(out: Any, a: Tensor, weight: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """For each row, ``a @ weight`` and the product of that with ``b``."""
    return a.shape[0] * weight.shape[0] * weight.shape[2] * (weight.shape[1] + 1)


_KNOWN: dict[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
    "aten._scaled_dot_product_attention_math_for_mps": _attention,
    "aten._native_multi_head_attention": _multihead,
    "aten._transformer_encoder_layer_fwd": _encoder_layer,
    "aten.mkldnn_rnn_layer": _recurrent_layer,
    "aten._cudnn_rnn": _recurrent,
    "aten.miopen_rnn": _recurrent,
    "aten._lstm_mps": lambda out, x, hx, weights, *_, **__: _recurrent(out, x, weights),
    "aten._trilinear": _bilinear,
    "aten._cdist_forward": lambda out, a, b, *_, **__: out.numel() * a.shape[-1],
    "aten._euclidean_dist": lambda out, a, b: out.numel() * a.shape[-1],
    "aten.mv": lambda out, a, v: a.numel(),
    "aten.addmv": lambda out, c, a, v, **_: a.numel(),
    "aten.dot": lambda out, a, b: a.numel(),
    "aten.vdot": lambda out, a, b: a.numel(),
    "aten.addr": lambda out, c, a, b, **_: a.numel() * b.numel(),
    "aten.addbmm": lambda out, c, a, b, **_: a.numel() * b.shape[-1],
    "aten._addmm_activation": lambda out, c, a, b, **_: a.numel() * b.shape[-1],
    "aten._int_mm": _linear,
    "aten._weight_int8pack_mm": _linear,
    "aten._weight_int4pack_mm": _linear,
    "aten._weight_int4pack_mm_for_cpu": _linear,
    "aten._dyn_quant_matmul_4bit": _linear,
    "aten._grouped_mm": _grouped,
    "aten._scaled_grouped_mm": _grouped,
    **{f"quantized.linear{kind}": _linear for kind in ("", "_relu", "_dynamic", "_relu_dynamic", "_dynamic_fp16")},
}
_UNKNOWN = (
    *(f"quantized.conv{n}d{kind}" for n in (1, 2, 3) for kind in ("", "_relu", "_dynamic")),
    *(f"quantized.conv_transpose{n}d{kind}" for n in (1, 2, 3) for kind in ("", "_dynamic")),
    *("aten.quantized_lstm", "aten.quantized_gru", "aten.mkldnn_linear", "aten.mkldnn_convolution"),
)


@functools.cache
def _formulas() -> dict[Any, _Formula]:
    """Return the formulas by kernel, for those that this torch has."""

    def no_formula(name: str) -> Callable[..., int]:
        def fail(out: Any, *args: Any, **kwargs: Any) -> int:
            raise SpectrimError(f"count_macs: the model runs {name}, whose cost cannot be read off its arguments; count its float version")

        return fail

    table = _KNOWN | {name: no_formula(name) for name in _UNKNOWN}
    kernels = {name: getattr(getattr(torch.ops, name.split(".")[0]), name.split(".")[1], None) for name in table}
    return {kernel: _Formula(table[name]) for name, kernel in kernels.items() if kernel is not None}
