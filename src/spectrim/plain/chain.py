"""Two layers in place of one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .composed import Composed

MARKS: dict[type, type] = {nn.Linear: NonDynamicallyQuantizableLinear}
"""Torch's own sub-classes that say to quantizers: not this layer, but those inside."""


def refuse_dense(names: Iterable[str], state_dict: Mapping[str, Any], prefix: str, errors: list[str]) -> None:
    """Note an error for each dense weight of a `state_dict`, which a merged layer does not hold; ``strict=False`` would pass over it."""
    told = "a dense weight for what is two layers here; load it into the dense network, then compress"
    errors.extend(f"{prefix}{name}: {told}" for name in names if f"{prefix}{name}" in state_dict)


class TwoLayers(nn.Module):
    """Base of two layers in place of one: what a merged layer's class asks of them."""

    __jit_unused_properties__ = ("weight", "bias")
    traced_inside = True  # `torch.fx` looks into it
    marks = MARKS

    @classmethod
    def stands_for(cls, base: type) -> bool:
        """Whether it behaves as a layer of class `base` does, so that a merged layer can stay an instance of that."""
        return True

    @staticmethod
    def takes_over(layer: nn.Module) -> tuple[str, ...]:
        """Return the names of a layer's parameters that the two layers hold in its place."""
        return "weight", "bias"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        refuse_dense(("weight",), state_dict, prefix, rest[-1])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    __repr__ = nn.Module.__repr__


class PlainPair(TwoLayers):
    """Two ordinary layers in place of one, with its attributes: ``weight`` is the dense weight, ``stride`` its stride.

    A merged layer is an instance of its original class and of this one. Models read such attributes without calling the layer. Reading the
    dtype, device or shape of ``weight`` costs nothing; any other use multiplies the two weights, and gradients reach both. To change the
    weight, change the two layers.

    Args:
        first: an `nn.Linear`, an `nn.Embedding` or a convolution, plain or transposed; without bias.
        second: an `nn.Linear`, or a convolution whose kernel has size one along each axis along which that of `first` has not.
        conv1d: the pair of `nn.Linear` stands for the ``Conv1D`` of transformers, whose weight is ``(in, out)``.

    Examples:
        >>> pair = PlainPair(nn.Linear(8, 2, bias=False), nn.Linear(2, 6))
        >>> pair.weight.shape, pair.in_features, list(pair.state_dict())
        (torch.Size([6, 8]), 8, ['0.weight', '1.weight', '1.bias'])
    """

    def __init__(self, first: nn.Module, second: nn.Module, *, conv1d: bool = False) -> None:
        super().__init__()
        self._modules.update({"0": first, "1": second})
        self.__dict__.update(_settings(first, second, conv1d))

    def forward(self, input, output_size: Any = None):  # type: ignore[no-untyped-def]
        """Run both layers.

        Args:
            input (Any): as for the dense layer; not annotated, as torch.fx gives a proxy and torch.jit takes no other type than a tensor.
            output_size: of a transposed convolution, as `nn.ConvTranspose2d` takes it.
        """
        if not torch.jit.is_scripting() and output_size is not None:  # type: ignore[attr-defined]
            return self._sized(input, output_size)
        return getattr(self, "1")(getattr(self, "0")(input))

    @torch.jit.unused
    def _sized(self, input: Tensor, output_size: Sequence[int]) -> Tensor:
        first, second = self
        return _run_sized(first, second, input, output_size)

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer, in its layout; read only."""
        first, second = (layer.weight for layer in self)
        if torch.compiler.is_compiling() or not isinstance(second, Tensor):  # then it is a proxy of torch.fx
            return self._composed()
        trained = first.requires_grad or second.requires_grad
        return Composed("PlainPair", self._composed, self._weight_shape(), second.dtype, second.device, trained)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the dense layer, a parameter of the second one."""
        if isinstance(self[0], nn.Embedding):
            raise AttributeError("an embedding has no bias")
        return self[1].bias  # type: ignore[no-any-return]

    def _weight_shape(self) -> tuple[int, ...]:
        layer: Any = self
        if hasattr(self[0], "shape_with"):
            return tuple(self[0].shape_with(self[1]))
        if hasattr(self, "num_embeddings"):
            return layer.num_embeddings, layer.embedding_dim
        if hasattr(self, "nx"):
            return layer.nx, layer.nf
        if hasattr(self, "in_features"):
            return layer.out_features, layer.in_features
        sides = (layer.in_channels, layer.out_channels) if layer.transposed else (layer.out_channels, layer.in_channels)
        return sides[0], sides[1] // layer.groups, *layer.kernel_size

    def _composed(self) -> Tensor:
        """Multiply the two weights."""
        first, second = self[0].weight, self[1].weight
        if hasattr(self[0], "product_with"):
            return self[0].product_with(self[1])  # type: ignore[no-any-return]
        if hasattr(self, "num_embeddings"):
            return first @ second.T  # type: ignore[no-any-return]
        if hasattr(self, "groups"):
            return _compose_kernels(first, second, self)
        return (second @ first).T if hasattr(self, "nx") else second @ first  # type: ignore[no-any-return]

    def _get_name(self) -> str:
        return "PlainPair"

    def extra_repr(self) -> str:
        """Return nothing: the two layers print their settings."""
        return ""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Any]:
        return iter((self._modules["0"], self._modules["1"]))

    def __getitem__(self, index: Any) -> Any:
        """Return one of the two layers; of a slice, an `nn.Sequential`."""
        layers = list(self)
        return nn.Sequential(*layers[index]) if isinstance(index, slice) else layers[index]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "PlainPair: its weight is composed of those of its two layers and cannot be set; set pair[0].weight, pair[1].weight"
            )
        if name == "bias":
            self[1].bias = value
        else:
            super().__setattr__(name, value)


def _run_sized(first: Any, second: Any, input: Tensor, output_size: Sequence[int]) -> Tensor:
    """Run two convolutions, at least one of them transposed, to an output of that size; each axis gets its size from its own one."""
    if not getattr(second, "transposed", False):
        if not getattr(first, "transposed", False):
            raise TypeError(f"PlainPair: only a transposed convolution takes an output_size, not {type(first).__name__}")
        return second(first(input, output_size))  # type: ignore[no-any-return]
    if not first.transposed:
        return second(first(input), output_size)  # type: ignore[no-any-return]
    axes = range(len(first.kernel_size))
    idle = [second.kernel_size[a] == second.stride[a] == 1 and second.padding[a] == second.output_padding[a] == 0 for a in axes]
    wanted, given = output_size[-len(idle) :], input.shape[-len(idle) :]
    middle = [size if first_only else old for size, old, first_only in zip(wanted, given, idle, strict=True)]
    return second(first(input, middle), output_size)  # type: ignore[no-any-return]


def _settings(first: Any, second: Any, conv1d: bool) -> dict[str, Any]:
    """Return the attributes of the dense layer that two layers stand for; a layer that is none of torch's says itself."""
    if hasattr(first, "settings_with"):
        return first.settings_with(second)  # type: ignore[no-any-return]
    if isinstance(first, nn.Embedding):
        own = ("num_embeddings", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        return {name: getattr(first, name) for name in own} | {"embedding_dim": second.out_features}
    if isinstance(first, nn.Linear):
        return dict(zip(("nx", "nf") if conv1d else ("in_features", "out_features"), (first.in_features, second.out_features), strict=True))
    groups = first.groups if first.groups == second.groups else 1  # a depthwise convolution before or behind one of all channels
    settings = {"in_channels": first.in_channels, "out_channels": second.out_channels, "groups": groups}
    settings["transposed"] = first.transposed or second.transposed
    settings["padding_mode"] = second.padding_mode if first.padding_mode == "zeros" else first.padding_mode
    for name in ("kernel_size", "stride", "dilation"):  # of the two operations one has the neutral value along each axis
        settings[name] = tuple(a * b for a, b in zip(getattr(first, name), getattr(second, name), strict=True))
    for name in ("padding", "output_padding"):
        both = getattr(first, name), getattr(second, name)
        words = [value for value in both if isinstance(value, str)]
        settings[name] = words[0] if words else tuple(a + b for a, b in zip(*both, strict=True))
    return settings


def of_one_group(kernel: Tensor, groups: int) -> Tensor:
    """Return the kernel of a grouped convolution as that of one group: blocks on the diagonal, zeros beside them."""
    lead, inner, *size = kernel.shape
    whole, each = kernel.new_zeros(groups, lead // groups, groups, inner, *size), torch.arange(groups, device=kernel.device)
    whole[each, :, each] = kernel.reshape(groups, lead // groups, inner, *size)
    return whole.reshape(lead, groups * inner, *size)


def _compose_kernels(first: Tensor, second: Tensor, pair: Any) -> Tensor:
    """Return the kernel of one convolution that does what two do, one after the other."""
    groups, sizes, axes = pair.groups, (pair[0].kernel_size, pair[1].kernel_size), range(len(pair.kernel_size))
    out, in_ = pair.out_channels // groups, pair.in_channels // groups

    def blocks(kernel: Tensor, layer: Any, rows: int, columns: int) -> Tensor:
        """Return ``(groups, rows, columns, size...)``."""
        if layer.groups != groups:
            kernel = of_one_group(kernel, layer.groups)
        lead = (columns, rows) if layer.transposed else (rows, columns)
        split = kernel.reshape(groups, *lead, *layer.kernel_size)
        return split.transpose(1, 2) if layer.transposed else split

    right, left = blocks(first, pair[0], -1, in_), blocks(second, pair[1], out, -1)
    product = left.movedim(2, -1).flatten(1, -2) @ right.flatten(2)
    product = product.reshape(groups, out, *sizes[1], in_, *sizes[0])
    outer, inner = 1, 2 + len(axes)
    sides = (inner, outer) if pair.transposed else (outer, inner)
    kernel = product.permute(0, *sides, *(axis for k in axes for axis in (outer + 1 + k, inner + 1 + k)))
    return kernel.reshape(groups * (in_ if pair.transposed else out), out if pair.transposed else in_, *pair.kernel_size)
