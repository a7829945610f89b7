"""The two files of a saved model: writing, reading and verifying them."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spectrim.errors import FormatError
from spectrim.files import JSON_LIMIT, check_room, make_folder, put, read_json, sweep, target_of, temporary_beside, write_text
from spectrim.locks import locked, writing_to

FORMAT = 1


WEIGHTS = "model.safetensors"


PLAN = "spectrim.json"


SAVING = "saving.json"
"""Says, while both files are replaced, which weights belong to the listing that still stands there."""


def write(folder: Path, plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files of a model under temporary names and rename them; other writers of the folder wait.

    Args:
        folder: made if missing.
        plan: plain data for JSON; the digest of the tensors is added.
        tensors: contiguous, on the CPU, none of them sharing memory.

    Raises:
        WriteError: they cannot be written; the folder is unchanged then.
    """
    plan = {**plan, "format": FORMAT, "tensors": _digest_tensors(tensors)}
    text = _text(plan)
    weights, listing = folder / WEIGHTS, folder / PLAN
    make_folder(folder)
    with locked(folder, wait=60.0):
        sweep(folder)
        check_room(folder, sum(tensor.nbytes for tensor in tensors.values()) + 3 * len(text))
        with temporary_beside(weights, folder=True) as made:  # a folder, as safetensors renames its own temporary file
            with writing_to(weights):
                save_file(dict(tensors), made / WEIGHTS, metadata={"format": "pt", "spectrim": text, "digest": _digest(text)})
            with writing_to(listing):
                (made / PLAN).write_text(_text({**plan, "digest": _digest(text)}) + "\n", encoding="utf-8")
            place(made / WEIGHTS, made / PLAN, folder)


def place(weights: Path, listing: Path, folder: Path) -> None:
    """Give both files of a model their places in a folder, so that a reader finds the old model or the new one at any moment.

    The weights hold the plan, too. Between the two renames a note says that they belong beside the listing of the old model.

    Args:
        weights: a whole file, which is moved.
        listing: as `weights`.
        folder: that exists, and may hold a model.

    Raises:
        WriteError: a file cannot be moved.
    """
    with locked(folder, wait=60.0), writing_to(folder):
        _finish(folder)
        try:
            if (old := _listed(folder)) is not None:
                write_text(folder / SAVING, json.dumps({"listing": old, "weights": _held(weights)}))
            put(weights, target_of(folder / WEIGHTS))
            put(listing, target_of(folder / PLAN))
        finally:
            _finish(folder)


def _finish(folder: Path) -> None:
    """Write the listing that a stopped `place` did not come to, from the plan that the weights hold, and remove its note."""
    if not (folder / SAVING).is_file():
        return
    held, listed = _held(folder / WEIGHTS), _listed(folder)
    if held != listed and _note(folder) == {"listing": listed, "weights": held}:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            plan = json.loads(file.metadata()["spectrim"])
        write_text(folder / PLAN, _text({**plan, "digest": held}) + "\n")
    (folder / SAVING).unlink(missing_ok=True)


def _held(weights: Path) -> str | None:
    """Return the digest of the plan in a file of weights; None where there is none."""
    try:
        with safe_open(weights, framework="pt") as file:
            return (file.metadata() or {}).get("digest")
    except (SafetensorError, OSError, RuntimeError):
        return None


def _listed(folder: Path) -> str | None:
    """Return the digest of the plan beside the weights; None where there is none."""
    try:
        found = read_json(folder / PLAN).get("digest")
    except FormatError:
        return None
    return found if isinstance(found, str) else None


def _note(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / SAVING)
    except FormatError:
        return {}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and verify both files of a folder; nothing of it is trusted before its digest is checked.

    Raises:
        FormatError: a file is missing, truncated, altered or foreign, or the two are of different models.
    """
    if not folder.is_dir():
        raise FormatError(folder, "no such folder", hint="it is what save(model, folder) writes")
    for path in (folder / PLAN, folder / WEIGHTS):
        if not path.is_file():
            raise FormatError(path, "is missing", hint="a saved model is model.safetensors and spectrim.json")
    for _ in range(3):  # another process may replace the files between the two reads
        listed, note = _read_listing(folder / PLAN), _note(folder)
        digest, plan, tensors = _read_weights(folder / WEIGHTS)
        if digest == listed or note == {"listing": listed, "weights": digest}:
            check_sizes(plan, tensors, folder / PLAN)
            return plan, tensors
        if _listed(folder) == listed and _note(folder) == note:
            break
    raise FormatError(folder / PLAN, f"is the plan of another model than {WEIGHTS} beside it", hint="copy both files of one model")


def _read_listing(path: Path) -> str:
    """Return the digest of the plan in a listing that is intact."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise FormatError(path, "is too large for a plan")
        text = path.read_text(encoding="utf-8")
        beside = json.loads(text)
        digest: str = beside.pop("digest")
        intact = digest == _digest(_text(beside)) and text == _text({**beside, "digest": digest}) + "\n"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FormatError(path, f"is truncated or not a plan of spectrim ({error!r})") from error
    if not intact:
        raise FormatError(path, "was altered: its digest does not match", hint="save the model again")
    return digest


def _read_weights(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return digest, plan and tensors of a file of weights that is intact."""
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FormatError(path, f"is truncated or not a safetensors file ({error})") from error
    if set(header) != {"format", "spectrim", "digest"} or header["format"] != "pt" or header["digest"] != _digest(header["spectrim"]):
        raise FormatError(path, "was not written by spectrim, or its header was altered")
    try:
        plan = json.loads(header["spectrim"])
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"holds no plan of spectrim ({type(error).__name__})", hint="do not use this file") from error
    if not isinstance(plan, dict):
        raise FormatError(path, f"holds no plan of spectrim, but a {type(plan).__name__}", hint="do not use this file")
    if plan.get("format") != FORMAT:
        raise FormatError(path, f"has format {plan.get('format')}, this version reads {FORMAT}", hint="install a newer spectrim")
    if plan.get("tensors") != _digest_tensors(tensors):
        raise FormatError(path, "was altered: the digest of its tensors does not match", hint="save the model again")
    return header["digest"], plan, tensors


def _check_header(path: Path) -> None:
    """Compare the length that a safetensors file says its header has with the file's."""
    with open(path, "rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
    if size < 8 or length > size - 8:
        raise FormatError(path, f"is truncated or not a safetensors file (a header of {length:,} bytes in a file of {size:,})")


SIZES = (
    *("in_features", "out_features", "in_channels", "out_channels", "num_embeddings", "embedding_dim", "input_size", "hidden_size"),
    *("proj_size", "num_layers", "embed_dim", "num_heads", "kdim", "vdim", "kernel_size", "groups"),
)
"""What a plan says of a layer that memory or time grows with."""


def check_sizes(plan: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Compare the sizes in a plan with the tensors stored for them, before anything is built.

    Args:
        plan: of the file.
        tensors: of the file.
        path: what an error names.

    Raises:
        FormatError: a layer is described as larger than the tensors that are stored for it.
    """
    try:
        aliases = plan["aliases"]
        stored = {name: tensor.numel() for name, tensor in tensors.items()} | {a: tensors[kept].numel() for a, kept in aliases.items()}
        for name, description in plan["merged"].items():
            prefix = f"{name}." if name else ""
            held = sum(count for key, count in stored.items() if key.startswith(prefix))
            if len(description) > held or any(size > held for entry in description for size in _sizes(entry)):
                problem = f"describes layer '{name}' as larger than what is stored for it ({held:,} numbers)"
                raise FormatError(path, problem, hint="do not use this file")
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(path, f"is not a plan of spectrim ({error!r})") from error


def _sizes(entry: Mapping[str, Any]) -> Iterator[int]:
    """Yield the sizes in the description of a layer, those of its weights included."""
    for name in SIZES:
        values = entry.get(name) or 0
        yield from values if isinstance(values, list) else [values]
    for shapes in entry.get("given", {}).values():
        yield sum(math.prod(shape) for shape in shapes)
    rows = next((entry[name] for name in ("out_features", "out_channels", "num_embeddings") if name in entry), 0)
    columns = next((entry[name] for name in ("in_features", "in_channels", "embedding_dim") if name in entry), 0)
    taps = entry.get("kernel_size", [1])
    parts = 4 if str(entry.get("kind")) in ("QLinear", "QConv1d", "QConv2d", "QConv3d") else 1  # a quaternion is four features
    yield rows * columns * math.prod(taps if isinstance(taps, list) else [taps]) // max(parts, entry.get("groups", 1))


def tensors_of(model: nn.Module | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state as separate contiguous tensors on the CPU, and for tied ones ``{name: the name it is stored under}``."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    kept: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise FormatError(key, f"is a {type(tensor).__name__}, not a tensor", hint="safetensors files hold tensors only")
        if tensor.is_meta or tensor.layout is not torch.strided:
            kind = "on the meta device, without numbers" if tensor.is_meta else f"a sparse tensor ({tensor.layout})"
            raise FormatError(key, f"is {kind}", hint="give it its numbers first" if tensor.is_meta else "call to_dense() first")
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
