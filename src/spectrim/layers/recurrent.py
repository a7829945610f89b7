"""Factorized `torch.nn.LSTM` and `torch.nn.GRU`: every layer, both directions, the gates of one matrix stacked."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from spectrim.layers.exchanged import Share
from spectrim.layers.linear import linear_of
from spectrim.layers.uses import Call, Features, call_on, first_argument
from spectrim.layers.weights import SeveralWeights
from spectrim.linalg.fold import Fold
from spectrim.plain.recurrent import PlainRecurrent

# Two operations on the hidden state run in a Python loop instead of the fused kernel. Its cost is in seconds, which a latency table
# measures; in multiply-accumulates it is zero.
LOOP_MACS = 0.0


class FactorizedRecurrent(SeveralWeights):
    """A recurrent layer whose weights are composed at every call and handed to torch's fused kernel.

    Where two operations on the input cost less, the first of them runs for the whole sequence and the kernel gets the second as its
    input weight; layers then run one after the other. Weights on the hidden state are always composed.

    Factors are called as torch calls the weights: ``weight_ih_l0``, ``weight_hh_l0_reverse``, and ``weight_hr_l0`` for projections.
    """

    @classmethod
    def weights(cls, module: Any) -> tuple[str, ...]:
        """Return every matrix of the layer, in torch's order."""
        return tuple(name for name in module._flat_weights_names if name.startswith("weight"))

    @classmethod
    def work(cls, module: Any, name: str, scheme: Fold, rank: int | None, shape: Sequence[int] | None) -> float:
        """``out * in``, or ``rank * (out + in)``, for each time step of each sequence."""
        out, in_ = weight_shape(module, name)
        steps = 1 if shape is None else math.prod(shape[:-1])
        return float(steps * (out * in_ if rank is None else rank * (out + in_)))

    def overhead(self, name: str) -> float:
        """A pair on the hidden state leaves the fused kernel."""
        return 0.0 if name.startswith("weight_ih") else LOOP_MACS

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run torch's own forward (padded, packed or unbatched sequences) on composed weights, or on pairs at the input."""
        pairs = self._pairs(input)
        if pairs:
            return self._layer_by_layer(input, hx, pairs)
        layer = self.composed()
        layer.__dict__["_flat_weights"] = [getattr(layer, name) for name in layer._flat_weights_names]
        return super(FactorizedRecurrent, layer).forward(input, hx)

    def _pairs(self, input: Any) -> list[str]:
        """Return the weights on layers' inputs that cost less as two operations; the two directions share an input, so none of them."""
        module: Any = self
        if module.bidirectional:
            return []
        positions = (input.data if isinstance(input, PackedSequence) else input).shape[:-1]
        names = [name for name in self.factors if name.startswith("weight_ih")]
        return [name for name in names if not self.composes(name, (*positions, weight_shape(self, name)[1]))]

    def _layer_by_layer(self, input: Any, hx: Any, pairs: Collection[str]) -> Any:
        """Run torch's kernel once for each layer; those in `pairs` on an input that is projected to their rank.

        Args:
            input: as torch takes it.
            hx: as torch takes it.
            pairs: names of input weights.
        """
        module: Any = self
        states = []
        for index in range(module.num_layers):
            names = [name for name in module._flat_weights_names if name.endswith(f"_l{index}")]
            weights, width = {}, weight_shape(self, f"weight_ih_l{index}")[1]
            for name in names:
                if name in pairs:
                    weights[name], right = self.factors_of(name).pair()
                    input, width = _on_rows(partial(F.linear, weight=right), input), len(right)
                else:
                    weights[name] = self.dense_weight(name) if name in self.factors else getattr(self, name)
            kernel: Any = object.__new__(type(self))
            kernel.__dict__.update(self.__dict__)
            kernel.__dict__.update(num_layers=1, input_size=width, dropout=0.0, _flat_weights=list(weights.values()))
            own = None if hx is None else tuple(h[index : index + 1] for h in hx) if module.mode == "LSTM" else hx[index : index + 1]
            input, state = super(FactorizedRecurrent, kernel).forward(input, own)
            states.append(state if isinstance(state, tuple) else (state,))
            if index + 1 < module.num_layers and module.dropout and module.training:
                input = _on_rows(partial(F.dropout, p=module.dropout), input)
        joined = tuple(torch.cat(parts) for parts in zip(*states, strict=True))
        return input, joined if module.mode == "LSTM" else joined[0]

    @classmethod
    def forget(cls, module: nn.Module) -> None:
        """Drop torch's lists of weights."""
        for name in ("_flat_weights", "_flat_weight_refs"):
            module.__dict__.pop(name, None)

    def release(self, share: Share) -> nn.Module:
        """Make this the dense torch layer, in place; return it."""
        dense: Any = super().release(share)
        dense._init_flat_weights()
        return dense  # type: ignore[no-any-return]

    def split(self, share: Share, paying: Collection[str]) -> nn.Module | None:
        """A `PlainRecurrent` in which every matrix that pays is a pair of `Linear` layers."""
        module: Any = self
        if not paying:
            return None
        weights = {
            name: self.factors_of(name).balanced() if name in paying else self.factors_of(name).matrix().detach() for name in self.factors
        }
        weights |= {name: getattr(self, name).detach() for name in module._flat_weights_names if name.startswith("bias")}
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
        plain = PlainRecurrent(module.mode, weights=weights, **{name: getattr(self, name) for name in names})
        return plain.requires_grad_(any(p.requires_grad for p in self.parameters()))

    def calls_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
        """Yield the uses of every matrix, on padded or packed sequences."""
        x = first_argument(args, kwargs)
        data, shape = (x.data if isinstance(x, PackedSequence) else x), self._time_first(x)
        yield from (call_on(self, name, data, shape) for name, _ in self.named_factors())

    def _time_first(self, x: Any) -> tuple[int, ...]:
        """Return ``(time, batch, features)`` of an input; of a packed one as if every sequence had full length."""
        if isinstance(x, PackedSequence):
            return (len(x.batch_sizes), int(x.batch_sizes[0]), x.data.shape[-1])
        if x.dim() == 2:
            return (x.shape[0], 1, x.shape[1])
        module: Any = self
        time, batch = (x.shape[1], x.shape[0]) if module.batch_first else (x.shape[0], x.shape[1])
        return (time, batch, x.shape[2])

    def features_read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Features]:
        """Matrices on the input of the first layer read its features."""
        held, x = dict(self.named_factors()), first_argument(args, kwargs) if args or kwargs else None
        if isinstance(x, Tensor):
            yield from (Features(held[name], "columns", x, -1) for name in ("weight_ih_l0", "weight_ih_l0_reverse") if name in held)

    def why_untimed(self, name: str, eager: bool) -> str:
        """Compilers and ONNX would unroll a loop over time."""
        return "" if eager or name.startswith("weight_ih") else "a pair on the hidden state is a loop in Python"

    def share_timed(self, name: str) -> float:
        """An LSTM of one layer has two matrices or three."""
        sizes = {other: math.prod(weight_shape(self, other)) for other in self.factors if _end(other) == _end(name)}
        return sizes[name] / sum(sizes.values())

    def timed_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """That of the layer within this one that has the weight."""
        return (*shape[:-1], weight_shape(self, f"weight_ih_{_end(name)}")[1])

    def timed_forms(self, name: str, rank: int) -> tuple[nn.Module, nn.Module]:
        """One layer and direction, time first."""
        module: Any = self
        factors = self.factors_of(name)
        out, in_ = factors.shape
        options: dict[str, Any] = {"dtype": factors.dtype, "device": factors.device}
        more = {"proj_size": module.proj_size} if module.proj_size else {}
        kind: Any = {"LSTM": nn.LSTM, "GRU": nn.GRU}[module.mode]
        width = weight_shape(self, f"weight_ih_{_end(name)}")[1]
        dense = kind(width, module.hidden_size, bias=module.bias, **options, **more)
        pair = (torch.randn(out, rank, **options) / out, torch.randn(rank, in_, **options))
        weights: dict[str, Any] = dict(dense.state_dict()) | {"_".join((*name.split("_")[:2], "l0")): pair}
        settings = {"bias": module.bias, "proj_size": module.proj_size}
        plain = PlainRecurrent(module.mode, dense.input_size, dense.hidden_size, weights=weights, **settings)
        return dense.eval(), plain.eval()

    def observed(self) -> PlainRecurrent:
        """Return the same layer as a loop over time, in which every matrix is a `FactorizedLinear` of this layer's own factors."""
        plain: Any = self.split(lambda factors, part, tensor: nn.Parameter(tensor), [name for name, _ in self.named_factors()])
        for key, cell in plain.cells.items():
            for part, name in (("input", "ih"), ("hidden", "hh"), ("project", "hr")):
                pair = getattr(cell, part)
                if pair is not None:
                    setattr(cell, part, linear_of(self.factors_of(f"weight_{name}_{key}"), pair[1].bias))
        return plain  # type: ignore[no-any-return]

    # What torch's class does with its list of weights, which here exists only for the time of a call.
    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Nothing to flatten: the weights are composed at each call."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]


def _end(name: str) -> str:
    """Return the layer and direction that a weight's name ends with: ``l0``, ``l1_reverse``."""
    return name.split("_", 2)[2]


def _on_rows(operation: Callable[[Tensor], Tensor], input: Any) -> Any:
    """Apply an operation on rows to a tensor, or to the rows of a packed sequence."""
    return input._replace(data=operation(input.data)) if isinstance(input, PackedSequence) else operation(input)


def weight_shape(module: Any, name: str) -> tuple[int, int]:
    """Return ``(out, in)`` of a recurrent layer's weight by its name."""
    gates = {"LSTM": 4, "GRU": 3}[module.mode]
    state = module.proj_size or module.hidden_size
    if name.startswith("weight_hr"):
        return module.proj_size, module.hidden_size
    if name.startswith("weight_hh"):
        return gates * module.hidden_size, state
    first = name.removesuffix("_reverse").endswith("_l0")
    return gates * module.hidden_size, module.input_size if first else state * (2 if module.bidirectional else 1)


class FactorizedLSTM(FactorizedRecurrent, nn.LSTM):
    """Factorized `torch.nn.LSTM`."""

    dense_kinds = (nn.LSTM,)


class FactorizedGRU(FactorizedRecurrent, nn.GRU):
    """Factorized `torch.nn.GRU`."""

    dense_kinds = (nn.GRU,)
