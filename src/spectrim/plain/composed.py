"""A weight that is composed of others whenever its values are read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

METADATA = {"dtype", "device", "shape", "ndim", "layout", "requires_grad", "grad", "itemsize", "nbytes"}


METADATA |= {"is_meta", "is_cpu", "is_cuda", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested"}


METADATA |= {"size", "dim", "ndimension", "numel", "nelement", "element_size", "__len__", "get_device", "is_floating_point", "is_complex"}
"""What can be asked of a weight without knowing its values."""


IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")}
"""``weight += 1`` and its like."""


VIEWS = {
    "T",
    "mT",
    "H",
    "mH",
    "real",
    "t",
    "view",
    "view_as",
    "reshape",
    "reshape_as",
    "flatten",
    "ravel",
    "transpose",
    "permute",
    "movedim",
}


VIEWS |= {"swapaxes", "swapdims", "squeeze", "unsqueeze", "unflatten", "expand", "expand_as", "narrow", "select", "diagonal", "unfold"}


VIEWS |= {"split", "chunk", "unbind", "tensor_split", "__iter__", "as_strided", "contiguous"}
"""Operations whose result can share the memory of the weight, so that a change of it is one of the weight."""


KEPT = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook"}
"""What a tensor that is composed again at the next use cannot keep."""


class Composed(Tensor):
    """A weight that is composed when its values are read; changes in place are refused, because they would only change a copy.

    A view of it refuses changes, too, and an array of numpy cannot be written.

    Args:
        owner: kind of the layer, for errors.
        compose: returns the weight.
        shape, dtype, device: its own.
        requires_grad: whether gradients reach what it is composed of.
        strides: its own; those of a contiguous tensor when omitted.
    """

    _owner: str
    _compose: Callable[[], Tensor]
    _detached: bool = False
    _layer: Any = None
    """The layer that has the weight, where that is known: it is in the errors of refused changes."""
    _is_hf_initialized = True
    """Transformers fills weights that a file does not have with random values: those of the parts, which are tensors of their own."""

    @staticmethod
    def __new__(
        cls: Any,
        owner: str,
        compose: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: Any,
        device: Any,
        requires_grad: bool,
        strides: Sequence[int] | None = None,
    ) -> "Composed":
        """Make one without composing it."""
        weight: Composed = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device, requires_grad=requires_grad
        )
        weight._owner, weight._compose = owner, compose
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        weight = args[0] if args and isinstance(args[0], Composed) else None
        if weight is not None and name in ("data", "detach"):
            detached = weight._view(lambda: weight._compose().detach(), weight, False)
            detached._detached = True
            return detached
        if weight is not None and weight._detached and name == "requires_grad_":  # to differentiate by a copy, as is usual
            return weight._compose().requires_grad_(*args[1:], **kwargs)
        changed = _changed_by(name, args, kwargs)
        if changed is not None:
            raise changed._refusal(f"{name} would change a copy, so change those")
        if weight is not None and name in KEPT:
            raise weight._refusal(f"{name} would be that of a copy, so use those")
        composed: dict[int, Tensor] = {}
        given = tree_map_only(Composed, lambda held: composed.setdefault(id(held), held._compose()), (args, kwargs))
        result = func(*given[0], **given[1])
        if name in ("numpy", "__array__") and weight is not None:
            result.flags.writeable = False  # else a change of it would be lost
        if weight is None or (name not in VIEWS and name != "__getitem__"):
            return result
        return _still_composed(weight, composed[id(weight)], result)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        arguments = zip(func._schema.arguments, args, strict=False) if hasattr(func, "_schema") else ()
        written = [value for argument, value in arguments if argument.alias_info is not None and argument.alias_info.is_write]
        for value in written:
            if isinstance(value, Composed):
                raise value._refusal(f"{func.__name__} would change a copy, so change those")
        args, kwargs = tree_map_only(Composed, lambda weight: weight._compose(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def _view(self, compose: Callable[[], Tensor], like: Tensor, requires_grad: bool) -> "Composed":
        made = Composed(self._owner, compose, like.shape, like.dtype, like.device, requires_grad, like.stride())
        made._layer = self._layer
        return made

    def _refusal(self, what: str) -> RuntimeError:
        parts = "weights of its layers" if self._owner.startswith("Plain") else "factors U, S and Vh"
        error = RuntimeError(f"{self._owner}: its weight is composed of the {parts}; {what}")
        error.layer = self._layer  # type: ignore[attr-defined]
        return error


def _changed_by(name: str, args: Any, kwargs: Mapping[str, Any]) -> Composed | None:
    """Return the composed weight that an operation would change in place, if any."""
    own = name in ("__set__", "__setitem__", *IN_PLACE) or (name.endswith("_") and not name.endswith("__"))
    targets = [args[:1], kwargs.get("tensor"), kwargs.get("input"), kwargs.get("self")] if own else []
    leaves = tree_leaves([*targets, kwargs.get("out")])
    return next((leaf for leaf in leaves if isinstance(leaf, Composed)), None)


def _still_composed(weight: Composed, value: Tensor, result: Any) -> Any:
    """Return what a view gave: tensors that share the composed weight's memory refuse changes as it does."""

    def mark(part: Tensor) -> Tensor:
        return weight._view(lambda: part, part, part.requires_grad) if _share_memory(part, value) else part

    return tree_map_only(Tensor, mark, result)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    if type(one) is not Tensor or one.is_meta:
        return False
    try:
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    except RuntimeError:  # inside a transform of torch.func there is no memory
        return False
