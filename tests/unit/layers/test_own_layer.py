"""A layer class of one's own, through everything that reads the table of kinds."""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectrim as sp
from spectrim.budget.latency_table import latency_table
from spectrim.errors import FormatError, LayerError
from spectrim.layers import METHODS, Example, FactorizedLayer, OneWeight, Share, kind_of, register
from spectrim.layers.own import check_kind
from spectrim.plain.chain import PlainPair
from spectrim.tables import Row


class GatedLinear(nn.Module):
    """``y = (x * gain) W + b``, with ``W`` stored ``(in, out)``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(inputs))
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gain) @ self.weight + self.bias


class FactorizedGatedLinear(OneWeight):
    dense_kinds = (GatedLinear,)

    @classmethod
    def fold(cls, module: Any, name: str, weight: Tensor, scheme: Any) -> Tensor:
        return weight.T

    @classmethod
    def unfold(cls, module: Any, name: str, matrix: Tensor, scheme: Any) -> Tensor:
        return matrix.T

    @classmethod
    def work(cls, module: Any, name: str, scheme: Any, rank: int | None, shape: Sequence[int] | None) -> float:
        in_, out = len(module.gain), len(module.bias)
        rows = 1 if shape is None else math.prod(shape[:-1])
        return float(rows * (out * in_ if rank is None else rank * (out + in_)))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gain
        if self.composes("weight", x.shape):
            return self.run_dense("weight", x.shape, lambda weight: x @ weight + self.bias)
        left, right = self.factors_of("weight").pair()
        return F.linear(F.linear(x, right), left, self.bias)

    def input_rows(self, x: Tensor, output_shape: Sequence[int], scheme: Any = None) -> Iterator[Tensor]:
        yield from super().input_rows(x * self.gain, output_shape, scheme)

    def split(self, share: Share, paying: Collection[str]) -> nn.Module | None:
        if "weight" not in paying:
            return None
        factors = self.factors_of("weight")
        left, right = factors.balanced()
        first = nn.Linear(right.shape[1], right.shape[0], bias=False, device="meta")
        second = nn.Linear(left.shape[1], left.shape[0], device="meta")
        first.weight, second.weight, second.bias = share(factors, "gated right", right * self.gain), share(factors, "left", left), self.bias
        return PlainPair(first, second)


@pytest.fixture
def registered() -> None:
    register(FactorizedGatedLinear, GatedLinear(5, 4), torch.randn(3, 5))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(GatedLinear(24, 32), nn.ReLU(), GatedLinear(32, 24), nn.ReLU(), nn.Linear(24, 5)).double()
    for layer in (model[0], model[2]):
        nn.init.uniform_(layer.gain, 0.5, 2)
        nn.init.normal_(layer.bias)
    return model


X = torch.randn(64, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_without_registration_it_is_skipped_with_the_reason() -> None:
    assert kind_of(GatedLinear(5, 4)) is None
    assert [line.reason for line in sp.coverage(network())][:2] == ["no factorized form for GatedLinear"] * 2


@pytest.mark.usefixtures("registered")
def test_factorize_cut_and_merge() -> None:
    dense = network()
    low = sp.factorize(dense)
    torch.testing.assert_close(low(X), dense(X), rtol=1e-9, atol=1e-12)  # algebra in float64
    assert [(line.kind, line.factorized) for line in sp.coverage(low)] == [("GatedLinear", True)] * 2 + [("Linear", False)]
    cut = sp.prune(low, {"0": 3, "2": 24})
    merged = sp.merge(cut)
    assert [type(layer) for layer in merged][1:] == [nn.ReLU, GatedLinear, nn.ReLU, nn.Linear]
    assert isinstance(merged[0], PlainPair)
    assert isinstance(merged[0], GatedLinear)
    torch.testing.assert_close(merged(X), cut(X), rtol=1e-9, atol=1e-12)  # algebra in float64
    assert sum(p.numel() for p in merged[0].parameters()) == 3 * (24 + 32) + 32
    cut(X).sum().backward()
    assert all(parameter.grad is not None for parameter in cut.parameters())


@pytest.mark.usefixtures("registered")
def test_a_budget_is_met_and_calibration_and_correction_help() -> None:
    dense, low = network(), sp.factorize(network())
    known = sp.calibrate(low, [X])
    ranks = sp.allocate(low, sp.Budget(macs=0.5), X, importance=sp.budget.distortion.WhitenedEnergy(known))
    assert set(ranks) == {"0", "2"}
    rows = X.double() * dense[0].gain.detach()
    rows = rows - rows.mean(0)  # its bias takes the mean up
    torch.testing.assert_close(known.inputs["0"], rows.T @ rows / len(X), rtol=1e-9, atol=1e-12)  # algebra in float64
    cut = sp.prune(low, ranks)
    assert sp.measure(sp.merge(cut), X, latency=False).macs <= 0.5 * (24 * 32 * 2 + 24 * 5)
    better = sp.correct(cut, dense, [X])
    assert (better(X) - dense(X)).norm() < (cut(X) - dense(X)).norm()


@pytest.mark.usefixtures("registered")
def test_latency_table_times_it() -> None:
    table = latency_table(sp.factorize(network().float()), X[:4].float(), multiple=8, time_box=0.01)
    assert {"0", "2"} <= set(table.weights)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("merged", [False, True])
def test_save_and_load(merged: bool, tmp_path: Path) -> None:
    low = sp.factorize(network(), rank=3)
    model = sp.merge(low) if merged else low
    again = sp.load(sp.save(model, tmp_path), network(seed=1))
    assert [type(layer) for layer in again] == [type(layer) for layer in model]
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("merged", [False, True])
def test_loading_without_registration_or_with_another_shape_is_refused(merged: bool, tmp_path: Path, registered: None) -> None:
    low = sp.factorize(network(), rank=3)
    sp.save(sp.merge(low) if merged else low, tmp_path)
    other = nn.Sequential(GatedLinear(25, 32), nn.ReLU(), GatedLinear(32, 24), nn.ReLU(), nn.Linear(24, 5)).double()
    with pytest.raises(FormatError, match="another architecture"):
        sp.load(tmp_path, other)
    METHODS[:] = [row for row in METHODS if row.method is not FactorizedGatedLinear]
    with pytest.raises(FormatError, match=r"no kind of layer is registered .* call spectrim.layers.register"):
        sp.load(tmp_path, network())


def broken(**methods: Any) -> type[FactorizedLayer]:
    return type("Broken", (FactorizedGatedLinear,), methods)


def halved(self: Any, x: Tensor) -> Tensor:
    return FactorizedGatedLinear.forward(self, x) / 2


def as_two_operations_wrong(self: Any, x: Tensor) -> Tensor:
    y = FactorizedGatedLinear.forward(self, x)
    return y if self.composes("weight", x.shape) else y + 1


def ungated(self: Any, share: Share, paying: Collection[str]) -> Any:
    pair: Any = FactorizedGatedLinear.split(self, share, paying)
    if pair is not None:
        pair[0].weight = nn.Parameter(pair[0].weight / self.gain)
    return pair


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"dense_kinds": (nn.Linear,)}, "does not accept its own example"),
        ({"weights": classmethod(lambda cls, module: ("kernel",))}, "'kernel' is not a parameter"),
        ({"fold": classmethod(lambda cls, module, name, weight, scheme: weight)}, "unfold is not the inverse of fold: 'weight' of (5, 4)"),
        ({"fold": classmethod(lambda cls, module, name, weight, scheme: weight.flatten())}, "fold must return"),
        ({"unfold": classmethod(lambda cls, module, name, matrix, scheme: 2 * matrix.T)}, "with other values"),
        ({"work": classmethod(lambda cls, module, name, scheme, rank, shape: 1.0)}, "proportional to the rank"),
        ({"forward": halved}, "with composed weights, at full rank, does not compute what the dense layer does: it is off by"),
        ({"forward": as_two_operations_wrong}, "as two operations, at full rank"),
        ({"split": ungated}, "what split returns at rank 1"),
        ({"split": lambda self, share, paying: self}, "split must return ordinary layers"),
        ({"split": lambda self, share, paying: FactorizedGatedLinear.split(self, share, ("weight",))}, "split must return None"),
        ({"input_rows": OneWeight.input_rows}, "its output is not the folded matrix times its input_rows"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_kind_that_breaks_a_law_is_refused_at_birth(methods: dict[str, Any], message: str) -> None:
    before = list(METHODS)
    with pytest.raises(LayerError, match=re.escape(message)):
        register(broken(**methods), GatedLinear(5, 4), torch.randn(3, 5))
    assert before == METHODS


def test_the_check_looks_behind_ones_and_zeros_and_leaves_the_example_alone() -> None:
    example = GatedLinear(5, 4)
    before = {name: tensor.clone() for name, tensor in example.state_dict().items()}
    check_kind(FactorizedGatedLinear, example, (torch.randn(3, 5),))
    assert all(torch.equal(tensor, before[name]) for name, tensor in example.state_dict().items())
    assert example.weight.dtype == torch.float32


class Scaled(GatedLinear):
    """``y = ((x * gain) W) * scale``: a gain for each output too, and no bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return ((x * self.gain) @ self.weight) * self.scale


def scaled_forward(self: Any, x: Tensor) -> Tensor:
    if self.composes("weight", x.shape):
        return self.run_dense("weight", x.shape, lambda weight: ((x * self.gain) @ weight) * self.scale)
    left, right = self.factors_of("weight").pair()
    return F.linear(F.linear(x * self.gain, right), left) * self.scale


def scaled_split(self: Any, share: Share, paying: Collection[str]) -> Any:
    pair: Any = FactorizedGatedLinear.split(self, share, paying)
    if pair is not None:
        second = nn.Linear(*pair[1].weight.shape[::-1], bias=False)
        second.weight = nn.Parameter(pair[1].weight.detach() * self.scale[:, None])
        return PlainPair(pair[0], second)
    return None


def test_what_is_not_one_product_inherits_the_base_and_is_left_out_of_calibration() -> None:
    methods = {name: vars(FactorizedGatedLinear)[name] for name in ("fold", "unfold", "work")}
    methods |= {"dense_kinds": (Scaled,), "forward": scaled_forward, "split": scaled_split}
    with pytest.raises(LayerError, match="its output is not the folded matrix times its input_rows"):
        register(broken(**methods), Scaled(5, 4), torch.randn(3, 5))
    register(type("Base", (FactorizedLayer,), methods), Scaled(5, 4), torch.randn(3, 5))
    dense = nn.Sequential(Scaled(24, 32), nn.Linear(32, 24), nn.Linear(24, 5)).double()
    low = sp.factorize(dense, rank=3)
    assert set(sp.calibrate(low, [X]).skipped) == {"0"}
    better = sp.correct(low, dense, [X])
    assert torch.equal(better[0](X), low[0](X))
    torch.testing.assert_close(sp.merge(low)(X), low(X), rtol=1e-9, atol=1e-12)  # algebra in float64


def test_a_layer_that_has_a_kind_is_not_taken_over_and_registering_twice_adds_nothing(registered: None) -> None:
    before = list(METHODS)
    register(FactorizedGatedLinear, GatedLinear(5, 4), torch.randn(3, 5))
    assert before == METHODS
    with pytest.raises(LayerError, match="of the kind FactorizedLinear already"):
        register(FactorizedGatedLinear, nn.Linear(4, 3), torch.randn(2, 4))


@pytest.mark.parametrize("row", [row for row in METHODS if row.example], ids=lambda row: row.label)
def test_the_kinds_of_the_library_hold_the_laws_too(row: Row[Sequence[Example]]) -> None:
    example = row.example[0]
    check_kind(row.method, example.make(), example.inputs(torch.float32))


def test_a_registered_kind_is_a_row_with_its_example_and_the_law_of_its_base(registered: None) -> None:
    (row,) = (row for row in METHODS if row.method is FactorizedGatedLinear)
    assert row.laws == {"one weight"}
    assert [x.dtype for x in row.example[0].inputs(torch.float64)] == [torch.float64]
    assert type(row.example[0].make()) is GatedLinear
