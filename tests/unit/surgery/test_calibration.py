"""Moments are those of the rows that the folded matrix meets, for every kind of layer, and nothing about the model changes."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import spectrim as sp
from spectrim.budget.distortion import WhitenedEnergy
from spectrim.errors import LayerError, SettingError
from spectrim.layers import named_factors, patches, weights
from spectrim.linalg.fold import folds
from spectrim.surgery import moments
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.moments import Calibration
from spectrim.surgery.observing import absorbing

EVERYTHING = sp.match("*")


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def squares(output: Any, target: Any = None) -> Tensor:
    """A loss that every output feels, and each differently; the mean over a batch of the target's size."""
    leaves = (
        [output] if isinstance(output, Tensor) else [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    )
    return torch.stack([(y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape) + y.square()).sum() for y in leaves]).sum()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (2, 4, 9)),
    "conv1d-unbatched": (lambda: nn.Conv1d(4, 6, 3, bias=False), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 6)),
    "conv2d-pointwise-stride": (lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 5, 6)),
    "conv2d-tall-stride": (lambda: nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0)), (2, 4, 5, 6)),
    "conv2d-not-square": (lambda: nn.Conv2d(4, 6, (2, 3), (3, 2), (1, 2), (2, 3)), (2, 4, 8, 9)),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (2, 4, 5, 6)),
    "conv2d-valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 5, 6)),
    "conv2d-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 5, 6)),
    "conv2d-replicate-stride": (lambda: nn.Conv2d(4, 6, 3, 2, padding=(0, 2), padding_mode="replicate"), (2, 4, 5, 6)),
    "conv2d-circular-same": (lambda: nn.Conv2d(4, 6, (4, 2), padding="same", padding_mode="circular"), (2, 4, 5, 6)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1, groups=2), (2, 4, 5, 6)),
    "conv2d-unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3), (1, 2, 1), 1, groups=2), (2, 4, 3, 4, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), (2, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 4), (2, 3), (1, 2), (1, 2)), (2, 4, 5, 4)),
    "transposed2d-groups-dilation": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, dilation=(1, 2)), (2, 4, 3, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, (2, 1, 2), 2, output_padding=(0, 1, 1)), (2, 4, 3, 2, 2)),
}
CASES = [
    pytest.param(name, scheme, id=f"{name}-{scheme}")
    for name, (make, _) in LAYERS.items()
    for scheme in folds(getattr(make(), "kernel_size", ()))
]


def rows_of(parts: Any) -> Tensor:
    return torch.cat(list(parts), dim=-2)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@pytest.mark.parametrize(("name", "scheme"), CASES)
@pytest.mark.parametrize("size", [1, 2**22], ids=["small-parts", "one-part"])
def test_rows_make_the_gradient_of_the_matrix(name: str, scheme: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``dL/dM = sum_rows g x^T``: what makes `inputs` and `outputs` the two factors of Fisher's matrix."""
    for where in (weights, patches):
        monkeypatch.setattr(where, "ROWS_SIZE", size)
    make, shape = LAYERS[name]
    low = sp.factorize(make().double(), scheme, EVERYTHING)
    if low.bias is not None:
        nn.init.zeros_(low.bias)
    x, matrix = double(*shape), low.factors_of("weight").matrix().detach().requires_grad_()
    weight = low.unfold(low, "weight", matrix, scheme)
    dense = sp.merge(low)
    y = torch.func.functional_call(dense, {"weight": weight}, x)
    cotangent = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, matrix, cotangent)
    inputs, outputs = rows_of(low.input_rows(x, y.shape)), rows_of(low.output_rows(cotangent, x.shape))
    near((outputs.mT @ inputs).reshape(matrix.shape), expected)
    if scheme == "channel":
        near(inputs @ matrix.detach().mT, rows_of(low.output_rows(y.detach(), x.shape)))


class Net(nn.Module):
    """A tied pair, a layer that runs twice, an attention inside torch's encoder, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight
        self.again = nn.Linear(6, 6)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True)
        self.lstm = nn.LSTM(6, 5, 2, dropout=0.5, batch_first=True, bidirectional=True)
        self.idle = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.one(x)) + self.two(x)
        x = self.again(torch.tanh(self.again(x)))
        return self.lstm(self.encoder(x))[0]


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    return sp.factorize(Net().to(dtype), "channel", EVERYTHING)


def data(dtype: torch.dtype = torch.float64, batches: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(3, 4, 6, dtype=dtype), torch.randn(3, 4, 10, dtype=dtype)) for _ in range(batches)]


def test_moments_of_a_linear_layer_by_hand() -> None:
    low = sp.factorize(nn.Linear(2, 2, bias=False).double(), where=EVERYTHING)
    x = torch.tensor([[[1.0, 2.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 0.0]]]).double()  # two examples of two positions
    found = calibrate(low, [(x, x)], lambda output, target: (output * target).sum() / 2)  # each example's gradient at the output is x
    near(found.inputs[""], torch.tensor([[10.0, 2.0], [2.0, 5.0]]).double() / 2)
    near(found.outputs[""], torch.tensor([[10.0, 2.0], [2.0, 5.0]]).double() / 4)
    near(found.slopes[""], (low.U.T @ (x.flatten(0, 1).T @ x.flatten(0, 1)) @ low.Vh.T).diagonal().detach() / 2)
    assert found.examples == 2


def test_every_use_adds_up() -> None:
    low, batches = net(), data()
    found = calibrate(low, batches, centered=False)
    low.eval()
    sums = {"one": 0, "again": 0}
    with torch.no_grad():
        for x, _ in batches:
            first = low.one(x)
            y = torch.relu(first) + low.two(x)
            z = torch.tanh(low.again(y))
            sums["one"] = sums["one"] + 2 * x.flatten(0, 1).T @ x.flatten(0, 1)
            sums["again"] = sums["again"] + sum(v.flatten(0, 1).T @ v.flatten(0, 1) for v in (y, z))
    for name, total in sums.items():
        near(found.inputs[name], total / 6)
    assert found.skipped == {"idle": moments.NOT_CALLED}
    assert set(found.inputs) == {name for name, _ in named_factors(low)} - {"idle"}
    assert (found.outputs, found.slopes, found.examples) == ({}, {}, 6)


def test_slopes_are_the_gradient_and_outputs_cover_every_matrix() -> None:
    """Of hidden states and packed projections too, which torch's own kernels keep to themselves."""
    low, batches = net(), data()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean()

    found = calibrate(low, batches, loss)
    low.eval()
    mean = sum(loss(low(x), y) for x, y in batches) / 2
    mean.backward()
    for name, factors in named_factors(low):
        if name != "idle":
            near(found.slopes[name], factors.S.grad)
            assert found.outputs[name].shape == (factors.shape[0], factors.shape[0])
            assert torch.linalg.eigvalsh(found.outputs[name]).min() > -1e-12
    assert set(found.slopes) == set(found.outputs) == set(found.inputs)


def hidden_rows(low: Any, x: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
    """The inputs of the second layer and its hidden states, from torch's kernel run on one layer after the other."""
    outputs, hidden = x, torch.zeros(0)
    for layer in range(2):
        x, directions = outputs, []
        for suffix in ("", "_reverse"):
            kernel = nn.LSTM(x.shape[-1], 5, batch_first=True).double()
            kernel.load_state_dict(
                {f"{n}_l0": getattr(low, f"{n}_l{layer}{suffix}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            )
            y = kernel(x.flip(1) if suffix else x)[0]
            if backwards == bool(suffix):
                hidden = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
            directions.append(y.flip(1) if suffix else y)
        outputs = torch.cat(directions, -1)
    return x, hidden


@pytest.mark.parametrize("backwards", [False, True])
def test_hidden_states_of_a_deep_bidirectional_layer(backwards: bool) -> None:
    low = sp.factorize(nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True).double(), where=EVERYTHING)
    x = double(3, 4, 6)
    found = calibrate(low, [x])
    with torch.no_grad():
        below, hidden = hidden_rows(low, x, backwards)
    suffix = "_reverse" if backwards else ""
    for kind, rows in (("ih", below), ("hh", hidden)):
        near(found.inputs[f"weight_{kind}_l1{suffix}"], rows.flatten(0, 1).T @ rows.flatten(0, 1) / 3)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_a_bias_takes_up_the_mean_of_what_is_cut(name: str) -> None:
    make, shape = LAYERS[name]
    low, x = sp.factorize(make().double(), "channel", EVERYTHING), double(*shape) + 2
    found, raw = calibrate(low, [x]), calibrate(low, [x], centered=False)
    if low.bias is None:
        assert not found.means
        assert torch.equal(found.inputs[""], raw.inputs[""])
        return
    y = low(x)
    rows = rows_of(low.input_rows(x, y.shape))
    deviations = rows - rows.mean(-2, keepdim=True)
    near(found.inputs[""], (deviations.mT @ deviations).reshape(found.inputs[""].shape) / found.examples)
    near(found.means[""], rows.mean(-2).reshape(found.means[""].shape))
    before = low.bias.detach().clone()
    change, plain = (sp.prune(low, sp.budget.Fixed(1), calibration=c)(x) - y for c in (found, raw))
    channel = -1 if name == "linear" else 0 if "unbatched" in name else 1
    near(change.detach().transpose(0, channel).flatten(1).mean(1), torch.zeros(change.shape[channel]).double())
    assert change.square().sum() < plain.square().sum()
    assert torch.equal(low.bias, before)
    in_place = copy.deepcopy(low)
    sp.prune_(in_place, sp.budget.Fixed(1), calibration=found)
    near((in_place(x) - y).detach(), change.detach())


def test_only_a_bias_and_a_weight_of_its_own_take_up_a_mean() -> None:
    low = net()
    assert set(absorbing(low)) == {"again", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2", "idle"}
    assert set(calibrate(low, data()).means) == {"again", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2"}
    spatial = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 1))
    assert set(absorbing(sp.factorize(spatial, "spatial", EVERYTHING))) == {"1"}
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].bias = shared[0].bias
    assert not absorbing(sp.factorize(shared, where=EVERYTHING))


def test_inputs_that_never_vary_keep_their_mean() -> None:
    low, x = sp.factorize(nn.Linear(6, 5).double(), where=EVERYTHING), double(1, 6).expand(8, 6)
    found = calibrate(low, [x])
    assert not found.means
    near(sp.prune(low, sp.budget.Fixed(1), calibration=found)(x).detach(), low(x).detach())


def test_a_cut_that_is_refused_leaves_biases_alone() -> None:
    low, x = sp.factorize(nn.Linear(6, 5).double(), where=EVERYTHING), double(8, 6) + 1
    found, before = calibrate(low, [x]), low.bias.detach().clone()
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(LayerError, match="is trained by the optimizer but is not in both models"):
        sp.prune_(low, sp.budget.Fixed(1), stranger, calibration=found)
    assert torch.equal(low.bias, before)
    assert low.rank == 5


def test_packed_sequences_count_what_is_there() -> None:
    low = sp.factorize(nn.GRU(6, 5).double(), where=EVERYTHING)
    sequences = [double(2, 6), double(4, 6)]
    found = calibrate(low, [pack_sequence(sequences, enforce_sorted=False)])
    rows = torch.cat(sequences)
    near(found.inputs["weight_ih_l0"], rows.T @ rows / 2)
    with torch.no_grad():
        states = torch.cat([torch.cat([torch.zeros(1, 5).double(), low(s)[0][:-1]]) for s in sequences])
    near(found.inputs["weight_hh_l0"], states.T @ states / 2)


def test_attention() -> None:
    low = sp.factorize(nn.MultiheadAttention(6, 2, batch_first=True).double(), where=EVERYTHING)
    query, key, value = double(2, 3, 6), double(2, 4, 6), double(2, 4, 6)
    found = calibrate(low, [((query, key, value), None)], squares, centered=False)
    near(found.inputs["in_proj_weight"], sum(x.flatten(0, 1).T @ x.flatten(0, 1) for x in (query, key, value)) / 2)
    assert found.outputs["in_proj_weight"][:6, 6:].abs().max() == 0  # a query's gradient is not a key's
    identity = copy.deepcopy(low.out_proj)
    with torch.no_grad():
        attended = nn.MultiheadAttention(6, 2, batch_first=True).double()
        attended.load_state_dict(
            {"in_proj_weight": low.in_proj_weight, "in_proj_bias": low.in_proj_bias}
            | {"out_proj.weight": torch.eye(6).double(), "out_proj.bias": torch.zeros(6).double()}
        )
        rows = attended(query, key, value)[0].flatten(0, 1)
    near(found.inputs["out_proj"], rows.T @ rows / 2)
    assert torch.equal(identity.U, low.out_proj.U)
    same = calibrate(low, [((query, query, query), None)], squares)
    near(same.inputs["in_proj_weight"], query.flatten(0, 1).T @ query.flatten(0, 1) / 2)
    assert same.outputs["in_proj_weight"][:6, 6:].abs().max() > 0


def test_nothing_about_the_model_changes() -> None:
    low = net().train()
    low.encoder.eval()
    frozen = low.again.factors_of("weight").S.requires_grad_(False)
    before = {name: value.clone() for name, value in low.state_dict().items()}
    flags = [m.training for m in low.modules()]
    hooks = [len(m._forward_hooks) for m in low.modules()]
    state = torch.get_rng_state()
    batches = data()
    torch.set_rng_state(state)
    found = calibrate(low, batches, lambda output, target: (output - target).square().mean())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in low.state_dict().items())
    assert [m.training for m in low.modules()] == flags
    assert [len(m._forward_hooks) for m in low.modules()] == hooks
    assert all(p.grad is None for p in low.parameters())
    assert not frozen.requires_grad
    assert "again" in found.slopes
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_models_have_moments_in_float64(dtype: torch.dtype) -> None:
    low = net(dtype)
    exact = calibrate(copy.deepcopy(low).double(), batches := data())
    found = calibrate(low, [(x.to(dtype), y.to(dtype)) for x, y in batches], lambda output, target: (output - target).square().mean())
    for name, moment in found.inputs.items():
        assert moment.dtype == found.outputs[name].dtype == found.slopes[name].dtype == torch.float64
        error = (moment - exact.inputs[name]).norm() / exact.inputs[name].norm()
        assert error < 32 * torch.finfo(dtype).eps  # a few roundings of each activation


def test_examples_are_counted_by_batches() -> None:
    low, batches = net(), data(batches=3)
    assert calibrate(low, batches, examples=4).examples == 6
    assert calibrate(low, batches, examples=None).examples == 9
    near(calibrate(low, batches, examples=3).inputs["one"], calibrate(low, batches[:1]).inputs["one"])
    near(calibrate(low, [x for x, _ in batches]).inputs["one"], calibrate(low, batches).inputs["one"])


def test_embeddings_are_skipped_and_a_tied_head_is_not() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.positions = nn.Embedding(8, 5), nn.Embedding(4, 5)
            self.head = nn.Linear(5, 8, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x) + self.positions(torch.arange(x.shape[1])))

    found = calibrate(sp.factorize(Language(), where=EVERYTHING), [torch.randint(8, (2, 4))])
    assert found.skipped == {"positions": moments.EMBEDDING}
    assert found.inputs["table"].shape == (5, 5)


def test_wide_outputs_have_no_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "WIDEST", 9)
    found = calibrate(net(), data(), lambda output, target: (output - target).square().mean())
    assert {name for name in found.inputs if name not in found.outputs} == {
        *("encoder.self_attn.in_proj_weight",),
        *(f"lstm.weight_{kind}_l{layer}{suffix}" for kind in ("ih", "hh") for layer in (0, 1) for suffix in ("", "_reverse")),
    }


def test_very_wide_inputs_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "WIDEST_INPUTS", 8)
    found = calibrate(net(), data())
    wide = {"encoder.linear2": 8, **{f"lstm.weight_ih_l1{suffix}": 10 for suffix in ("", "_reverse")}}
    assert {name for name, reason in found.skipped.items() if reason == moments.WIDE} == {n for n, size in wide.items() if size > 8}
    assert found.inputs["encoder.linear2"].shape == (8, 8)


def test_errors_say_what_to_do() -> None:
    low = net()
    with pytest.raises(LayerError, match=re.escape("call factorize(model) first")):
        calibrate(nn.Linear(2, 2), data())
    with pytest.raises(SettingError, match=re.escape("calibrate: examples must be an integer of at least 1, or None for all, got 0")):
        calibrate(low, data(), examples=0)
    with pytest.raises(SettingError, match="at least one batch"):
        calibrate(low, [])
    with pytest.raises(SettingError, match=re.escape("batches (inputs, target) with a loss")):
        calibrate(low, [data()[0][0]], squares)
    with pytest.raises(LayerError, match="layer 'one': its inputs are not finite"):
        calibrate(low, [torch.full((1, 4, 6), torch.inf).double()])
    empty = Calibration({}, {}, {}, {}, 1)
    with pytest.raises(LayerError, match=re.escape("layer 'one': (6 x 6) is not in the calibration; calibrate this model")):
        empty.metrics("one", (6, 6))


@pytest.mark.parametrize("scheme", ["channel", "input"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_cut_needs_no_more_than_the_inputs_through_the_singular_vectors(
    scheme: Any, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projected first, the same cut and bias as from the moments of all inputs, also of a network that is cut already."""
    low = sp.factorize(nn.Sequential(nn.Conv2d(16, 6, 5, padding=2, groups=groups)).double(), scheme, EVERYTHING)
    low = sp.prune(low, sp.budget.Fixed(3)) if scheme == "input" else low
    batches = [double(4, 16, 6, 6) + 3 for _ in range(2)]
    whole = calibrate(low, batches)
    monkeypatch.setattr(moments, "PROJECTED", 1)
    seen = calibrate(low, batches)
    rank = low[0].rank
    assert not whole.bases
    assert seen.inputs["0"].shape[-2:] == (rank, rank)
    assert seen.bases["0"].shape[-2:] == (rank, low[0].Vh.shape[-1])
    for a, b in zip(
        sp.prune(low, sp.budget.Fixed(2), calibration=seen)[0].parameters(),
        sp.prune(low, sp.budget.Fixed(2), calibration=whole)[0].parameters(),
        strict=True,
    ):
        near(a, b)
    near(WhitenedEnergy(seen)(low)["0"], WhitenedEnergy(whole)(low)["0"])
    near(
        WhitenedEnergy(seen)(sp.prune(low, sp.budget.Fixed(2)))["0"],
        WhitenedEnergy(whole)(sp.prune(low, sp.budget.Fixed(2)))["0"],
    )


def test_moments_of_other_directions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "PROJECTED", 1)
    low, x = sp.factorize(nn.Sequential(nn.Linear(12, 4)), where=EVERYTHING), [torch.randn(20, 12)]
    known = calibrate(low, x)
    with torch.no_grad():
        low[0].Vh.copy_(torch.linalg.qr(torch.randn(12, 4)).Q.T)
    with pytest.raises(SettingError, match="calibrate the model as it is"):
        sp.prune(low, sp.budget.Fixed(2), calibration=known)


def test_single_precision_is_as_good_as_double_for_a_cut() -> None:
    """Products in float32, sums in float64: also where the mean of the inputs is far larger than their deviations."""
    low = sp.factorize(nn.Sequential(nn.Linear(24, 16)), where=EVERYTHING)
    x = torch.randn(500, 24) * torch.logspace(0, -2, 24) + 200
    single, exact = calibrate(low, [x]), calibrate(copy.deepcopy(low).double(), [x.double()])
    error = (single.inputs["0"] - exact.inputs["0"]).norm() / exact.inputs["0"].norm()
    assert error < 1e-5
    torch.testing.assert_close(WhitenedEnergy(single)(low)["0"], WhitenedEnergy(exact)(low)["0"], rtol=1e-4, atol=1e-7)


def test_a_process_takes_all_batches_of_a_loader_that_is_divided_already() -> None:
    class First:
        """Of two processes, whose sums are its own."""

        process_index, num_processes, device = 0, 2, torch.device("cpu")

        def reduce(self, tensor: Tensor, how: str) -> Tensor:
            return tensor

    model, data = sp.factorize(nn.Linear(5, 4)).double(), torch.utils.data.TensorDataset(double(16, 5))
    own = torch.utils.data.DataLoader(data, 2, sampler=torch.utils.data.DistributedSampler(data, 2, 0))
    assert calibrate(model, own, accelerator=First()).examples == 8
    assert calibrate(model, own, accelerator=First(), examples=7).examples == 4  # the other one takes as many
    assert calibrate(model, list(own), accelerator=First()).examples == 4
    near(calibrate(model, own, accelerator=First()).inputs[""], calibrate(model, list(own)).inputs[""])
