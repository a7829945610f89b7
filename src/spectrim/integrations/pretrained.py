"""Low-rank models of `transformers` as folders: `save_pretrained`, `from_pretrained`, `push_to_hub`.

The weights and the plan lie in a subfolder, `INSIDE`. Plain ``AutoModel.from_pretrained`` therefore
reports missing weights. Next to the config it would treat them as incomplete weights of the original and initialize the rest at random.
"""

import copy
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import FormatError, LayerError
from spectrim.files import make_folder, sweep, temporary_beside
from spectrim.forms.form import Form
from spectrim.integrations.card import model_card
from spectrim.layers import factors_in
from spectrim.locks import locked, writing_to
from spectrim.metrics.measurement import Measurement
from spectrim.pipeline.compressed import Compressed
from spectrim.storage.folder import PLAN, WEIGHTS, place
from spectrim.storage.save import load, plan_of, save
from spectrim.surgery.select import ADAPTED, is_adapted

try:
    import huggingface_hub
    import transformers
except ImportError as error:  # pragma: no cover
    raise ImportError("spectrim.integrations.pretrained needs transformers: pip install transformers, or install the extra 'hf'") from error

INSIDE = "spectrim"
"""Within the folder: what `spectrim.save` writes. Also the key of the config under which dtypes that deviate are kept, and the name under
which transformers knows merged networks, see `spectrim.integrations.quantizer`."""

CARD = "README.md"
FOREIGN = ("model*.safetensors", "pytorch_model*.bin", "*.index.json")
"""Weights that transformers would load."""


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    base_model: str | None = None,
    report: Compressed | Mapping[str, Measurement] | None = None,
) -> Path:
    """Write a factorized or merged model of `transformers`: config, weights, plan and a model card, in one folder that can be uploaded.

    All is written to a temporary folder beside, which is renamed. Into a folder that exists the files are moved one by one, each whole,
    weights and plan last; other files there stay, an earlier card does not.

    Args:
        model: of `transformers`, factorized or merged; it is left untouched.
        folder: made if missing.
        tokenizer: a tokenizer or processor, saved beside.
        base_model: name on the Hub of the model that was compressed, for the card.
        report: what `compress` returned, or measurements by name, the dense one first: costs before and after, for the card.

    Returns:
        The folder.

    Raises:
        LayerError: for a model without a config of transformers, a quantized one, or one that holds adapters of peft.
        FormatError: when the folder holds weights that transformers would load in place of these.
    """
    _check(model)
    folder = Path(folder).resolve()
    foreign = sorted(path.name for pattern in FOREIGN for path in folder.glob(pattern))
    if foreign:
        raise FormatError(
            folder, f"holds weights that transformers would load in place of these: {foreign[0]}", hint="choose another folder"
        )
    make_folder(folder.parent)
    with locked(folder, wait=60.0):
        sweep(folder.parent)
        with temporary_beside(folder, folder=True) as temporary, writing_to(folder):
            _config_for(model).save_pretrained(temporary)
            generation: Any = getattr(model, "generation_config", None)
            for part in (generation, tokenizer):
                if part is not None:
                    part.save_pretrained(temporary)
            card = model_card(model, folder.name, base_model, report, own_class=_class_of(type(model).__name__) is not type(model))
            (temporary / CARD).write_text(card, encoding="utf-8")
            save(model, temporary / INSIDE)
            _move(temporary, folder)
    return folder


def from_pretrained(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> nn.Module:
    """Return a model that `save_pretrained` wrote, in eval mode: its class of `transformers` is built from the config, the plan replayed.

    No code of the folder is run. The model is built on the CPU, with random weights that the stored ones replace.

    Args:
        folder: a folder, or, where there is none of that name, a repository on the Hub, which is downloaded.
        model: the dense original in the dtype that was saved, for a class that is not in transformers; its weights do not matter.
        dtype: to cast weights to; as saved when omitted. Buffers that are not saved, such as rotary frequencies, keep theirs.
        device: to move to; the CPU, or that of `model`, when omitted.
        revision: branch, tag or commit on the Hub.
        token: for the Hub.
        cache_dir: where downloads go.

    Raises:
        FormatError: for a folder without a plan, a damaged file, a class that is not in transformers, or a failed download.
    """
    path = Path(folder)
    if not path.is_dir():
        path = _download(str(folder), revision, token, cache_dir)
    _check_folder(path)
    built = load(path / INSIDE, _original(path) if model is None else model).eval()
    whole: Any = built
    if (path / "generation_config.json").is_file() and hasattr(built, "generation_config"):
        whole.generation_config = transformers.GenerationConfig.from_pretrained(path)
    if dtype is not None:
        _cast(_stored(built), dtype)
        whole.config.dtype = dtype
    return built if device is None else built.to(device)


def push_to_hub(model: nn.Module, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **contents: Any) -> str:
    """Write a model with `save_pretrained` and upload it; return the address of the commit.

    Args:
        model: as for `save_pretrained`.
        repo_id: ``user/name``; made if missing.
        private: whether a new repository is private.
        token: for the Hub.
        contents: further arguments of `save_pretrained`.
    """
    hub = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as parent:
        folder = save_pretrained(model, Path(parent) / repo_id.rpartition("/")[2], **contents)
        hub.create_repo(repo_id, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repo_id, folder_path=folder))


def _check(model: nn.Module) -> None:
    """Raise unless the model is one that this module can write."""
    owner, config = type(model).__name__, getattr(model, "config", None)
    adapted = next((name for name, module in model.named_modules() if is_adapted(module)), None)
    if adapted is not None or hasattr(model, "peft_config"):
        raise LayerError(adapted or owner, ADAPTED)
    if not isinstance(config, transformers.PretrainedConfig):
        hint = "spectrim.save(model, folder) and spectrim.load(folder, model) take any model"
        raise LayerError(owner, "is no model of transformers: it has no config", hint=hint)
    methods = [getattr(config, "quantization_config", None), getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)]
    if any(method is not None and getattr(method, "quant_method", None) != INSIDE for method in methods):
        raise LayerError(owner, "is quantized", hint="compress the model before it is quantized")


def _config_for(model: Any) -> Any:
    """Return a copy of the config that says which class to build and in which dtype."""
    config = copy.deepcopy(model.config)
    sizes: Counter[torch.dtype] = Counter()
    dtypes: dict[str, torch.dtype] = {}
    for name, dtype, size in _dtypes(model):
        sizes[dtype] += size
        dtypes[name] = dtype
    config.dtype = sizes.most_common(1)[0][0]
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the plan is in the folder inside
    other = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items() if dtype != config.dtype}
    setattr(config, INSIDE, {"version": version("spectrim"), "dtypes": other})
    return config


def _dtypes(model: nn.Module) -> Iterator[tuple[str, torch.dtype, int]]:
    """Yield name, dtype and size of each floating-point tensor of the dense original; of what `merge` replaced, of the module."""
    merged, inside = plan_of(model)["merged"], set[int]()
    for name, module in model.named_modules():
        if name in merged:
            inside.update(id(part) for part in module.modules())
            yield name, next(module.parameters()).dtype, sum(p.numel() for p in module.parameters())
        if id(module) in inside or isinstance(module, Form):
            continue
        own: Iterable[tuple[str, Any]] = [*_own_tensors(module), *factors_in(module)]
        for key, tensor in own:
            size = tensor.numel() if isinstance(tensor, Tensor) else sum(p.numel() for p in tensor.parameters())
            yield f"{name}.{key}".removeprefix("."), tensor.dtype, size


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the floating-point tensors that a module holds itself and that are saved."""
    left_out = module._non_persistent_buffers_set
    named = (*module.named_parameters(recurse=False), *((n, b) for n, b in module.named_buffers(recurse=False) if n not in left_out))
    return [(name, tensor) for name, tensor in named if tensor.is_floating_point()]


def _stored(model: nn.Module) -> Iterator[Tensor | Form]:
    """Yield every tensor with a dtype that is saved."""
    for module in model.modules():
        if isinstance(module, Form):
            yield module
        else:
            yield from (tensor for _, tensor in _own_tensors(module))


def _cast(parts: Iterable[Tensor | Form], dtype: torch.dtype) -> None:
    """Change dtypes in place; factors keep U, S and Vh in float32 at least."""
    for part in parts:
        if isinstance(part, Form):
            part.to(dtype)
        else:
            part.data = part.data.to(dtype)


def _move(source: Path, folder: Path) -> None:
    """Make `source` the folder; where that exists, move file by file, weights and plan last."""
    if not folder.exists():
        os.rename(source, folder)
        return
    for path in [path for path in source.rglob("*") if path.is_file() and path.parent.name != INSIDE]:
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    make_folder(folder / INSIDE)
    place(source / INSIDE / WEIGHTS, source / INSIDE / PLAN, folder / INSIDE)


def _download(name: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None) -> Path:
    wanted = ["config.json", "generation_config.json", f"{INSIDE}/*"]
    try:
        place = huggingface_hub.snapshot_download(name, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        raise FormatError(name, f"is no folder here, and the Hub has none ({type(error).__name__}: {error})") from error
    return Path(place)


def _check_folder(folder: Path) -> None:
    """Raise with what to call instead, where this is no folder of `save_pretrained`."""
    if (folder / INSIDE / PLAN).is_file():
        return
    if (folder / PLAN).is_file():
        raise FormatError(folder, "is what spectrim.save wrote", hint="call spectrim.load(folder, model) with the dense original")
    if any(path for pattern in FOREIGN for path in folder.glob(pattern)):
        raise FormatError(folder, "holds plain weights and no plan of spectrim", hint="call from_pretrained of transformers itself")
    raise FormatError(
        folder / INSIDE / PLAN,
        "is missing",
        hint="a folder is what save_pretrained(model, folder) writes; a dense repository is read by transformers",
    )


def _original(folder: Path) -> nn.Module:
    """Build the dense original from the config, in the dtypes that were saved."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        name = config.architectures[0]
        dtypes = getattr(config, INSIDE)["dtypes"]
        delattr(config, INSIDE)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        hint = "for a custom model pass model=, the dense original; else save it again"
        raise FormatError(folder / "config.json", f"gives no model of transformers ({error})", hint=hint) from error
    kind: Any = _class_of(name)
    if kind is None:
        raise FormatError(folder / "config.json", f"names {name}, which is not in transformers", hint="pass model=, the dense original")
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = kind._from_config(config)
    modules = dict(model.named_modules())
    for key, dtype in dtypes.items():
        owner, _, leaf = key.rpartition(".")
        part = getattr(modules.get(owner), leaf, None)
        if part is None:
            raise FormatError(folder / "config.json", f"names '{key}', which {name} does not have", hint="save the model again")
        _cast(_stored(part) if isinstance(part, nn.Module) else [part], getattr(torch, dtype))
    return model


def _class_of(name: str) -> type[nn.Module] | None:
    """Return a class of transformers by its name."""
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None
