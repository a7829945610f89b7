"""Plain LSTM and GRU layers with low-rank projections."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .chain import refuse_dense
from .composed import Composed
from .parts import Weight, _check_shapes, _linear, _projection, _shapes

State: TypeAlias = tuple[Tensor, ...]  # of an LSTM: hidden and cell; of a GRU: hidden


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

    @classmethod
    def stands_for(cls, base: type) -> bool:
        """Whether it behaves as a layer of class `base` does."""
        return base in (nn.LSTM, nn.GRU)

    @staticmethod
    def takes_over(layer: nn.Module) -> tuple[str, ...]:
        """Return the names of the parameters of an `nn.LSTM` or `nn.GRU` that this one holds otherwise."""
        return tuple(layer._flat_weights_names)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Return a weight or bias by torch's name; one that is a product of two is read only."""
        key = name.partition("_l")[2]
        cells = self.__dict__.get("_modules", {}).get("cells")
        if cells is not None and name.startswith(("weight_", "bias_")) and f"l{key}" in cells:
            return _read(cells[f"l{key}"], name.partition("_l")[0])
        return super().__getattr__(name)

    @property
    def loops(self) -> bool:
        """Whether a layer or direction is a loop over time, outside torch's fused kernel."""
        return any(not isinstance(cell, _Fused) for cell in self.cells.values())

    def flatten_parameters(self) -> None:
        """Lay out the fused kernels' weights for cuDNN, as `nn.LSTM` does; does nothing on other devices."""
        for cell in self.cells.values():
            if isinstance(cell, _Fused):
                cell.kernel.flatten_parameters()

    # What torch's classes do with their list of weights, which this one does not have.
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        refuse_dense(self.given, state_dict, prefix, rest[-1])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _get_name(self) -> str:
        return "PlainRecurrent"

    def extra_repr(self) -> str:
        """Return the settings that differ from torch's defaults."""
        settings = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False, "proj_size": 0}
        changed = [f"{name}={getattr(self, name)}" for name, default in settings.items() if getattr(self, name) != default]
        return ", ".join([f"{self.mode}, {self.input_size}, {self.hidden_size}", *changed])


def _read(cell: Any, name: str) -> Any:
    """Return one weight or bias of a layer and direction, as torch's layer holds it: ``weight_ih``, ``bias_hh`` ..."""
    if isinstance(cell, _Loop):
        layer: Any = {"ih": cell.input, "hh": cell.hidden, "hr": cell.project}[name.split("_")[1]]
        return layer.bias if name.startswith("bias") else layer.weight
    held = getattr(cell.kernel, f"{name}_l0")
    if name != "weight_ih" or cell.reduce is None:
        return held
    right, shape = cell.reduce.weight, (held.shape[0], cell.reduce.in_features)
    return Composed("PlainRecurrent", lambda: held @ right, shape, held.dtype, held.device, held.requires_grad or right.requires_grad)


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


def _reversal(batch_sizes: Tensor) -> Tensor:
    """Return the index that turns every sequence of a packed one around; applied twice it changes nothing."""
    position, lengths = pad_packed_sequence(PackedSequence(torch.arange(int(batch_sizes.sum())), batch_sizes))
    mirrored = lengths - 1 - torch.arange(len(batch_sizes)).unsqueeze(1)
    return pack_padded_sequence(position.gather(0, mirrored.clamp(min=0)), lengths).data


def _reverse(x: Tensor, packed: Tensor | None) -> Tensor:
    return x.flip(0) if packed is None else x[packed]


def _permute(state: State | None, index: Tensor | None) -> State | None:
    return state if state is None or index is None else tuple(part.index_select(1, index) for part in state)
