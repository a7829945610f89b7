"""`correct` brings each layer's output nearer, exactly where the ranks allow it."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import LayerError, SettingError
from spectrim.layers import named_factors, named_layers
from spectrim.linalg import svd, weighted_svd
from spectrim.surgery import correct as module
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.correct import correct, uncorrected
from spectrim.surgery.recalibrate import recalibrate
from spectrim.surgery.regression import truncated

EVERYTHING = sp.match("*")


def images(count: int = 4, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 4, size, size).double() + 0.5, torch.zeros(8)) for _ in range(count)]


def convolutions() -> nn.Sequential:
    return (
        nn.Sequential(
            nn.Conv2d(4, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, (3, 2), stride=2, padding=1, padding_mode="reflect", bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, padding="same", dilation=2, groups=2),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 3, stride=2),
            nn.Flatten(2),
            nn.Linear(99, 9),
        )
        .double()
        .eval()
    )


def outputs(model: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input and the output of one layer."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = dict(model.named_modules())[name].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
def test_no_layer_gets_worse_and_most_get_better(scheme: Any) -> None:
    """With the inputs that it has in the corrected network, each layer is at least as near to the dense one as its cut was."""
    dense, data = convolutions(), images()
    cut = sp.prune(sp.factorize(dense, scheme, EVERYTHING), sp.budget.Fixed(3))
    corrected = correct(cut, dense, data)
    better = 0
    for name, layer in named_layers(cut):
        before = after = 0.0
        for x, _ in data:
            own, output = outputs(corrected, name, x)
            _, wanted = outputs(dense, name, x)
            with torch.no_grad():
                before += float((layer(own) - wanted).square().sum())
            after += float((output - wanted).square().sum())
        assert after <= before * (1 + 1e-9)
        better += after < 0.98 * before
    assert better >= 4  # all but the first, whose inputs are as they were, if it has no bias
    assert [f.rank for _, f in named_factors(corrected)] == [f.rank for _, f in named_factors(cut)]


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
def test_full_ranks_recover_the_dense_network(scheme: Any) -> None:
    """From any weights, where the inputs span the whole space."""
    dense, data = convolutions(), images()
    other = sp.factorize(convolutions(), scheme, EVERYTHING)
    other.load_state_dict(dict(other.state_dict()) | {k: v for k, v in dense.state_dict().items() if k.startswith("3.")})
    with torch.no_grad():
        for x, _ in data:
            torch.testing.assert_close(correct(other, dense, data)(x), dense(x), rtol=1e-6, atol=1e-6)  # pseudo-inverses square conditions


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
def test_what_was_not_cut_stays(scheme: Any) -> None:
    dense, data = convolutions(), images(1)
    low = sp.factorize(dense, scheme, EVERYTHING)
    corrected = correct(low, low, data)
    for (_, a), (_, b) in zip(named_factors(corrected), named_factors(low), strict=True):
        torch.testing.assert_close(a.matrix(), b.matrix(), rtol=1e-9, atol=1e-9)


def test_one_layer_is_the_weighted_optimum() -> None:
    """Against least squares over the right factor with the left one given, and against random ones: none is nearer."""
    dense = nn.Linear(5, 4, bias=False).double()
    x = (torch.randn(64, 5) @ torch.randn(5, 5)).double()
    cut = sp.prune(sp.factorize(dense, where=EVERYTHING), sp.budget.Fixed(2))
    corrected = correct(cut, dense, [x])
    wanted = dense(x).detach()
    values = torch.linalg.svdvals(wanted)
    torch.testing.assert_close((corrected(x) - wanted).square().sum().detach(), values[2:].square().sum(), rtol=1e-9, atol=1e-12)


def test_with_gradients_the_error_of_the_loss_falls() -> None:
    """One layer, two ways: each is the better one in its own norm."""
    dense = nn.Linear(5, 4, bias=False).double()
    x = (torch.randn(64, 5) @ torch.randn(5, 5)).double()
    scale = torch.tensor([5.0, 1.0, 0.2, 1.0]).double()
    low = sp.factorize(dense, where=EVERYTHING)
    found = calibrate(low, [(x, x)], lambda output, target: (output * scale * target[:, :4]).sum() / 64)
    cut = sp.prune(low, sp.budget.Fixed(2))
    errors = []
    for corrected in (correct(cut, dense, [x]), correct(cut, dense, [x], calibration=found)):
        difference = (corrected(x) - dense(x)).detach()
        errors.append((float(difference.square().sum()), float((difference @ found.outputs[""] * difference).sum())))
    assert errors[0][0] < errors[1][0]
    assert errors[1][1] < errors[0][1]


def test_a_bias_takes_the_mean_by_hand() -> None:
    """Inputs ``(1, t)``: of rank one, and the constant column is the bias's."""
    dense = nn.Linear(2, 2).double()
    with torch.no_grad():
        dense.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 1.0]]))
        dense.bias.copy_(torch.tensor([1.0, 0.0]))
    cut = sp.prune(sp.factorize(dense, where=EVERYTHING), sp.budget.Fixed(1))  # keeps the first output, loses the second
    x = torch.stack([torch.ones(3), torch.tensor([-1.0, 0.0, 4.0])], 1).double()
    assert float((cut(x) - dense(x)).detach().square().sum()) == pytest.approx(17)
    torch.testing.assert_close(correct(cut, dense, [x])(x), dense(x), rtol=1e-9, atol=1e-9)


def test_directions_without_data_keep_the_dense_weight() -> None:
    dense = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    cut = sp.prune(sp.factorize(dense, where=EVERYTHING), {"0": 2})
    x = torch.zeros(8, 4).double()
    x[:, 0] = torch.randn(8).double()
    corrected = correct(cut, dense, [x])
    torch.testing.assert_close(corrected(x), dense(x), rtol=1e-9, atol=1e-9)
    blind = torch.linalg.svd(outputs(corrected, "1", x)[0])[2][1:]  # what the second layer never saw
    torch.testing.assert_close(corrected[1].weight @ blind.T, dense[1].weight @ blind.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_untouched_and_kept_in_their_dtype(dtype: torch.dtype) -> None:
    dense = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).to(dtype).train()
    cut = sp.prune(sp.factorize(dense, where=EVERYTHING), sp.budget.Fixed(3)).train()
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (dense, cut)]
    random = torch.get_rng_state()
    x = torch.linspace(-1, 1, 60).reshape(10, 6).cos().to(dtype)
    corrected = correct(cut, dense, [x, x])
    assert torch.equal(torch.get_rng_state(), random)
    for model, state in zip((dense, cut), states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert model.training
        assert not any(m._forward_hooks for m in model.modules())
    assert corrected(x).dtype == dtype
    assert (corrected(x) - dense(x)).norm() < (cut(x) - dense(x)).norm()


class Several(nn.Module):
    """A layer that runs twice, a tied pair, and kinds that are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(9, 6), nn.LSTM(6, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight
        self.twice = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(self.table(x))[0]
        y = self.attention(y, y, y)[0]
        return self.twice(torch.tanh(self.twice(self.two(torch.tanh(self.one(y))))))


def test_passes_end_at_the_layer_that_they_are_for() -> None:
    """Also at the last of several calls of it: the middle layer runs twice."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.middle(self.first(x).relu()).relu()))

    dense, data = Twice(), [torch.randn(32, 6) for _ in range(2)]
    runs: list[str] = []
    for name, layer in dense.named_children():
        layer.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    cut = sp.prune(sp.factorize(dense, where=EVERYTHING), sp.budget.Fixed(5))  # with the same hooks
    corrected = correct(cut, dense, data)
    once, both, batches = 1, 2, len(data)  # to see the order; for each layer
    assert runs.count("first") == once + both * batches * 3
    assert runs.count("middle") == 2 * (once + both * batches * 2)
    assert runs.count("last") == once + both * batches
    assert all(len(layer._forward_pre_hooks) == 1 and not layer._forward_hooks for _, layer in named_layers(corrected))


class Residual(nn.Module):
    """Convolutions and normalisations with a shortcut, in place where it can be; runs its middle in a mode of torch's, or fails."""

    def __init__(self, mode: str = "") -> None:
        super().__init__()
        self.one, self.two, self.short = nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(4, 6, 3)
        self.norm, self.last = nn.BatchNorm2d(6), nn.Linear(6, 5)
        self.mode, self.runs = mode, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mode == "autocast"):
            y = torch.relu_(self.norm(self.one(x)))
            y = self.two(y) + self.short(x)
        if self.mode == "fails" and self.runs > 3:
            raise RuntimeError("out of luck")
        return self.last(y.float().mean((2, 3)))


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
@pytest.mark.parametrize("mode", ["", "autocast"])
def test_one_pass_gives_the_numbers_of_a_pass_for_each_layer(mode: str, scheme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a network runs its layers in a mode, which would reach the others that wait: they are run one by one then."""
    dense, data = Residual(mode), [torch.randn(16, 4, 8, 8) for _ in range(3)]
    cut = sp.prune(sp.factorize(dense, scheme, EVERYTHING), sp.budget.Fixed(3))
    dense.runs = 0
    at_once = correct(cut, dense, data)
    runs = dense.runs
    monkeypatch.setattr(module, "room", lambda _: 0)
    dense.runs = 0
    step_by_step = correct(cut, dense, data)
    assert dense.runs == len(data) * 4  # its four layers
    assert runs == len(data) if not mode else runs > len(data) * 4
    for (name, one), other in zip(at_once.named_parameters(), step_by_step.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert any(not torch.equal(one, old) for one, old in zip(at_once.parameters(), cut.parameters(), strict=True))
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    for network in (dense, at_once):
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())


def test_a_network_that_fails_on_the_way_keeps_no_hooks() -> None:
    dense, data = Residual("fails"), [torch.randn(16, 4, 8, 8) for _ in range(3)]
    cut = sp.prune(sp.factorize(dense, "channel", EVERYTHING), sp.budget.Fixed(3))
    dense.runs = 1
    with pytest.raises(RuntimeError, match="out of luck"):
        correct(cut, dense, data)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in dense.modules())
    assert torch.is_grad_enabled()


def test_what_is_left_out_is_listed() -> None:
    dense = Several().double()
    cut = sp.prune(sp.factorize(dense, where=EVERYTHING), sp.budget.Fixed(3))
    corrected = correct(cut, dense, [torch.randint(9, (4, 5)) for _ in range(3)])
    left = uncorrected(cut)
    assert left == uncorrected(corrected)
    assert left == {
        "table": "an embedding is a look-up",
        "lstm.weight_ih_l0": "its inputs are inside a fused kernel",
        "lstm.weight_hh_l0": "its inputs are inside a fused kernel",
        "attention.in_proj_weight": "its inputs are inside a fused kernel",
        "attention.out_proj": "its inputs are inside a fused kernel",
        "one": "it is tied to another layer's",
        "two": "it is tied to another layer's",
    }
    changed = {
        name
        for (name, a), (_, b) in zip(named_factors(corrected), named_factors(cut), strict=True)
        if not torch.equal(a.matrix(), b.matrix())
    }
    assert changed == {"twice"}


def test_recalibrate_renews_batchnorm() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    x = torch.randn(32, 2) + 3
    recalibrate(model, [(x, None)])
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0).detach())
    recalibrate(nn.Linear(2, 2), [x])


ERRORS: dict[str, tuple[Callable[[nn.Module], Any], type, str]] = {
    "data": (
        lambda dense: correct(sp.factorize(dense, where=EVERYTHING), dense, []),
        SettingError,
        "correct: data must be at least one batch",
    ),
    "examples": (
        lambda dense: correct(dense, dense, [torch.ones(1, 2)], examples=-1),
        SettingError,
        "correct: examples must be an integer of at least 1",
    ),
    "network": (
        lambda dense: correct(sp.factorize(dense, where=EVERYTHING), nn.Sequential(nn.Linear(2, 3)), [torch.ones(1, 2)]),
        LayerError,
        "layer '0': is not in the network before the cut",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_to_do(call: Callable[[nn.Module], Any], error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(nn.Sequential(nn.Linear(2, 2)))


def test_recalibrate_takes_inputs_as_data_give_them() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.norm(x * scale)

    x = torch.randn(16, 3)
    for inputs in (2 * x, (x, 2.0), {"x": x, "scale": 2.0}):
        model = Net().eval()
        recalibrate(model, [(inputs, torch.zeros(16))])
        torch.testing.assert_close(model.norm.running_mean, 2 * x.mean(0))
        torch.testing.assert_close(model.norm.running_var, 4 * x.var(0))
        assert not model.training


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
def test_some_positions_are_as_good_as_all(scheme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ones in both networks."""
    dense, data = convolutions(), images(12)
    cut = sp.prune(sp.factorize(dense, scheme, EVERYTHING), sp.budget.Fixed(3))
    whole = correct(cut, dense, data)
    looked_at: list[int] = []
    gram = module.moments_of

    def counted(layer: Any, met: Any, dense: Any, most: float, basis: Any) -> Any:
        looked_at.append(round(most * len(data)))
        return gram(layer, met, dense, most, basis)

    monkeypatch.setattr(module, "moments_of", counted)
    monkeypatch.setattr(module, "FEWEST_ROWS", 10)
    monkeypatch.setattr(module, "ROWS", 50)
    some = correct(cut, dense, data)
    assert looked_at[0] == 50 * 4 * 9 < 12 * 8 * 8 * 8
    with torch.no_grad():
        errors = [sum(float((network(x) - dense(x)).square().sum()) for x, _ in data) for network in (cut, some, whole)]
    assert errors[1] < errors[0]
    assert errors[1] == pytest.approx(errors[2], rel=0.05)
    assert not torch.equal(some[0].weight, whole[0].weight)
    assert torch.equal(correct(cut, dense, data)[0].weight, some[0].weight)


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
def test_a_few_directions_of_wide_inputs_improve_the_cut(scheme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No better than all directions, and no layer worse than it was; at full rank the dense layer is found."""
    dense, data = convolutions(), images(12)
    cut = sp.prune(sp.factorize(dense, scheme, EVERYTHING), sp.budget.Fixed(3))
    whole = correct(cut, dense, data)
    monkeypatch.setattr(module, "WIDE_INPUTS", 0)
    if scheme != "channel":
        assert torch.equal(correct(cut, dense, data)[0].weight, whole[0].weight)  # the bound is for the channel scheme alone
    monkeypatch.setattr(module, "WIDE_PATCHES", 0)
    some = correct(cut, dense, data)
    with torch.no_grad():
        errors = [sum(float((network(x) - dense(x)).square().sum()) for x, _ in data) for network in (whole, some, cut)]
    assert 0.9 * errors[0] < errors[1] < min(errors[2], 1.5 * errors[0])
    first = dict(named_layers(correct(sp.factorize(dense, scheme, EVERYTHING), dense, data)))
    for name, layer in first.items():
        torch.testing.assert_close(layer.dense_weight("weight"), dense.get_submodule(name).weight, rtol=1e-4, atol=1e-5)


def test_there_is_room_on_every_device() -> None:
    assert module.room(torch.device("cpu")) >= 2**31
    assert module.room(torch.device("meta")) == 2**31


@pytest.mark.parametrize("value", [0.0, 3.7, 1e4])
def test_constant_inputs_change_no_weight_to_speak_of(value: float) -> None:
    """Centered they leave nothing but rounding, which is no matrix to divide by."""
    dense = nn.Linear(6, 4).double()
    cut = sp.prune(sp.factorize(dense, where=EVERYTHING), sp.budget.Fixed(4))
    x = torch.full((64, 6), value).double()
    corrected = correct(cut, dense, [x, x])
    torch.testing.assert_close(corrected(x), dense(x))
    eye = torch.eye(6).double()
    torch.testing.assert_close(corrected(eye) - corrected(0 * eye), dense(eye) - dense(0 * eye), rtol=0, atol=0.01)


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    dense = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    cut = sp.prune(sp.factorize(dense, where=EVERYTHING), sp.budget.Fixed(2))
    x = torch.ones(8, 4)
    x[0, 0] = torch.inf
    with pytest.raises(LayerError, match="layer '0': its inputs are not finite"):
        correct(cut, dense, [x])


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2, dilation=2), (4, 15)),
        (lambda: nn.Conv2d(4, 6, (5, 1), padding=(2, 0), padding_mode="circular"), (4, 9, 4)),
        (lambda: nn.Conv3d(4, 6, (2, 3, 2), stride=(1, 2, 1), padding=1, groups=2), (4, 4, 5, 4)),
        (lambda: nn.ConvTranspose1d(6, 4, 4, stride=3, padding=1), (6, 9)),
        (lambda: nn.ConvTranspose3d(4, 6, (1, 3, 2), (1, 2, 2), bias=False), (4, 3, 3, 4)),
    ],
    ids=["1d", "column", "3d", "transposed 1d", "transposed 3d"],
)
def test_kernels_of_every_dimension_are_refitted(make: Any, shape: tuple[int, ...], scheme: Any) -> None:
    """At full rank from other weights the regression finds the dense layer; at rank 2 the error does not grow."""
    dense, data = nn.Sequential(make()).double(), [torch.randn(32, *shape).double() + 0.5 for _ in range(3)]
    other = sp.factorize(nn.Sequential(make()).double(), scheme, EVERYTHING)
    cut = sp.factorize(dense, scheme, EVERYTHING, rank=2)
    refitted = correct(cut, dense, data)
    with torch.no_grad():
        x = data[0]
        torch.testing.assert_close(correct(other, dense, data)(x), dense(x), rtol=1e-6, atol=1e-6)  # pseudo-inverses square conditions
        errors = [sum(float((network(x) - dense(x)).square().sum()) for x in data) for network in (refitted, cut)]
    assert errors[0] <= errors[1] + 1e-20  # rank 2 is full in the input scheme of two channels a group


def test_a_spatial_layer_of_many_inputs_is_refitted() -> None:
    """Between the widths at which the two schemes leave the equations for all inputs."""
    dense = nn.Sequential(nn.Conv2d(180, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    data = [(torch.randn(8, 180, 5, 5), torch.zeros(8))]
    low = sp.factorize(dense, "spatial", "0")
    cut = sp.prune(low, {"0": 3})
    x = data[0][0]
    before, after = ((dense(x) - net(x)).square().mean() for net in (cut, sp.correct(cut, dense, data)))
    assert after < before


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_truncation_in_both_metrics_is_that_of_the_weighted_decomposition(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    target, left, right = (
        torch.randn(1, *size, generator=generator, dtype=torch.float64) for size in (shape, (30, shape[0]), (40, shape[1]))
    )
    left, right = left.mT @ left, right.mT @ right
    U, S, Vh = truncated(3, target, right, left)
    X, _, Y = weighted_svd(*svd(target), left, right)
    assert torch.allclose(U * S.unsqueeze(-2) @ Vh, X[..., :3] @ Y[..., :3, :], atol=1e-9)
