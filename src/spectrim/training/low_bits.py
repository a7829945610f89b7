"""What courses of low precision share: layers that compute in the bits of a step, the cost of it, and running a network in bits."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from spectrim.errors import SettingError
from spectrim.layers.rounded import computed, lending, operations_of, take_back
from spectrim.linalg.rounding import EXACT
from spectrim.protocols import Change, LayerFilter
from spectrim.training.bits import STATIC, arithmetics, bit_operations, counted, left_in_float, lend_bits, sizes_of, slopes_of

MOST = 16
"""Largest number of bits that is simulated; 32 stand for none."""

INT8 = 8
"""Bits of the engines that `quantize` writes for."""


class Rounding:
    """Base of the three courses: layers compute in the bits of the step, between `before` and `after`."""

    gradient_bits: int
    learns: ClassVar[bool] = False

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        """Return the memory before the first step: what the network computes, and nothing spent; see `Course`."""
        memory = counted(type(self).__name__, model, inputs)
        if float_layers := left_in_float(model, memory["macs"]):
            what = f"{type(self).__name__}: these layers compute in float, and no cost counts them: {', '.join(float_layers)}"
            warnings.warn(what, stacklevel=2)
        reference = float(bit_operations(sum(memory["macs"].values()), STATIC, STATIC))
        return memory | {"reference": reference, "bits": {}, "done": 0, "bit_operations": 0.0, "ratio": 0.0}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        """Choose the bits of the step, and let the layers compute in them, see `Course`."""
        if sizes_of(model) != memory["sizes"]:
            take_back(model)
            memory |= counted(type(self).__name__, model, inputs)
        memory["bits"] = self._bits(step, steps, memory)
        lend_bits(model, memory["bits"], self.gradient_bits, learned=self.learns)
        return Change()

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        """Let the layers compute in float again, count what the step cost, and learn, see `Course`."""
        slopes = slopes_of(model, take_back(model))
        done = float(sum(bit_operations(memory["macs"][name], bits, self.gradient_bits) for name, bits in memory["bits"].items()))
        memory["done"] += 1
        memory["bit_operations"] += done
        memory["ratio"] += done / (3 * EXACT**2 * sum(memory["macs"].values()))
        self._learn(slopes, step, steps, memory)

    def closed(self, model: nn.Module) -> None:
        """Let the layers compute in float again, when training ends in the middle of a step, see `Course`."""
        take_back(model)

    def noted(self, memory: Mapping[str, Any]) -> dict[str, float]:
        """Return what the log of an epoch gets: costs so far, and the bits of the last step.

        ``cost`` is a share of the bit operations of training with static 8 bits at the ranks that training began with; ``BOPs`` are those
        of one example in a mean step; ``ratio`` is the source's, ``(b b + 2 b g) / (3 * 32^2)`` at present ranks, the mean.
        """
        done = max(1, memory["done"])
        spent = memory["bit_operations"] / done
        costs = {"cost": spent / memory["reference"], "BOPs": spent, "ratio": memory["ratio"] / done}
        return costs | {f"bits {name}".strip(): float(bits) for name, bits in memory["bits"].items()}

    def _bits(self, step: int, steps: int, memory: Mapping[str, Any]) -> dict[str, int]:
        """Return the bits of each operation in a step."""
        raise NotImplementedError

    def _learn(self, slopes: Mapping[str, float], step: int, steps: int, memory: dict[str, Any]) -> None:
        """Take the gradients of the bits after a step."""


@contextmanager
def rounding(model: nn.Module, bits: int | Mapping[str, int]) -> Iterator[None]:
    """Simulate a network in fewer bits: inside, it computes with rounded inputs and weights, and in float behind.

    Args:
        model: dense or factorized.
        bits: of every operation, or by operation as `bits_of` returns them; operations that are not named stay exact.

    Raises:
        SettingError: for bits outside [2, 16] that are not 32, or of an operation that the model does not have.

    Examples:
        >>> import torch
        >>> model, x = nn.Linear(4, 3), torch.randn(5, 4)
        >>> exact = model(x)
        >>> with rounding(model, 3):
        ...     torch.equal(model(x), exact)
        False
        >>> torch.equal(model(x), exact), type(model)
        (True, <class 'torch.nn.modules.linear.Linear'>)
    """
    names = [operation for name, module in computed(model).items() for operation in operations_of(name, module)]
    given = dict.fromkeys(names, bits) if isinstance(bits, int) else dict(bits)
    for name, value in given.items():
        check_bits("rounding", f"bits[{name!r}]", value)
        if name not in names:
            raise SettingError("rounding", "bits", got=name, rule=f"by operation of the model: {', '.join(names)[:300]}")
    with lending(model, arithmetics(model, given, EXACT)):
        yield


def float_in_int8(model: nn.Module, bits: Mapping[str, int]) -> LayerFilter | None:
    """Return the layers for ``quantize(..., keep=...)`` that learned more bits than int8 has; None where there is none.

    Args:
        model: that was trained, before it is merged.
        bits: by operation, see `bits_of`.

    Examples:
        >>> float_in_int8(nn.Linear(2, 2), {"": 8}) is None
        True
    """
    fine = {
        name for name, module in computed(model).items() if any(bits.get(operation, 0) > INT8 for operation in operations_of(name, module))
    }
    return (lambda name, module: name in fine) if fine else None


def bits_of(line: Mapping[str, float]) -> dict[str, int]:
    """Return the bits by operation in a line of a history, as one of the three courses logged them.

    Examples:
        >>> bits_of({"loss": 0.1, "LearnedPrecision bits fc1": 5.0, "LearnedPrecision cost": 0.6})
        {'fc1': 5}
    """
    found = (key.partition(" bits") for key in line if key.partition(" ")[0].endswith("Precision"))
    return {name.strip(): int(line[f"{course} bits{name}"]) for course, mark, name in found if mark}


def check_bits(owner: str, field: str, bits: Any) -> None:
    """Raise a SettingError unless bits are an integer in [2, 16], or 32."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not (2 <= bits <= MOST or bits == EXACT):
        raise SettingError(owner, field, got=bits, rule=f"an integer in [2, 16], or {EXACT} to round nothing")


def check_limits(owner: str, least: Any, most: Any) -> None:
    """Raise a SettingError unless ``2 <= least <= most <= 16``."""
    for field, bits in (("least", least), ("most", most)):
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise SettingError(owner, field, got=bits, rule="an integer")
    if not 2 <= least <= most <= MOST:
        raise SettingError(owner, "least and most", got=(least, most), rule="2 <= least <= most <= 16")
