"""The contracts. A method is a frozen dataclass whose fields are its knobs, and which is called."""

from collections.abc import Mapping
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Penalty(Protocol):
    """What is added to the loss: a non-negative scalar of the model, differentiable in its parameters."""

    def __call__(self, model: nn.Module, /) -> Tensor:
        """Return a scalar tensor >= 0, already multiplied by the penalty's strength."""


@runtime_checkable
class RankRule(Protocol):
    """Chooses a rank from one layer's singular values."""

    def __call__(self, singular_values: Tensor, /) -> int:
        """Return an integer in ``[1, len(singular_values)]`` from a 1-D tensor of non-negative values, in any order."""


@runtime_checkable
class Importance(Protocol):
    """Measures the distortion of each truncated weight, in one unit for all weights, so that distortions can be added."""

    def __call__(self, model: nn.Module, /) -> Mapping[str, Tensor]:
        """Return, by the names of `named_factors`, float64 ``(rank + 1,)``.

        Entry ``r`` is the distortion of keeping the best ``r`` singular values: not negative, never rising with ``r``, zero where all are
        kept.
        """


@runtime_checkable
class RankSchedule(Protocol):
    """Cuts ranks while a network trains."""

    def __call__(self, model: nn.Module, inputs: Any, step: int, steps: int, /) -> RankRule | Mapping[str, SupportsIndex] | None:
        """Return the ranks to cut to before step `step` of `steps` (a function of these and the model alone), or None for no cut."""


@runtime_checkable
class PenaltySchedule(Protocol):
    """Changes a penalty while a network trains."""

    def penalty(self, model: nn.Module, inputs: Any, step: int, steps: int, before: Mapping[str, Any] | None, /) -> Penalty | None:
        """Return the penalty of step `step` of `steps`, or None for none.

        A function of its arguments alone, so that a run can be resumed: `before` holds the fields of what it returned for the step before
        (plain data, which a checkpoint keeps), None at first.
        """


@runtime_checkable
class Projection(Protocol):
    """Maps a tensor to the nearest tensor of a set (in the Frobenius norm)."""

    def __call__(self, tensor: Tensor, /) -> Tensor:
        """Return a tensor of the same shape and dtype that lies in the set."""


@runtime_checkable
class Coder(Protocol):
    """Entropy coder: symbols to bytes and back."""

    def encode(self, symbols: Tensor, probabilities: Tensor, /) -> bytes:
        """Return the coded bytes of 1-D integer symbols under a probability table."""

    def decode(self, data: bytes, probabilities: Tensor, count: int, /) -> Tensor:
        """Return `count` symbols; the inverse of `encode`."""


@runtime_checkable
class Latencies(Protocol):
    """Measured seconds of each factorized weight, by the names of `coverage`; `LatencyTable` is one."""

    def limits(self, model: nn.Module) -> Mapping[tuple[int, str], int]:
        """Return, by the ``id`` of each factorized layer and the weight's name, the largest rank at which a pair is the fastest form."""

    def seconds(self, name: str, rank: int | None) -> float | None:
        """Return the seconds of one weight as a pair of `rank`, or dense for None; None where it was not timed."""

    def multiple(self, name: str) -> int:
        """Return the number that a rank of one weight should be a multiple of."""

    def verdict(self, name: str, rank: int) -> str:
        """Say what `merge` writes for one weight of `rank`, and why."""


@runtime_checkable
class LayerFilter(Protocol):
    """Selects layers by name and module."""

    def __call__(self, name: str, module: nn.Module, /) -> bool:
        """Return True for layers that should be factorized."""
