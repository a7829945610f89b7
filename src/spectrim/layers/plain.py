"""What `merge` writes besides torch's own layers: two layers in the place of one, recurrent layers and attention with low-rank projections.

This file imports torch and nothing else, so that a merged network runs wherever a copy of it lies. All parameters are in ordinary torch
layers: a projection is an `nn.Linear`, or ``nn.Sequential(nn.Linear(in, rank, bias=False), nn.Linear(rank, out))`` for a low-rank one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map_only

Weight: TypeAlias = Tensor | tuple[Tensor, Tensor]  # dense (out, in), or the pair (out, rank), (rank, in)
State: TypeAlias = tuple[Tensor, ...]  # of an LSTM: hidden and cell; of a GRU: hidden

METADATA = {"dtype", "device", "shape", "ndim", "layout", "requires_grad", "grad", "itemsize", "nbytes"}
METADATA |= {"is_meta", "is_cpu", "is_cuda", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested"}
METADATA |= {"size", "dim", "ndimension", "numel", "nelement", "element_size", "__len__", "get_device", "is_floating_point", "is_complex"}
"""What can be asked of a weight without knowing its values."""

IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")}
"""``weight += 1`` and its like."""


class PlainPair(nn.Sequential):
    """Two ordinary layers in the place of one, which also answer for it: ``weight`` is the dense weight, ``stride`` its stride.

    Models read such things of their layers without calling them. Reading dtype, device or shape of ``weight`` costs nothing; any other
    use of it multiplies the two weights anew, and gradients reach both. To change the weight, change the two layers.

    Args:
        first: an `nn.Linear`, an `nn.Embedding` or a convolution, plain or transposed; without bias.
        second: an `nn.Linear`, or a convolution whose kernel has size one along each axis along which that of `first` has not.
        conv1d: the pair of `nn.Linear` stands for the ``Conv1D`` of transformers, whose weight is ``(in, out)``.

    Examples:
        >>> pair = PlainPair(nn.Linear(8, 2, bias=False), nn.Linear(2, 6))
        >>> pair.weight.shape, pair.in_features, list(pair.state_dict())
        (torch.Size([6, 8]), 8, ['0.weight', '1.weight', '1.bias'])
    """

    __jit_unused_properties__ = ("weight", "bias")

    def __init__(self, first: nn.Module, second: nn.Module, *, conv1d: bool = False) -> None:
        super().__init__(first, second)
        self.__dict__.update(_settings(first, second, conv1d))

    def forward(self, input, output_size: Any = None):  # type: ignore[no-untyped-def]
        """Run both layers.

        Args:
            input (Any): as for the dense layer; not annotated, as torch.fx gives a proxy and torch.jit takes no other type than a tensor.
            output_size: of a transposed convolution, as `nn.ConvTranspose2d` takes it.
        """
        if not torch.jit.is_scripting() and output_size is not None:  # type: ignore[attr-defined]
            return self._sized(input, output_size)
        return self[1](self[0](input))

    @torch.jit.unused
    def _sized(self, input: Tensor, output_size: Sequence[int]) -> Tensor:
        first, second = self._modules["0"], self._modules["1"]
        if not getattr(first, "transposed", False):
            raise TypeError(f"PlainPair: only a transposed convolution takes an output_size, not {type(first).__name__}")
        if not getattr(second, "transposed", False):
            return second(first(input, output_size))  # type: ignore[no-any-return]
        height, _ = output_size[-2:]
        return second(first(input, [height, input.shape[-1]]), output_size)  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer, in its layout; read only."""
        first, second = self[0].weight, self[1].weight
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
        if hasattr(self, "num_embeddings"):
            return first @ second.T  # type: ignore[no-any-return]
        if hasattr(self, "groups"):
            return _compose_kernels(first, second, self)
        return (second @ first).T if hasattr(self, "nx") else second @ first  # type: ignore[no-any-return]

    def __getitem__(self, index: Any) -> Any:
        """Return one of the two layers; of a slice, an `nn.Sequential`."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "PlainPair: its weight is composed of those of its two layers and cannot be set; set pair[0].weight, pair[1].weight"
            )
        if name == "bias":
            self[1].bias = value
        else:
            super().__setattr__(name, value)


class Composed(Tensor):
    """A weight that is composed when its values are asked for, and not before; it refuses to be changed, as a copy would change alone.

    Args:
        owner: kind of the layer, for errors.
        compose: returns the weight.
        shape, dtype, device: its own.
        requires_grad: whether gradients reach what it is composed of.
    """

    _owner: str
    _compose: Callable[[], Tensor]
    _detached: bool = False

    @staticmethod
    def __new__(
        cls: Any, owner: str, compose: Callable[[], Tensor], shape: Sequence[int], dtype: Any, device: Any, requires_grad: bool
    ) -> "Composed":
        """Make one without composing it."""
        weight: Composed = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=requires_grad)
        weight._owner, weight._compose = owner, compose
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        weight = args[0] if args and isinstance(args[0], Composed) else None
        if weight is not None and name in ("data", "detach"):
            detached = Composed(weight._owner, lambda: weight._compose().detach(), weight.shape, weight.dtype, weight.device, False)
            detached._detached = True
            return detached
        if weight is not None and weight._detached and name == "requires_grad_":  # to differentiate by a copy, as is usual
            return weight._compose().requires_grad_(*args[1:], **(kwargs or {}))
        changes = name in ("__set__", "__setitem__", *IN_PLACE) or (name.endswith("_") and not name.endswith("__"))
        if weight is not None and changes:
            parts = "weights of its two layers" if weight._owner == "PlainPair" else "factors U, S and Vh"
            raise RuntimeError(f"{weight._owner}: its weight is composed of the {parts}; {name} would change a copy, so change those")
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(Composed, lambda weight: weight._compose(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _settings(first: Any, second: Any, conv1d: bool) -> dict[str, Any]:
    """Return the attributes of the dense layer that two layers stand for."""
    if isinstance(first, nn.Embedding):
        own = ("num_embeddings", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        return {name: getattr(first, name) for name in own} | {"embedding_dim": second.out_features}
    if isinstance(first, nn.Linear):
        return dict(zip(("nx", "nf") if conv1d else ("in_features", "out_features"), (first.in_features, second.out_features), strict=True))
    settings = {name: getattr(first, name) for name in ("in_channels", "groups", "padding_mode", "transposed")}
    settings |= {"out_channels": second.out_channels}
    for name in ("kernel_size", "stride", "dilation"):  # of the two operations one has the neutral value along each axis
        settings[name] = tuple(a * b for a, b in zip(getattr(first, name), getattr(second, name), strict=True))
    for name in ("padding", "output_padding"):
        one, two = getattr(first, name), getattr(second, name)
        settings[name] = one if isinstance(one, str) else tuple(a + b for a, b in zip(one, two, strict=True))
    return settings


def _compose_kernels(first: Tensor, second: Tensor, pair: Any) -> Tensor:
    """Return the kernel of one convolution that does what two do, one after the other."""
    groups, sizes, axes = pair.groups, (pair[0].kernel_size, pair[1].kernel_size), range(len(pair.kernel_size))
    out, in_ = pair.out_channels // groups, pair.in_channels // groups

    def blocks(kernel: Tensor, layer: Any, rows: int, columns: int) -> Tensor:
        """Return ``(groups, rows, columns, size...)``."""
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


class PlainRecurrent(nn.Module):
    """`nn.LSTM` or `nn.GRU` with low-rank projections: same call, same results. Parameters are copies of the weights given, and trainable.

    Input projections run on the whole sequence at once. A layer and direction whose hidden projection is dense runs in the fused kernel, on
    inputs of size rank; one whose hidden (or output) projection is a pair is a loop over time, so `torch.export` fixes its length.

    Args:
        mode: ``"LSTM"`` or ``"GRU"``.
        input_size: features of the input.
        hidden_size: features of the hidden state.
        num_layers: recurrent layers on top of each other.
        bias: whether `weights` holds biases.
        batch_first: input and output are ``(batch, time, features)``, not ``(time, batch, features)``; a state is always
            ``(layers * directions, batch, features)``.
        dropout: probability in [0, 1] of dropping each output of every layer but the last, while training.
        bidirectional: whether a second set of weights reads the sequence backwards.
        proj_size: size of the projected hidden state of an LSTM; 0 for none.
        weights: tensors under the names that `nn.LSTM` gives them (``weight_ih_l0``, ``bias_hh_l1_reverse``, ...); a matrix is a dense
            ``(out, in)`` tensor or a pair ``(out, rank), (rank, in)`` whose product it is.

    Raises:
        ValueError: a weight is missing, unknown or of the wrong shape; at a call, the initial state is of the wrong shape.

    Examples:
        >>> dense = nn.LSTM(6, 4)
        >>> weights = dict(dense.state_dict())
        >>> left, right = torch.randn(16, 2), torch.randn(2, 6)
        >>> lstm = PlainRecurrent("LSTM", 6, 4, weights=weights | {"weight_ih_l0": (left, right)})
        >>> output, (h, c) = lstm(torch.randn(5, 3, 6))
        >>> output.shape
        torch.Size([5, 3, 4])
    """

    def __init__(
        self,
        mode: Literal["LSTM", "GRU"],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        weights: Mapping[str, Weight],
    ) -> None:
        if mode not in ("LSTM", "GRU") or (mode == "GRU" and proj_size):
            raise ValueError(f"PlainRecurrent: mode must be 'LSTM', or 'GRU' without proj_size, got {mode!r} with proj_size={proj_size}")
        super().__init__()
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size

        gates, state = (4 if mode == "LSTM" else 3) * hidden_size, proj_size or hidden_size
        directions = ("", "_reverse") if bidirectional else ("",)
        shapes: dict[str, tuple[int, ...]] = {}
        cells: dict[str, dict[str, Weight]] = {}
        for layer in range(num_layers):
            for direction in directions:
                key = f"l{layer}{direction}"
                cell = {
                    "weight_ih": (gates, state * len(directions) if layer else input_size),
                    "weight_hh": (gates, state),
                    **({"bias_ih": (gates,), "bias_hh": (gates,)} if bias else {}),
                    **({"weight_hr": (proj_size, hidden_size)} if proj_size else {}),
                }
                shapes |= {f"{name}_{key}": shape for name, shape in cell.items()}
                cells[key] = {name: weights[f"{name}_{key}"] for name in cell if f"{name}_{key}" in weights}
        _check_shapes("PlainRecurrent", weights, shapes)
        self.given = _shapes(weights)
        self.cells = nn.ModuleDict({key: _cell(mode, hidden_size, proj_size, cell) for key, cell in cells.items()})

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, Tensor]]:
        """Run the sequence.

        Args:
            input: ``(time, batch, features)``, ``(batch, time, features)`` if `batch_first`, ``(time, features)``, or a packed sequence.
            hx: initial state, ``(layers * directions, batch, size)``, without ``batch`` for an unbatched input; ``(hidden, cell)`` for an
                LSTM, ``hidden`` for a GRU; zeros when None.

        Returns:
            The outputs of the last layer, laid out as `input`, and the final state, laid out as `hx`.
        """
        state = None if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if isinstance(input, PackedSequence):
            state = _permute(state, input.sorted_indices)
            data, final = self._run(input.data, input.batch_sizes, state)
            output: Tensor | PackedSequence = PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            final = _permute(final, input.unsorted_indices) or final
        elif input.dim() == 2:
            state = None if state is None else tuple(part.unsqueeze(1) for part in state)
            data, final = self._run(input.unsqueeze(1), None, state)
            output, final = data.squeeze(1), tuple(part.squeeze(1) for part in final)
        elif input.dim() == 3:
            data, final = self._run(input.transpose(0, 1) if self.batch_first else input, None, state)
            output = data.transpose(0, 1) if self.batch_first else data
        else:
            raise ValueError(f"PlainRecurrent: input must have 2 or 3 dimensions, got {input.dim()}")
        return output, (final[0], final[1]) if self.mode == "LSTM" else final[0]

    def _run(self, x: Tensor, batch_sizes: Tensor | None, state: State | None) -> tuple[Tensor, State]:
        """Run all layers on ``(time, batch, features)``, or on packed ``(sum of batch_sizes, features)``."""
        batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
        sizes = (self.proj_size or self.hidden_size, self.hidden_size) if self.mode == "LSTM" else (self.hidden_size,)
        shapes = [(len(self.cells), batch, size) for size in sizes]
        if state is None:
            state = tuple(x.new_zeros(shape) for shape in shapes)
        elif [tuple(part.shape) for part in state] != shapes:
            raise ValueError(f"PlainRecurrent: the initial state must be {shapes}, got {[tuple(part.shape) for part in state]}")
        backwards = _reversal(batch_sizes).to(x.device) if self.bidirectional and batch_sizes is not None else None
        directions = 2 if self.bidirectional else 1
        finals, outputs = [], []
        for index, cell in enumerate(self.cells.values()):
            first = tuple(part[index : index + 1] for part in state)
            if index % directions:
                output, final = cell(_reverse(x, backwards), batch_sizes, first)
                output = _reverse(output, backwards)
            else:
                output, final = cell(x, batch_sizes, first)
            outputs.append(output)
            finals.append(final)
            if len(outputs) == directions:
                x = torch.cat(outputs, -1) if self.bidirectional else output
                outputs = []
                if index + 1 < len(self.cells):
                    x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.cat(parts) for parts in zip(*finals, strict=True))

    def flatten_parameters(self) -> None:
        """Lay out the fused kernels' weights for cuDNN, as `nn.LSTM` does; does nothing on other devices."""
        for cell in self.cells.values():
            if isinstance(cell, _Fused):
                cell.kernel.flatten_parameters()

    def extra_repr(self) -> str:
        """Return the settings that differ from torch's defaults."""
        settings = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False, "proj_size": 0}
        changed = [f"{name}={getattr(self, name)}" for name, default in settings.items() if getattr(self, name) != default]
        return ", ".join([f"{self.mode}, {self.input_size}, {self.hidden_size}", *changed])


class _Fused(nn.Module):
    """One layer and direction in torch's kernel, on the input reduced to its rank."""

    def __init__(self, mode: str, hidden_size: int, proj_size: int, weights: Mapping[str, Any]) -> None:
        super().__init__()
        first = weights["weight_ih"]
        self.reduce = None if isinstance(first, Tensor) else _linear(first[1], None)
        left: Tensor = first if isinstance(first, Tensor) else first[0]
        kind, projected = (nn.LSTM, {"proj_size": proj_size}) if mode == "LSTM" else (nn.GRU, {})
        kernel = kind(left.shape[1], hidden_size, bias="bias_ih" in weights, device="meta", dtype=left.dtype, **projected)
        self.kernel = kernel.to_empty(device=left.device)  # by way of "meta" nothing is drawn from the random number generator
        self.kernel.load_state_dict({f"{name}_l0": weight for name, weight in {**weights, "weight_ih": left}.items()})

    def forward(self, x: Tensor, batch_sizes: Tensor | None, state: State) -> tuple[Tensor, State]:
        x = x if self.reduce is None else self.reduce(x)
        hx = state if len(state) == 2 else state[0]
        output, final = self.kernel(x if batch_sizes is None else PackedSequence(x, batch_sizes), hx)
        return output if batch_sizes is None else output.data, (final,) if isinstance(final, Tensor) else final


class _Loop(nn.Module):
    """One layer and direction, step by step."""

    def __init__(self, mode: str, weights: Mapping[str, Any]) -> None:
        super().__init__()
        self.mode = mode
        self.input = _projection(weights["weight_ih"], weights.get("bias_ih"))
        self.hidden = _projection(weights["weight_hh"], weights.get("bias_hh"))
        self.project = _projection(weights["weight_hr"], None) if "weight_hr" in weights else None

    def forward(self, x: Tensor, batch_sizes: Tensor | None, state: State) -> tuple[Tensor, State]:
        x = self.input(x)
        state = tuple(part[0] for part in state)
        outputs, finished = [], []
        for step in x.unbind(0) if batch_sizes is None else torch.split(x, batch_sizes.tolist()):
            if batch_sizes is not None and len(step) < len(state[0]):
                finished.append(tuple(part[len(step) :] for part in state))
                state = tuple(part[: len(step)] for part in state)
            state = self._lstm(step, *state) if self.mode == "LSTM" else self._gru(step, *state)
            outputs.append(state[0])
        if finished:
            state = tuple(torch.cat(parts) for parts in zip(state, *reversed(finished), strict=True))
        output = torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)
        return output, tuple(part.unsqueeze(0) for part in state)

    def _lstm(self, step: Tensor, h: Tensor, c: Tensor) -> State:
        i, f, g, o = (step + self.hidden(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h if self.project is None else self.project(h), c

    def _gru(self, step: Tensor, h: Tensor) -> State:
        step_r, step_z, step_n = step.chunk(3, -1)
        hidden_r, hidden_z, hidden_n = self.hidden(h).chunk(3, -1)
        new = torch.tanh(step_n + torch.sigmoid(step_r + hidden_r) * hidden_n)
        return (new + torch.sigmoid(step_z + hidden_z) * (h - new),)


def _cell(mode: str, hidden_size: int, proj_size: int, weights: Mapping[str, Weight]) -> _Fused | _Loop:
    loop = any(name != "weight_ih" and not isinstance(weight, Tensor) for name, weight in weights.items())
    return _Loop(mode, weights) if loop else _Fused(mode, hidden_size, proj_size, weights)


def _shapes(weights: Mapping[str, Weight]) -> dict[str, list[list[int]]]:
    """Return the shapes of each weight's factors: what it takes, with the settings, to build the module again."""
    return {name: [list(part.shape) for part in ((w,) if isinstance(w, Tensor) else w)] for name, w in weights.items()}


def _reversal(batch_sizes: Tensor) -> Tensor:
    """Return the index that turns every sequence of a packed one around; applied twice it changes nothing."""
    position, lengths = pad_packed_sequence(PackedSequence(torch.arange(int(batch_sizes.sum())), batch_sizes))
    mirrored = lengths - 1 - torch.arange(len(batch_sizes)).unsqueeze(1)
    return pack_padded_sequence(position.gather(0, mirrored.clamp(min=0)), lengths).data


def _reverse(x: Tensor, packed: Tensor | None) -> Tensor:
    return x.flip(0) if packed is None else x[packed]


def _permute(state: State | None, index: Tensor | None) -> State | None:
    return state if state is None or index is None else tuple(part.index_select(1, index) for part in state)


class _NotForTheFastPath:
    """Stands where torch's transformer layers look for a packed weight.

    `nn.TransformerEncoder` hands padded inputs on as nested tensors, which only its fused kernel can read, unless a weight overrides
    torch functions. This one says that it does; nothing is ever computed with it.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


class PlainAttention(nn.Module):
    """`nn.MultiheadAttention` with low-rank projections: same call, same results (nested tensors are not taken).

    It can be the ``self_attn`` or ``multihead_attn`` of torch's transformer layers, which then run their ordinary path.

    Args:
        embed_dim: features of the query and the output.
        num_heads: attention heads; a divisor of `embed_dim`.
        dropout: probability in [0, 1] of dropping an attention weight, while training.
        bias: whether `weights` holds biases of the projections.
        add_bias_kv: whether `weights` holds ``bias_k`` and ``bias_v``, a learned key and value added to each sequence.
        add_zero_attn: whether a zero key and value are added to each sequence.
        kdim: features of the key; None for `embed_dim`.
        vdim: features of the value; None for `embed_dim`.
        batch_first: tensors are ``(batch, time, features)``, not ``(time, batch, features)``.
        weights: tensors under the names that `nn.MultiheadAttention` gives them: ``in_proj_weight``, or ``q_proj_weight``,
            ``k_proj_weight`` and ``v_proj_weight``; ``out_proj.weight``, ``in_proj_bias``, ``out_proj.bias``, ``bias_k``, ``bias_v``; a
            matrix is a dense ``(out, in)`` tensor or a pair ``(out, rank), (rank, in)`` whose product it is.

    Raises:
        ValueError: a weight is missing, unknown or of the wrong shape; at a call, a mask is of the wrong shape.

    Examples:
        >>> weights = dict(nn.MultiheadAttention(8, 2).state_dict())
        >>> low = {"in_proj_weight": (torch.randn(24, 2), torch.randn(2, 8))}
        >>> attention = PlainAttention(8, 2, weights=weights | low)
        >>> x = torch.randn(5, 3, 8)
        >>> attention(x, x, x)[0].shape
        torch.Size([5, 3, 8])
    """

    # What torch's transformer layers read before they choose a path.
    _qkv_same_embed_dim = False
    in_proj_weight = _NotForTheFastPath()

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        weights: Mapping[str, Weight],
    ) -> None:
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"PlainAttention: num_heads must be a divisor of embed_dim={embed_dim}, got {num_heads}")
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.add_zero_attn = add_zero_attn
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.packed = "in_proj_weight" in weights

        inputs = {"q_proj_weight": embed_dim, "k_proj_weight": self.kdim, "v_proj_weight": self.vdim}
        shapes: dict[str, tuple[int, ...]] = {"out_proj.weight": (embed_dim, embed_dim)}
        shapes |= {"in_proj_weight": (3 * embed_dim, embed_dim)} if self.packed else {name: (embed_dim, n) for name, n in inputs.items()}
        if bias:
            shapes |= {"in_proj_bias": (3 * embed_dim,), "out_proj.bias": (embed_dim,)}
        if add_bias_kv:
            shapes |= {"bias_k": (1, 1, embed_dim), "bias_v": (1, 1, embed_dim)}
        _check_shapes("PlainAttention", weights, shapes)
        self.given = _shapes(weights)
        given: dict[str, Any] = dict(weights)
        in_bias = given.get("in_proj_bias")
        if self.packed:
            self.in_proj = _projection(given["in_proj_weight"], in_bias)
        else:
            biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
            self.q_proj, self.k_proj, self.v_proj = (_projection(given[name], b) for name, b in zip(inputs, biases, strict=True))
        self.out_proj = _projection(given["out_proj.weight"], given.get("out_proj.bias"))
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, nn.Parameter(given[name].detach().clone()) if name in given else None)
        self.register_parameter("in_proj_bias", None)
        if isinstance(self.out_proj, nn.Sequential):  # torch's encoder reads these two, whatever they are
            self.out_proj.register_parameter("weight", None)
            self.out_proj.register_parameter("bias", None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: ``(target, batch, embed)``, ``(batch, target, embed)`` if `batch_first`, or ``(target, embed)``.
            key: the same with ``source`` and ``kdim``.
            value: the same with ``source`` and ``vdim``.
            key_padding_mask: ``(batch, source)``, ``(source,)`` when unbatched; True (or what is added to the scores) hides a key.
            need_weights: return the attention weights too; False is faster.
            attn_mask: ``(target, source)`` or ``(batch * heads, target, source)``; True (or what is added to the scores) hides a pair.
            average_attn_weights: return the mean over heads.
            is_causal: a hint that `attn_mask`, which must be given too, is the causal one.

        Returns:
            The outputs, laid out as `query`, and the attention weights or None: ``(batch, target, source)``, with ``heads`` after ``batch``
            if not averaged, without ``batch`` when unbatched.
        """
        if query.is_nested or query.dim() not in (2, 3):
            raise ValueError(f"PlainAttention: query must be an ordinary tensor of 2 or 3 dimensions, got {query.dim()}")
        if is_causal and attn_mask is None:
            raise ValueError("PlainAttention: is_causal is a hint about attn_mask; give the mask too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = _same(lambda x: x.unsqueeze(0), query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = _same(lambda x: x.transpose(0, 1), query, key, value)
        is_causal = is_causal and key_padding_mask is None and not need_weights  # then the kernel makes the mask
        mask = None if is_causal else self._mask(query, key, key_padding_mask, attn_mask)

        q, k, v = self._project(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))

        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        return output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Project ``(batch, time, features)``; of a packed pair the first factor runs once for each distinct input."""
        if not self.packed:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)  # type: ignore[no-any-return]
        if isinstance(self.in_proj, nn.Sequential):
            query, key, value = _same(self.in_proj[0], query, key, value)
        last: Any = self.in_proj[1] if isinstance(self.in_proj, nn.Sequential) else self.in_proj
        biases = (None, None, None) if last.bias is None else last.bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), last.weight.chunk(3), biases, strict=True))

    def _mask(self, query: Tensor, key: Tensor, padding: Tensor | None, attn: Tensor | None) -> Tensor | None:
        """Return what is added to the scores ``(batch, heads, target, source)``, or None."""
        batch, target, source = query.shape[0], query.shape[1], key.shape[1]
        mask: Tensor | None = None
        if attn is not None:
            if tuple(attn.shape) not in ((target, source), (batch * self.num_heads, target, source)):
                allowed = f"{(target, source)} or {(batch * self.num_heads, target, source)}"
                raise ValueError(f"PlainAttention: attn_mask must be {allowed}, got {tuple(attn.shape)}")
            mask = _additive(attn, query.dtype)
            mask = mask if mask.dim() == 2 else mask.view(batch, self.num_heads, target, source)
        if padding is not None:
            if tuple(padding.shape) != (batch, source):
                raise ValueError(f"PlainAttention: key_padding_mask must be {(batch, source)}, got {tuple(padding.shape)}")
            hidden = _additive(padding, query.dtype)[:, None, None, :]
            mask = hidden if mask is None else mask + hidden
        return mask

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"


def _same(change: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply `change` to each, once where they are the same tensor."""
    new_key = change(key)
    return (new_key if query is key else change(query)), new_key, (new_key if value is key else change(value))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out, in_ = weight.shape
    layer = nn.Linear(in_, out, bias=bias is not None, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


def _projection(weight: Weight, bias: Tensor | None) -> nn.Linear | nn.Sequential:
    if isinstance(weight, Tensor):
        return _linear(weight, bias)
    return nn.Sequential(_linear(weight[1], None), _linear(weight[0], bias))


def _check_shapes(owner: str, weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise where `weights` are not exactly those of `shapes`; only matrices may be pairs."""
    if set(weights) != set(shapes):
        missing, unknown = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
        raise ValueError(f"{owner}: weights: missing {missing}, unknown {unknown}")
    for name, weight in weights.items():
        expected = shapes[name]
        if isinstance(weight, Tensor):
            got, fits = str(tuple(weight.shape)), tuple(weight.shape) == expected
        else:
            left, right = (tuple(factor.shape) for factor in weight)
            got, fits = f"the pair {left}, {right}", len(expected) == 2 and (left[:1] + right[1:], left[1:]) == (expected, right[:1])
        if not fits:
            raise ValueError(f"{owner}: {name} must be {expected}, got {got}")
