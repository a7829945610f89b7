"""Projections that prune: numbers by hand, ties, counts, and positions that can be read back."""

import itertools

import pytest
import torch
from torch import Tensor

from spectrim.errors import SettingError
from spectrim.projections import RankAtMost, Structured, Tiles, TopK, entropy_bits, gap_bits, position_bits
from spectrim.projections.counts import count_of
from spectrim.protocols import Bits


@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_the_count_is_exact_with_ties(count: int) -> None:
    tied = torch.tensor([1.0, -1.0, 1.0, 2.0, 1.0, 1.0, -1.0])
    assert int(TopK(count)(tied).count_nonzero()) == min(count, 7)
    assert TopK(3)(tied).tolist() == [1, -1, 0, 2, 0, 0, 0], "the largest, then the first of equal ones"


@pytest.mark.parametrize(("keep", "total", "count"), [(0.01, 430_500, 4305), (0.29, 100, 29), (0.001, 10, 1), (1.0, 9, 9), (12, 9, 9)])
def test_counts_of_fractions(keep: float, total: int, count: int) -> None:
    assert count_of(keep, total) == count
    assert int(TopK(keep)(torch.randn(total)).count_nonzero()) == count


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, True, "2", float("nan")])
def test_other_counts_are_refused(keep: object) -> None:
    for made in (lambda: TopK(keep), lambda: Structured(keep), lambda: Tiles(2, 2, keep=keep)):  # type: ignore[arg-type]
        with pytest.raises((SettingError, TypeError), match=r"keep|type"):
            made()


def test_rows_columns_and_blocks_by_hand() -> None:
    matrix = torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 0.5], [1.0, 0.0, 1.0]])
    assert Structured(1)(matrix).tolist() == [[0, 0, 0], [0, 3, 0.5], [0, 0, 0]], "9.25 against 9 and 2"
    assert Structured(1, along="columns")(matrix).tolist() == [[0, 2, 0], [0, 3, 0], [0, 0, 0]]
    blocks = Structured(2, along="blocks", block=(2, 2))(matrix)
    assert blocks.tolist() == [[1, 2, 2], [0, 3, 0.5], [0, 0, 0]], "14 and 4.25 against 1 and 1"
    assert Structured(2, along="blocks", block=(2, 2)).stored_bits(blocks) == Bits(data=6 * 32, index=2)
    assert Structured(1).stored_bits(Structured(1)(matrix)) == Bits(data=3 * 32, index=2), "gaps of one bit: an escape, then the row"


def test_filters_of_a_kernel_and_their_inputs() -> None:
    kernel = torch.zeros(3, 2, 2, 2)
    kernel[1, 0, 1, 0], kernel[2, 1, 0, 0] = 5.0, 4.0
    assert Structured(1)(kernel).nonzero().tolist() == [[1, 0, 1, 0]]
    assert Structured(1, along="columns")(kernel).nonzero().tolist() == [[1, 0, 1, 0]]


def test_tiles_by_hand_with_an_edge() -> None:
    matrix = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 3.0], [1.0, 1.5, 0.0]])
    made = Tiles(2, 2, keep=1)(matrix)
    assert made.tolist() == [[1, 0, 3], [4, 0, 3], [0, 1.5, 0]], "the one column of the tile at the edge is all there is"
    assert Tiles(2, 2, keep=1).stored_bits(made).data == (2 + 2 + 1) * 32
    assert Tiles(2, 2, keep=1, along="rows")(matrix).tolist() == [[0, 0, 3], [4, 0, 0], [1, 1.5, 0]]


def test_rank_by_hand() -> None:
    made = RankAtMost(1)(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 2.0]]))
    torch.testing.assert_close(made, torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    assert RankAtMost(1).stored_bits(made) == Bits(data=5 * 32, index=0)


def read_gaps(codes: list[int], width: int, total: int) -> Tensor:
    """Read positions back: the largest code skips that many entries, any other so many before one that is kept."""
    mask, at = torch.zeros(total, dtype=torch.bool), 0
    for code in codes:
        at += code
        if code < 2**width - 1:
            mask[at] = True
            at += 1
    return mask


def gaps(mask: Tensor, width: int) -> list[int]:
    codes, run = [], 0
    for kept in mask.tolist():
        if kept:
            codes += [2**width - 1] * (run // (2**width - 1)) + [run % (2**width - 1)]
            run = 0
        else:
            run += 1
    return codes


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_gaps_can_be_read_back_and_take_the_bits_that_are_said(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    for density in (0.02, 0.2, 0.7):
        mask = torch.rand(300, generator=generator) < density
        codes = gaps(mask, width)
        assert torch.equal(read_gaps(codes, width, 300), mask)
        assert gap_bits(mask, width) == width * len(codes)


def test_positions_take_the_shortest_way() -> None:
    for density in (0.0, 0.01, 0.1, 0.5, 1.0):
        mask = torch.rand(5000, generator=torch.Generator().manual_seed(1)) < density
        said = position_bits(mask)
        ways = [gap_bits(mask, width) for width in range(1, 14)]
        assert said == (0 if density in (0.0, 1.0) else min(5000, *ways))
        assert said >= 0.99 * entropy_bits(mask)  # one sample may lie below the mean of its density
    assert entropy_bits(torch.tensor([True] * 3 + [False])) == pytest.approx(4 * 0.8112781245)
    masks = itertools.product([False, True], repeat=4)
    assert all(position_bits(torch.tensor(mask)) <= 4 for mask in masks)
