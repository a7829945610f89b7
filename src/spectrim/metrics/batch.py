"""Where the examples of a batch lie in its tensors: found by agreement of sizes, or stated by the caller."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from spectrim.errors import SettingError

BatchDims = int | Sequence[int | None] | Mapping[Any, int | None]
"""The batch axis of all tensors; or of each argument, by position or name, where None or a missing name stands for a shared tensor."""


@dataclass(frozen=True)
class Layout:
    """How a batch is divided into examples.

    Attributes:
        size: examples in the batch.
        axes: for each item of the inputs (see `items_of`) the axis of the examples; None where all examples share the item.
    """

    size: int
    axes: tuple[int | None, ...]

    @property
    def plain(self) -> bool:
        """Whether every item has the examples along its leading axis."""
        return all(axis == 0 for axis in self.axes)


def items_of(inputs: Any, size: int | None) -> tuple[list[Any], Any]:
    """Flatten inputs into items, and return what `tree_unflatten` needs to undo it.

    An item is a tensor, a packed sequence, a list of `size` examples, or whatever else is no container.
    """
    return tree_flatten(inputs, is_leaf=lambda node: isinstance(node, PackedSequence) or _is_list_of(node, size))


def _is_list_of(node: Any, size: int | None) -> bool:
    """Whether a list holds `size` examples, for example images of different sizes, and not one tensor for each argument."""
    if not isinstance(node, list) or len(node) != size or not all(isinstance(entry, Tensor | Mapping | str) for entry in node):
        return False
    return len(node) == 1 or not all(isinstance(entry, Tensor) and entry.dim() and entry.size(0) == size for entry in node) or _images(node)


def _images(node: list[Any]) -> bool:
    """Whether all entries are images of three channels, so that the leading axis of three images is ambiguous."""
    return len(node) == 3 and all(isinstance(entry, Tensor) and entry.dim() == 3 for entry in node)


def _sizes(item: Any) -> tuple[int, ...]:
    """Return the sizes of an item that can be the batch: of its first two axes."""
    if isinstance(item, PackedSequence):
        return (int(item.batch_sizes[0]),)
    if isinstance(item, Tensor) and item.is_nested:
        return (item.size(0),)
    return tuple(item.shape[:2]) if isinstance(item, Tensor) else ()


def hints_of(given: Any) -> list[int]:
    """Return the sizes of targets or outputs that can be the batch, those that all tensors share, else the most common leading one."""
    if isinstance(given, list) and given and not isinstance(given[0], Tensor):
        return [len(given)]
    tensors = [
        leaf for leaf in tree_leaves(dict(given) if isinstance(given, Mapping) else given) if isinstance(leaf, Tensor) and leaf.dim()
    ]
    if not tensors:
        return [len(given)] if isinstance(given, list) and given else []
    common = [size for size in tensors[0].shape[:2] if all(size in tensor.shape[:2] for tensor in tensors)]
    if not common:
        common = [Counter(tensor.shape[0] for tensor in tensors).most_common(1)[0][0]]
    return list(dict.fromkeys(common))


def layout_of(inputs: Any, size: int) -> Layout:
    """Return which axis of each item has `size` entries; of two such axes the leading one, unless others have it second only."""
    items, _ = items_of(inputs, size)
    second = any(len(_sizes(item)) == 2 and _sizes(item)[0] != size == _sizes(item)[1] for item in items)
    return Layout(size, tuple(_axis(item, size, second) for item in items))


def _axis(item: Any, size: int, second: bool) -> int | None:
    if _is_list_of(item, size):
        return 0
    sizes = _sizes(item)
    if size not in sizes:
        return None
    return 1 if second and sizes == (size, size) else sizes.index(size)


def candidates(inputs: Any, *hints: Any) -> list[Layout]:
    """Return the layouts that sizes allow, the most likely one first.

    Args:
        inputs: of a batch, as data give them.
        hints: the target or the output of the batch, the most informative one first; None where there is none.

    Returns:
        Layouts whose size agrees with a hint along one of its first two axes; without such an agreement, those that the inputs allow among
        themselves. Empty where several tensors agree on nothing.
    """
    for hint in hints:
        if found := agreeing(inputs, hint):
            return found
    sizes = [_sizes(item) for item in items_of(inputs, None)[0] if _sizes(item)]
    if not sizes:
        return []
    leading = [size for size in sizes[0][:1] if all(size in others for others in sizes)]
    images = any(isinstance(item, Tensor) and item.dim() == 4 for item in items_of(inputs, None)[0])
    second = [] if images else [size for size in sizes[0][1:] if all(size in others[1:] and size != others[0] for others in sizes)]
    return [layout_of(inputs, size) for size in dict.fromkeys([*leading, *second])]


def agreeing(inputs: Any, hint: Any) -> list[Layout]:
    """Return the layouts whose size is that of the first or the second axis of a target or an output."""
    sizes = hints_of(hint)
    layouts = [layout_of(inputs, size) for size in sizes]
    agreed = [layout for layout in layouts if any(axis is not None for axis in layout.axes)]
    if not agreed and sizes[:1] == [1]:
        return layouts[:1]  # one result for all inputs together, such as a graph: one example
    return _with_squares(inputs, agreed)


def _with_squares(inputs: Any, found: list[Layout]) -> list[Layout]:
    """Add to each layout those in which square items are read otherwise: shared, such as masks ``(time, time)``, or with time first."""
    more: list[Layout] = []
    for layout in found:
        items, _ = items_of(inputs, layout.size)
        square = [layout.size > 1 and _sizes(item) == (layout.size, layout.size) for item in items]
        shared = tuple(None if lone and place else axis for place, (lone, axis) in enumerate(zip(square, layout.axes, strict=True)))
        second = tuple(
            1 if lone and axis == 0 and not place else axis for place, (lone, axis) in enumerate(zip(square, shared, strict=True))
        )
        more += [layout, Layout(layout.size, shared), Layout(layout.size, second)]
    return list(dict.fromkeys(more))


def stated(inputs: Any, dims: BatchDims, owner: str) -> Layout:
    """Return the layout that a caller states.

    Args:
        inputs: of a batch, as data give them.
        dims: the axis of every tensor; or by argument.
        owner: the verb that was called, for errors.

    Raises:
        SettingError: for an axis that a tensor does not have, or axes of different lengths.
    """
    arguments = {**inputs} if isinstance(inputs, Mapping) else dict(enumerate(inputs if isinstance(inputs, tuple | list) else [inputs]))
    if isinstance(dims, int):
        by_name: Mapping[Any, int | None] = dict.fromkeys(arguments, dims)
    else:
        by_name = dims if isinstance(dims, Mapping) else dict(zip(arguments, dims, strict=False))
    if unknown := [name for name in by_name if name not in arguments]:
        raise SettingError(owner, "batch_dims", got=dims, rule=f"by argument, of {list(arguments)}", hint=f"{unknown[0]!r} is none of them")
    axes: list[int | None] = []
    sizes = set()
    for name, argument in arguments.items():
        axis = by_name.get(name)
        for item in tree_leaves(argument, is_leaf=lambda node: isinstance(node, PackedSequence)):
            lone = not isinstance(item, Tensor | PackedSequence) or (isinstance(item, Tensor) and not item.dim())
            if isinstance(item, Tensor) and axis is not None and not lone:
                if not -item.dim() <= axis < item.dim():
                    raise SettingError(owner, "batch_dims", got=dims, rule="axes that the inputs have", hint=described(inputs))
                sizes.add(item.size(axis))
            elif isinstance(item, PackedSequence) and axis is not None:
                sizes.add(int(item.batch_sizes[0]))
            axes.append(None if lone or axis is None else axis % item.dim() if isinstance(item, Tensor) else 0)
    if len(sizes) != 1:
        raise SettingError(owner, "batch_dims", got=dims, rule="axes of one length, that of the batch", hint=described(inputs))
    return Layout(sizes.pop(), tuple(axes))


def take(inputs: Any, layout: Layout, index: int = 0) -> Any:
    """Return the inputs of one example, as a batch of one; what all examples share stays whole.

    Args:
        inputs: of a batch.
        layout: where its examples lie.
        index: of the example.
    """
    items, tree = items_of(inputs, layout.size)
    if len(items) != len(layout.axes):  # a stated layout, which looks into lists
        items, tree = items_of(inputs, None)
    return tree_unflatten([_one(item, axis, index) for item, axis in zip(items, layout.axes, strict=True)], tree)


def _one(item: Any, axis: int | None, index: int) -> Any:
    if axis is None:
        return item
    if isinstance(item, list):
        return [item[index]]
    if isinstance(item, PackedSequence):
        padded, lengths = pad_packed_sequence(item, batch_first=True)
        return pack_padded_sequence(padded[index : index + 1], lengths[index : index + 1], batch_first=True)
    if item.is_nested:
        return torch.nested.nested_tensor([item.unbind()[index]], dtype=item.dtype, device=item.device, layout=item.layout)
    return item.narrow(axis, index, 1)


def sizes_in_both(inputs: Any, output: Any) -> set[int]:
    """Return the sizes of the first two axes of inputs that every output has along some axis."""
    tensors = [leaf for leaf in tree_leaves(dict(output) if isinstance(output, Mapping) else output) if isinstance(leaf, Tensor)]
    sizes = {size for item in items_of(inputs, None)[0] for size in _sizes(item)}
    return {size for size in sizes if tensors and all(size in tensor.shape for tensor in tensors)}


def described(inputs: Any) -> str:
    """Name the tensors of inputs and their shapes, for errors."""
    given = dict(inputs) if isinstance(inputs, Mapping) else inputs
    if isinstance(given, Tensor | PackedSequence):
        return f"inputs {_shape(given)}"
    named = given.items() if isinstance(given, dict) else enumerate(given) if isinstance(given, tuple | list) else []
    parts = []
    for name, value in named:
        leaves = tree_leaves(value, is_leaf=lambda node: isinstance(node, PackedSequence))
        shapes = [_shape(leaf) for leaf in leaves if isinstance(leaf, Tensor | PackedSequence)]
        if shapes:
            listed = ", ".join(shapes[:3]) + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else "")
            parts.append(f"inputs[{name!r}] {listed}")
    return ", ".join(parts) if parts else f"inputs of type {type(inputs).__name__}"


def _shape(value: Any) -> str:
    return (
        f"packed {tuple(value.data.shape)}"
        if isinstance(value, PackedSequence)
        else "nested"
        if value.is_nested
        else str(tuple(value.shape))
    )


def same_example(whole: Any, one: Any, layout: Layout, index: int) -> bool | None:
    """Return whether the outputs for one example are its part of the outputs for the whole batch; None where they cannot be compared.

    Args:
        whole: outputs for the batch.
        one: outputs for the example at `index`.
        layout: where the examples lie in the inputs.
        index: of the example.
    """
    pairs = list(zip(_real(whole), _real(one), strict=False))
    if layout.size > 1 and any(batch.shape == single.shape and batch.dim() and len(batch) == layout.size for batch, single in pairs):
        return False
    found = [part for batch, single in pairs for part in [_part(batch, single, layout, index)] if part is not None]
    if not found:
        return None
    return all(_agree(part, single) for part, single in found if single.numel())


def _agree(part: Tensor, single: Tensor) -> bool:
    scale = float(single.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(part, single, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)


def _real(output: Any) -> list[Tensor]:
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf.float() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.is_nested]


def _part(batch: Tensor, single: Tensor, layout: Layout, index: int) -> tuple[Tensor, Tensor] | None:
    """Return the part of a batch's output that belongs to one example, and the output of that example."""
    if batch.dim() != single.dim() or not batch.dim():
        return None
    differ = [axis for axis in range(batch.dim()) if batch.size(axis) != single.size(axis)]
    if len(differ) != 1:
        return None
    axis, count = differ[0], single.size(differ[0])
    if batch.size(axis) == layout.size and count == 1:
        return batch.narrow(axis, index, 1), single
    if axis == 0 and batch.size(0) == layout.size * count:  # positions of all examples in one axis
        second = next((axis for axis in layout.axes if axis is not None), 0) == 1
        return (batch[index :: layout.size] if second else batch[index * count : (index + 1) * count]), single
    return None
