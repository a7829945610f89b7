"""`TensorTrain`: a kernel as a core for each axis; run as 1x1, the taps of one axis after the other, 1x1."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectrim.errors import LayerError
from spectrim.forms.float16 import evened
from spectrim.forms.form import LOST, Form, Size, rung_of
from spectrim.forms.kernel import Kernel, Nested, several_ranks
from spectrim.linalg import tensor_train as tt
from spectrim.linalg.gram import Metric
from spectrim.linalg.train_sizes import nearest_within, nested_path, path_losses

Cores = tuple[Tensor, ...]


class TensorTrain(Nested, Kernel):
    """One kernel ``(out, in, taps...)`` as a tensor train over inputs, the taps of each axis, and outputs, in this order.

    A size has a rank between each two of them, from the inputs on: ``(r1, r2, r3)`` for 3x3 taps. The path of sizes is nested: from the
    full size down, the next rung has one rank less where that loses least for each number saved. It is chosen when it is asked for.

    Attributes:
        G1: ``(in, r1)``, orthonormal columns where it is exact.
        G2: ``(r1, taps, r2)``, orthonormal columns when unfolded to ``(r1 taps, r2)``; so are `G3` and further ones.
        G4: the last one, ``(r3, out)``, with the norms.

    Source: Oseledets, SIAM J. Sci. Comput. 33 (2011); for convolutions Garipov et al., arXiv 1611.03214.
    Deviation: one core for each axis of the kernel, no folding of channels into several axes. The distortion of a rung is the squared error
    of the leading entries; its cut is improved by alternating least squares, so that the squared error is at most the distortion.
    """

    called: ClassVar[str] = "a tensor train"

    def __init__(self, *cores: Tensor, dtype: torch.dtype | None = None, requires_grad: bool = True, exact: bool = False) -> None:
        """Copy existing tensors.

        Args:
            cores: ``(in, r1)``, ``(r1, taps, r2)``, ..., ``(r, out)``.
            dtype: the weight's dtype; that of the first core when omitted.
            requires_grad: False for a frozen layer.
            exact: whether these are a decomposition as `linalg.tensor_train.tt_svd` gives it.
        """
        parts = {f"G{number}": core for number, core in enumerate(cores, 1)}
        super().__init__(parts, dtype=dtype or cores[0].dtype, requires_grad=requires_grad)
        self._decomposed = self._fingerprint() if exact else None
        self.__dict__["operations"] = tuple(parts)

    @classmethod
    def full_size_of(cls, folded: Tensor) -> tt.Ranks:
        """Return the ranks that hold any kernel of this shape."""
        return tt.full_ranks(_train(folded.shape))

    @classmethod
    def empty(cls, weight: Tensor, folded: Tensor, size: Size) -> "TensorTrain":
        """Return zero parts of the right shapes, for loading a checkpoint into."""
        zeros = (torch.zeros(shape, device=weight.device) for shape in tt.shapes(_train(folded.shape), _ranks(size)))
        return cls(*zeros, dtype=weight.dtype, requires_grad=weight.requires_grad)

    # Sizes

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """The parts, from the inputs to the outputs."""
        return self.shown()

    @property
    def size(self) -> tt.Ranks:
        """A rank between each two axes."""
        return tuple(core.shape[-1] for core in self.cores[:-1])

    @property
    def rank(self) -> int:
        """The rung of the size: the sum of the ranks, less one for each but the first."""
        return rung_of(self.size)

    @property
    def full_size(self) -> tt.Ranks:
        """The ranks that hold any kernel of this shape."""
        return tt.full_ranks(_train(self.folded_shape))

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.cores[-1].shape[1], self.cores[0].shape[0]

    @property
    def folded_shape(self) -> tuple[int, ...]:
        """``(out, in, taps...)``."""
        return (*self.shape, *(core.shape[1] for core in self.cores[1:-1]))

    def _shapes(self, size: tt.Ranks) -> list[tuple[int, ...]]:
        return tt.shapes(_train(self.folded_shape), size)

    def nested_path(self) -> tuple[tt.Ranks, ...]:
        """Return the sizes from ones to the present one."""
        return nested_path(self.cores if self.cores[0].is_meta else self.parts_in_order(), _train(self.folded_shape))

    def checked(self, name: str, size: Any) -> tt.Ranks:
        """Return a rank for each cut; a number stands for all, at most what is held; raise a RankError for another."""
        return several_ranks(self, name, size)

    def count(self, size: Size) -> int:
        """``in r1 + r1 taps r2 + ... + r out``."""
        return tt.count(_train(self.folded_shape), _ranks(size))

    # The weight

    @property
    def compose_macs(self) -> int:
        """Multiply-accumulates of composing the kernel: the inputs first."""
        rows, macs = self.cores[0].shape[0], 0
        for core in self.cores[1:]:
            macs += rows * core.numel()
            rows *= core.shape[1] if core.dim() == 3 else 1
        return macs

    @staticmethod
    def compose(*parts: Tensor) -> Tensor:
        """Return ``(out, in, taps...)``."""
        return tt.contract(parts).movedim(-1, 0)

    def chain(self) -> Cores:
        """Return ``G1^T (r1, in)``, the kernels ``(r2, r1, taps)`` of each axis and ``(out, r)`` in the weight's dtype, even in float16."""
        last, first = evened(self.cores[-1], self.cores[0], self.dtype, across=(0, 1))
        first, *middle, last = (core.to(self.dtype) for core in (first, *self.cores[1:-1], last))
        return first.mT, *(core.permute(2, 0, 1) for core in middle), last.mT

    @classmethod
    def decomposed(cls, kernel: Tensor, size: Any) -> Cores:
        """Return the cores by successive singular value decompositions."""
        return tt.tt_svd(kernel.movedim(0, -1), size)

    def nearest(self, kernel: Tensor, size: Any, held: Cores) -> Cores:
        """Improve by alternating least squares the leading entries, or successive decompositions where these are nearer."""
        tensor, cores = kernel.movedim(0, -1), self.ordered(held)
        kept = tt.leading(cores, nearest_within(cores, self.path(), size, _train(self.folded_shape)))
        padded = tuple(tt.resized(*each) for each in zip(kept, tt.shapes(tensor.shape, size), strict=True))
        starts = [tt.improved(tensor, start) for start in (padded, tt.tt_svd(tensor, size))]
        return self.ordered(max(starts, key=lambda cores: float(cores[-1].square().sum())))  # what orthonormal cores keep

    @classmethod
    def ordered(cls, parts: Cores) -> Cores:
        """Return the same kernel in orthonormal cores."""
        return cls.decomposed(cls.compose(*parts), tuple(core.shape[-1] for core in parts[:-1]))

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return the last core, transposed, and the first one."""
        return self.cores[-1].mT, self.cores[0]

    @classmethod
    def with_ends(cls, parts: Cores, left: Tensor, right: Tensor) -> Cores:
        """Return cores with other outputs and inputs."""
        first, *middle, last = parts
        return (right @ first, *middle, last @ left.mT)

    @torch.no_grad()
    def parts_in_order(self) -> Cores:
        """Return the decomposition of the kernel at the present size, in float64; nothing is computed where it is at hand."""
        return self.held() if self.exact else self.ordered(self.held())

    def spectra(self) -> tuple[Tensor, ...]:
        """Return the singular values at each cut, descending."""
        return tuple(energy.clamp(min=0).sqrt() for energy in tt.right_spectra(self.parts_in_order()))

    def tail(self, left: Tensor | None = None, right: Metric | None = None) -> Tensor:
        """Return the squared error of the leading entries at every rung, never rising."""
        parts = self.parts_in_order()
        if left is not None or right is not None:
            parts = self.ordered(self.with_ends(parts, *self._metrics(left, right)[0]))
        return path_losses(parts, self.path(), _train(self.folded_shape))

    def cut_to(self, size: Size, left: Tensor | None = None, right: Metric | None = None) -> "TensorTrain":
        """Cut to ranks; the path stays where they are on it."""
        made = super().cut_to(size, left, right)
        made._path = self.path()[: made.rank] if made.size in self.path() else None
        return made

    def cut(self, choose: Callable[[Tensor], int], left: Tensor | None = None, right: Metric | None = None) -> "TensorTrain":
        """Cut to what is chosen from the singular values at each cut."""
        return self.cut_to(tuple(choose(spectrum) for spectrum in self.spectra()), left, right)

    # Training

    def slope_parameters(self) -> list[nn.Parameter]:
        """Return the last core, which has the norms."""
        return [list(self.parameters(recurse=False))[-1]]

    def sides(self) -> Cores:
        """Return all cores but the last, unfolded to matrices with orthonormal columns."""
        return tuple(core.reshape(-1, core.shape[-1]) for core in self.cores[:-1])

    @torch.no_grad()
    def retract_(self) -> None:
        """Give all cores but the last orthonormal columns, in place; the core behind each takes over what it loses."""
        self.set_(*tt.orthonormalized(self.held()))

    def values(self) -> Cores:
        """Return the norms of what is behind each column of each cut: singular values, as long as the cores are orthonormal."""
        return tuple((energy.clamp(min=0) + torch.finfo(energy.dtype).tiny).sqrt() for energy in tt.right_spectra(self.cores))

    def tail_share(self, size: Size) -> Tensor:
        """Return the squared distance of the kernel to that of the leading entries, relative to its energy, treated as a constant."""
        whole = tt.contract(self.cores)
        rest = whole - tt.contract(tt.leading(self.cores, _ranks(size)))
        return rest.square().sum() / whole.detach().square().sum().clamp_min(torch.finfo(whole.dtype).tiny)

    def first_order_rises(self, slopes: Tensor) -> Tensor:
        """Raise a LayerError: the slopes of one core say nothing of the other cuts."""
        raise LayerError("a tensor train", "has no first-order distortion", hint="use LossSensitivity(calibration, order=2)")

    def truncated_parts(self, rank: int) -> Cores:
        """Return cores of the present shapes, zero outside the size of a rung, or of a lower one that is nearer."""
        cores = self.parts_in_order()
        if not rank:
            return tuple(torch.zeros_like(core) for core in cores)
        kept = tt.leading(cores, nearest_within(cores, self.path(), self.size_of(rank), _train(self.folded_shape)))
        return tuple(tt.resized(*each) for each in zip(kept, self._shapes(self.size), strict=True))

    def turns(self, new: Form) -> dict[str, dict[int, Tensor]]:
        """Return the products of the old columns of each cut with the new ones, which take moments of gradients through a cut."""
        assert isinstance(new, TensorTrain)
        found = tt.overlaps(self.held(), new.held())
        middle = {f"G{number}": {0: before, 2: after} for number, (before, after) in enumerate(pairwise(found), 2)}
        return {"G1": {1: found[0]}, **middle, f"G{len(found) + 1}": {0: found[-1]}}

    # Storage

    def parts_of(self, weight: Tensor) -> dict[str, Tensor] | None:
        """Return the cores of a dense kernel at the present size; None where values beyond rounding would be lost."""
        cores = self.decomposed(weight.detach(), self.size)
        whole, kept = float(weight.double().square().sum()), float(cores[-1].square().sum())
        if whole - kept > LOST**2 * whole + 1e-12 * whole:
            return None
        return {f"G{number}": core.to(self.cores[0]) for number, core in enumerate(cores, 1)}

    def size_of_parts(self, stored: Mapping[str, Any]) -> tt.Ranks | None:
        """Return the size of stored cores; None where they are none of this kernel."""
        cores = [stored.get(f"G{number}") for number in range(1, len(self.cores) + 1)]
        if not all(isinstance(core, Tensor) and core.dim() == mine.dim() for core, mine in zip(cores, self.cores, strict=True)):
            return None
        shapes = [tuple(core.shape) for core in cores if core is not None]
        size = tuple(shape[-1] for shape in shapes[:-1])
        fits = shapes == self._shapes(size) and all(1 <= r <= most for r, most in zip(size, self.full_size, strict=True))
        return size if fits else None

    def first(self, rank: int, *, device: torch.device | str | None = None) -> "TensorTrain":
        """Return copies of the leading entries at a rung, at most the present one."""
        size = self.size_of(min(rank, self.rank))
        made = self.like(*(core.detach().to(device or self.device) for core in tt.leading(self.cores, size)))
        made._path = self.path()[: made.rank]
        return made

    def resized(self, size: Size) -> "TensorTrain":
        """Return the leading entries as they are held, or zeros beside them."""
        return self.like(*(tt.resized(core.detach(), shape) for core, shape in zip(self.cores, self._shapes(_ranks(size)), strict=True)))

    def random(self, rank: int) -> "TensorTrain":
        """Return random cores at a rung, in float32 or the weight's dtype, to time what they do."""
        shapes = self._shapes(self.size_of(min(rank, self.rank)))
        return type(self)(*(torch.randn(shape, device=self.device) / shape[0] for shape in shapes), dtype=self.dtype)

    def extra_repr(self) -> str:
        """Shape, size and dtype for the module's printout."""
        return f"{' x '.join(map(str, self.folded_shape))}, size={self.size} of {self.full_size}, dtype={self.dtype}"


def _train(folded: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes in the order of the cores: inputs, taps, outputs."""
    return (*folded[1:], folded[0])


def _ranks(size: Size) -> tt.Ranks:
    assert isinstance(size, tuple)
    return size
