"""Tracing a model once, with named inputs and outputs."""

import inspect
import io
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from spectrim.errors import ExportError
from spectrim.metrics.calls import call_model
from spectrim.runtimes.blame import _blame, _Place, _place_in, first_line
from spectrim.runtimes.formats import _Names
from spectrim.runtimes.tensors import _arguments, _tensors
from spectrim.tables import Format

# The content of a file


class _Flat(nn.Module):
    """A model called with the tensors among its arguments, which gives the tensors among its outputs: what other runtimes know."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        leaves, self.form = tree_flatten((args, kwargs))
        self.constants = [(not isinstance(leaf, Tensor), None if isinstance(leaf, Tensor) else leaf) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Put the tensors back where they belong, and call."""
        given = iter(tensors)
        leaves = [value if constant else next(given) for constant, value in self.constants]
        args, kwargs = tree_unflatten(leaves, self.form)
        return tuple(tensor for _, tensor in _tensors(self.model(*args, **kwargs), "output"))


def _named_inputs(model: nn.Module, inputs: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors among the inputs with the names that `forward` gives them."""
    args, kwargs = _arguments(inputs)
    parameters = list(inspect.signature(model.forward).parameters.values())
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = plain + [f"input_{index}" for index in range(len(plain), len(args))]
    found = [pair for name, value in zip(names, args, strict=False) for pair in _tensors(value, name)]
    return found + [pair for name, value in kwargs.items() for pair in _tensors(value, name)]


def _unique(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    result: list[str] = []
    for name in names:
        while name in result or name in taken:
            name += "_"
        result.append(name)
    return result


def _outputs(format: Format, model: nn.Module, inputs: Any) -> list[Tensor]:
    """Run the model in torch, and return the tensors that it gives."""
    with torch.no_grad():
        returned = call_model(model, inputs)
    try:
        outputs = [tensor for _, tensor in _tensors(returned, "output")]
    except TypeError as error:
        hint = "export a module that returns tensors only; of transformers, switch the cache off: config.use_cache = False"
        raise ExportError(format, f"what the model returns {error}", hint=hint) from error
    if not outputs:
        raise ExportError(format, "the model returns no tensor")
    return outputs


# Tracing, and the origin of errors


def _trace(format: Format, network: nn.Module, inputs: Any, batch: int | None, limit: int | None) -> tuple[ExportedProgram, _Names]:
    """Return the program of the network, and the names of its inputs and outputs.

    Args:
        format: `torch.export` keeps the call as it is; for the others tensors go in and tensors come out.
        network: in eval mode, on the CPU.
        inputs: with at least two examples where the batch is to be dynamic.
        batch: the leading dimension that is to be dynamic; None for none.
        limit: its largest value; None for no limit.
    """
    given = _named_inputs(network, inputs)
    names = _Names(_unique([name for name, _ in given]), [])
    args, kwargs = _arguments(inputs)
    module: nn.Module = network
    if format != "pt2":
        module, args, kwargs = _Flat(network, args, kwargs).eval(), tuple(tensor for _, tensor in given), {}
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    if batch is not None:
        # ExecuTorch's lowering excludes the largest value, so it gets one more; the file is compared at the limit itself
        dim = Dim("batch", min=1, max=None if limit is None else limit + 1)
        for _, tensor in given:
            if tensor.dim() and tensor.size(0) == batch:
                shapes[tensor] = {0: dim}

    def trace() -> ExportedProgram:
        return torch.export.export(
            module, args, kwargs, dynamic_shapes=None if batch is None else shapes.dynamic_shapes(module, args, kwargs)
        )

    printed = io.StringIO()  # torch prints the graph so far when it fails
    try:
        with torch.no_grad(), redirect_stderr(printed):
            program = trace()
    except Exception as error:  # of torch or of the model: all mean the same here
        raise _untraceable(format, error, trace, network, inputs) from error
    sys.stderr.write(printed.getvalue())
    with torch.no_grad():
        outputs = [name for name, _ in _tensors(call_model(network, inputs), "output")]
    return program, _Names(names.inputs, _unique(outputs, names.inputs))


def _untraceable(format: Format, error: Exception, trace: Callable[[], Any], network: nn.Module, inputs: Any) -> ExportError:
    """Return the error that says what `torch.export` could not follow."""
    if "Constraints violated" in str(error) or "marked batch as dynamic" in str(error):
        place = _specialization(trace, network)
        text = " ".join(line.strip(" -") for line in str(error).splitlines() if "your code specialized" in line or "must" in line)
        problem = f"the model refuses a dynamic batch{place.line}: {text.split('. If')[0] or first_line(error)}"
        hint = "write the layer for any batch, or export for the batch of the inputs: dynamic_batch=False, on the command line --static"
        return ExportError(format, problem, operator=place.operator, layer=place.layer, hint=hint)
    place = _blame(error, network)
    hint = ""
    if packing := _packing(network, inputs):
        hint = f"layer '{packing}' gets a packed sequence, whose sizes depend on values: export a module that gives it the padded tensor"
    elif "data-dependent" in str(error):
        hint = "a branch on values cannot be written: use torch.where, or torch.cond"
    problem = f"torch.export cannot follow it{place.line}: {first_line(error)}"
    return ExportError(format, problem, operator=place.operator, layer=place.layer, hint=hint)


def _packing(network: nn.Module, inputs: Any) -> str:
    """Return the name of the first layer that the network gives a packed sequence; empty where there is none."""
    found: list[str] = []

    def noting(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if any(isinstance(value, PackedSequence) for value in args):
                found.append(name)

        return note

    handles = [module.register_forward_pre_hook(noting(name)) for name, module in network.named_modules()]
    try:
        with torch.no_grad(), suppress(Exception):
            call_model(network, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


class _Witness(logging.Handler):
    """Remembers which layer was running when torch last said that it took a size for a constant."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.place = network, _Place()

    def emit(self, record: logging.LogRecord) -> None:
        """Look at the frames below the one that logs."""
        if not record.getMessage().startswith(("eval", "set_replacement", "runtime_assert")):
            return
        frames: list[tuple[FrameType, int]] = []
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            frames.append((frame, frame.f_lineno))
            frame = frame.f_back
        place = _place_in(frames[::-1], self.network)
        self.place = place if place.layer else self.place


def _specialization(trace: Callable[[], Any], network: nn.Module) -> _Place:
    """Trace once more, and listen to what torch logs about sizes."""
    log, witness = logging.getLogger("torch.fx.experimental.symbolic_shapes"), _Witness(network)
    level, handlers, log.handlers = log.level, log.handlers, [witness]
    log.setLevel(logging.INFO)
    try:
        with torch.no_grad(), redirect_stderr(io.StringIO()), suppress(Exception):  # the same one as before
            trace()
    finally:
        log.setLevel(level)
        log.handlers = handlers
    return witness.place
