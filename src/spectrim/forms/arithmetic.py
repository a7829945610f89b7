"""`Arithmetic`: in how many bits the operations of a weight are computed, and `Computed`, what computes in it."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from spectrim.linalg.rounding import EXACT, Rounded, RoundedGradient


class Arithmetic:
    """Inputs, weights and gradients of the operations of one weight, rounded as an engine of fewer bits would hold them.

    Inputs are rounded with one range for the tensor, weights with one for each output channel, to the nearest level; gradients of outputs
    with one range, stochastically. Products and sums are float: the arithmetic is simulated.

    Args:
        bits: of inputs and weights of each operation, in the order in which they run; 32 leaves them as they are.
        gradient_bits: of the gradients of outputs.
        learned: whether the bits get gradients, in ``slopes.grad``.

    Attributes:
        slopes: as many zeros as there are operations, in float32.
        macs: multiply-accumulates of each operation that have run, of all examples.
    """

    def __init__(self, bits: Sequence[int], gradient_bits: int = EXACT, *, learned: bool = False) -> None:
        self.bits, self.gradient_bits = tuple(bits), gradient_bits
        self.slopes = torch.zeros(len(self.bits), requires_grad=learned)
        self.macs = [0] * len(self.bits)

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded."""
        return min(*self.bits, self.gradient_bits) < EXACT


class Computed(nn.Module):
    """What computes operations of a weight: in float, or in the `Arithmetic` that it is lent for a while."""

    operations: ClassVar[tuple[str, ...]] = ("",)
    """Names of the operations, in the order in which they run; the empty name is that of an only one."""

    _arithmetic: Arithmetic | None = None

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded at present."""
        return self._arithmetic is not None and self._arithmetic.rounds

    def enter(self, at: int, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Return input and kernel of an operation as they are multiplied: rounded where that is wanted, straight through for gradients.

        Args:
            at: index of the operation.
            x: its input.
            kernel: its weights, outputs first.
        """
        held = self._arithmetic
        if held is None or held.bits[at] >= EXACT:
            return x, kernel
        slope, bits = held.slopes[at], held.bits[at]
        return Rounded.apply(x, slope, bits, False), Rounded.apply(kernel, slope, bits, True)  # type: ignore[no-untyped-call]

    def run(self, at: int, operation: Callable[[Tensor, Tensor], Tensor], x: Tensor, kernel: Tensor) -> Tensor:
        """Run ``operation(x, kernel)`` as it is computed at present.

        Args:
            at: index of the operation.
            operation: a product with the weights, or a convolution.
            x: its input.
            kernel: its weights, outputs first.
        """
        held = self._arithmetic
        if held is None:
            return operation(x, kernel)
        y = operation(*self.enter(at, x, kernel))
        held.macs[at] += y.numel() * kernel[0].numel()
        return y if held.gradient_bits >= EXACT else RoundedGradient.apply(y, held.gradient_bits)  # type: ignore[no-untyped-call]
