"""Each block is trained toward the dense block, without labels; a network that is kept is better on what was held out."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import LayerError, SettingError
from spectrim.layers import named_factors
from spectrim.metrics.distance import Divergence
from spectrim.training.blocks import blocks_of
from spectrim.training.parts import Part, Reconstruction
from spectrim.training.reconstruct import reconstruct

EVERYTHING = sp.match("*")
SETTINGS = [
    Reconstruction(steps=60, rate=1e-2),
    Reconstruction(steps=0, whole=60, whole_rate=1e-2),
    Reconstruction(steps=30, whole=60, logits=True, rate=1e-2, whole_rate=1e-2),
]
WRONG = {"steps": -1, "batch": 0, "held_out": 1.0, "seconds": 0.0}


class Block(nn.Module):
    """A residual block that takes a second argument by name, which all examples share, and returns a tuple."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 24), nn.Linear(24, width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, None]:
        return self.norm(x + scale * self.down(torch.relu(self.up(x)))), None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x, scale=torch.full((12,), 0.5))
        return self.head(x)


def prepared(seed: int = 0) -> tuple[nn.Module, nn.Module, list[Any]]:
    torch.manual_seed(seed)
    dense = Net().eval()
    data = [(torch.randn(48, 12), torch.zeros(48)) for _ in range(4)]
    return dense, sp.prune(sp.factorize(dense, where=EVERYTHING), {"blocks.0.up": 4, "blocks.1.down": 3, "head": 3}), data


def errors(network: nn.Module, dense: nn.Module, data: list[Any], logits: bool) -> float:
    with torch.no_grad():
        pairs = [(network.eval()(x), dense(x)) for x, _ in data]
        return sum(float(Divergence()(out, wanted) if logits else (out - wanted).square().sum()) for out, wanted in pairs)


def test_blocks_are_found_or_named() -> None:
    low = sp.factorize(Net(), where=EVERYTHING)
    assert blocks_of(low) == ["blocks.0", "blocks.1"]
    assert blocks_of(low, ["blocks.1", "head"]) == ["blocks.1", "head"]
    with pytest.raises(LayerError, match="matches no module"):
        blocks_of(low, ["layers.*"])


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_network_comes_nearer_and_nothing_else_changes(settings: Reconstruction) -> None:
    dense, cut, data = prepared()
    before = copy.deepcopy((dense.state_dict(), cut.state_dict(), torch.get_rng_state()))
    made, told = reconstruct(cut, dense, data, settings)
    for now, then in zip((dense.state_dict(), cut.state_dict()), before[:2], strict=True):
        assert all(torch.equal(now[name], value) for name, value in then.items())
    assert torch.equal(torch.get_rng_state(), before[2])
    assert [one.kept for one in told] == [one.after < one.before for one in told]
    assert any(one.kept for one in told)
    assert errors(made, dense, data, settings.logits) < 0.97 * errors(cut, dense, data, settings.logits)
    assert {name: form.rank for name, form in named_factors(made)} == {name: form.rank for name, form in named_factors(cut)}
    assert torch.equal(made.get_buffer("blocks.0.norm.running_mean"), cut.get_buffer("blocks.0.norm.running_mean"))
    for _, form in named_factors(made):
        torch.testing.assert_close(form.U.T @ form.U, torch.eye(form.rank), rtol=0, atol=1e-5)
    again, _ = reconstruct(cut, dense, data, settings)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), made.parameters(), strict=True))


class TwoHeads(nn.Module):
    """Two outputs of very different size, of one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(12, 24), nn.Linear(24, 2), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.trunk(x))
        return self.first(x), 1000 * self.second(x)


@torch.no_grad()
def shares(network: nn.Module, dense: nn.Module, data: list[Tensor]) -> list[float]:
    """Return the error of each output on the last batch, as a share of its variance over all batches."""
    variances = [torch.cat(parts).var(correction=0) for parts in zip(*map(dense, data), strict=True)]
    pairs = zip(network(data[-1]), dense(data[-1]), variances, strict=True)
    return [float((out - wanted).square().mean() / variance) for out, wanted, variance in pairs]


def test_every_output_is_matched_each_by_its_variance() -> None:
    torch.manual_seed(0)
    dense, data = TwoHeads(), [torch.randn(48, 12) for _ in range(4)]
    low = sp.prune(sp.factorize(dense, where=EVERYTHING), {"trunk": 4})
    better, (told,) = reconstruct(low, dense, data, Reconstruction(steps=0, whole=60, whole_rate=2e-2, batch=16))
    before, after = shares(low, dense, data), shares(better, dense, data)
    assert all(new < 0.7 * old for new, old in zip(after, before, strict=True))
    assert (told.before, told.after) == pytest.approx((sum(before) / 2, sum(after) / 2), rel=1e-4)


def test_steps_that_make_it_worse_are_taken_back() -> None:
    dense, cut, data = prepared()
    made, told = reconstruct(cut, dense, data, Reconstruction(steps=5, whole=5, rate=30.0, whole_rate=30.0))
    assert not any(one.kept for one in told)
    torch.testing.assert_close(made.eval()(data[0][0]), cut.eval()(data[0][0]), rtol=1e-4, atol=1e-5)


def test_a_block_is_matched_on_the_inputs_that_it_meets() -> None:
    """At full rank nothing is to be learned: the error is rounding, before and after."""
    dense, _, data = prepared()
    _, told = reconstruct(sp.factorize(dense, where=EVERYTHING), dense, data, Reconstruction(steps=2))
    assert all(one.before < 1e-10 for one in told)


def test_time_can_be_boxed(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, cut, data = prepared()
    clock = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    _, told = reconstruct(cut, dense, data, Reconstruction(steps=100, seconds=20.0))
    assert 0 < sum(one.steps for one in told) < 25


def test_divergence_by_hand() -> None:
    out, wanted = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, torch.log(torch.tensor(3.0))]])
    expected = 0.25 * torch.log(torch.tensor(0.5)) + 0.75 * torch.log(torch.tensor(1.5))
    torch.testing.assert_close(Divergence()(out, wanted), expected)


@pytest.mark.parametrize("name", WRONG)
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(SettingError, match=name):
        Reconstruction(**{name: WRONG[name]})


def test_errors_say_what_to_do() -> None:
    dense, cut, data = prepared()
    with pytest.raises(SettingError, match="at least one batch"):
        reconstruct(cut, dense, [])
    with pytest.raises(LayerError, match="not in the network"):
        reconstruct(cut, nn.Linear(12, 5), data)


def test_each_example_counts_alike_however_batches_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, cut, data = prepared()
    x = torch.cat([x for x, _ in data])
    taught = {"few": x[:1] * 5, "many": x[1:96]}
    batches = [taught["few"], x[96:97], taught["many"], x[97:]]
    drawn: list[int] = []
    some = Part._some
    monkeypatch.setattr(Part, "_some", lambda self, index, generator: drawn.append(index) or some(self, index, generator))
    settings = Reconstruction(steps=0, whole=200, whole_rate=1e-6, logits=True, held_out=0.5)
    _, (told,) = reconstruct(cut, dense, batches, settings)
    with torch.no_grad():
        assert told.before == pytest.approx(float(Divergence()(cut.eval()(x[96:]), dense(x[96:]))), rel=1e-4)
    assert set(drawn) <= {0, 2}
    assert drawn.count(0) < 20  # 2 of 200 in the mean
