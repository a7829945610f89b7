"""The contracts. A method is a frozen dataclass whose fields are its settings, and which is called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Penalty(Protocol):
    """A term of the loss: a non-negative scalar of the model, differentiable in its parameters."""

    def __call__(self, model: nn.Module, /) -> Tensor:
        """Return a scalar tensor >= 0, already multiplied by the penalty's strength."""


@runtime_checkable
class RankRule(Protocol):
    """Chooses a rank from one layer's singular values."""

    def __call__(self, singular_values: Tensor, /) -> int:
        """Return an integer in ``[1, len(singular_values)]`` from a 1-D tensor of non-negative values, in any order."""


Sizes = RankRule | Mapping[str, SupportsIndex | tuple[int, ...]]
"""What to cut to: a rule for every weight, or by name a rank; of a Tucker form the ranks of outputs and inputs."""


@runtime_checkable
class Importance(Protocol):
    """Measures the distortion of each truncated weight, in one unit for all weights, so that distortions can be added."""

    def __call__(self, model: nn.Module, /) -> Mapping[str, Tensor]:
        """Return, by the names of `named_factors`, float64 ``(rank + 1,)``.

        Entry ``r`` is the distortion of keeping the best ``r`` singular values, or the ``r``-th size of a form that has several ranks: not
        negative, never rising with ``r``, zero where all are kept.
        """


@runtime_checkable
class RankSchedule(Protocol):
    """Cuts ranks while a network trains: the shortest way to write a `Course`, a function."""

    def __call__(self, model: nn.Module, inputs: Any, step: int, steps: int, /) -> Sizes | None:
        """Return the ranks to cut to before step `step` of `steps` (a function of these and the model alone), or None for no cut."""


@dataclass(frozen=True)
class Change:
    """What a `Course` changes for the next step.

    Args:
        ranks: to cut to before the step; None for no cut.
        penalty: added to the loss of this step alone; None for nothing.
    """

    ranks: Sizes | None = None
    penalty: Penalty | None = None


@runtime_checkable
class Course(Protocol):
    """Changes training step by step: cuts, penalties with varying strength, projections of the weights.

    A function of its arguments and its memory alone, so that a run can be stopped and resumed: all state for the next step is in the
    memory, a dict of tensors and plain data (numbers, strings, None; lists, tuples and dicts of them) that checkpoints keep. A course that
    adds a penalty may set ``penalizes = True``: its column is then in the log from the first epoch on.

    One that holds entries of weights may have ``free(memory) -> {name of a parameter: boolean tensor}``: gradients and the optimizer's
    moments of all other entries are then set to zero at each step (`after` has to put the weights back). One that has ``noted(memory) ->
    {name: number}`` adds to the log of an epoch. One that lets layers run differently between `before` and `after` has
    ``closed(model)``, which is called when training ends, also by an error within a step.
    """

    def start(self, model: nn.Module, inputs: Any, steps: int, /) -> dict[str, Any]:
        """Return the memory before the first step.

        Args:
            model: factorized or dense.
            inputs: the first batch, as the model takes it.
            steps: optimizer steps of the whole training.
        """

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any], /) -> Change | None:
        """Return the changes for the next step, or None.

        Args:
            model: factorized or dense; left as it is: cuts are made from what is returned.
            inputs: of the step's first batch.
            step: number of finished optimizer steps.
            steps: of the whole training.
            memory: read and changed in place.
        """

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any], /) -> None:
        """Change weights or memory, in place and without gradients, once the optimizer has made the step.

        Args:
            model: after the step.
            step: as it was for `before`.
            steps: of the whole training.
            memory: read and changed in place.
        """


@dataclass(frozen=True)
class Seen:
    """The data of a step that a `Lesson` gets.

    Args:
        loss: of the task, after the lessons before this one; a scalar.
        inputs: of the batch, as the model takes them.
        output: of the model.
        target: of the batch.
        layers: first tensor that each watched layer returned, by module name.
        done: share of the training that is done, in [0, 1).
    """

    loss: Tensor
    inputs: Any
    output: Any
    target: Any
    layers: Mapping[str, Tensor]
    done: float


@runtime_checkable
class Lesson(Protocol):
    """A scalar of a step: its loss, computed from the batch, the output and the outputs of some layers.

    One that has ``mixed(inputs, loss) -> (inputs, loss)`` prepares each batch. One that has ``opened(model, device, compiled)``, a context
    manager, gives with it the function that is called in its place while training lasts.
    """

    def watched_layers(self, model: nn.Module, /) -> Sequence[str]:
        """Return the names of the modules whose outputs the lesson needs; none for the model's output only."""

    def __call__(self, seen: Seen, /) -> Tensor:
        """Return the loss to train on instead of ``seen.loss``, a scalar; to add something: ``seen.loss + something``."""


@dataclass(frozen=True)
class Bits:
    """What a tensor takes in a plain format, without entropy coding.

    Attributes:
        data: bits of values, with their scales.
        index: bits of positions.
    """

    data: int
    index: int

    @property
    def total(self) -> int:
        """Bits of values and positions."""
        return self.data + self.index


@runtime_checkable
class Projection(Protocol):
    """Maps a tensor to the nearest tensor of a set (in the Frobenius norm)."""

    def __call__(self, tensor: Tensor, /) -> Tensor:
        """Return a tensor of the same shape and dtype that lies in the set: a new one, which shares no memory with the given one."""

    def stored_bits(self, tensor: Tensor, /) -> Bits:
        """Return the stored bits of a member of the set."""


@runtime_checkable
class Coder(Protocol):
    """Entropy coder: symbols to bytes and back."""

    def encode(self, symbols: Tensor, contexts: Tensor, frequencies: Tensor, /) -> bytes:
        """Return the coded bytes of symbols ``(n,)``, each in its context.

        Row ``contexts[i]`` of `frequencies`, ``(contexts, symbols)``, is the table of symbol ``i``: integers, so that every machine decodes
        the same.
        """

    def decode(self, data: bytes, contexts: Tensor, frequencies: Tensor, /) -> Tensor:
        """Return the symbols, as many as there are contexts; the inverse of `encode`.

        Raises:
            ValueError: for other bytes.
        """


@runtime_checkable
class Latencies(Protocol):
    """Measured seconds of each factorized weight, by the names of `coverage`; `LatencyTable` is one."""

    def limits(self, model: nn.Module) -> Mapping[str, int]:
        """Return, by the names of `coverage`, the largest rank at which a pair is the fastest form."""

    def seconds(self, name: str, rank: int | None) -> float | None:
        """Return the seconds of one weight as a pair of `rank`, or dense for None; None where it was not timed."""

    def multiple(self, name: str) -> int:
        """Return the number that a rank of one weight should be a multiple of."""

    def verdict(self, name: str, rank: int) -> str:
        """Say what `merge` writes for one weight of `rank`, and why."""


@runtime_checkable
class Hardware(Protocol):
    """Crossbars that a network is mapped to; `spectrim.runtimes.crossbar.Crossbars` is one."""

    def price(self, model: nn.Module, inputs: Any = None, batch_size: int | None = None) -> Any:
        """Return what a dense or merged network takes: an object with ``tiles`` and, with inputs, their ``reads`` for one example."""


@runtime_checkable
class LayerFilter(Protocol):
    """Selects layers by name and module."""

    def __call__(self, name: str, module: nn.Module, /) -> bool:
        """Return True for layers that should be factorized."""


Where = LayerFilter | str | Sequence[str]
"""Which layers: a predicate, the name of a layer or a glob over names, or a list of these."""
