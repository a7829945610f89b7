"""The two files of a saved model: writing, reading and verifying them."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spectrim.errors import FormatError

FORMAT = 1


WEIGHTS = "model.safetensors"


PLAN = "spectrim.json"


def write(folder: Path, plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files of a model under temporary names and rename them.

    Args:
        folder: made if missing.
        plan: plain data for JSON; the digest of the tensors is added.
        tensors: contiguous, on the CPU, none of them sharing memory.
    """
    plan = {**plan, "format": FORMAT, "tensors": _digest_tensors(tensors)}
    text = _text(plan)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (*folder.glob(f"{WEIGHTS}.*.tmp"), *folder.glob(f"{PLAN}.*.tmp")):
        leftover.unlink(missing_ok=True)
    mark = f".{os.getpid()}.tmp"
    weights, listing = folder / (WEIGHTS + mark), folder / (PLAN + mark)
    try:
        save_file(dict(tensors), weights, metadata={"format": "pt", "spectrim": text, "digest": _digest(text)})
        _sync(weights)
        listing.write_text(_text({**plan, "digest": _digest(text)}) + "\n", encoding="utf-8")
        _sync(listing)
        os.replace(weights, folder / WEIGHTS)
        os.replace(listing, folder / PLAN)
    finally:
        weights.unlink(missing_ok=True)
        listing.unlink(missing_ok=True)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and verify both files of a folder; nothing of it is trusted before its digest is checked."""
    if not folder.is_dir():
        raise FormatError(folder, "no such folder", hint="it is what save(model, folder) writes")
    listing, weights = folder / PLAN, folder / WEIGHTS
    for path in (listing, weights):
        if not path.is_file():
            raise FormatError(path, "is missing", hint="a saved model is model.safetensors and spectrim.json")
    try:
        text = listing.read_text(encoding="utf-8")
        beside = json.loads(text)
        digest = beside.pop("digest")
        intact = digest == _digest(_text(beside)) and text == _text({**beside, "digest": digest}) + "\n"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FormatError(listing, f"is truncated or not a plan of spectrim ({error!r})") from error
    if not intact:
        raise FormatError(listing, "was altered: its digest does not match", hint="save the model again")
    try:
        with safe_open(weights, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FormatError(weights, f"is truncated or not a safetensors file ({error})") from error
    if set(header) != {"format", "spectrim", "digest"} or header["format"] != "pt" or header["digest"] != _digest(header["spectrim"]):
        raise FormatError(weights, "was not written by spectrim, or its header was altered")
    plan: dict[str, Any] = json.loads(header["spectrim"])
    if plan.get("format") != FORMAT:
        raise FormatError(weights, f"has format {plan.get('format')}, this version reads {FORMAT}", hint="install a newer spectrim")
    if plan["tensors"] != _digest_tensors(tensors):
        raise FormatError(weights, "was altered: the digest of its tensors does not match", hint="save the model again")
    return plan, tensors


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state as separate contiguous tensors on the CPU, and for tied ones ``{name: the name it is stored under}``."""
    kept: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for key, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise FormatError(key, f"is a {type(tensor).__name__}, not a tensor", hint="safetensors files hold tensors only")
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in kept:
            aliases[key] = kept[place]
        else:
            kept[place] = key
            tensors[key] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases


def _text(plan: Mapping[str, Any]) -> str:
    return json.dumps(plan, indent=1, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return total.hexdigest()


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
