"""Kinds of layers from outside: their contract, checked on one example."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import LayerError
from spectrim.forms import FORMS, Form
from spectrim.layers.base import FactorizedLayer
from spectrim.layers.forwards import renew
from spectrim.layers.weights import OneWeight
from spectrim.linalg.fold import MATRICES

TOLERANCE = 1e-9
"""Relative, in float64: far above rounding, far below any mistake."""


def check_kind(kind: type[FactorizedLayer], layer: nn.Module, inputs: Sequence[Any]) -> None:
    """Check a kind of layer against the laws of every factorized layer, on one dense layer and one input, in float64.

    Args:
        kind: the factorized class.
        layer: a small dense layer; left untouched. Its sizes and settings matter, the values of its parameters do not.
        inputs: the arguments it is called with.

    Raises:
        LayerError: for the first law that does not hold.
    """
    if not kind.accepts(layer):
        hint = f"list its class in {kind.__name__}.dense_kinds, or override accepts"
        raise LayerError(kind.__name__, f"does not accept its own example, a {type(layer).__name__}", hint=hint)
    dense = _shaken(copy.deepcopy(layer).double().eval())
    given = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        for scheme in kind.schemes(dense):
            factors = {name: _factors(kind, dense, name, scheme) for name in kind.weights(dense)}
            _check_cost(kind, dense, list(factors), scheme, given)
            low = kind.adopt(_again(dense), factors, scheme)
            _check_forward(low, dense(*given), given, "at full rank")
            if isinstance(low, OneWeight) and not low.looks_up and scheme == "channel":
                _check_rows(low, given)
            cut: dict[str, Form] = {name: full.cut(lambda spectrum: 1) for name, full in factors.items()}
            one = kind.adopt(_again(dense), cut, scheme)
            expected = _check_forward(one, kind.adopt(_again(dense), cut, scheme).release(_parameter)(*given), given, "at rank 1")
            pair = one.split(_parameter, list(cut))
            if not isinstance(pair, nn.Module) or any(isinstance(part, FactorizedLayer | Form) for part in pair.modules()):
                raise LayerError(kind.__name__, f"split must return ordinary layers where all weights pay, got {type(pair).__name__}")
            _check_same(kind, pair.eval()(*given), expected, "what split returns at rank 1 does not compute what the layer does")
            if one.split(_parameter, ()) is not None:
                raise LayerError(kind.__name__, "split must return None where no weight pays", hint="look at its argument paying")


def _again(layer: nn.Module) -> nn.Module:
    """Return another layer of the same tensors."""
    return renew(layer, type(layer))  # type: ignore[no-any-return]


def _shaken(layer: nn.Module) -> nn.Module:
    """Change every number a layer has learned, in place: ones and zeros can hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            random = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) + 0.5
            parameter.copy_(torch.where(parameter == 0, random, parameter * random))
    return layer


def _factors(kind: type[FactorizedLayer], dense: nn.Module, name: str, scheme: Any) -> Form:
    """Fold one weight, which `unfold` must give back, and decompose it."""
    weight = getattr(dense, name, None)
    if not isinstance(weight, nn.Parameter):
        raise LayerError(kind.__name__, f"'{name}' is not a parameter of the example", hint="name the weights in the method weights")
    matrix = kind.fold(dense, name, weight.detach(), scheme)
    if scheme in MATRICES and matrix.dim() not in (2, 3):
        raise LayerError(kind.__name__, f"fold must return (out, in) or (blocks, out, in), got {tuple(matrix.shape)}")
    back = kind.unfold(dense, name, matrix, scheme)
    if back.shape != weight.shape or not torch.equal(back, weight):
        problem = f"unfold is not the inverse of fold: '{name}' of {tuple(weight.shape)} comes back as {tuple(back.shape)}"
        raise LayerError(kind.__name__, problem if back.shape != weight.shape else f"{problem} with other values")
    return FORMS[scheme].of(weight, matrix)


def _check_cost(kind: type[FactorizedLayer], dense: nn.Module, names: Sequence[str], scheme: Any, inputs: Sequence[Any]) -> None:
    shapes: list[Any] = [None, *(tuple(x.shape) for x in inputs[:1] if isinstance(x, Tensor))]
    for name in names:
        for shape in shapes:
            if scheme not in MATRICES:
                continue  # of sizes with several ranks, work is not proportional to them
            whole, one, two = (kind.work(dense, name, scheme, rank, shape) for rank in (None, 1, 2))
            if not (whole >= 0 and one > 0 and two == 2 * one):
                problem = f"work on an input of {shape} is {whole} dense, {one} at rank 1 and {two} at rank 2"
                raise LayerError(kind.__name__, problem, hint="it must be positive, and proportional to the rank")


def _check_forward(low: FactorizedLayer, expected: Any, inputs: Sequence[Any], where: str) -> Any:
    """Run a factorized layer both ways, each of which must give what is expected; return that."""
    for composes, way in ((True, "with composed weights"), (False, "as two operations")):
        low.__dict__["composes"] = lambda name, shape, answer=composes: answer
        _check_same(type(low), low(*inputs), expected, f"its forward, {way}, {where}, does not compute what the dense layer does")
    del low.__dict__["composes"]
    return expected


def _check_rows(low: OneWeight, inputs: Sequence[Any]) -> None:
    """Without its bias the output must be the folded matrix times the rows of the input: calibration and correction count on it."""
    x, y = inputs[0], low(*inputs)
    factors = low.factors_of("weight")
    values = factors.S.clone()
    factors.S.zero_()
    rest = low(*inputs)
    factors.S.copy_(values)
    rows, matrix = torch.cat([*low.input_rows(x, y.shape)], -2), factors.matrix()
    hint = "override input_rows and output_rows, or inherit FactorizedLayer instead of OneWeight: calibrate and correct then leave it out"
    problem = "its output is not the folded matrix times its input_rows, plus a bias"
    if rows.shape[-1] != matrix.shape[-1]:
        raise LayerError(type(low).__name__, f"{problem}: rows are {rows.shape[-1]} wide, the matrix {matrix.shape[-1]}", hint=hint)
    _check_same(type(low), rows @ matrix.mT, torch.cat([*low.output_rows(y - rest, x.shape)], -2), f"{problem}; {hint}")


def _check_same(kind: type, actual: Any, expected: Any, problem: str) -> None:
    for a, b in zip(_tensors(actual), _tensors(expected), strict=True):
        if a.shape != b.shape:
            raise LayerError(kind.__name__, f"{problem}: shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        error, scale = float((a - b).abs().max()), float(b.abs().max())
        if not error <= TOLERANCE * scale:
            raise LayerError(kind.__name__, f"{problem}: it is off by {error:.3g} where the largest value is {scale:.3g}")


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _parameter(factors: Form, part: str, tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone())
