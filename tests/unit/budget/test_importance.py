"""What each importance says a cut distortions, against its formula, by hand, and against the loss itself."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectrim as sp
from spectrim.budget.distortion.base import distortions_of
from spectrim.budget.distortion.compare import compare_importances
from spectrim.budget.distortion.energy import SpectralEnergy, WhitenedEnergy
from spectrim.budget.distortion.loss import LossSensitivity
from spectrim.budget.distortion.measured import MeasuredLoss
from spectrim.budget.distortion.normalized import NormalizedEnergy
from spectrim.errors import LayerError, RankError, SettingError
from spectrim.layers import named_factors
from spectrim.layers.linear import FactorizedConv1D
from spectrim.surgery.calibrate import calibrate
from spectrim.surgery.moments import Calibration

EVERYTHING = sp.match("*")


def relative(matrix: Tensor) -> Tensor:
    """Tail energy of one matrix, or of several blocks together, over all."""
    squares = torch.linalg.svdvals(matrix.double()).square()
    squares = squares.sum(0) if squares.dim() > 1 else squares
    return torch.cat([squares.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)]) / squares.sum()


def low_of(*layers: nn.Module, scheme: Any = "channel") -> Any:
    return sp.factorize(nn.Sequential(*layers).double().eval(), scheme, EVERYTHING)


def positive_definite(size: int, *blocks: int, rank: int | None = None) -> Tensor:
    half = torch.randn(*blocks, size, rank or 2 * size, dtype=torch.float64)
    return half @ half.mT / half.shape[-1]


def moments(low: nn.Module, gradients: bool = True, without: tuple[str, ...] = ()) -> Calibration:
    """A calibration of random moments."""
    held = {name: f for name, f in named_factors(low) if name not in without}
    blocks = {name: f.S.shape[:-1] for name, f in held.items()}
    inputs = {name: positive_definite(f.shape[1], *blocks[name]) for name, f in held.items()}
    outputs = {name: positive_definite(f.shape[0], *blocks[name]) for name, f in held.items()} if gradients else {}
    slopes = {name: torch.randn(f.S.shape, dtype=torch.float64) for name, f in held.items()} if gradients else {}
    return Calibration(inputs, outputs, slopes, dict.fromkeys(without, "not called"), 1)


# ---- normalised


def randomised(norm: Any) -> Any:
    """Give a norm gains and statistics that differ from feature to feature."""
    with torch.no_grad():
        norm.weight.copy_(torch.randn(norm.weight.shape))
        if getattr(norm, "running_var", None) is not None:
            norm.running_var.copy_(torch.rand(norm.running_var.shape) * 4 + 0.1)
    return norm


def distortion_of(low: nn.Module, x: Any, name: str) -> Tensor:
    return NormalizedEnergy(x)(low)[name]


KINDS = ["conv1d", "conv2d", "conv3d", "transposed", "groups", "transposed groups", "linear"]


def convolution(kind: str) -> tuple[Any, Any, tuple[int, ...]]:
    """A layer, the norm behind it, and the shape of an input."""
    cases: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
        "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 8)),
        "conv2d": (nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 4, 8, 8)),
        "conv3d": (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 4, 4, 4)),
        "transposed": (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        "groups": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 8, 8)),
        "transposed groups": (nn.ConvTranspose2d(4, 6, (2, 3), groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        "linear": (nn.Linear(5, 6), nn.BatchNorm1d(6), (3, 5)),
    }
    return cases[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_a_batchnorm_scales_the_rows_as_folding_it_would(kind: str, scheme: Any) -> None:
    layer, norm, shape = convolution(kind)
    norm = randomised(norm)
    low = low_of(layer, norm, nn.ReLU(), scheme=scheme)
    scale = norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()
    axis = 1 if getattr(layer, "transposed", False) else 0
    weight = layer.weight.detach().double()
    if axis == 1 and layer.groups > 1:
        weight = weight.unflatten(0, (2, 2)) * scale.double().view(2, 1, 3, 1, 1)
        weight = weight.flatten(0, 1)
    else:
        weight = weight * scale.double().view([-1 if place == axis else 1 for place in range(weight.dim())])
    matrix = type(low[0]).fold(low[0], "weight", weight, low[0].scheme)
    torch.testing.assert_close(distortion_of(low, torch.randn(shape, dtype=torch.float64), "0"), relative(matrix), rtol=1e-9, atol=1e-12)


def test_scaling_a_layer_in_front_of_its_batchnorm_changes_nothing() -> None:
    """The network is the same; spectral energy is not."""
    layer, norm = nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6, eps=0.0)
    x, factors = torch.randn(50, 6, dtype=torch.float64), torch.tensor([1.0, 5.0, 0.2, 3.0, 1.0, 9.0], dtype=torch.float64)
    first = low_of(layer, norm)
    with torch.no_grad():
        layer.weight.mul_(factors.unsqueeze(-1))
        norm.running_var.mul_(factors.square())
    second = low_of(layer, norm)
    torch.testing.assert_close(first(x), second(x))
    torch.testing.assert_close(distortion_of(first, x, "0"), distortion_of(second, x, "0"), rtol=1e-9, atol=1e-12)
    assert (SpectralEnergy()(first)["0"] - SpectralEnergy()(second)["0"]).abs().max() > 0.05


def test_what_stands_between_separates() -> None:
    norm, x = randomised(nn.BatchNorm1d(6)), torch.randn(4, 5, dtype=torch.float64)
    plain = SpectralEnergy()(low_of(nn.Linear(5, 6), norm))
    for between, apart in (
        (nn.ReLU(), True),
        (nn.ReLU(inplace=True), True),
        (nn.Identity(), False),
        (nn.Dropout(), False),
        (nn.Unflatten(1, (6, 1)), False),
    ):
        torch.default_generator.manual_seed(0)
        low = low_of(nn.Linear(5, 6), between, norm)
        energy = SpectralEnergy()(low)["0"]
        assert (
            torch.equal(distortion_of(low, x, "0"), energy) is apart
            or torch.allclose(distortion_of(low, x, "0"), energy, rtol=1e-9) is apart
        )
    assert plain["0"].shape == (6,)


def test_layernorm_behind_and_in_front() -> None:
    behind = low_of(nn.Linear(5, 6), randomised(nn.LayerNorm(6)))
    x = torch.randn(4, 5, dtype=torch.float64)
    weight, gain = behind[0].weight.detach(), behind[1].weight.detach().double().abs()
    torch.testing.assert_close(distortion_of(behind, x, "0"), relative(gain.unsqueeze(-1) * weight), rtol=1e-9, atol=1e-12)
    for norm in (nn.LayerNorm(5), nn.RMSNorm(5)):
        front = low_of(randomised(norm), nn.Linear(5, 6))
        weight, gain = front[1].weight.detach(), front[0].weight.detach().double().abs()
        torch.testing.assert_close(distortion_of(front, x, "1"), relative(weight * gain), rtol=1e-9, atol=1e-12)
    bare = low_of(nn.Linear(5, 6), nn.LayerNorm(6, elementwise_affine=False))
    torch.testing.assert_close(distortion_of(bare, x, "0"), SpectralEnergy()(bare)["0"], rtol=1e-9, atol=1e-12)


class Permuted(nn.Module):
    """Convolution, then LayerNorm over channels that were moved to the end, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.up = nn.Conv2d(3, 6, 3), randomised(nn.LayerNorm(6)), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        return out


def test_a_permutation_does_not_hide_a_norm() -> None:
    low = sp.factorize(Permuted().double(), "channel", EVERYTHING)
    distortions, gain = NormalizedEnergy(torch.randn(2, 3, 7, 7, dtype=torch.float64))(low), low.norm.weight.detach().abs()
    expected = relative(gain.unsqueeze(-1) * low.conv.weight.detach().flatten(1))
    torch.testing.assert_close(distortions["conv"], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(distortions["up"], relative(low.up.weight.detach() * gain), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["group", "instance", "batch"])
def test_norms_without_running_statistics_take_those_of_the_batch(kind: str) -> None:
    norms = {
        "group": nn.GroupNorm(2, 6),
        "instance": nn.InstanceNorm1d(6, affine=True),
        "batch": nn.BatchNorm1d(6, track_running_stats=False),
    }
    low, x = low_of(nn.Conv1d(4, 6, 1, bias=False), randomised(norms[kind])), torch.randn(3, 4, 9, dtype=torch.float64)
    y = low[0](x).detach()
    spread = {
        "group": y.reshape(3, 2, -1).var(-1, correction=0).mean(0).repeat_interleave(3),
        "instance": y.var(-1, correction=0).mean(0),
        "batch": y.var((0, 2), correction=0),
    }[kind]
    scale = low[1].weight.detach().double().abs() / (spread + low[1].eps).sqrt()
    expected = relative(scale.unsqueeze(-1) * low[0].weight.detach()[..., 0])
    torch.testing.assert_close(distortion_of(low, x, "0"), expected, rtol=1e-9, atol=1e-12)


class PreNorm(nn.Module):
    """Embedding with a norm behind it, attention behind a norm, recurrence behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norms = nn.Embedding(9, 6), nn.ModuleList(randomised(nn.LayerNorm(6)) for _ in range(3))
        self.attention, self.lstm = nn.MultiheadAttention(6, 2, batch_first=True), nn.LSTM(6, 5, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norms[0](self.embed(tokens))
        x = self.norms[1](self.attention(x, x, x, need_weights=False)[0])
        out: Tensor = self.lstm(x)[0]
        return out


def test_embeddings_attention_and_recurrence() -> None:
    low = sp.factorize(PreNorm().double(), where=EVERYTHING).eval()
    distortions = NormalizedEnergy(torch.randint(0, 9, (2, 4)))(low)
    first, second = (low.norms[place].weight.detach().abs() for place in (0, 1))
    expected = {
        "embed": low.embed.weight.detach() * first,
        "attention.in_proj_weight": low.attention.in_proj_weight.detach() * first,
        "attention.out_proj": second.unsqueeze(-1) * low.attention.out_proj.weight.detach(),
        "lstm.weight_ih_l0": low.lstm.weight_ih_l0.detach() * second,
        "lstm.weight_hh_l0": low.lstm.weight_hh_l0.detach(),
    }
    assert set(distortions) == set(expected)
    for name, matrix in expected.items():
        torch.testing.assert_close(distortions[name], relative(matrix), rtol=1e-9, atol=1e-12, msg=name)


def test_the_transposed_linear_layer_of_transformers() -> None:
    transformers = pytest.importorskip("transformers.pytorch_utils")
    low = low_of(randomised(nn.LayerNorm(5)), transformers.Conv1D(7, 5), randomised(nn.LayerNorm(7)))
    assert isinstance(low[1], FactorizedConv1D)
    matrix = low[2].weight.detach().abs().unsqueeze(-1) * low[1].weight.detach().T * low[0].weight.detach().abs()
    torch.testing.assert_close(distortion_of(low, torch.randn(3, 5, dtype=torch.float64), "1"), relative(matrix), rtol=1e-9, atol=1e-12)


class Twice(nn.Module):
    """One layer that runs twice, with a norm of its own behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norms = nn.Linear(6, 6), nn.ModuleList(randomised(nn.LayerNorm(6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norms[1](self.layer(F.relu(self.norms[0](self.layer(x)))))
        return out


def test_a_layer_that_runs_twice_takes_the_mean_of_the_squares() -> None:
    low = sp.factorize(Twice().double(), where=EVERYTHING)
    first, second = (norm.weight.detach() for norm in low.norms)
    scale = ((first.square() + second.square()) / 2).sqrt()
    expected = relative(scale.unsqueeze(-1) * low.layer.weight.detach())
    torch.testing.assert_close(distortion_of(low, torch.randn(2, 6, dtype=torch.float64), "layer"), expected, rtol=1e-9, atol=1e-12)


def test_a_branch_that_is_multiplied_by_zero_costs_nothing() -> None:
    layers = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
    nn.init.zeros_(layers[1].weight)
    distortions = NormalizedEnergy(torch.randn(3, 4, dtype=torch.float64))(low_of(*layers))
    assert distortions["0"].tolist() == [0.0] * 5


# ---- with moments


@pytest.mark.parametrize("groups", [1, 2])
def test_whitened_energy_is_the_share_of_the_output_that_is_lost(groups: int) -> None:
    low, x = low_of(nn.Conv1d(4, 6, 1, groups=groups, bias=False)), torch.randn(40, 4, 3, dtype=torch.float64)
    calibration = calibrate(low, [x])
    distortions, out = WhitenedEnergy(calibration)(low)["0"], low(x).detach()
    for rank in range(1, low[0].rank + 1):
        lost = sp.prune(low, {"0": rank}, calibration=calibration)(x) - out
        torch.testing.assert_close(lost.square().sum() / out.square().sum(), distortions[rank], rtol=1e-7, atol=1e-12)  # roots of A


def test_inputs_that_span_less_than_the_space() -> None:
    low = low_of(nn.Linear(6, 5, bias=False))
    calibration = Calibration({"0": positive_definite(6, rank=2)}, {}, {}, {}, 1)
    distortions = WhitenedEnergy(calibration)(low)["0"]
    assert distortions[1] > 1e-3
    assert distortions[2] < 1e-12, "two directions come in, two singular values are enough"


def test_second_order_by_hand() -> None:
    low = low_of(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        low[0].S.copy_(torch.tensor([3.0, 1.0]))
        low[0].U.copy_(torch.eye(2))
        low[0].Vh.copy_(torch.eye(2))
    A, G = torch.diag(torch.tensor([1.0, 4.0])).double(), torch.diag(torch.tensor([1.0, 9.0])).double()
    calibration = Calibration({"0": A}, {"0": G}, {"0": torch.tensor([0.5, -2.0]).double()}, {}, 1)
    # squares of 3 * 1 * 1 = 3 and 1 * sqrt(9) * sqrt(4) = 6: the smaller value weighs more; halves of 45, 9, 0
    torch.testing.assert_close(LossSensitivity(calibration)(low)["0"], torch.tensor([22.5, 4.5, 0.0]).double())
    # |0.5 * 3| = 1.5 and |-2 * 1| = 2: cut in the order of the values
    torch.testing.assert_close(LossSensitivity(calibration, order=1)(low)["0"], torch.tensor([3.5, 2.0, 0.0]).double())


def test_second_order_is_the_loss_of_a_quadratic() -> None:
    """A linear layer under a squared loss: gradient covariance at the optimum's noise level scales the same for every direction."""
    low = low_of(nn.Linear(5, 4, bias=False))
    calibration = moments(low)
    A, G, W = calibration.inputs["0"], calibration.outputs["0"], low[0].weight.detach()
    distortions = LossSensitivity(calibration)(low)["0"]
    for rank in range(1, 4):
        D = sp.prune(low, {"0": rank}, calibration=calibration)[0].weight.detach() - W
        torch.testing.assert_close(0.5 * torch.trace(G @ D @ A @ D.T), distortions[rank], rtol=1e-8, atol=1e-12)
        other = sp.prune(low, {"0": rank})[0].weight.detach() - W
        assert 0.5 * torch.trace(G @ other @ A @ other.T) >= distortions[rank]


def test_first_order_of_blocks_cuts_each_at_the_common_rank() -> None:
    low = low_of(nn.Conv1d(6, 4, 1, groups=2))
    calibration = moments(low)
    rises = (calibration.slopes["0"] * low[0].S.detach()).abs()
    expected = [float(rises[:, rank:].sum()) for rank in range(3)]
    torch.testing.assert_close(LossSensitivity(calibration, 1)(low)["0"], torch.tensor(expected).double())


def test_weights_without_moments_are_in_the_same_unit_as_the_others() -> None:
    low = low_of(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5))
    calibration = moments(low, without=("1",))
    energy = SpectralEnergy()(low)["1"]
    torch.testing.assert_close(WhitenedEnergy(calibration)(low)["1"], energy)
    for order in (1, 2):
        distortions = LossSensitivity(calibration, order)(low)
        typical = (distortions["0"][0] + distortions["2"][0]) / 2
        torch.testing.assert_close(distortions["1"], typical * energy)


def test_calibrations_that_do_not_fit() -> None:
    low = low_of(nn.Linear(5, 5), nn.Linear(5, 4))
    with pytest.raises(SettingError, match=r"LossSensitivity: calibration must be made with a loss.*calibrate\(model, data, loss\)"):
        LossSensitivity(moments(low, gradients=False))
    for order in (0, 3, True):
        with pytest.raises(SettingError, match=f"LossSensitivity: order must be 1 or 2, got {order}"):
            LossSensitivity(moments(low), order)
    other = moments(low_of(nn.Linear(5, 5)))
    for importance in (WhitenedEnergy(other), LossSensitivity(other), LossSensitivity(other, 1)):
        with pytest.raises(LayerError, match=r"layer '1': .* is not in the calibration"):
            importance(low)
    with pytest.raises(LayerError, match="layer '0': holds 2 singular values, its slopes are for 5; calibrate this model"):
        LossSensitivity(moments(low), 1)(sp.prune(low, sp.budget.Fixed(2)))


# ---- measured


def classifier() -> tuple[nn.Module, list[Any]]:
    dense = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    x = torch.randn(60, 6)
    y = (x[:, :3] * torch.tensor([3.0, 2.0, 1.0])).argmax(1)
    optimizer = torch.optim.Adam(dense.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(dense(x), y).backward()
        optimizer.step()
    return sp.factorize(dense, where=EVERYTHING), [(x[:30], y[:30]), (x[30:], y[30:])]


def test_measured_harms_are_what_the_cut_costs() -> None:
    low, data = classifier()
    loss = nn.CrossEntropyLoss()
    distortions = MeasuredLoss(data, loss, points=3)(low)
    base = sp.evaluate(low, data, loss)["loss"]
    most = max(float(distortion[0]) for distortion in distortions.values())
    limits = {"0": 3, "2": 5, "4": 2}  # 72 / 18 = 4, 144 / 24 = 6, 36 / 15 = 2.4
    for name, limit in limits.items():
        for rank in (1, limit):
            later = [sp.evaluate(sp.prune(low, {name: r}), data, loss)["loss"] - base for r in {rank, limit}]
            assert float(distortions[name][rank]) == pytest.approx(max(0.0, *later), abs=2e-4 * most + 1e-6)  # the part that breaks ties
        assert float(distortions[name][0]) > 0.1


class Counting:
    """A loss that stops, as a killed run does, when it was asked often enough."""

    def __init__(self, most: float = math.inf) -> None:
        self.calls, self.most = 0, most

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.most:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)


def test_a_stopped_measurement_goes_on_where_it_was(tmp_path: Path) -> None:
    low, data = classifier()
    whole = Counting()
    expected = MeasuredLoss(data, whole, points=2)(low)
    first, second, third = Counting(10), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        MeasuredLoss(data, first, points=2, folder=tmp_path)(low)
    resumed = MeasuredLoss(data, second, points=2, folder=tmp_path)(low)
    assert all(torch.equal(distortion, resumed[name]) for name, distortion in expected.items())
    assert second.calls == whole.calls - 8, "ten calls: the model itself and four cuts, on two batches each"
    MeasuredLoss(data, third, points=2, folder=tmp_path)(low)
    assert third.calls == 2
    (path,) = tmp_path.iterdir()
    stored = json.loads(path.read_text())
    assert set(stored) == {"base", "losses", "sha256"}
    assert list(stored["losses"]["0"]) == ["0", "1", "3"]


def test_another_model_or_other_data_are_measured_anew(tmp_path: Path) -> None:
    low, data = classifier()
    MeasuredLoss(data, Counting(), points=1, folder=tmp_path)(low)
    again = Counting()
    MeasuredLoss(data[:1], again, points=1, folder=tmp_path)(low)
    assert again.calls == 1 + 3 * 2
    other = sp.prune(low, {"2": 7})
    again = Counting()
    MeasuredLoss(data, again, points=1, folder=tmp_path)(other)
    assert again.calls == 2 * (1 + 3 * 2)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_file_is_measured_anew(tmp_path: Path) -> None:
    low, data = classifier()
    expected = MeasuredLoss(data, nn.CrossEntropyLoss(), points=1, folder=tmp_path)(low)
    (path,) = tmp_path.iterdir()
    path.write_text('{"losses": {"0": [')
    with pytest.warns(UserWarning, match="damaged, its losses are measured again"):
        again = MeasuredLoss(data, nn.CrossEntropyLoss(), points=1, folder=tmp_path)(low)
    assert all(torch.equal(distortion, again[name]) for name, distortion in expected.items())


def test_losses_that_are_not_finite() -> None:
    low, data = classifier()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        value = F.cross_entropy(output, target)
        return value if value < 0.5 else value * math.inf

    distortions = distortions_of(low, MeasuredLoss(data, loss, points=2))
    assert max(float(distortion[0]) for distortion in distortions.values()) == pytest.approx(1e6, rel=1e-3)
    with pytest.raises(SettingError, match="MeasuredLoss: loss must be finite for the model as it is, got nan"):
        MeasuredLoss(data, lambda output, target: output.sum() * math.nan)(low)
    with pytest.raises(SettingError, match="MeasuredLoss: points must be at least 1, got 0"):
        MeasuredLoss(data, loss, points=0)


def test_data_that_can_be_read_once_only() -> None:
    low, data = classifier()
    with pytest.raises(SettingError, match="a generator can be read only once"):
        MeasuredLoss((batch for batch in data), nn.CrossEntropyLoss())(low)


# ---- what comes from outside


class Returns:
    """An importance that returns what it was given."""

    def __init__(self, distortions: Any) -> None:
        self.distortions = distortions

    def __call__(self, model: nn.Module, /) -> Any:
        return self.distortions


FULL = [3.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("distortions", "message"),
    [
        ([FULL], r"Returns: what it returns must be a mapping from the names of named_factors to distortions"),
        ({"0": torch.tensor(FULL)}, "layer '1': Returns has no entry for it"),
        (
            {"0": torch.tensor(FULL[1:])},
            r"layer '0': Returns gives distortions of shape \(3,\), not \(4,\); entry r is the distortion of keeping r",
        ),
        ({"0": torch.tensor([3.0, math.nan, 1.0, 0.0])}, "layer '0': Returns gives distortions that are not finite: nan at rank 1"),
        ({"0": torch.tensor([3.0, 2.0, 1.0, -1.0])}, "layer '0': Returns gives distortions below zero: -1 at rank 3"),
        ({"0": torch.tensor([3.0, 1.0, 2.0, 0.0])}, "layer '0': Returns gives distortions that increase with the rank: 2 at rank 2"),
    ],
    ids=["no-mapping", "missing", "short", "nan", "negative", "rising"],
)
def test_harms_that_are_none_are_refused(distortions: Any, message: str) -> None:
    low = low_of(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises((LayerError, SettingError), match=message):
        distortions_of(low, Returns(distortions))
    with pytest.raises((LayerError, SettingError), match=message):
        sp.allocate(low, sp.Budget(macs=0.9), torch.zeros(1, 3, dtype=torch.float64), importance=Returns(distortions))


def test_rounding_is_taken_out_and_lists_are_taken() -> None:
    low = low_of(nn.Linear(3, 3))
    assert distortions_of(low, Returns({"0": [3.0, 1.0, 1.0 + 1e-12, 0.0]}))["0"].tolist() == [3.0, 1.0, 1.0, 0.0]
    with pytest.raises(LayerError, match=r"call factorize\(model\) first"):
        distortions_of(nn.Linear(3, 3), SpectralEnergy())


# ---- side by side


def test_shares_and_correlations() -> None:
    low = low_of(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    one = Returns({name: torch.tensor([9.0, a, 0.0, 0.0]) for name, a in (("0", 1.0), ("1", 2.0), ("2", 5.0))})
    other = Returns({name: torch.tensor([9.0, a, 0.0, 0.0]) for name, a in (("0", 8.0), ("1", 4.0), ("2", 4.5))})
    table = compare_importances(low, {"one": one, "other": other}, {"0": 1, "1": 1, "2": 1})
    assert table.shares["one"] == {"0": 0.125, "1": 0.25, "2": 0.625}
    assert table.totals == {"one": 8.0, "other": 16.5}
    assert table.correlations["one"]["other"] == pytest.approx(-0.5), "ranks 1 2 3 and 3 1 2"
    assert table.correlations["one"]["one"] == pytest.approx(1.0)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in str(table).splitlines()]
    assert ["2", "1", "62.5 %", "27.3 %"] in cells
    assert ["rank correlation with other", "", "-0.50", "1.00"] in cells
    assert json.loads(json.dumps(table.to_dict()))["shares"]["one"]["2"] == 0.625
    kept = compare_importances(low, {"one": one}, {"2": 1})
    assert kept.ranks == {"0": 3, "1": 3, "2": 1}
    assert kept.shares["one"] == {"0": 0.0, "1": 0.0, "2": 1.0}
    nothing = compare_importances(low, {"one": one}, {})
    assert math.isnan(nothing.correlations["one"]["one"])
    assert nothing.to_dict()["correlations"] == {"one": {"one": None}}
    with pytest.raises(LayerError, match="layer '9': is not a factorized weight"):
        compare_importances(low, {"one": one}, {"9": 1})
    with pytest.raises(RankError, match=r"rank must be in \[1, 3\], got 4"):
        compare_importances(low, {"one": one}, {"0": 4})
