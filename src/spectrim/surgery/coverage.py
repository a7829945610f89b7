"""`coverage`: every layer, factorized or why not."""

import io
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from torch import nn

from spectrim.checks import check, unwrapped
from spectrim.forms.form import Size, shown
from spectrim.layers import Site, sites
from spectrim.metrics.figures import frame
from spectrim.metrics.table import html_of, markdown_table
from spectrim.protocols import Latencies, Where
from spectrim.surgery.head import call_order
from spectrim.surgery.select import decide


def break_evens(model: nn.Module, latency: Latencies | None = None) -> Mapping[str, int]:
    """Return the largest rank at which `merge` writes two operations, by the names of weights.

    Args:
        model: factorized.
        latency: measured seconds decide; multiply-accumulates when omitted.
    """
    if latency is not None:
        return latency.limits(model)
    return {site.name: site.layer.break_even(site.key) for site in sites(model)}


@dataclass(frozen=True)
class LayerCoverage:
    """One line of `coverage`: one parameterized layer or weight.

    Attributes:
        name: the layer; with several weights, the layer and the weight.
        kind: class of the layer.
        factorized: whether its weight is held in a form.
        reason: why it is dense; for a factorized one, what `merge` will write.
        scheme: how the kernel is folded, for factorized layers.
        shape: ``(out, in)`` of one block.
        blocks: groups of a convolution.
        rank: the present rank; of a Tucker form the ranks of outputs and inputs.
        break_even: the largest rank at which two operations cost less than the dense one, by measured seconds where a table was given; of
            a Tucker form the last size on its path.
        full: the full rank.
    """

    name: str
    kind: str
    factorized: bool
    reason: str
    scheme: str | None = None
    shape: tuple[int, int] | None = None
    blocks: int = 1
    rank: Size | None = None
    break_even: Size | None = None
    full: Size | None = None


TITLES = ("layer", "kind", "scheme", "matrix", "rank", "break-even", "what")


class Coverage(tuple[LayerCoverage, ...]):
    """All lines of `coverage`; prints as a table."""

    def __str__(self) -> str:
        table = Table(Column(TITLES[0], overflow="fold"), *TITLES[1:], title=None)
        for cells in self._rows():
            table.add_row(*cells)
        text = io.StringIO()
        Console(width=150, file=text, markup=False, emoji=False, highlight=False).print(table)
        return text.getvalue() + self._rest()

    def _repr_html_(self) -> str:
        return html_of(f"{markdown_table(self._rows(), TITLES)}\n{self._rest()}")

    def to_pandas(self) -> Any:
        """Return the lines as a pandas data frame, by layer."""
        return frame([vars(line) for line in self], "name")

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for line in self:
            if _is_vectors(line):
                continue
            if line.factorized and line.shape:
                blocks = f"{line.blocks} x " if line.blocks > 1 else ""
                rank, full, limit = (shown(size) for size in (line.rank or 0, line.full or min(line.shape), line.break_even or 0))
                cells = (line.scheme or "", f"{blocks}{line.shape[0]} x {line.shape[1]}", f"{rank} of {full}", limit)
            else:
                cells = ("", "", "dense", "")
            rows.append((line.name or "(model)", line.kind, *cells, line.reason))
        return rows

    def _rest(self) -> str:
        """Return one line for all layers that hold no matrix."""
        counts = Counter(line.kind for line in self if _is_vectors(line))
        return f"vectors only, not listed: {', '.join(f'{count} {kind}' for kind, count in counts.items())}" if counts else ""


def _is_vectors(line: LayerCoverage) -> bool:
    return line.reason == f"{line.kind} has vectors only"


def coverage(model: nn.Module, where: Where | None = None, *, inputs: Any = None, latency: Latencies | None = None) -> Coverage:
    """List every parameterized layer of a model: factorized, or why not.

    Args:
        model: dense, factorized or merged. For a dense model the reason of a layer that could be factorized is empty.
        where: what was given to `factorize`, so that the reasons are the same.
        inputs: one batch; the classifier head is then the last layer called for the output. Without it see `head_of`.
        latency: the table that `merge` will be given, so that both agree.

    Examples:
        >>> [line.reason for line in coverage(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))]
        ['can be factorized', 'LayerNorm has vectors only']
    """
    check("coverage", optional=("inputs",), model=model, where=where, inputs=inputs, latency=latency)
    model = unwrapped(model)
    order = None if inputs is None or where is not None else call_order(model, inputs)
    reasons, limits = decide(model, where, order=order, references=True), break_evens(model, latency)
    lines: list[LayerCoverage] = []
    inside: set[nn.Module] = set()
    used = defaultdict[str, list[Site]](list)
    for site in sites(model):
        used[site.layer_name].append(site)
    for name, module in model.named_modules():
        if module in inside:
            continue
        if name in used:
            for site in used[name]:
                inside.update(site.layer.factors.modules())
                lines.append(_factorized_line(site, limits[site.name], latency))
        elif name in reasons:
            lines.append(LayerCoverage(name, type(module).__name__, False, reasons[name] or "can be factorized"))
    return Coverage(lines)


def _factorized_line(site: Site, limit: int, latency: Latencies | None) -> LayerCoverage:
    factors = site.factors
    most = limit if factors.is_matrix or not limit else factors.size_of(limit)
    if latency is not None:
        verdict = latency.verdict(site.name, factors.rank)
    elif not factors.splits:
        verdict = "merges to one dense layer" + (f" ({shown(factors.size)} of {shown(factors.full_size)})" if factors.rank > 1 else "")
    elif factors.rank <= limit:
        layers = ("two", "three", "four", "five")[len(factors.chain()) - 2]
        verdict = f"merges to {layers} layers (rank {shown(factors.size)} <= {shown(most)})"
    elif factors.size == factors.full_size:
        verdict = "merges to one dense layer (at full rank" + (f"; more than one cost less up to rank {shown(most)})" if limit else ")")
    else:
        verdict = f"merges to one dense layer (rank {shown(factors.size)} > {shown(most)})"
    kind, scheme = site.layer.dense_kind.__name__, site.layer.scheme
    return LayerCoverage(site.name, kind, True, verdict, scheme, factors.shape, factors.blocks, factors.size, most, factors.full_size)
