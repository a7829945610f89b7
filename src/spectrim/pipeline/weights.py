"""The weights of a trained network, from the file that its user has."""

import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spectrim.errors import FormatError, RecipeError
from spectrim.training.statefile import read_state

NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep a state dict inside a checkpoint."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What `DataParallel`, `torch.compile` and Lightning put before every name."""


def fill_(model: nn.Module, path: str | Path) -> None:
    """Load a state dict into a dense network, strictly by name and shape, in place.

    Args:
        model: of the class that the weights are of.
        path: ``.safetensors``, or what ``torch.save(model.state_dict(), path)`` wrote, alone or inside a checkpoint under ``state_dict``,
            ``model_state_dict`` or ``model``; prefixes of wrappers are taken off.

    Raises:
        RecipeError: when the file is missing, damaged, cannot be read without running code, or holds other names, shapes or kinds of
            numbers, or parameters that are not finite.
    """
    state = _state(Path(path))
    own = model.state_dict()
    while prefix := next((prefix for prefix in PREFIXES if _all_begin(state, prefix) and not _all_begin(own, prefix)), ""):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    tied = _tied(own)
    state |= {name: state[twin] for name in own if name not in state for twin in tied.get(own[name].data_ptr(), ()) if twin in state}
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    other = [
        f"{name} {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    found = [f"{what} {_few(names)}" for what, names in (("lacks", missing), ("has the unknown", unknown), ("has", other)) if names]
    if found:
        raise RecipeError("weights", f"{path} {' and '.join(found)}", allowed=f"the state dict of {type(model).__name__}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in state.items():
        if _kind(value.dtype) != _kind(own[name].dtype):
            allowed = f"numbers that {own[name].dtype} can hold; dequantize the network first"
            raise RecipeError("weights", f"{path} holds {name} in {value.dtype}", allowed=allowed)
        if name in parameters and not torch.isfinite(value.to(own[name].dtype)).all():
            raise RecipeError("weights", f"{path} holds values in {name} that are not finite", allowed="an undamaged file")
    model.load_state_dict(state)


def _kind(dtype: torch.dtype) -> str:
    """Return which numbers a dtype has; 8-bit floating-point numbers have a scale elsewhere."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return "real"
    return "complex" if dtype.is_complex else "integers"


def _state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name."""
    if not path.is_file():
        raise RecipeError("weights", f"no such file: {path}", allowed="a .safetensors file, or a .pt file with a state dict")
    hint = "a .safetensors file, or torch.save(model.state_dict(), path); a pickled module would run code"
    try:
        if path.suffix == ".safetensors":
            held: Any = load_file(path)
        else:  # what torch.save wrote before 1.6 is no archive and has no checksums
            held = read_state(path, "") if zipfile.is_zipfile(path) else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, FormatError) else error
        told = f"{type(cause).__name__}{f': {cause}' if isinstance(cause, zipfile.BadZipFile) else ''}"
        raise RecipeError("weights", f"{path} cannot be read ({told})", allowed=hint) from error
    for name in NESTED:
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
    if not isinstance(held, Mapping) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise RecipeError("weights", f"{path} holds a {type(held).__name__}, no state dict", allowed=hint)
    for name, value in held.items():
        if not isinstance(name, str) or value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise RecipeError("weights", f"{path} holds {name!r}, a sparse, quantized or empty tensor", allowed="dense tensors by name")
    return dict(held)


def _tied(state: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """Return the names that share one tensor, by its place in memory; safetensors stores it once."""
    names: dict[int, list[str]] = {}
    for name, value in state.items():
        names.setdefault(value.data_ptr(), []).append(name)
    return {place: shared for place, shared in names.items() if len(shared) > 1}


def _all_begin(names: Collection[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
