"""The layer that a failing export comes from."""

import linecache
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import fx, nn


@dataclass(frozen=True)
class _Place:
    """Where something went wrong; empty where unknown."""

    operator: str = ""
    layer: str = ""
    line: str = ""


def _blame(error: BaseException, network: nn.Module) -> _Place:
    """Find the operator and the layer in the frames that an error and its causes came through; the innermost ones count."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    places = [_place_in([(frame, number) for frame, number in _frames(part.__traceback__)], network) for part in chain]
    return next((place for place in reversed(places) if place.operator or place.layer), _Place())


def _frames(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _place_in(frames: Sequence[tuple[FrameType, int]], network: nn.Module) -> _Place:
    """Read frames, outermost first: the last module of the network that runs, what it called, or the last node of a graph."""
    names = {id(module): name for name, module in network.named_modules()}
    operator = layer = line = ""
    for frame, number in frames:
        values, names_of_locals = frame.f_locals, frame.f_code.co_varnames
        owner = values.get(names_of_locals[0]) if names_of_locals else None
        node, called = values.get("node", values.get("n")), values.get("func")
        if isinstance(owner, nn.Module) and id(owner) in names:
            layer, operator = names[id(owner)] or type(owner).__name__, ""
            if frame.f_code.co_name == "forward":
                source = linecache.getline(frame.f_code.co_filename, number).strip()
                line = f" at `{source}` ({Path(frame.f_code.co_filename).name}:{number})" if source else ""
        elif isinstance(node, fx.Node) and node.op == "call_function":
            operator, layer, line = _operator_name(node.target), layer_of(node), ""
        elif callable(called) and not operator and layer:
            operator = _operator_name(called) if isinstance(called, torch._ops.OpOverload) else getattr(called, "__qualname__", "")
    return _Place(operator, layer, line)


def _operator_name(target: Any) -> str:
    found = re.search(r"\w+\.\w+(\.\w+)?", str(target))  # ExecuTorch's operators write their whole schema
    return found[0] if found else str(target)


def layer_of(node: fx.Node) -> str:
    """Return the name of the layer that a node of an exported graph belongs to; empty where unknown."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path, kind = map(str, stack[-1]) if stack else ("", "")
    if path.startswith("_"):
        return ""
    return kind.rpartition(".")[2] if path in ("", "model") else path.removeprefix("model.")


def _root(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root(error.__cause__)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
