"""`Structured` and `Tiles`: whole rows, columns or blocks are zero, in the matrix or inside each of its tiles."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from spectrim.checks.words import check_words
from spectrim.errors import SettingError
from spectrim.projections.counts import check_keep, count_of, largest
from spectrim.projections.positions import position_bits
from spectrim.protocols import Bits


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor as a matrix: its first axis by all others; a vector is a column."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.dim() else tensor.reshape(1, 1)


def cut_up(matrix: Float[Tensor, "out in_"], rows: int, columns: int) -> Float[Tensor, "down across rows columns"]:
    """Cut a matrix into tiles, filled up with zeros where it is no multiple of them."""
    out, in_ = matrix.shape
    padded = F.pad(matrix, (0, -in_ % columns, 0, -out % rows))
    return padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).transpose(1, 2)


def put_together(tiles: Float[Tensor, "down across rows columns"], shape: torch.Size) -> Tensor:
    """Undo `cut_up` for a tensor of `shape`."""
    down, across, rows, columns = tiles.shape
    out, in_ = as_matrix(torch.empty(shape, device="meta")).shape
    return tiles.transpose(1, 2).reshape(down * rows, across * columns)[:out, :in_].reshape(shape)


def norms(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return sums of squares over some axes, in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square().sum(axes)


def check_size(owner: str, name: str, value: object) -> None:
    """Raise a SettingError unless a size is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(owner, name, got=value, rule="an integer >= 1")


@dataclass(frozen=True)
class Structured:
    """Keep the rows, columns or blocks of largest norm, exactly so many, and set all others to zero.

    The tensor is a matrix, its first axis by all others: a row is a filter.

    Args:
        keep: a count (an integer >= 1) or a fraction (a float in (0, 1]) of the rows, columns or blocks.
        along: which of them.
        block: rows and columns of a block; at the right and lower edge blocks may be smaller.

    Raises:
        SettingError: for a value outside its range, or a block without ``along="blocks"``.

    Examples:
        >>> Structured(1, along="rows")(torch.tensor([[3.0, 3.0], [4.0, 0.0]]))
        tensor([[3., 3.],
                [0., 0.]])

    Source: filter and column pruning as in Zhang et al., arXiv 1804.03294.
    """

    keep: int | float
    along: Literal["rows", "columns", "blocks"] = "rows"
    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_keep("Structured", self.keep)
        check_words(self)
        if (self.block is not None) != (self.along == "blocks"):
            raise SettingError("Structured", "block", got=self.block, rule="(rows, columns) for along='blocks', else None")
        for size in self.block or ():
            check_size("Structured", "block", size)

    def _tiles(self, tensor: Tensor) -> Tensor:
        matrix = as_matrix(tensor)
        out, in_ = matrix.shape
        rows, columns = self.block or ((1, in_) if self.along == "rows" else (out, 1))
        return cut_up(matrix, rows, columns)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the nearest tensor of which that many rows, columns or blocks are not zero; among equal norms the first are kept."""
        tiles = self._tiles(tensor)
        scores = norms(tiles, (2, 3)).flatten()
        kept = largest(scores, count_of(self.keep, scores.numel())).reshape(tiles.shape[:2])
        return put_together(torch.where(kept[..., None, None], tiles, 0), tensor.shape)

    def things(self, tensor: Tensor) -> int:
        """Return of how many things `keep` is a count or a fraction: rows, columns or blocks."""
        return int(self._tiles(torch.empty(tensor.shape, device="meta")).shape[:2].numel())

    def stored(self, tensor: Tensor) -> tuple[int, int]:
        """Return how many values of a member are stored (all of a row, column or block that is not zero), and the bits of positions."""
        kept = self._tiles(tensor).ne(0).any(-1).any(-1)
        sizes = self._tiles(torch.ones_like(tensor)).sum((2, 3))
        return int(sizes[kept].sum()), position_bits(kept)

    def stored_bits(self, tensor: Tensor) -> Bits:
        """Return the stored bits of a member: the values of what is kept, in their dtype, and its positions."""
        values, index = self.stored(tensor)
        return Bits(values * 8 * tensor.element_size(), index)


@dataclass(frozen=True)
class Tiles:
    """Inside each tile of a matrix, keep exactly so many rows or columns of largest norm: pruning that a crossbar can use.

    Args:
        rows: of a tile, >= 1.
        columns: of a tile, >= 1; at the right and lower edge tiles may be smaller.
        keep: a count (an integer >= 1) or a fraction (a float in (0, 1]) of the rows, or columns, of each tile.
        along: which of them.

    Raises:
        SettingError: for a value outside its range.

    Examples:
        >>> Tiles(2, 2, keep=1)(torch.tensor([[1.0, 2.0, 5.0, 0.0], [1.0, 2.0, 0.0, 4.0]]))
        tensor([[0., 2., 5., 0.],
                [0., 2., 0., 0.]])

    Source: crossbar-block pruning as in Yuan et al., arXiv 1908.11691.
    """

    rows: int
    columns: int
    keep: int | float = 0.5
    along: Literal["rows", "columns"] = "columns"

    def __post_init__(self) -> None:
        check_words(self)
        check_size("Tiles", "rows", self.rows)
        check_size("Tiles", "columns", self.columns)
        check_keep("Tiles", self.keep)

    @property
    def _across(self) -> int:
        """The axis of a tile's entries that a line of it runs along."""
        return 3 if self.along == "rows" else 2

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the nearest tensor each tile of which has that many lines that are not zero; among equal norms the first are kept."""
        tiles = cut_up(as_matrix(tensor), self.rows, self.columns)
        scores = norms(tiles, (self._across,))
        kept = largest(scores, count_of(self.keep, scores.shape[-1])).unsqueeze(self._across)
        return put_together(torch.where(kept, tiles, 0), tensor.shape)

    def things(self, tensor: Tensor) -> int:
        """Return of how many things `keep` is a count or a fraction: rows or columns of a tile."""
        return self.rows if self.along == "rows" else self.columns

    def _kept(self, tensor: Tensor) -> Bool[Tensor, "down across lines"]:
        return cut_up(as_matrix(tensor), self.rows, self.columns).ne(0).any(self._across)

    def stored(self, tensor: Tensor) -> tuple[int, int]:
        """Return how many values of a member are stored (all of a line that is not zero), and the bits of positions of lines."""
        sizes = cut_up(as_matrix(torch.ones_like(tensor)), self.rows, self.columns).sum(self._across)
        kept = self._kept(tensor)
        return int(sizes[kept].sum()), position_bits(kept[sizes > 0])

    def stored_bits(self, tensor: Tensor) -> Bits:
        """Return the stored bits of a member: the values of lines that are kept, in their dtype, and their positions."""
        values, index = self.stored(tensor)
        return Bits(values * 8 * tensor.element_size(), index)
