"""Levels by rate and distortion: the laws of rounding with feedback, and `round_to` on small networks."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.budget.rounding.attempts import Search
from spectrim.budget.rounding.curves import INPUTS, OUTPUTS, Curve, Rounding, curve_of, price_for, towards, with_feedback
from spectrim.budget.rounding.joint import Costs, chosen
from spectrim.budget.rounding.meeting import Moments, _meeting, beside, moments, output_of, units_of
from spectrim.budget.rounding.pairs import Option, best_at, options_of, with_pairs
from spectrim.budget.rounding.round_to import round_to
from spectrim.budget.rounding.vectors import round_vectors
from spectrim.budget.rounding.weights import Weight, weights_of
from spectrim.errors import SettingError
from spectrim.linalg.feedback import bits_of, entropy, metric_of, rounded
from spectrim.projections import TopK
from spectrim.storage.pack import coded, pack, unpack
from spectrim.training import Hold, StraightThrough


def moment(size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(2 * size, size)) @ np.diag(np.linspace(0.1, 2, size)) @ rng.normal(size=(size, size))
    return drawn.T @ drawn / size


A, G, W = moment(20, 0), moment(7, 1), np.random.default_rng(2).normal(size=(7, 20))


def squared(levels: np.ndarray, step: float, left: np.ndarray) -> float:
    change = levels * step - W
    return float(np.trace(left @ change @ A @ change.T))


def test_a_metric_is_its_moment_in_the_order_of_decisions() -> None:
    metric = metric_of(A, 0.0)
    again = metric.mixing.T @ np.diag(metric.weights) @ metric.mixing
    np.testing.assert_allclose(again, A[np.ix_(metric.order, metric.order)], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.diag(metric.mixing), 1.0)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("price", [0.0, 0.5])
def test_the_distortion_is_the_squared_error(both: bool, price: float) -> None:
    right, left = metric_of(A, 0.0), metric_of(G, 0.0) if both else None
    levels, distortion = rounded(W, 0.4, right, left, price, bits_of(np.rint(W / 0.4).astype(int)))
    assert distortion == pytest.approx(squared(levels, 0.4, G if both else np.eye(7)), rel=1e-9)


@pytest.mark.parametrize("both", [True, False])
def test_blocks_follow_each_other_and_zeros_can_be_forced(both: bool) -> None:
    """Of more rows and columns than one block has: the value that is returned is the squared error, zeros or not."""
    A, G = moment(150, 5), moment(70, 6)
    W = np.random.default_rng(7).normal(size=(70, 150))
    right, left = metric_of(A, 0.0), metric_of(G, 0.0) if both else None
    kept = np.random.default_rng(8).random(W.shape) < 0.7
    for free in (None, kept):
        levels, distortion = rounded(W, 0.4, right, left, kept=free)
        change = levels * 0.4 - W
        true = float(np.trace((G if both else np.eye(70)) @ change @ A @ change.T))
        assert distortion == pytest.approx(true, rel=1e-8)
        assert free is None or not levels[~free].any()
        nearest = np.rint(W / 0.4) * 0.4 - W
        assert free is not None or true < 0.9 * float(np.trace((G if both else np.eye(70)) @ nearest @ A @ nearest.T))


def test_feedback_lowers_the_error_and_nothing_changes_without_correlations() -> None:
    right, left = metric_of(A, 0.0), metric_of(G, 0.0)
    nearest = np.rint(W / 0.4)
    one, both = rounded(W, 0.4, right)[0], rounded(W, 0.4, right, left)[0]
    assert squared(both, 0.4, G) < 0.8 * squared(one, 0.4, G) < 0.8**2 * squared(nearest, 0.4, G)
    plain = metric_of(np.diag(np.arange(1.0, 21.0)), 0.0)
    assert (rounded(W, 0.4, plain, metric_of(np.eye(7), 0.0))[0] == nearest).all()


def test_a_price_of_bits_buys_fewer_bits() -> None:
    right, left = metric_of(A, 0.0), metric_of(G, 0.0)
    levels, distortion = rounded(W, 0.4, right, left)
    fewer, larger = rounded(W, 0.4, right, left, 20.0, bits_of(levels))
    assert entropy(fewer) < 0.9 * entropy(levels)
    assert larger > distortion


def test_one_price_is_the_best_split_of_the_bits() -> None:
    curves = {str(scale): curve_of(lambda step, s=scale: (np.rint(W / step).astype(int), s * step**2), 1.0) for scale in (0.1, 1.0, 30.0)}
    places = range(len(curves["1.0"].steps))
    for limit in (300.0, 700.0):
        price = price_for(curves, limit)
        taken = [curve.best(price) for curve in curves.values()]
        bits = sum(curve.bits[place] for curve, place in zip(curves.values(), taken, strict=True))
        spent = sum(curve.distortions[place] for curve, place in zip(curves.values(), taken, strict=True))
        first, second, third = curves.values()
        every = ((first.bits[a] + second.bits[b] + third.bits[c], first.distortions[a] + second.distortions[b] + third.distortions[c])
                 for a in places for b in places for c in places)  # fmt: skip
        assert bits <= limit
        assert spent <= min(total for count, total in every if count <= bits) + 1e-9
    two = {"a": Curve((1.0, 2.0), (50.0, 30.0), (1.0, 5.0))}
    assert price_for(two, 10.0) == pytest.approx(price_for(two, 30.0)) == pytest.approx(4 / 20)  # no step meets 10: the fewest bits


class Skip(nn.Module):
    """A residual block between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inside = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.norm(self.first(x)).relu()
        x = (self.inside(x) + x).relu()
        logits: Tensor = self.last(x.mean((2, 3)))
        return logits


def skip(seed: int = 0) -> tuple[Skip, list[Tensor]]:
    torch.manual_seed(seed)
    model, data = Skip(), [torch.randn(64, 3, 6, 6) for _ in range(2)]
    model(data[0])
    return model.eval(), data


def test_moments_are_those_of_rows_and_of_the_jacobian() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False)), torch.randn(4000, 4)
    found = moments(model, weights_of(model), [x], [4000])
    expected = torch.cov(x.T, correction=0)
    torch.testing.assert_close(found["0"].own[0].float(), expected, rtol=1e-4, atol=1e-4)
    weight = model[1].weight.detach().double()
    torch.testing.assert_close(found["0"].left[0], weight.T @ weight, rtol=0.1, atol=0.02)  # random signs
    hidden = model[0](x).detach()
    torch.testing.assert_close(found["1"].own[0].float(), hidden.T @ hidden / 4000, rtol=1e-4, atol=1e-4)


def test_a_layer_makes_up_for_the_skip_path_beside_it() -> None:
    model, data = skip()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.first.weight.add_(0.1 * torch.randn_like(other.first.weight))
        dense, now = weights_of(model)["inside"], weights_of(other)["inside"]
        x, _, added = _meeting(model, model.inside, data[0])
        assert added is not None
        assert torch.equal(added, x)
        met = beside(model, dense, other, now, data, [64, 64], torch.eye(8)[None].double())
        assert met.once

        def lacks() -> float:
            before, after = (m.inside(h) + h for m, h in ((m, m.norm(m.first(data[0])).relu()) for m in (model, other)))
            return float((before - after).square().sum())

        began = lacks()
        now.set_(towards(now.matrices(), met, ridge=1e-4))
        other.inside.bias.add_(
            ((dense.matrices() - now.matrices()) @ met.mean[..., None]).flatten().float() + met.missing.flatten().float()
        )
        assert lacks() < 0.6 * began


def nearest(model: nn.Module, limit: int) -> nn.Module:
    """Round every weight to the nearest multiple of one step, the smallest that meets the bytes."""
    low, high, found = 1e-3, 1.0, model
    for _ in range(12):
        step, made = math.sqrt(low * high), copy.deepcopy(model)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_((parameter / torch.tensor(step)).round() * torch.tensor(step) + 0)
        if len(coded(made)[0]) > limit:
            low = step
        else:
            high, found = step, made
    return found


def test_a_network_meets_its_bytes_with_less_change_than_the_nearest_levels(tmp_path: Path) -> None:
    model, data = skip()
    made = round_to(model, data, 1000, progress=False)
    packed = pack(made.model, tmp_path / "s.spz")
    assert packed.coded_bytes == made.packed.coded_bytes <= 1000
    with torch.no_grad():
        back = unpack(tmp_path / "s.spz", model)
        assert torch.equal(back(data[0]), made.model(data[0]))
        changes = [float((model(data[0]) - m(data[0])).square().sum()) for m in (made.model, nearest(model, 1000))]
    assert changes[0] < 0.5 * changes[1]
    assert made.unexplained < 0.2
    assert set(made.bits) == {"first", "inside", "last"}
    assert "bits for each weight" in made.summary()
    assert all(parameter.requires_grad for parameter in made.model.parameters())


def low_rank() -> tuple[nn.Module, Tensor]:
    dense = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 9))
    return sp.merge(sp.prune(sp.factorize(dense), sp.budget.Fixed(8))), torch.randn(99, 40)


def grouped() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv1d(16, 24, 3, groups=2), nn.ConvTranspose1d(24, 12, 2, stride=2), nn.Flatten()), torch.randn(64, 16, 20)


def embedding() -> tuple[nn.Module, Tensor]:
    layers = nn.Embedding(50, 24), nn.Flatten(), nn.Linear(120, 24), nn.LayerNorm(24)
    return nn.Sequential(*layers), torch.randint(50, (80, 5))


def twice() -> tuple[nn.Module, Tensor]:
    shared = nn.Linear(32, 32)
    return nn.Sequential(shared, nn.Tanh(), shared), torch.randn(90, 32)


def half() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 9)).bfloat16(), torch.randn(90, 60).bfloat16()


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {made.__name__: made for made in (low_rank, grouped, embedding, twice, half)}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("sequential", [True, False])
def test_kinds_of_networks_meet_their_bytes(name: str, sequential: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    model = model.eval()
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    share = 0.55 if name == "half" else 0.3
    made = round_to(model, [(x, torch.zeros(len(x)))], share, sequential=sequential, progress=False)
    assert made.packed.coded_bytes <= share * held
    assert made.unexplained < 0.05
    pack(made.model, tmp_path / "n.spz")
    back = unpack(tmp_path / "n.spz")
    assert all(torch.equal(back[key], tensor) for key, tensor in made.model.state_dict().items())


def test_recurrent_and_tied_weights_are_rounded_without_feedback() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.look, self.run, self.say = nn.Embedding(40, 24), nn.LSTM(24, 24, batch_first=True), nn.Linear(24, 40, bias=False)
            self.say.weight = self.look.weight

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.say(self.run(self.look(x))[0])
            return logits

    torch.manual_seed(0)
    made = round_to(Tied(), [torch.randint(40, (32, 6))], 0.3, progress=False)
    assert made.model.say.weight is made.model.look.weight
    assert set(made.bits) == {"look.weight", "run.weight_ih_l0", "run.weight_hh_l0"}
    assert made.unexplained < 0.1


class Branch(Skip):
    def forward(self, x: Tensor) -> Tensor:
        """Return logits; torch.fx cannot follow the branch."""
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.parametrize("limit", [10**5, 10**7, 10**300])
def test_more_bytes_than_the_levels_take_change_no_more(limit: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    model[2].weight.data[0, 0] = 30.0  # has a level at every step
    nn.init.zeros_(model[2].weight[1:].data)
    assert round_to(model, [torch.randn(16, 16)], limit, progress=False).unexplained < 1e-4


def test_what_cannot_be_is_refused() -> None:
    model, data = skip()
    with pytest.raises(SettingError, match="round_to: coded_bytes must be a fraction"):
        round_to(model, data, 0, progress=False)
    with pytest.raises(SettingError, match="call merge"):
        round_to(sp.factorize(model), data, 0.1, progress=False)
    with pytest.raises(SettingError, match="fold must be False for this network"):
        round_to(Branch(), data, 1000, progress=False)
    norm = nn.BatchNorm1d(300)
    norm(torch.randn(64, 300))  # statistics are kept as they are
    with pytest.raises(SettingError, match="the fewest bytes that were reached"):
        round_to(nn.Sequential(norm, nn.Linear(300, 2)), [torch.randn(64, 300)], 1000, progress=False)


def pair_options() -> tuple[Weight, Moments, list[Option]]:
    torch.manual_seed(0)
    layer, mixed = nn.Linear(24, 16), torch.from_numpy(moment(24, 3))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(16, 3) @ torch.randn(3, 24) + 0.02 * torch.randn(16, 24))
    weight = weights_of(nn.Sequential(layer))["0"]
    blank = torch.zeros(1, 16, 24, dtype=torch.float64)
    met = Moments(mixed[None], torch.zeros(1, 24), torch.from_numpy(moment(16, 4))[None], blank, blank[..., 0])
    rounding = with_feedback(weight.matrices(), met)
    return weight, met, options_of(weight, met, curve_of(rounding, float(rounding.matrices.std())))


def test_a_pair_is_the_best_cut_in_the_metric_and_its_loss_is_the_squared_error() -> None:
    weight, met, options = pair_options()
    own, left = (
        m[0].numpy() + share * float(m[0].trace()) / len(m[0]) * np.eye(len(m[0])) for m, share in ((met.own, INPUTS), (met.left, OUTPUTS))
    )
    matrix = weight.matrices()[0].numpy()
    ranks = [option.rank for option in options[1:]]
    assert ranks == [2, 4, 6, 8]  # from 10 on two take as many numbers as one
    for option in options[1:]:
        assert option.factors is not None
        first, second = option.factors
        change = second @ first - matrix
        assert option.lost == pytest.approx(float(np.trace(left @ change @ own @ change.T)), rel=1e-6)
        u, s, vh = np.linalg.svd(matrix)
        other = (u[:, : option.rank] * s[: option.rank]) @ vh[: option.rank] - matrix
        assert option.lost <= float(np.trace(left @ other @ own @ other.T)) * (1 + 1e-9)
    assert options[0].lost == 0
    assert options[0].rank is None


def test_one_price_chooses_a_low_rank_where_the_weight_has_one_and_bits_are_few() -> None:
    _, _, options = pair_options()
    for price in (1e-6, 1e-3, 0.1, 3.0):
        chosen = best_at({"0": options}, price)["0"]
        assert chosen.cost(price) == min(option.cost(price) for option in options)
    ranks = [best_at({"0": options}, price)["0"].rank for price in np.geomspace(1e-6, 10.0, 12)]
    assert ranks[0] is None
    assert 4 in ranks


def test_pairs_take_the_place_of_layers_and_know_what_they_stand_for() -> None:
    weight, _, options = pair_options()
    network = nn.Sequential(weight.layer, nn.ReLU(), nn.Linear(16, 4))
    made, stands_for = with_pairs(network, {"0": options[2]})
    assert stands_for == {"0.1": "0"}
    assert options[2].factors is not None
    first, second = options[2].factors
    torch.testing.assert_close(made[0][0].weight.double(), torch.from_numpy(first), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made[0][1].weight.double(), torch.from_numpy(second), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made[0][1].bias, weight.layer.bias)


def test_ranks_are_kept_where_the_outputs_change_less() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(48, 4) @ torch.randn(4, 48) / 7)
    data = [torch.randn(256, 48)]
    one = round_to(model, data, 1100, progress=False)
    made = round_to(model, data, 1100, low_rank=True, progress=False)
    assert set(made.ranks) == {"0"}
    assert made.tried == (one.unexplained, made.unexplained)
    assert made.unexplained < 0.7 * one.unexplained
    assert made.packed.coded_bytes <= 1100
    assert "0 in rank" in made.summary()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6))
    assert round_to(plain, data, 2500, low_rank=True, progress=False).ranks == {}


def test_one_knapsack_takes_rank_zeros_and_step_within_all_limits() -> None:
    """Beside brute force over all ways to hold two weights, with limits of bits and of multiply-accumulates."""
    rng = np.random.default_rng(0)

    def curve(scale: float, bits: float) -> Curve:
        return Curve(
            (1.0, 2.0, 3.0), tuple(bits * np.array([1.0, 0.7, 0.5])), tuple(scale * np.array([1.0, 2.0, 4.0]) * rng.uniform(0.9, 1.1))
        )

    options = {
        name: [
            Option(None, [curve(1.0, 900)], numbers=100),
            Option(None, [curve(1.6, 500)], keep=0.4, numbers=100),
            Option(2, [curve(0.6, 300)], lost=1.1, numbers=40),
        ]
        for name in ("a", "b")
    }
    works = {(name, rank): work for name in options for rank, work in ((None, 100.0), (2, 40.0))}
    costs = Costs(works, {"macs": 260.0, "params": 220.0, "size": 880.0})
    ways = {
        name: [(o, b, o.lost + d) for o in held for b, d in zip(o.curves[0].bits, o.curves[0].distortions, strict=True)]
        for name, held in options.items()
    }
    for bits, macs in ((1400.0, 1.0), (1400.0, 0.8), (800.0, 0.8), (700.0, 0.55)):
        picked = chosen(options, {}, bits, sp.Budget(macs=macs, coded_bytes=1000), costs)
        fits = [
            (a[2] + b[2], a[0], b[0])
            for a in ways["a"]
            for b in ways["b"]
            if a[1] + b[1] <= bits and works["a", a[0].rank] + works["b", b[0].rank] + 60 <= macs * 260
        ]
        _, one, two = min(fits, key=lambda way: way[0])
        assert (picked["a"], picked["b"]) == (one, two)


def test_a_budget_of_coded_bytes_and_operations_is_met_by_both() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6)), torch.randn(256, 48)
    made = round_to(model, [x], sp.Budget(coded_bytes=1800, macs=0.7), progress=False)
    assert made.packed.coded_bytes <= 1800
    assert set(made.ranks) == {"0"}
    assert sum(w.numel() for w in made.model.parameters() if w.dim() > 1) <= 0.7 * (48 * 48 + 48 * 6)
    with pytest.raises(SettingError, match="no more than macs, params, size, size_bytes"):
        round_to(model, [x], sp.Budget(coded_bytes=1800, latency=0.5), progress=False)
    with pytest.raises(SettingError, match="no ranks satisfy"):
        round_to(model, [x], sp.Budget(coded_bytes=1800, macs=0.05), progress=False)


def test_pruned_weights_keep_their_share_of_zeros() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6)).eval()
    search = Search(model, [torch.randn(256, 48)], True, False)
    search.keep_({"0": 0.2})
    weight: Tensor = search.within(1500).model.get_parameter("0.weight")
    assert int(weight.count_nonzero()) <= 0.2 * weight.numel()


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("limit", [1500, 2100])
def test_a_network_that_was_pruned_meets_its_bytes_and_stays_pruned(limit: int, sequential: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 6)).eval(), torch.randn(512, 256)
    with torch.no_grad():
        for layer, keep in ((model[0], 500), (model[2], 250)):
            layer.weight.copy_(TopK(keep)(torch.randn_like(layer.weight)))
    made = round_to(model, [x], limit, sequential=sequential, progress=False)
    assert 0.9 * limit <= made.packed.coded_bytes <= limit
    assert made.unexplained < {1500: 0.1, 2100: 0.01}[limit]
    for now, before in zip(made.model.parameters(), model.parameters(), strict=True):
        assert now.dim() == 1 or not bool((now[before == 0] != 0).any())


def test_a_pruned_network_is_trained_on_the_levels_that_it_was_given() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(256, 64)
    with torch.no_grad():
        net[0].weight.copy_(TopK(600)(net[0].weight))
    made = round_to(net, [x], 1200, progress=False)
    levels = made.projections()
    assert set(levels) == {"0.weight", "2.weight"}
    for name, table in levels.items():
        torch.testing.assert_close(table(made.model.get_parameter(name).detach()), made.model.get_parameter(name).detach(), rtol=0, atol=0)
    trained, batches = copy.deepcopy(made.model), [(x, net(x).detach())]
    optimizer = torch.optim.Adam(trained.parameters(), 1e-3)
    sp.fit(trained, batches, nn.MSELoss(), optimizer, 60, courses=[Hold(), StraightThrough(levels, end=0.9)], progress=False)
    assert not torch.equal(trained[0].weight, made.model.get_parameter("0.weight"))
    for name, step in made.steps.items():
        whole = trained.get_parameter(f"{name}.weight").detach() / step
        torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-4)
    assert not bool(((trained[0].weight != 0) & (net[0].weight == 0)).any())


class Several(nn.Module):
    """Returns what it is told to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(32, 64), nn.Linear(64, 5), kind

    def forward(self, x: Tensor) -> Any:
        """Return the kind of output."""
        hidden = torch.relu(self.first(x))
        scores = self.second(hidden)
        return {
            "tuple": (scores, None, {"hidden": 100 * hidden}),
            "mapping": {"boxes": scores, "count": torch.tensor(3)},
            "vector": scores[:, 0],
            "words": "none",
            "changing": scores[scores[:, 0] > 0],
        }[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "mapping", "vector"])
def test_outputs_of_any_kind_are_kept_near(kind: str) -> None:
    torch.manual_seed(0)
    net, batches = Several(kind).eval(), [torch.randn(96, 32), torch.randn(40, 32)]
    small, smaller = (round_to(net, batches, limit, progress=False) for limit in (2200, 1100))
    assert smaller.packed.coded_bytes <= 1100 < small.packed.coded_bytes <= 2200
    assert small.unexplained < 0.3 * smaller.unexplained < 0.05


def test_several_outputs_count_alike_whatever_their_scale() -> None:
    torch.manual_seed(0)
    net, x = Several("tuple").eval(), torch.randn(96, 32)
    parts = output_of(net, x, units_of(net, x)).detach().split([96 * 5, 96 * 64])
    variances = [float((part - part.mean()).square().sum()) for part in parts]
    assert variances[0] == pytest.approx(variances[1], rel=1e-4)


@pytest.mark.parametrize(("kind", "said"), [("words", "floating-point tensors"), ("changing", "depend on their values")])
def test_outputs_that_cannot_be_compared_are_refused(kind: str, said: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(SettingError, match=said):
        round_to(Several(kind).eval(), [torch.randn(96, 32)], 1100, progress=False)


def test_parametrized_weights_become_ordinary_ones_and_constant_outputs_have_a_change() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 128)), nn.ReLU(), nn.Linear(128, 10))
    made = round_to(net, [torch.randn(64, 64)], 2500, progress=False)
    assert set(made.model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"} != set(net.state_dict())
    assert made.unexplained < 0.1
    with torch.no_grad():
        net[2].weight.zero_()
    assert round_to(net, [torch.randn(64, 64)], 2500, progress=False).unexplained < 1e-4


def test_a_weight_of_one_magnitude_has_a_step_that_loses_nothing() -> None:
    torch.manual_seed(0)
    signs = torch.randn(16, 32, dtype=torch.float64).round().clamp(-1, 1)
    metrics = [(metric_of(np.eye(32), INPUTS), metric_of(np.eye(16), OUTPUTS))]
    rounding = Rounding(0.3 * signs.numpy()[None], metrics).holding()
    curve = curve_of(rounding, rounding.size)
    exact = int(np.argmin(curve.distortions))
    assert curve.distortions[exact] < 1e-20
    assert curve.bits[exact] == pytest.approx(entropy(signs.numpy()))


def test_vectors_of_a_trained_network_are_back_on_levels_and_factors_are_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Linear(40, 3))
    made = round_vectors(net, biases=3)
    assert len(made[0].bias.unique()) <= 7 < len(net[0].bias.unique())
    torch.testing.assert_close(made[1].weight, net[1].weight, rtol=0, atol=1e-3)
    assert torch.equal(made[0].weight, net[0].weight)
    with pytest.raises(SettingError, match="merge"):
        round_vectors(sp.factorize(net, rank=2, where="0"))
    with pytest.raises(SettingError, match="at least 1"):
        round_vectors(net, others=0)
