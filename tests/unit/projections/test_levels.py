"""Projections that round: numbers by hand, and steps against a search of all steps."""

from typing import Any

import pytest
import torch

from spectrim.errors import SettingError
from spectrim.projections import Levels, LevelTable, PowersOfTwo, RankAtMost, Then, TopK, scale
from spectrim.protocols import Bits


def test_steps_by_hand() -> None:
    assert Levels(2, zero=False)(torch.tensor([0.9, -1.1, 2.0, 0.0])).tolist() == pytest.approx([1, -1, 2, 0]), "(0.9 + 1.1 + 4) / 6"
    assert Levels(2)(torch.tensor([3.0, -5.0, 0.5])).tolist() == [4, -4, 0]
    assert Levels(1, zero=False)(torch.tensor([3.0, -5.0, 1.0])).tolist() == [3, -3, 3]
    assert Levels(1, kind="affine", zero=False)(torch.tensor([3.0, 5.0, 9.0, 0.0])).tolist() == [4, 4, 9, 0]
    assert Levels(1, kind="affine")(torch.tensor([3.0, 5.0, 10.0, -1.0])).tolist() == [0, 7.5, 7.5, 0], "22.5 against 27 for 6"
    assert PowersOfTwo(2, zero=False)(torch.tensor([1.0, -2.2, 2.1])).tolist() == pytest.approx([9.6 / 9, -19.2 / 9, 19.2 / 9])
    assert LevelTable((-1.0, 0.5, 2.0))(torch.tensor([-0.25, -0.26, 1.24, 9.0])).tolist() == [0.5, -1.0, 0.5, 2.0]
    assert LevelTable((-1.0, 0.5, 2.0))(torch.tensor([0.0])).tolist() == [0.0]


def test_channels_and_groups_have_their_own_steps() -> None:
    tensor = torch.tensor([[1.0, -1.0, 1.0], [8.0, -8.0, 8.0]])
    assert torch.equal(Levels(2, per="channel")(tensor), tensor)
    assert torch.equal(Levels(2, per=3)(tensor), tensor)
    assert Levels(2)(tensor).tolist() == [[0, 0, 0], [8, -8, 8]]
    assert Levels(2, per=4)(tensor).flatten().tolist() == [0, 0, 0, 8, -8, 8], "the last group is short"
    assert Levels(3, per="channel").stored_bits(tensor) == Bits(data=6 * 3 + 2 * 32, index=0)
    assert Levels(3, kind="affine", per=4).stored_bits(tensor) == Bits(data=6 * 3 + 2 * 35, index=0)
    assert Levels(3, zero=False).stored_bits(torch.tensor([1.0, 0.0, 0.0, 2.0])) == Bits(data=2 * 3 + 32, index=4)


LEVELS: dict[str, list[float]] = {
    "symmetric": [-3, -2, -1, 0, 1, 2, 3],
    "without zero": [-2, -1, 1, 2],
    "powers": [-4, -2, -1, 1, 2, 4],
    "one-sided": [0, 1, 2, 3],
    "uneven": [-2, -1, 0, 1, 2, 3, 4, 5],
    "measured": [-1.3, -0.2, 0.0, 0.9],
}


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_the_step_is_the_best_of_all(name: str, seed: int) -> None:
    levels = torch.tensor(LEVELS[name], dtype=torch.float64)
    row = torch.randn(1, 25, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def error(steps: torch.Tensor) -> torch.Tensor:
        return (row - scale.nearest(row / steps, levels) * steps).square().sum(1)

    steps = torch.linspace(0.01, 6, 20_000, dtype=torch.float64)[:, None]
    best, found = error(steps).min(), error(scale.best_scale(row, levels))[0]
    assert best * 0.999 <= found <= best, "the search has a grain"


def test_long_rows_are_averaged_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a thousandth of the exact error, and exact for a member."""
    row = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = torch.arange(-7.0, 8, dtype=torch.float64)

    def error(step: torch.Tensor) -> float:
        return float((row - scale.nearest(row / step, levels) * step).square().sum())

    exact = scale.best_scale(row, levels)
    monkeypatch.setattr(scale, "SWEPT", 3000)
    quick = scale.best_scale(row, levels)
    assert error(exact) <= error(quick) <= 1.001 * error(exact)
    member = scale.nearest(row / exact, levels) * exact
    torch.testing.assert_close(scale.best_scale(member, levels), exact)


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_affine_levels_are_no_worse_than_those_between_the_ends(bits: int) -> None:
    for seed in range(4):
        x = torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
        step = (x.max() - x.min()) / (2**bits - 1)
        usual = x.min() + step * ((x - x.min()) / step).round()
        free, whole = (Levels(bits, kind="affine", zero=zero)(x) for zero in (False, True))
        assert (x - free).square().sum() <= (x - usual).square().sum()
        steps = whole / whole.unique().diff().min() if len(whole.unique()) > 1 else whole
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)


def test_many_bits_lose_little() -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    for projection in (Levels(8), Levels(8, zero=False), Levels(8, kind="affine"), Levels(8, kind="affine", zero=False)):
        assert float((x - projection(x)).norm() / x.norm()) < 0.01, projection  # a step of 1/127 of 3.5, over the root of 12: 0.008


def test_prune_then_round() -> None:
    small = Then(TopK(3), Levels(2, zero=False))
    made = small(torch.tensor([0.9, -0.2, -1.1, 2.0]))
    assert made.tolist() == pytest.approx([1, 0, -1, 2])
    assert small.stored_bits(made) == Bits(data=3 * 2 + 32, index=4)


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        (Levels, {"bits": 0}),
        (Levels, {"bits": 1}),
        (Levels, {"bits": 9}),
        (Levels, {"bits": 3, "kind": "log"}),
        (Levels, {"bits": 3, "per": 0}),
        (Levels, {"bits": 3, "per": "row"}),
        (PowersOfTwo, {"bits": 6}),
        (LevelTable, {"values": (1.0,)}),
        (LevelTable, {"values": (1.0, 0.0)}),
        (LevelTable, {"values": (1.0, 2.0), "scaled": True}),
        (Then, {"first": Levels(3), "second": TopK(3)}),
        (Then, {"first": RankAtMost(3), "second": Levels(3)}),
    ],
)
def test_wrong_settings_are_refused(method: type, knobs: dict[str, Any]) -> None:
    made = object.__new__(method)
    defaults = {name: value for name, value in vars(method).items() if name in getattr(method, "__dataclass_fields__", {})}
    for name, value in {**defaults, **knobs}.items():
        object.__setattr__(made, name, value)
    with pytest.raises(SettingError, match=rf"^{method.__name__}: "):
        made.__post_init__()
