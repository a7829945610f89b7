"""What every factorized layer answers: what a weight costs, how it runs, what is written, and how it is timed."""

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectrim.forms.form import Form
from spectrim.layers.exchanged import ExchangedLayer, Share
from spectrim.layers.forwards import renew
from spectrim.layers.uses import Call, Features, call_on, first_argument
from spectrim.linalg.fold import Fold

TRAFFIC = 0.15
"""Two operations also write and read what is between them: they have to save this share of the multiply-accumulates to be faster.

From the step times of ResNet-20 in the spatial scheme at half the ranks: at equal multiply-accumulates they took 1.2 times as long.
"""

RECOMPUTE_SHARE = 0.02
"""A composed weight is forgotten after the forward pass when composing it again costs at most this share of the layer's step."""


RECOMPUTE_SIZE = 2**16
"""Weights with fewer elements are kept: they take less memory than the bookkeeping is worth."""

LEAST_GAIN = 0.05
"""Share of the pair's cost, ``r / (m + n)``, that the interpolative writing has to save: its two parts are concatenated."""


def share_nothing(factors: Form, part: str, tensor: Tensor) -> nn.Parameter:
    """Make a parameter of its own for each tensor: a `Share`."""
    return nn.Parameter(tensor.detach())


class FactorizedLayer(ExchangedLayer):
    """Base of the factorized layers: a dense torch layer whose weights are composed from a `Form`.

    A sub-class names one kind of layer and adds `weights`, `fold`, `work` and `split`. An adopted layer stays the same object and an
    instance of its original class: its class is exchanged in place for one derived from both. Attributes, hooks, buffers and further
    parameters stay; ``layer.weight`` gives the dense weight, composed on each use.
    """

    looks_up: ClassVar[bool] = False
    """Whether the layer looks rows of its weight up, instead of multiplying with it."""

    unobserved: ClassVar[str] = ""
    """Why `calibrate` does not see what the weights meet; empty where it does."""

    @classmethod
    def work(cls, module: Any, name: str, scheme: Fold, size: Any, shape: Sequence[int] | None) -> float:
        """Multiply-accumulates of applying one weight to an input of `shape` (the batch included).

        Args:
            module: the layer, dense or factorized: its sizes are read.
            name: which weight.
            scheme: how it is folded.
            size: two operations of this rank, or as many as the scheme's form has; None for the dense operation.
            shape: the whole input; None for the cost per output position of a large input, up to a factor common to all ranks.
        """
        raise NotImplementedError

    @classmethod
    def interpolated_kind(cls, module: Any, scheme: Fold) -> str | None:
        """Return the key of `linalg.writings.WRITINGS` for the interpolative writing of the weight; None where there is none."""
        return None

    @classmethod
    def interpolated_work(cls, module: Any, scheme: Fold, rank: int, shape: Sequence[int] | None) -> float:
        """Multiply-accumulates of the interpolative writing, as `work`."""
        raise NotImplementedError

    own_forward: ClassVar[bool] = False
    """Whether the forward is that of a class outside, which reads the weight: that it computes the same is found by comparing."""

    def interpolates(self, name: str, rank: int) -> bool:
        """Whether `merge` writes a rank in ``r (m + n - r)`` numbers: where that was asked for, and saves enough over the pair."""
        factors = self.factors_of(name)
        able = self.writing == "interpolative" and self.interpolated_kind(self, self.scheme) is not None
        return able and factors.is_matrix and rank < factors.full_rank and rank >= LEAST_GAIN * sum(factors.shape)

    def written_work(self, name: str, rank: int | None, shape: Sequence[int] | None) -> float:
        """Multiply-accumulates of what `merge` writes at the rung `rank`, or of the dense operation; as `work`."""
        if rank is not None and self.interpolates(name, rank):
            return self.interpolated_work(self, self.scheme, rank, shape)
        factors = self.factors_of(name)
        size = None if rank is None else factors.plain_of(factors.size_of(rank))
        return self.work(self, name, self.scheme, size, shape)

    def calls_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
        """Yield the uses of the layer's weights in one call."""
        x = first_argument(args, kwargs)
        yield from (call_on(self, name, x) for name, _ in self.named_factors())

    def features_read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Features]:
        """Yield the features that the weights read as they are; none where that is not known."""
        yield from ()

    def features_written(self, output: Any) -> Iterator[Features]:
        """Yield the features of the output that are the product of a weight; none where that is not known."""
        yield from ()

    def params_written(self, name: str, rank: int | None, site: str) -> dict[str, int]:
        """Return the entries of one block that `merge` stores for a weight, by tensor: what tied weights store once has one key.

        Args:
            name: which weight.
            rank: None for the dense form.
            site: the weight's name in the model, for tensors that are not shared.
        """
        factors = self.factors_of(name)
        if rank is None:
            return {"dense": math.prod(factors.folded_shape) // factors.blocks}
        return {site: factors.count(factors.size_of(rank)) - (rank**2 if self.interpolates(name, rank) else 0)}

    def why_untimed(self, name: str, eager: bool) -> str:
        """Return why multiply-accumulates decide about a weight, not seconds; empty where it is timed."""
        return "" if self.factors_of(name).splits else f"{self.factors_of(name).called} is one operation"

    def share_timed(self, name: str) -> float:
        """Return what part of the operation that is timed for a weight is that weight."""
        return 1.0

    def timed_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the input of the operation that is timed for a weight, from that of the layer's input."""
        return shape

    def timed_forms(self, name: str, rank: int) -> tuple[nn.Module, nn.Module]:
        """Return the operation of one weight dense and as the pair that `merge` writes, with values that do not matter."""
        bare = self._bare(name, self.factors_of(name).random(rank))
        two = bare.split(share_nothing, (name,))
        return bare.release(share_nothing).eval(), two.eval()

    def written_on_meta(self, name: str, rank: int) -> nn.Module:
        """Return the layers that `merge` writes for a weight at a rung, on the meta device: their sizes alone."""
        made: nn.Module = self._bare(name, self.factors_of(name).first(rank, device="meta")).split(share_nothing, (name,))
        return made

    def _bare(self, name: str, factors: Form) -> Any:
        """Return a copy of the layer without hooks, with other factors of one weight alone."""
        bare = renew(self, type(self))
        for key, value in vars(bare).items():
            if key.endswith("_hooks") and isinstance(value, dict):
                bare.__dict__[key] = OrderedDict()
        bare._modules["factors"] = nn.ModuleDict({name: factors})
        return bare

    def overhead(self, name: str) -> float:
        """Return what two operations cost beyond their multiply-accumulates, in the unit of `work` without a shape."""
        return 0.0

    def break_even(self, name: str) -> int:
        """Return the largest rank at which what `merge` writes costs less than the dense operation; 0 when none does."""
        if not self.factors_of(name).splits:
            return 0
        if self.writing == "interpolative" and self.interpolated_kind(self, self.scheme) is not None and self.factors_of(name).is_matrix:
            dense, full = self.work(self, name, self.scheme, None, None), self.factors_of(name).full_rank
            return next((rank for rank in range(full - 1, 0, -1) if self.written_work(name, rank, None) < dense), 0)
        if not self.factors_of(name).is_matrix:
            return self._last_paying(name)
        dense, single = (self.work(self, name, self.scheme, rank, None) for rank in (None, 1))
        return max(0, min(self.factors_of(name).full_rank, math.ceil((dense - self.overhead(name)) / single) - 1))

    def _last_paying(self, name: str) -> int:
        """Return the last rung whose work is below that of the dense operation; 0 where there is none."""
        dense, held = self.work(self, name, self.scheme, None, None), self.factors_of(name).rank
        return bisect_left(range(1, held + 1), dense, key=lambda rank: self.written_work(name, rank, None))

    def pays(self, name: str) -> bool:
        """Whether two operations take fewer multiply-accumulates than the dense one at the present rank."""
        return self.factors_of(name).rank <= self.break_even(name)

    def composes(self, name: str, shape: Sequence[int]) -> bool:
        """Whether composing the weight and running one dense operation costs no more than two operations on this input.

        By measured seconds where `choose_execution` has timed this weight at its present rank, else by multiply-accumulates, of which two
        operations must save the share `TRAFFIC`.
        """
        factors = self.factors_of(name)
        if not factors.splits:
            return True
        if self.execution:
            measured = self.execution.get((name, factors.rank, tuple(shape[1:])))
            if measured is not None:
                return measured
        dense, two = (self.work(self, name, self.scheme, size, shape) for size in (None, factors.plain_size))
        return dense + factors.compose_macs <= (1 + TRAFFIC) * two

    def run_dense(self, name: str, shape: Sequence[int], operation: Callable[[Tensor], Tensor]) -> Tensor:
        """Run ``operation(weight)`` on one composed weight; backward recomputes it where that is cheap, instead of keeping it.

        Args:
            name: which weight.
            shape: of the layer's input.
            operation: uses the weight; what it returns is returned.
        """
        factors = self.factors_of(name)
        weight = self.laid_out(self.unfold(self, name, factors.product(), self.scheme))
        if weight.numel() < RECOMPUTE_SIZE or not weight.requires_grad or torch.compiler.is_compiling():
            return operation(weight)  # a compiler decides by itself what it keeps
        if factors.compose_macs > RECOMPUTE_SHARE * 3 * self.work(self, name, self.scheme, None, shape):
            return operation(weight)
        storage, device, dtype = weight.untyped_storage().data_ptr(), weight.device.type, weight.dtype

        def forget(saved: Tensor) -> Any:
            own = saved.untyped_storage().data_ptr() == storage
            return (saved.shape, saved.stride(), saved.storage_offset()) if own else saved

        def recall(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != factors.dtype):
                return self.laid_out(self.unfold(self, name, factors.product(), self.scheme)).as_strided(*kept)

        with torch.autograd.graph.saved_tensors_hooks(forget, recall):
            return operation(weight)

    def split(self, share: Share, paying: Collection[str]) -> nn.Module | None:
        """Return the layer as torch layers applied one after the other, or None where no weight pays.

        Args:
            share: makes the parameter for a tensor, the same one for tied weights.
            paying: names of the weights to write as two operations.
        """
        raise NotImplementedError

    def _get_name(self) -> str:
        return f"Factorized{self.dense_kind.__name__}"

    def extra_repr(self) -> str:
        """Return the dense layer's description."""
        return f"{super().extra_repr()}, scheme={self.scheme}".removeprefix(", ")
