"""What is factorized and why not; ties, shared modules, heads; every layer accounted for."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.nn.utils import prune as masks

import spectrim as sp
from spectrim.forms.svd import Factors
from spectrim.layers import FactorizedLayer, named_factors
from spectrim.plain.attention import PlainAttention
from spectrim.plain.recurrent import PlainRecurrent
from spectrim.surgery.head import head_of
from spectrim.surgery.select import HEAD, OWN_FORWARD

EVERYTHING = sp.match("*")


class LinearOfItsOwn(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, 2 * self.weight.data, self.bias)


class DoubledLinear(nn.Linear):
    """Its forward leads to torch's and reads no weight: is factorized."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class RenamedLinear(nn.Linear):
    """Runs torch's forward: is factorized."""


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eio->bo", x, self.weight.data)


class Doubled(nn.Module):
    """A parametrization with a layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.mix(weight)


def after(change: Callable[[nn.Module], Any], layer: nn.Module) -> nn.Module:
    """Apply a change in place; return the layer."""
    change(layer)
    return layer


def tensor_subclass() -> nn.Module:
    from torch.testing._internal.two_tensor import TwoTensor

    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(TwoTensor(torch.randn(4, 4), torch.randn(4, 4)))
    return layer


def quantized(layer: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear, nn.LSTM})[0]


REWRITTEN = "its weight is rewritten by a hook (weight norm, spectral norm or pruning); remove that first"
PARAMETRIZED = "under a parametrization (weight); torch.nn.utils.parametrize.remove_parametrizations it first"

DATA = "its forward may change its weight in place (data)"
REFUSED = {
    "weight norm, old": (lambda: weight_norm(nn.Linear(4, 4)), REWRITTEN),
    "weight norm, old, of an LSTM": (lambda: weight_norm(nn.LSTM(4, 4), "weight_hh_l0"), REWRITTEN),
    "spectral norm, old": (lambda: spectral_norm(nn.Linear(4, 4, bias=False)), REWRITTEN),
    "pruned": (lambda: masks.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), REWRITTEN),
    "pruned convolution": (lambda: masks.ln_structured(nn.Conv1d(4, 4, 1), "weight", 0.5, n=2, dim=0), REWRITTEN),
    "weight norm, new": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), PARAMETRIZED),
    "spectral norm, new": (lambda: parametrizations.spectral_norm(nn.Linear(4, 4, bias=False)), PARAMETRIZED),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), PARAMETRIZED),
    "parametrized by a layer": (
        lambda: after(lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()), nn.Linear(4, 4)),
        PARAMETRIZED,
    ),
    "quantized": (lambda: quantized(nn.Linear(4, 4)), "quantized: factorize before quantizing"),
    "quantized LSTM": (lambda: quantized(nn.LSTM(4, 4)), "quantized: factorize before quantizing"),
    "lazy": (lambda: nn.LazyLinear(4), "lazy: its shape is not known yet; run the model once first"),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4), "depthwise: each block has one input channel, so there is no rank to cut"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "weights of dtype torch.complex64 are not real numbers"),
    "own forward": (lambda: LinearOfItsOwn(4, 4), f"LinearOfItsOwn is a Linear with another forward ({DATA}); {OWN_FORWARD}"),
    "forward replaced": (
        lambda: after(lambda m: setattr(m, "forward", torch.sin), nn.Linear(4, 4)),
        "its forward was replaced on this very layer",
    ),
    "experts": (lambda: Experts(), f"no factorized form for Experts, whose matrices are stacked (weight): {DATA}"),
    "tensor subclass": (tensor_subclass, "its weight is a TwoTensor: factorize before quantizing or sharding"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm rescales rows of the dense table in place"),
    "sparse": (lambda: nn.Embedding(4, 4, sparse=True), "sparse gradients need the dense table"),
    "rank one": (lambda: nn.Linear(4, 1), "its matrix has rank 1 at most"),
    "norm": (lambda: nn.BatchNorm1d(4), "BatchNorm1d has vectors only"),
    "RNN": (lambda: nn.RNN(4, 4), "no factorized form for RNN"),
    "bilinear": (lambda: nn.Bilinear(4, 4, 4), "no factorized form for Bilinear"),
}

DEPRECATED = pytest.mark.filterwarnings(  # torch's own words about the layers under test
    "ignore:.*weight_norm.*is deprecated:FutureWarning",
    "ignore:.*torch.ao.quantization is deprecated.*:DeprecationWarning",
    "ignore:.*quantize_dynamic.*:FutureWarning",
    "ignore:Lazy modules are a new feature:UserWarning",
    "ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other:UserWarning",
)


@DEPRECATED
@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_the_reason_and_left_as_it_was(what: str) -> None:
    make, reason = REFUSED[what]
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.Tanh())
    for stage in (model, low := sp.factorize(model, where=EVERYTHING), sp.prune(low, sp.budget.Fixed(2)), sp.merge(low)):
        lines = sp.coverage(stage, EVERYTHING)
        assert [line.name for line in lines] == ["0", "1"]
        assert lines[1].reason == reason
        assert not lines[1].factorized
        assert type(stage[1]) is type(model[1])
    assert isinstance(low[0], FactorizedLayer)
    with pytest.raises(ValueError, match="nothing to factorize"):
        sp.factorize(nn.Sequential(make()), where=EVERYTHING)


@DEPRECATED
@pytest.mark.parametrize(
    "what", ["weight norm, old", "spectral norm, old", "pruned", "weight norm, new", "quantized", "own forward", "experts"]
)
def test_a_refused_layer_still_computes_the_same(what: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), REFUSED[what][0]()).eval(), torch.randn(3, 4)
    expected = model(x)  # now the hooks have left tensors behind that deepcopy refuses
    for stage in (low := sp.factorize(model, where=EVERYTHING), sp.prune(low, sp.budget.Fixed(4)), sp.merge(low)):
        torch.testing.assert_close(stage(x), expected)


def test_a_subclass_that_runs_torchs_forward_is_factorized_and_comes_back() -> None:
    model = nn.Sequential(RenamedLinear(4, 4))
    low = sp.factorize(model)
    assert isinstance(low[0], FactorizedLayer)
    assert sp.coverage(low)[0].kind == "RenamedLinear"
    assert type(sp.merge(low)[0]) is RenamedLinear


def test_a_forward_that_leads_to_torchs_runs_around_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(DoubledLinear(12, 12)).double(), torch.randn(3, 12).double()
    low = sp.factorize(model, where=EVERYTHING)
    torch.testing.assert_close(low(x), model(x))
    cut = sp.prune(low, sp.budget.Fixed(3))
    merged = sp.merge(cut)
    assert isinstance(merged[0], DoubledLinear)
    torch.testing.assert_close(cut(x), 2 * torch.nn.functional.linear(x, cut[0].weight + 0, cut[0].bias))
    torch.testing.assert_close(merged(x), cut(x))
    assert sp.measure(merged, x, latency=False).macs == 3 * 24
    assert type(sp.merge(low)[0]) is DoubledLinear


# ---- every layer exactly once


class Zoo(nn.Module):
    """Every kind of layer at once, some of them tied, shared, frozen or refused."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.grouped = nn.Conv2d(12, 12, 3, groups=2)
        self.up = nn.ConvTranspose2d(12, 8, 2)
        self.blocks = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
        self.again = self.blocks[0]
        self.embedding = nn.Embedding(20, 12)
        self.lstm = nn.LSTM(12, 8, 2, bidirectional=True)
        self.encoder = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
        self.experts = Experts()
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embedding.weight


def parameters_of(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def own_holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold parameters themselves, once each."""
    for name, module in model.named_modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            yield name, module


@pytest.mark.parametrize("rank", [None, 2])
def test_coverage_lists_every_layer_exactly_once(rank: int | None) -> None:
    model = Zoo()
    before = [line.name for line in sp.coverage(model)]
    assert before == [name for name, _ in own_holders(model)]
    low = sp.factorize(model, rank=rank)
    lines = sp.coverage(low)
    factorized = {name for name, _ in named_factors(low)}
    assert {line.name for line in lines if line.factorized} == factorized
    dense = [name for name, m in own_holders(low) if not isinstance(m, FactorizedLayer | Factors)]
    assert [line.name for line in lines if not line.factorized] == dense
    assert len({line.name for line in lines}) == len(lines)
    covered = sum(sum(p.numel() for p in f.parameters()) for _, f in named_factors(low))
    covered += sum(p.numel() for name in dense for p in low.get_submodule(name)._parameters.values() if p is not None)
    covered += sum(p.numel() for m in low.modules() if isinstance(m, FactorizedLayer) for p in m._parameters.values() if p is not None)
    assert covered - low.head.weight.numel() == sum(p.numel() for p in low.parameters())  # head and embedding share theirs
    for stage in (cut := sp.prune(low, sp.budget.Fixed(1)), sp.merge(cut), sp.merge(low)):
        lines = sp.coverage(stage)
        assert len({line.name for line in lines}) == len(lines)
        listed = {id(stage.get_submodule(line.name)) for line in lines if not line.factorized}
        listed |= {id(m) for m in stage.modules() if isinstance(m, FactorizedLayer | Factors)}
        assert listed >= {id(m) for _, m in own_holders(stage)}
    assert not any(line.factorized for line in sp.coverage(sp.merge(cut)))
    assert isinstance(sp.merge(cut).lstm, PlainRecurrent)
    assert isinstance(sp.merge(cut).encoder.self_attn, PlainAttention)
    assert isinstance(sp.merge(sp.factorize(model)).lstm, nn.LSTM)


def test_coverage_says_what_merge_will_write() -> None:
    low = sp.factorize(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), where=EVERYTHING, rank={"0": 5, "1": 6})
    five, six = sp.coverage(low)
    assert (five.reason, six.reason) == ("merges to two layers (rank 5 <= 5)", "merges to one dense layer (rank 6 > 5)")
    assert (five.rank, five.break_even, five.shape, five.blocks, five.scheme) == (5, 5, (12, 12), 1, "channel")
    assert [layer._get_name() for layer in sp.merge(low)] == ["PlainPair", "Linear"]
    text = str(sp.coverage(low))
    assert "5 of 12" in text
    assert "merges to two layers (rank 5 <= 5)" in text


def test_coverage_of_a_root_that_is_a_layer() -> None:
    low = sp.factorize(nn.Linear(4, 4))
    assert [(line.name, line.factorized) for line in sp.coverage(low)] == [("", True)]
    assert "(model)" in str(sp.coverage(low))


# ---- ties and shared modules


class Tied(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.last = first, second, nn.Linear(6, 6)
        second.weight = first.weight


def test_tied_embedding_and_head_stay_tied_to_the_end() -> None:
    model = Tied(nn.Embedding(30, 6), nn.Linear(6, 30))
    low = sp.factorize(model, where=EVERYTHING, rank=2)
    assert low.first.factors["weight"] is low.second.factors["weight"]
    assert [name for name, _ in named_factors(low)] == ["first", "last"]
    cut = sp.prune(low, {"first": 1})
    assert cut.first.factors["weight"] is cut.second.factors["weight"]
    assert cut.second.rank == 1
    merged = sp.merge(low)
    assert merged.first[0].weight is merged.second[1].weight  # the (30, rank) side; the other is stored transposed
    x = torch.randint(0, 30, (4,))
    torch.testing.assert_close(merged.second(merged.first(x)), low.second(low.first(x)))
    dense = sp.merge(sp.factorize(model, where=EVERYTHING))
    assert dense.first.weight is dense.second.weight


def test_tied_linears_stay_tied_to_the_end() -> None:
    model = Tied(nn.Linear(6, 6, bias=False), nn.Linear(6, 6))
    low = sp.factorize(model, where=EVERYTHING, rank=2)
    assert low.first.factors["weight"] is low.second.factors["weight"]
    merged = sp.merge(sp.prune(low, sp.budget.Fixed(1)))
    assert merged.first[0].weight is merged.second[0].weight
    assert merged.first[1].weight is merged.second[1].weight
    assert sum(p.numel() for p in merged.parameters()) == 2 * 12 + 2 * 6
    low.first.factors["weight"].S.data.zero_()
    torch.testing.assert_close(low.second(torch.ones(1, 6))[0], low.second.bias)


def test_a_layer_tied_to_one_that_stays_dense_stays_dense() -> None:
    model = Tied(nn.Embedding(30, 6), nn.Linear(6, 30))
    low = sp.factorize(model, where=sp.match("!second"))
    reasons = {line.name: line.reason for line in sp.coverage(model, sp.match("!second"))}
    assert reasons["first"] == "its weight is tied to 'second', which stays dense"
    assert low.first.weight is low.second.weight
    refused = Tied(nn.Linear(6, 6), LinearOfItsOwn(6, 6))
    assert sp.coverage(refused)[0].reason == "its weight is tied to 'second', which stays dense"
    low = sp.factorize(refused, where=EVERYTHING)
    assert low.first.weight is low.second.weight
    assert isinstance(low.last, FactorizedLayer)


def test_a_language_models_embedding_is_tied_to_its_head_and_both_stay_dense_by_default() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(30, 6), "body": nn.Linear(6, 6), "head": nn.Linear(6, 30, bias=False)})
    model["head"].weight = model["embed"].weight
    reasons = {line.name: line.reason for line in sp.coverage(model)}
    assert reasons == {"embed": "its weight is tied to 'head', which stays dense", "body": "can be factorized", "head": HEAD}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: nn.Conv2d(4, 4, 3), lambda: nn.ConvTranspose2d(4, 4, 3)),
        (lambda: nn.Conv2d(4, 4, 1), lambda: nn.ConvTranspose2d(4, 4, 1)),
        (lambda: nn.Conv1d(8, 8, 3, groups=2), lambda: nn.Conv1d(4, 8, 3)),
    ],
)
def test_a_tie_between_layers_that_fold_it_differently_stays_dense(first: Any, second: Any) -> None:
    model = Tied(first(), second())
    assert sp.coverage(model)[1].reason == "its weight is tied to 'first', which folds it otherwise"
    low = sp.factorize(model, where=EVERYTHING)
    assert low.first.weight is low.second.weight
    assert type(low.first) is type(model.first)


def test_tied_convolutions_of_different_strides_share_their_factors() -> None:
    model, x = Tied(nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3, stride=2)), torch.randn(2, 6, 7, 7)
    low = sp.factorize(model, where=EVERYTHING)
    assert low.first.factors["weight"] is low.second.factors["weight"]
    assert low.first.scheme == low.second.scheme
    torch.testing.assert_close(low.second(x), model.second(x))


def test_shared_modules_stay_one_object() -> None:
    model = Zoo()
    for stage in (
        low := sp.factorize(model),
        sp.prune(low, sp.budget.Fixed(1)),
        sp.merge(low),
        sp.merge(sp.prune(low, sp.budget.Fixed(1))),
    ):
        assert stage.again is stage.blocks[0]
        assert stage.again is not model.again
    assert isinstance(low.again, FactorizedLayer)


def test_frozen_layers_stay_frozen() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 4), nn.Linear(6, 6))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    for stage in (
        low := sp.factorize(model, where=EVERYTHING),
        sp.prune(low, sp.budget.Fixed(1)),
        sp.merge(low),
        sp.merge(sp.prune(low, sp.budget.Fixed(1))),
    ):
        assert [{p.requires_grad for p in layer.parameters()} for layer in stage] == [{False}, {False}, {True}]
    low[2].factors["weight"].U.requires_grad_(False)
    cut = sp.prune(low, sp.budget.Fixed(2))
    assert [p.requires_grad for p in (cut[2].U, cut[2].S, cut[2].Vh)] == [False, True, True]


# ---- the classifier head


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 10)), "1"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 10), nn.Softmax(-1))), "2.0"),
        (lambda: nn.Sequential(nn.Linear(4, 10)), None),
        (lambda: nn.Linear(4, 10), None),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 10, 1)), None),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)), None),
        (lambda: nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), None),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2), None),
        (lambda: nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 4), nn.ModuleList([nn.Linear(4, 5)])), "2.0"),
        (lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)), None),
    ],
)
def test_head(model: Callable[[], nn.Module], head: str | None) -> None:
    assert head_of(model()) == head
    reasons = {line.name: line.reason for line in sp.coverage(model())}
    assert [name for name, reason in reasons.items() if reason == HEAD] == ([] if head is None else [head])
    assert HEAD not in {line.reason for line in sp.coverage(model(), EVERYTHING)}
    if head is not None:
        low = sp.factorize(model())
        assert head_of(low) == head
        assert not isinstance(low.get_submodule(head), FactorizedLayer)
        assert isinstance(sp.factorize(model(), where=EVERYTHING).get_submodule(head), FactorizedLayer)


# ---- match and replace


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ((), "abc"),
        (("layer*.conv?",), "ab"),
        (("*", "!layer1.*"), "bc"),
        (("!head",), "ab"),
        (("layer1.*", "head"), "ac"),
        (("!*",), ""),
        (("LAYER*",), ""),
    ],
)
def test_match(patterns: tuple[str, ...], chosen: str) -> None:
    select = sp.match(*patterns)
    names = {"a": "layer1.conv1", "b": "layer2.conv2", "c": "head"}
    assert "".join(key for key, name in names.items() if select(name, nn.Identity())) == chosen


def test_where_selects_by_module_too_and_says_so() -> None:
    model = Zoo()
    only = lambda name, module: isinstance(module, nn.Embedding)  # noqa: E731
    with pytest.raises(ValueError, match=r"layer 'Zoo': nothing to factorize; '': Zoo has vectors only; 'stem': not selected by where="):
        sp.factorize(model, where=only)  # the embedding is tied to the head, which is not selected
    low = sp.factorize(model, where=lambda name, module: isinstance(module, nn.Conv2d))
    assert [name for name, _ in named_factors(low)] == ["stem", "grouped"]
    assert {line.reason for line in sp.coverage(low, lambda name, module: False) if line.name.startswith("blocks")} == {
        "not selected by where="
    }


def test_a_factorized_model_can_be_factorized_further() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    once = sp.factorize(model, where=sp.match("0"), rank=2)
    twice = sp.factorize(once, where=EVERYTHING, rank=3)
    assert [layer.rank for layer in twice] == [2, 3, 3]
    with pytest.raises(ValueError, match="nothing to factorize"):
        sp.factorize(twice, where=EVERYTHING)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")  # the dense encoder's own
@pytest.mark.parametrize("rank", [None, 2])
def test_encoders_leave_the_paths_that_do_not_call_their_layers(rank: int | None) -> None:
    """Torch's fused encoder reads ``linear1.weight``, and nested tensors reach layers that cannot take them."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, activation="gelu"), 2).eval()
    x, hidden = torch.randn(3, 5, 12), torch.zeros(3, 5, dtype=torch.bool)
    hidden[0, 3:] = True
    low = sp.factorize(encoder, rank=rank)
    merged = sp.merge(low)
    with torch.enable_grad():
        expected, masked = low(x), low(x, src_key_padding_mask=hidden)
    if rank is None:
        torch.testing.assert_close(expected, encoder(x))
        assert [layer.activation_relu_or_gelu for layer in merged.layers] == [2, 2]  # dense again: fused again
    with torch.no_grad():
        for model in (low, merged):
            torch.testing.assert_close(model(x), expected)
            torch.testing.assert_close(model(x, src_key_padding_mask=hidden)[~hidden], masked[~hidden])
    assert encoder.use_nested_tensor
    assert encoder.layers[0].activation_relu_or_gelu == 2


def test_hooks_of_a_parent_and_buffers_survive() -> None:
    model = Zoo()
    model.register_forward_hook(lambda *_: None)
    low = copy.deepcopy(sp.factorize(model))
    assert len(low._forward_hooks) == 1
    assert {name for name, _ in low.named_buffers()} >= {"norm.running_mean", "norm.running_var"}
