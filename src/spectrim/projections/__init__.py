"""Projections: the nearest member of a set of tensors. `METHODS` is the table that contract tests and docs read.

A projection is called and returns a new tensor, never a view of what it was given; it computes no gradients.
"""

from typing import Any

from spectrim.projections.levels import Levels, LevelTable, PowersOfTwo
from spectrim.projections.positions import entropy_bits, gap_bits, position_bits
from spectrim.projections.rank import RankAtMost
from spectrim.projections.structured import Structured, Tiles
from spectrim.projections.then import Then
from spectrim.projections.top_k import TopK
from spectrim.tables import Row

LAWS = {
    "nearest": "no member of the set is nearer",
    "prunes": "each entry is kept as it is or zero; zeros of the tensor stay",
    "rounds": "at most 2^width values in what has one scale, those that are exactly zero not counted where zero is no level",
    "scale-free": "a multiple of the tensor gives that multiple of the result",
    "exact": "the result of a member is the member to the bit, not only up to rounding",
}
"""The laws that some projections obey, beyond idempotence and copies."""

METHODS: tuple[Row[Any], ...] = (
    Row(TopK, example=TopK(0.2), card="admm", laws={"nearest", "prunes", "scale-free", "exact"}, label="TopK, a fraction"),
    Row(TopK, example=TopK(7), card="admm", laws={"nearest", "prunes", "scale-free", "exact"}, label="TopK, a count"),
    Row(Structured, example=Structured(2), card="admm", laws={"nearest", "prunes", "scale-free", "exact"}, label="Structured, rows"),
    Row(
        Structured,
        example=Structured(0.5, along="columns"),
        card="admm",
        laws={"nearest", "prunes", "scale-free", "exact"},
        label="Structured, columns",
    ),
    Row(
        Structured,
        example=Structured(3, along="blocks", block=(2, 3)),
        card="admm",
        laws={"nearest", "prunes", "scale-free", "exact"},
        label="Structured, blocks",
    ),
    Row(Tiles, example=Tiles(4, 4, keep=2), card="admm", laws={"nearest", "prunes", "scale-free", "exact"}, label="Tiles, columns"),
    Row(
        Tiles,
        example=Tiles(4, 4, keep=0.25, along="rows"),
        card="admm",
        laws={"nearest", "prunes", "scale-free", "exact"},
        label="Tiles, rows",
    ),
    Row(RankAtMost, example=RankAtMost(2), card="admm", laws={"nearest", "scale-free"}),
    Row(Levels, example=Levels(3), card="admm", laws={"nearest", "rounds", "scale-free"}, label="Levels"),
    Row(Levels, example=Levels(2, zero=False), card="admm", laws={"nearest", "rounds", "scale-free"}, label="Levels without zero"),
    Row(Levels, example=Levels(3, per="channel"), card="admm", laws={"nearest", "rounds", "scale-free"}, label="Levels per channel"),
    Row(Levels, example=Levels(3, per=8), card="admm", laws={"nearest", "rounds", "scale-free"}, label="Levels per group"),
    Row(Levels, example=Levels(2, kind="affine"), card="admm", laws={"nearest", "rounds", "scale-free"}, label="Levels, affine"),
    Row(
        Levels,
        example=Levels(3, kind="affine", zero=False, per="channel"),
        card="admm",
        laws={"rounds", "scale-free"},
        label="Levels, affine without zero",
    ),
    Row(PowersOfTwo, example=PowersOfTwo(3), card="admm", laws={"nearest", "rounds", "scale-free"}),
    Row(LevelTable, example=LevelTable((-1.1, -0.4, 0.3, 0.9)), card="admm", laws={"nearest", "rounds", "exact"}),
    Row(
        LevelTable,
        example=LevelTable((-1.1, -0.4, 0.0, 0.3, 0.9), scaled=True),
        card="admm",
        laws={"nearest", "rounds", "scale-free"},
        label="LevelTable, scaled",
    ),
    Row(Then, example=Then(TopK(0.3), Levels(2, zero=False)), card="admm", laws={"nearest", "rounds", "scale-free"}),
)

__all__ = [
    "LAWS",
    "METHODS",
    "LevelTable",
    "Levels",
    "PowersOfTwo",
    "RankAtMost",
    "Structured",
    "Then",
    "Tiles",
    "TopK",
    "entropy_bits",
    "gap_bits",
    "position_bits",
]
