"""`pack` and `unpack`: a network as one coded file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.errors import FormatError, SettingError
from spectrim.files import make_folder, whole_file
from spectrim.layers.sharded import refuse_shards
from spectrim.metrics.table import Summarized
from spectrim.storage.coded.container import Content, coded_file, read_file
from spectrim.storage.folder import check_sizes, read, tensors_of
from spectrim.storage.save import plan_of, rebuilt

SUFFIX = ".spz"

NOTHING: dict[str, Any] = {"factorized": {}, "ranks": {}, "merged": {}, "aliases": {}}
"""Keys of a plan that are left out of a file where they are empty."""


@dataclass(frozen=True)
class Packed(Summarized):
    """What a coded file takes.

    Attributes:
        coded_bytes: of the file itself: everything.
        data_bytes: of the values of symbols, by their code lengths.
        index_bytes: of the positions of zeros, likewise.
        size_bytes: of the tensors, not coded.
        tensors: ``(data, index)`` of each tensor, by name.
        path: the file; None where none was written.
    """

    coded_bytes: int
    data_bytes: int
    index_bytes: int
    size_bytes: int
    tensors: Mapping[str, tuple[float, float]]
    path: Path | None = None

    @property
    def compression(self) -> float:
        """How many times smaller the file is than the tensors."""
        return self.size_bytes / self.coded_bytes

    def summary(self) -> str:
        """Return the bytes as text, with the tensors that take most of them."""
        most = sorted(self.tensors.items(), key=lambda item: -sum(item[1]))[:5]
        lines = [
            f"{self.size_bytes:,} bytes as tensors, {self.coded_bytes:,} as a file: {self.compression:.2f} times smaller",
            f"values {self.data_bytes:,}, positions of zeros {self.index_bytes:,}, header, tables and scales "
            f"{self.coded_bytes - self.data_bytes - self.index_bytes:,}",
        ]
        if most:
            lines.append("most in " + ", ".join(f"{name} {sum(sizes):,.0f}" for name, sizes in most))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        names = ("coded_bytes", "data_bytes", "index_bytes", "size_bytes", "compression")
        tensors = {name: [round(part, 1) for part in sizes] for name, sizes in self.tensors.items()}
        return {name: getattr(self, name) for name in names} | {"path": str(self.path or ""), "tensors": tensors}


def pack(model: nn.Module | Mapping[str, Tensor] | str | Path, path: str | Path) -> Packed:
    """Write a network, or any tensors, as one coded file.

    Tensors on levels (multiples of a step, one for each row, or of few values) are stored as integers in an entropy code; zeros
    by their gaps or in the code, whichever is smaller. Any other tensor is stored exactly, too: numbers without levels shrink by about a
    tenth. The file holds no code, and decodes without the model's class.

    Args:
        model: factorized, merged, quantized or dense; or tensors by name, such as a state dict; or a folder that `save` wrote.
        path: of the file, by custom ``.spz``; its folder is made if missing.

    Returns:
        The three sizes: the file, the values, the positions of zeros.

    Raises:
        SettingError: for an argument that is none of these, or a dtype that no file holds.
        FormatError: for a folder that `save` did not write.
        WriteError: the file cannot be written; the one that was there before is left as it was.

    Examples:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "model.spz"
        >>> packed = pack({"weight": torch.randint(-3, 4, (64, 64)) * 0.25}, path)
        >>> packed.coded_bytes < 1700, packed.size_bytes
        (True, 16384)
        >>> unpack(path)["weight"].shape
        torch.Size([64, 64])

    Source: entropy coding of weights: Han et al., arXiv 1510.00149; Wiedemann et al., arXiv 1907.11900.
    Deviation: tables are static, and scales of rows, columns and taps are sent beside them, so that decoding is a few vector operations.
    """
    check("pack", path=path)
    made, packed = coded(model)
    path = Path(path)
    make_folder(path.parent)
    with whole_file(path) as temporary:
        temporary.write_bytes(made)
    return Packed(**{**vars(packed), "path": path})


def coded(model: nn.Module | Mapping[str, Tensor] | str | Path) -> tuple[bytes, Packed]:
    """Return the bytes that `pack` writes, and their sizes.

    Args:
        model: as for `pack`.
    """
    tensors, plan = _content(model)
    made, sizes = coded_file(tensors, plan)
    data, index = (sum(getattr(size, name) for size in sizes.values()) for name in ("data", "index"))
    held = sum(tensor.nbytes for tensor in tensors.values())
    return made, Packed(len(made), round(data), round(index), held, {name: (size.data, size.index) for name, size in sizes.items()})


def _content(model: nn.Module | Mapping[str, Tensor] | str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors to store, and the header's other entries."""
    if isinstance(model, str | Path):
        plan, tensors = read(Path(model))
        return tensors, _short(plan)
    if isinstance(model, nn.Module):
        model = unwrapped(model)
        refuse_shards(model, "pack")
        tensors, aliases = tensors_of(model)
        return tensors, _short(plan_of(model) | {"aliases": aliases})
    if not isinstance(model, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in model.items()):
        raise SettingError("pack", "model", got=type(model), rule="a module, tensors by name, or a folder")
    tensors, aliases = tensors_of(model)
    return tensors, _short({"aliases": aliases}) if aliases else {}


def _short(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header's entry of a plan without what is empty or not needed."""
    return {"plan": {key: value for key, value in plan.items() if value and key not in ("versions", "format", "tensors", "eval")}}


@outside_inference_mode
def unpack(path: str | Path, model: nn.Module | None = None) -> Any:
    """Return what `pack` wrote, bit for bit: the tensors by name, or a network.

    Args:
        path: of the file.
        model: the original architecture, dense; its weights do not matter, and it is left untouched. None for plain tensors.

    Returns:
        A dict of tensors, or a copy of `model` with the layers and weights that were packed, in eval mode.

    Raises:
        FormatError: for a missing, truncated, altered or foreign file, or for another architecture.
    """
    check("unpack", path=path)
    path = Path(path)
    content = read_file(path)
    plan = _plan(content, path)
    if model is None:
        return _with_aliases(content.tensors, plan)
    check("unpack", model=model)
    return rebuilt(unwrapped(model), plan, content.tensors, path).eval()


def _plan(content: Content, path: Path) -> dict[str, Any]:
    """Return the plan of a file, all of its keys there; a FormatError for one that its tensors do not fit."""
    plan = content.header.get("plan")
    if plan is not None and not isinstance(plan, dict):
        raise FormatError(path, "is not a coded file of spectrim: its plan is no mapping", hint="do not use this file")
    plan = NOTHING | {"model": "model"} | (plan or {})
    check_sizes(plan, content.tensors, path)
    return plan


def _with_aliases(tensors: Mapping[str, Tensor], plan: Mapping[str, Any], copies: bool = False) -> dict[str, Tensor]:
    """Return tensors by every name that they had, tied ones as one tensor or as copies."""
    again = {alias: tensors[kept] for alias, kept in plan["aliases"].items()}
    return {**tensors, **{name: tensor.clone() if copies else tensor for name, tensor in again.items()}}


def packed_sizes(path: str | Path) -> Packed:
    """Return the sizes of a coded file, without those of each tensor.

    Args:
        path: of the file.

    Raises:
        FormatError: for a missing, truncated, altered or foreign file.
    """
    content = read_file(Path(path))
    return Packed(content.size, *content.totals, sum(tensor.nbytes for tensor in content.tensors.values()), {}, Path(path))


def unpack_file(path: str | Path, out: str | Path) -> Packed:
    """Write the tensors of a coded file as safetensors, tied ones once for each name.

    Args:
        path: of the coded file.
        out: of the file to write; its folder is made if missing.

    Returns:
        The sizes of the coded file, without those of each tensor.

    Raises:
        FormatError: for a missing, truncated, altered or foreign file.
        WriteError: the file cannot be written.
    """
    content, out = read_file(Path(path)), Path(out)
    make_folder(out.parent)
    with whole_file(out) as temporary:
        tensors = _with_aliases(content.tensors, _plan(content, Path(path)), copies=True)
        temporary.write_bytes(to_safetensors(tensors, metadata={"format": "pt"}))
    return Packed(content.size, *content.totals, sum(tensor.nbytes for tensor in content.tensors.values()), {}, Path(path))
