"""A weight that is a product of two thin ones, for code that reads it: what can be done with the thin ones is done with them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .composed import Composed

GROUPED_BYTES = 16
"""Multiple of bytes that rows have for grouped products."""

Thin = Callable[[], tuple[Tensor, Tensor]]
"""Returns ``(..., out, rank)`` and ``(..., rank, in)``; of a kernel ``(out, rank, 1...)`` and ``(rank, in, taps...)``."""


class Product(Composed):
    """A weight ``left @ right``, or a stack of such: indexed, transposed and multiplied it runs as two thin operations.

    A linear layer, a matrix product, a grouped one, an einsum of one product, a convolution and an embedding take two operations; whatever
    else reads the values composes the weight. Gradients reach both thin ones.
    """

    _thin: Thin
    _groups: int = 0

    def with_thin(self, thin: Thin, groups: int = 0) -> "Product":
        """Set the two thin ones; return this.

        Args:
            thin: returns them.
            groups: of the convolution whose kernel this is; 0 for what is no kernel.
        """
        self._thin, self._groups = thin, groups
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        rule = RULES.get(name)
        if rule is not None:
            result = rule(func, args, kwargs or {})
            if result is not None:
                return result
        return super().__torch_function__(func, types, args, kwargs)

    def _part(self, compose: Callable[[], Tensor], thin: Thin) -> "Product | None":
        """Return a part or another view of this product, of which the thin ones say the shape."""
        left, right = thin()
        shape = torch.Size((*left.shape[:-1], right.shape[-1]))
        if len(shape) not in (2, 3):
            return None
        made: Any = type(self)(self._owner, compose, shape, left.dtype, left.device, self.requires_grad)
        return made.with_thin(lambda: (left, right))  # type: ignore[no-any-return]


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Product) and not value._groups


def _same(func: Any, args: Any, kwargs: Any) -> Any:
    """Apply a change of dtype to both thin ones."""
    weight, rest = args[0], args[1:]
    left, right = weight._thin()
    if weight._groups or any(isinstance(value, Product) for value in rest):
        return None
    return weight._part(
        lambda: func(weight._compose(), *rest, **kwargs), lambda: (func(left, *rest, **kwargs), func(right, *rest, **kwargs))
    )


def _scaled(func: Any, args: Any, kwargs: Any) -> Any:
    """Multiply with a number, or divide by one."""
    weight, factor = args if isinstance(args[0], Product) else args[::-1]
    number = isinstance(factor, int | float) or (isinstance(factor, Tensor) and factor.dim() == 0 and not isinstance(factor, Composed))
    if kwargs or not number or (weight is not args[0] and "div" in func.__name__):
        return None
    left, right = weight._thin()
    scaled = left / factor if "div" in func.__name__ else left * factor
    made: Any = Product(
        weight._owner, lambda: func(*(_value(a) for a in args)), weight.shape, left.dtype, left.device, weight.requires_grad
    )
    return made.with_thin(lambda: (scaled, right), weight._groups)


def _value(weight: Any) -> Any:
    return weight._compose() if isinstance(weight, Composed) else weight


def _item(func: Any, args: Any, kwargs: Any) -> Any:
    """Take one matrix of a stack, or some."""
    weight, index = args
    if not _is_matrix(weight) or weight.dim() != 3 or isinstance(index, tuple) or index is None or index is Ellipsis:
        return None
    if isinstance(index, Tensor) and index.dim() > 1:
        return None
    left, right = weight._thin()
    return weight._part(lambda: weight._compose()[index], lambda: (left[index], right[index]))


def _each(func: Any, args: Any, kwargs: Any) -> Any:
    """Take all matrices of a stack, one by one."""
    weight = args[0]
    if not _is_matrix(weight) or weight.dim() != 3 or any(args[1:]) or any(kwargs.values()):
        return None
    parts = tuple(_item(None, (weight, index), {}) for index in range(weight.shape[0]))
    return iter(parts) if func.__name__ == "__iter__" else parts


def _transposed(func: Any, args: Any, kwargs: Any) -> Any:
    """Exchange rows and columns."""
    weight = args[0]
    if not _is_matrix(weight) or kwargs:
        return None
    name, axes = func.__name__, args[1:]
    if name == "__get__":
        name = func.__self__.__name__
    if name in ("transpose", "swapaxes", "swapdims") and {axis % weight.dim() for axis in axes} != {weight.dim() - 1, weight.dim() - 2}:
        return None
    if name in ("T", "t") and weight.dim() != 2:
        return None
    if name == "permute":
        order = tuple(axes[0]) if len(axes) == 1 else tuple(axes)
        if [axis % weight.dim() for axis in order] != [*range(weight.dim() - 2), weight.dim() - 1, weight.dim() - 2]:
            return None
    left, right = weight._thin()
    return weight._part(lambda: weight._compose().mT, lambda: (right.mT, left.mT))


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if isinstance(x, Composed) or not _is_matrix(weight) or weight.dim() != 2:
        return None
    left, right = weight._thin()
    return F.linear(F.linear(x, right), left, bias)


def _product(func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs or len(args) != 2:
        return None
    first, second = reversed(args) if func.__name__ == "__rmatmul__" else args
    weight, other = (second, first) if isinstance(second, Product) else (first, second)
    if isinstance(other, Composed) or not _is_matrix(weight) or (other.dim() == 1 and weight.dim() > 2):
        return None
    left, right = weight._thin()
    return (other @ left) @ right if weight is second else left @ (right @ other)


def _with_addend(func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs or len(args) != 3 or isinstance(args[0], Composed):
        return None
    found = _product(torch.matmul, args[1:], {})
    return None if found is None else args[0] + found


def _grouped(func: Any, args: Any, kwargs: Any) -> Any:
    """Multiply the groups of rows with the matrices of a stack; the rank is padded, since the kernel wants rows of 16 bytes or so."""
    given = dict(zip(("input", "mat2", "offs", "bias", "out_dtype"), args, strict=False)) | kwargs
    x: Any = args[0] if len(args) > 1 else None
    weight: Any = args[1] if len(args) > 1 else None
    if not isinstance(x, Tensor) or isinstance(x, Composed) or not _is_matrix(weight) or given.get("bias") is not None:
        return None
    if given.get("out_dtype") is not None:
        return None
    left, right = weight._thin()
    missing = -left.shape[-1] % max(1, GROUPED_BYTES // left.element_size())
    left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
    return func(func(x, left, offs=given["offs"]), right, offs=given["offs"])


def _einsum(func: Any, args: Any, kwargs: Any) -> Any:
    """Contract one side of the weight first, where it is summed over and the other is not in the other operand."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if kwargs or not isinstance(equation, str) or "->" not in equation or "." in equation or len(operands) != 2:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    names = inputs.split(",")
    at = next(index for index, operand in enumerate(operands) if isinstance(operand, Product))
    weight, other, mine, its = operands[at], operands[1 - at], list(names[at]), names[1 - at]
    if isinstance(other, Composed) or not _is_matrix(weight) or len(set(mine)) < len(mine):
        return None
    left, right = weight._thin()
    (*stack, rows, columns), free = mine, next(letter for letter in "zyxwvutsrqp" if letter not in equation)
    for summed, stays, first, then in ((columns, rows, right, left), (rows, columns, left, right)):
        if summed in its and summed not in out and stays not in its:
            kept = "".join(dict.fromkeys([letter for letter in its if letter != summed] + stack)) + free
            one, two = ("".join(stack) + free + columns, "".join(stack) + rows + free)[:: 1 if summed == columns else -1]
            middle = torch.einsum(f"{its},{one}->{kept}", other, first)
            return torch.einsum(f"{kept},{two}->{out}", middle, then)
    return None


def _convolution(func: Any, args: Any, kwargs: Any) -> Any:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    weight, bias, groups = given.pop("weight"), given.pop("bias", None), given.get("groups", 1)
    if not isinstance(weight, Product) or isinstance(given["input"], Composed) or groups != weight._groups:
        return None
    left, right = weight._thin()
    return func(func(weight=right, **given), weight=left, bias=bias, groups=groups)


def _lookup(func: Any, args: Any, kwargs: Any) -> Any:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, args, strict=False)) | kwargs
    weight = given.pop("weight")
    if not _is_matrix(weight) or weight.dim() != 2 or given.get("max_norm") is not None:
        return None
    left, right = weight._thin()
    return F.embedding(weight=left, **given) @ right


RULES: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "mm", "bmm"), _product),
    **dict.fromkeys(("addmm", "baddbmm"), _with_addend),
    **dict.fromkeys(("grouped_mm", "_grouped_mm"), _grouped),
    "einsum": _einsum,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "embedding": _lookup,
    "__getitem__": _item,
    **dict.fromkeys(("unbind", "__iter__"), _each),
    **dict.fromkeys(("T", "mT", "t", "transpose", "swapaxes", "swapdims", "permute"), _transposed),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__", "divide", "true_divide"), _scaled),
    **dict.fromkeys(("to", "type_as", "float", "half", "bfloat16", "double"), _same),
}
"""By the name of a function of torch how it runs on a product; None where it has to be composed."""


def kernels(left: Tensor, right: Tensor, shape: Sequence[int], groups: int) -> tuple[Tensor, Tensor]:
    """Return the two thin factors of a folded weight in the layout of its layer.

    Args:
        left: ``(..., out, rank)``.
        right: ``(..., rank, in)``.
        shape: of the weight: a matrix, a stack of matrices, or with `groups` a kernel.
        groups: of the convolution; 0 for what is no kernel.
    """
    if not groups:
        return left, right
    return left.reshape(shape[0], -1, *(1 for _ in shape[2:])), right.reshape(-1, *shape[1:])
