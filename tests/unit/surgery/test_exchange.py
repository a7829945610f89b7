"""A layer that is exchanged stays the object, the class and the holder of everything that it was."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import spectrim as sp
from spectrim.errors import LayerError
from spectrim.layers import FactorizedLayer
from spectrim.plain.chain import PlainPair
from spectrim.surgery.exchange import HELD

EVERYTHING = sp.match("*")


class Net(nn.Module):
    """Reaches its layers by a list, a dict of tuples, a bound method, a partial and its module tree."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(12, 12) for _ in range(4))
        self.listed = [self.a]
        self.named = {"b": (self.b,)}
        self.bound = self.c.forward
        self.partial = functools.partial(nn.Linear.__call__, self.d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.listed:
            x = layer(x)
        return self.partial(self.bound(torch.tanh(self.named["b"][0](x)))) + self.a(x)


def stages(model: nn.Module, rank: int = 2) -> dict[str, nn.Module]:
    low = sp.factorize(model, where=EVERYTHING)
    cut = sp.prune(low, sp.budget.Fixed(rank))
    return {"factorized": low, "cut": cut, "merged": sp.merge(cut), "dense again": sp.merge(low)}


def no_meta(model: nn.Module) -> bool:
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_references_from_anywhere_follow() -> None:
    model, x = Net().double(), torch.randn(3, 12).double()
    made = stages(model)
    for name, stage in made.items():
        assert no_meta(stage), name
        assert stage.listed[0] is stage.a, name
        assert stage.named["b"][0] is stage.b, name
        assert stage.partial.args[0] is stage.d, name
        assert stage.bound.__self__ is stage.c, name
    for name in ("factorized", "dense again"):
        torch.testing.assert_close(made[name](x), model(x))
    torch.testing.assert_close(made["merged"](x), made["cut"](x))
    assert model.a.weight.shape == (12, 12)
    assert type(model.a) is nn.Linear


def array_of(value: Any) -> Any:
    array = np.empty(1, dtype=object)
    array[0] = value
    return array


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "a list": lambda m: setattr(m, "held", [m[0].weight]),
    "a tuple in a dict": lambda m: setattr(m, "held", {"w": (m[0].weight, 1)}),
    "an array of objects": lambda m: setattr(m, "held", array_of(m[0].weight)),
    "an attribute": lambda m: m.__dict__.__setitem__("held", m[0].weight),
    "another layer's attribute": lambda m: m[2].__dict__.__setitem__("teacher", m[0].weight),
}


@pytest.mark.parametrize("what", HOLDERS)
def test_a_weight_that_something_else_holds_stays_dense_with_the_reason(what: str) -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), torch.randn(2, 6)
    HOLDERS[what](model)
    for stage in (model, low := sp.factorize(model, where=EVERYTHING), sp.prune(low, sp.budget.Fixed(2)), sp.merge(low)):
        assert no_meta(stage)
        assert type(stage[0]) is nn.Linear
        assert {line.name: line.reason for line in sp.coverage(stage, EVERYTHING)}["0"] == HELD
    assert isinstance(low[2], FactorizedLayer)
    torch.testing.assert_close(low(x), model(x))
    held = low[2].teacher if what.startswith("another") else low.held
    while not isinstance(held, torch.Tensor):
        held = held["w"] if isinstance(held, dict) else held[0]
    assert held is low[0].weight


def test_a_recurrent_layer_whose_weight_is_held_stays_as_it_is() -> None:
    model, x = nn.ModuleDict({"r": nn.LSTM(4, 4), "o": nn.Linear(4, 4)}), torch.randn(3, 2, 4)
    model.keep = [model["r"].weight_hh_l0]
    low = sp.factorize(model, where=EVERYTHING)
    assert type(low["r"]) is nn.LSTM
    assert low.keep[0] is low["r"].weight_hh_l0
    torch.testing.assert_close(low["r"](x)[0], model["r"](x)[0])


class Tagged(nn.Linear):
    """A user's class with arguments, attributes, a method, an extra parameter and a buffer, which registers its sub-classes."""

    registry: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls, *, needed: int = 0) -> None:
        Tagged.registry.append(cls)

    def __init__(self, size: int, *, tag: str) -> None:
        super().__init__(size, size)
        self.tag = tag
        self.gain = nn.Parameter(torch.full((), 2.0))
        self.register_buffer("seen", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * super().forward(x)

    def twice(self) -> str:
        return 2 * self.tag


def test_class_attributes_methods_and_extra_tensors_stay() -> None:
    model, x = nn.Sequential(Tagged(12, tag="t")), torch.randn(2, 12)
    fired: list[str] = []
    model[0].register_forward_hook(lambda *_: fired.append("hook"))
    for name, stage in stages(model).items():
        layer: Any = stage[0]
        assert isinstance(layer, Tagged), name
        assert (layer.tag, layer.twice(), layer.in_features) == ("t", "tt", 12), name
        assert {"0.gain"} <= {key for key, _ in stage.named_parameters()}, name
        assert torch.equal(layer.seen, torch.ones(3)), name
        before = len(fired)
        stage(x)
        assert len(fired) == before + 1, name
        again = type(layer)(4, tag="new")
        assert type(again) is Tagged, name
        assert again(torch.zeros(1, 4)).shape == (1, 4), name
    assert isinstance(stages(model)["merged"][0], PlainPair)
    assert Tagged.registry == []


@pytest.mark.parametrize("name", ["factorized", "merged"])
def test_copies_and_pickles_are_of_the_same_class(name: str) -> None:
    stage, x = stages(nn.Sequential(Tagged(12, tag="t")))[name], torch.randn(2, 12)
    file = io.BytesIO()
    torch.save(stage, file)
    file.seek(0)
    for again in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage)), torch.load(file, weights_only=False)):
        assert type(again[0]) is type(stage[0])
        torch.testing.assert_close(again(x), stage(x))


def test_a_name_that_a_factorized_layer_needs_is_refused() -> None:
    layer: Any = nn.Linear(4, 4)
    layer.rank = 3
    line = sp.coverage(nn.Sequential(layer), EVERYTHING)[0]
    assert line.reason == "has an attribute 'rank', a name that a factorized layer needs"


def test_recurrent_weights_answer_by_name_to_the_end() -> None:
    dense = nn.LSTM(16, 16, batch_first=True)
    dense.note = "kept"  # type: ignore[assignment]
    for stage in stages(nn.Sequential(dense)).values():
        layer: Any = stage[0]
        assert isinstance(layer, nn.LSTM)
        assert layer.note == "kept"
        for key in ("weight_ih_l0", "weight_hh_l0", "bias_hh_l0"):
            assert getattr(layer, key).dtype == torch.float32
            assert getattr(layer, key).shape == getattr(dense, key).shape
        layer.flatten_parameters()
        assert layer.double()(torch.randn(2, 3, 16).double())[0].shape == (2, 3, 16)


def test_attention_answers_for_its_weights_to_the_end() -> None:
    dense, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)
    for stage in stages(nn.Sequential(dense)).values():
        layer: Any = stage[0]
        assert isinstance(layer, nn.MultiheadAttention)
        assert isinstance(layer.out_proj, nn.Linear)
        assert (layer.in_proj_weight.dtype, tuple(layer.in_proj_weight.shape)) == (torch.float32, (48, 16))
        assert layer.in_proj_bias.shape == (48,)
        assert layer.out_proj.weight.shape == (16, 16)
        assert layer(x, x, x)[0].shape == x.shape


@pytest.mark.parametrize("verb", ["hook", "wrapped"])
def test_every_part_of_a_merged_attention_is_called(verb: str) -> None:
    """An adapter or a hook on any projection takes effect, also where query and memory differ."""
    layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    merged: Any = sp.merge(sp.factorize(layer, where=EVERYTHING, rank=2)).eval()
    x, memory = torch.randn(2, 3, 16), torch.randn(2, 4, 16)
    plain = merged(x, memory)
    for name in ("0", "1"):
        changed = copy.deepcopy(merged)
        part = changed.multihead_attn.in_proj.get_submodule(name)
        if verb == "hook":
            part.register_forward_hook(lambda module, args, output: 2 * output)
        else:
            changed.multihead_attn.in_proj._modules[name] = nn.Sequential(part, nn.Hardtanh(-0.01, 0.01))
        assert not torch.allclose(changed(x, memory), plain), name


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("hole", [False, True])
def test_an_encoder_writes_at_padding_what_it_wrote(norm: bool, grad: bool, hole: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model: Any = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16) if norm else None).eval()
    if norm:
        nn.init.normal_(model.norm.bias)
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False, False, hole, not hole, True]])
    low = sp.factorize(model, where=EVERYTHING)
    cut = sp.prune(low, sp.budget.Fixed(2))
    with torch.set_grad_enabled(grad):
        expected = model(x, src_key_padding_mask=padding)
        for stage in (low, sp.merge(low)):
            assert isinstance(stage, nn.TransformerEncoder)
            torch.testing.assert_close(stage(x, src_key_padding_mask=padding).mean(1), expected.mean(1))
        torch.testing.assert_close(sp.merge(cut)(x, src_key_padding_mask=padding), cut(x, src_key_padding_mask=padding))
    assert type(sp.merge(low)) is nn.TransformerEncoder


def test_a_dense_state_dict_is_taken_where_the_rank_holds_it_and_refused_elsewhere() -> None:
    dense, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.LazyLinear(5)), torch.randn(2, 3, 5, 5)
    dense(x)
    low = sp.factorize(dense, where=EVERYTHING)
    other = copy.deepcopy(dense)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    for strict in (True, False):
        again = sp.factorize(dense, where=EVERYTHING)
        again.load_state_dict(other.state_dict(), strict=strict)
        torch.testing.assert_close(again(x), other(x))
    for small in (sp.prune(low, sp.budget.Fixed(2)), sp.merge(sp.prune(low, sp.budget.Fixed(2)))):
        for strict in (True, False):
            with pytest.raises(RuntimeError, match="dense weight"):
                small.load_state_dict(other.state_dict(), strict=strict)


def test_a_function_that_would_run_the_originals_layers_is_refused() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inner = model[0]
    model.shortcut = lambda x: inner(x)
    with pytest.raises(LayerError, match=r"'shortcut'.*'0'"):
        sp.factorize(model, where=EVERYTHING)


@pytest.mark.parametrize("holder", ["model", "inner"])
def test_a_function_of_what_contains_the_layers_is_refused(holder: str) -> None:
    model: Any = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
    owner = model if holder == "model" else model["inner"]
    owner.shortcut = lambda x: owner(x)
    with pytest.raises(LayerError, match="'shortcut'"):
        sp.factorize(model, where=EVERYTHING)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.LSTM(4, 4), nn.Conv1d(4, 4, 3)])
def test_a_composed_weight_cannot_be_set(layer: nn.Module) -> None:
    low: Any = sp.factorize(nn.Sequential(layer), where=EVERYTHING)
    name = "weight_hh_l0" if isinstance(layer, nn.LSTM) else "weight"
    for value in (nn.Parameter(torch.zeros(4, 4)), torch.zeros(4, 4)):
        with pytest.raises(LayerError, match="is composed and cannot be set"):
            setattr(low[0], name, value)


def test_own_classes_that_read_their_weight_compute_the_same() -> None:
    class Reads(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight / 2, self.bias)

    model, x = nn.Sequential(Reads(6, 6), nn.Linear(6, 6)), torch.randn(2, 6)
    low = sp.factorize(model, where=EVERYTHING)
    assert isinstance(low[0], Reads)
    assert "0" in dict(sp.layers.named_factors(low))
    torch.testing.assert_close(low(x), model(x))
