"""What each writing costs, and which one is taken."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim import linalg
from spectrim.errors import SettingError
from spectrim.linalg.writings import WRITINGS, Uses, cheapest, prices, window_bound, write


def factors(out: int, in_: int, rank: int, *blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = linalg.svd(torch.randn(*blocks, out, in_, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return U[..., :rank], Vh[..., :rank, :], S[..., :rank]


@pytest.mark.parametrize("kind", WRITINGS)
@pytest.mark.parametrize(("out", "in_"), [(12, 9), (9, 12), (7, 7), (1, 4)])
def test_no_rank_costs_more_than_dense_and_more_ranks_cost_more(kind: str, out: int, in_: int) -> None:
    for unit in ("params", "macs"):
        costs = []
        for rank in range(1, min(out, in_) + 1):
            listed = prices(out, in_, rank, kind=kind, blocks=2, uses=Uses(5.0, 5.0))
            assert list(listed) == list(WRITINGS[kind])
            costs.append(getattr(listed[cheapest(listed, unit)], unit))
            assert costs[-1] <= getattr(listed["dense"], unit)
        assert costs == sorted(costs)
        assert kind == "spatial" or len(set(costs)) == len(costs), "every rank below full saves"
    assert cheapest(prices(out, in_, min(out, in_), kind=kind)) == "dense"


def test_one_example_by_hand() -> None:
    listed = prices(6, 4, 3, kind="pointwise", blocks=2, uses=Uses(right=100.0, left=10.0, dense=50.0))
    assert {name: price.params for name, price in listed.items()} == {"dense": 48, "rows": 42, "columns": 42, "pair": 60}
    macs = {"dense": 2 * 24 * 50, "rows": 2 * (12 * 100 + 9 * 10), "columns": 2 * (3 * 100 + 18 * 10), "pair": 2 * (12 * 100 + 18 * 10)}
    assert {name: price.macs for name, price in listed.items()} == macs
    assert cheapest(listed, "macs") == "columns"


def test_an_embedding_multiplies_nothing_when_it_is_dense() -> None:
    listed = prices(512, 64, 48, kind="embedding", uses=Uses(right=7.0, left=0.0, dense=0.0))
    assert listed["dense"].macs == 0
    assert listed["columns"].macs == 7 * 48 * 16
    assert cheapest(listed, "macs") == "dense"
    assert cheapest(listed, "params") == "columns"


def test_a_small_gain_can_be_left_to_the_pair() -> None:
    listed = prices(100, 100, 5)
    assert cheapest(listed) == "rows"
    assert cheapest(listed, least_gain=0.025) == "rows"
    assert cheapest(listed, least_gain=0.026) == "pair"


@pytest.mark.parametrize("kind", WRITINGS)
@pytest.mark.parametrize("blocks", [(), (2,)])
def test_what_is_written_is_what_was_priced(kind: str, blocks: Any) -> None:
    U, Vh, S = factors(20, 16, 9, *blocks)
    made = write(U, Vh, S, kind=kind)
    listed = prices(20, 16, 9, kind=kind, blocks=2 if blocks else 1)
    assert made.price == listed[made.name]
    assert made.name == cheapest(listed)
    if made.interpolation is not None:
        assert made.name == made.interpolation.side
        assert made.interpolation.stored == made.price.params
        torch.testing.assert_close(made.interpolation.matrix(), (U * S.unsqueeze(-2)) @ Vh, rtol=1e-9, atol=1e-9)
        assert made.interpolation.growth <= window_bound(torch.float32)
        assert made.positions == 0


def test_rows_come_first_and_an_end_before_the_middle() -> None:
    U, Vh, S = factors(30, 30, 20)
    assert write(U, Vh, S).name == "rows"
    blunt = U.clone()
    blunt[[0, 29]] = 0  # no window of rows at either end is regular
    found = write(blunt, Vh, S)
    assert found.name == "columns"
    assert found.interpolation is not None
    assert found.interpolation.start in (0, 10)
    rough = Vh.clone()
    rough[:, [0, 29]] = 0
    found = write(blunt, rough, S)
    assert found.name == "rows"
    assert found.interpolation is not None
    assert found.interpolation.start not in (0, 10)


def test_where_no_window_is_good_enough_pivots_are_free_or_the_pair_is_taken() -> None:
    U, Vh, S = factors(30, 30, 10)
    found = write(U, Vh, S, bound=2.0)
    assert found.interpolation is not None
    assert found.interpolation.order is not None
    assert found.positions == 30
    assert write(U, Vh, S, bound=2.0, pivots=False).name == "pair"
    assert write(*factors(30, 30, 20), bound=1.0, pivots=False).name == "dense", "the pair of rank 20 is larger than dense"
    assert write(U, Vh, S, bound=0.01).name == "pair", "no pivots are that good"
    assert write(U, Vh, S, dtype=torch.float16).interpolation.growth <= 4  # type: ignore[union-attr]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(SettingError, match="kind must be one of"):
        prices(4, 4, 2, kind="conv")
    with pytest.raises(SettingError, match=r"rank must be in \[1, 3\], got 4"):
        prices(3, 4, 4)
    with pytest.raises(SettingError, match="bound must be positive"):
        write(*factors(4, 4, 2), bound=0.0)
