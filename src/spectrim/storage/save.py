"""`save` and `load`: tensors in safetensors, the plan beside them in JSON, never a pickle."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.checks import check, unwrapped
from spectrim.errors import FormatError
from spectrim.forms.svd import Factors
from spectrim.layers import FactorizedLayer, kind_of, named_factors
from spectrim.layers.attention import become_attention
from spectrim.layers.base import become, renew
from spectrim.layers.geometry import CHANNELS_LAST, memory_format_of
from spectrim.layers.sharded import refuse_shards
from spectrim.plain.attention import PlainAttention
from spectrim.plain.chain import PlainPair
from spectrim.plain.encoder import follow_layers
from spectrim.plain.recurrent import PlainRecurrent
from spectrim.storage.folder import FORMAT, PLAN, read, tensors_of, write
from spectrim.surgery.batchnorm import NORMS
from spectrim.surgery.exchange import replace
from spectrim.surgery.factorize import build

CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


RECURRENT = ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")


ATTENTION = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")


SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq"),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), CONVOLUTION),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), (*CONVOLUTION, "output_padding")),
}
"""The constructor arguments of the layers that `merge` writes."""


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write a factorized or merged model: ``model.safetensors`` (tensors, and the plan in its header) and ``spectrim.json`` (the plan).

    Both files are written under temporary names and renamed: a folder holds the old model or the new one, whole. Temporary files that a
    killed `save` left behind are removed; only one process at a time may save to a folder.

    Args:
        model: factorized, merged or dense.
        folder: made if missing.

    Returns:
        The folder.

    Raises:
        FormatError: when the model's state holds something that is not a tensor.
        LayerError: for a model that FSDP2 shards.
    """
    check("save", model=model, folder=folder)
    model = unwrapped(model)
    refuse_shards(model, "save")
    folder = Path(folder)
    tensors, aliases = tensors_of(model)
    write(folder, plan_of(model) | {"aliases": aliases}, tensors)
    return folder


def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """Return a copy of `model` rebuilt by the plan in `folder`, with the weights stored there.

    Args:
        folder: what `save` wrote.
        model: the original architecture, dense; its weights do not matter. It is left untouched.

    Returns:
        The factorized (or merged) model, on the device of `model`; parameters that were frozen are frozen again.

    Raises:
        FormatError: for a missing, truncated, altered or foreign file, or for another architecture; nothing is changed then.
    """
    check("load", folder=folder, model=model)
    model = unwrapped(model)
    plan, tensors = read(Path(folder))
    path = Path(folder) / PLAN
    try:
        built, made = _rebuild(model, plan, path)
    except FormatError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise FormatError(path, f"its plan does not fit the model ({error!r})", hint=_hint(plan)) from error
    state = {**tensors, **{alias: tensors[kept] for alias, kept in plan["aliases"].items()}}
    expected = built.state_dict()
    for key in sorted({*expected, *state}):
        if key not in state or key not in expected:
            whose = "the model" if key in expected else "the file"
            raise FormatError(path, f"is of another architecture: only {whose} has '{key}'", hint=_hint(plan))
        if state[key].shape != expected[key].shape or state[key].dtype != expected[key].dtype:
            came, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (state[key], expected[key]))
            problem = f"is of another architecture: '{key}' is {came} in the file, {wanted} in the model"
            raise FormatError(path, problem, hint=_hint(plan))
    _tie(built, plan, state, made, path)
    _materialize(built, state, path)
    built.load_state_dict(state)
    for name, parameter in built.named_parameters():
        if name in plan.get("channels_last", ()):
            parameter.data = parameter.data.contiguous(memory_format=CHANNELS_LAST[parameter.dim()])
    if "frozen" in plan:
        for name, parameter in built.named_parameters():
            parameter.requires_grad_(name not in plan["frozen"])
    return built


def plan_of(model: nn.Module) -> dict[str, Any]:
    """Return what it takes, beside the original architecture, to build this model again: plain data for JSON."""
    factorized, merged, inside = {}, {}, set[int]()
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            factorized[name] = {"kind": module.dense_kind.__name__, "scheme": module.scheme}
        elif id(module) not in inside and (description := _describe(module)):
            merged[name] = description
            inside.update(id(part) for part in module.modules())
    return {
        "format": FORMAT,
        "versions": {"spectrim": version("spectrim"), "torch": torch.__version__},
        "model": type(model).__name__,
        "factorized": factorized,
        "ranks": {name: factors.rank for name, factors in named_factors(model)},
        "merged": merged,
        "folded": _folded(model),
        "channels_last": [name for name, p in model.named_parameters() if memory_format_of(p) is not torch.contiguous_format],
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
    }


def _hint(plan: Mapping[str, Any]) -> str:
    return f"pass the dense {plan['model']} it was made from, in the same dtype"


def _rebuild(model: nn.Module, plan: Mapping[str, Any], path: Path) -> tuple[nn.Module, list[nn.Module]]:
    """Replay a plan on the original architecture; return the model, with any values in the new tensors, and what `merge` had written."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, entry in plan["factorized"].items():
        found = type(modules[name]).__name__ if name in modules else "nothing"
        if found == entry["kind"] and kind_of(modules[name]) is None:
            raise _unregistered(path, name, found)
        if found != entry["kind"] or kind_of(modules[name]) is None:
            raise FormatError(
                path, f"is of another architecture: layer '{name}' was a {entry['kind']}, the model has {found}", hint=_hint(plan)
            )

    def make(name: str, weight: Tensor, matrix: Tensor) -> Factors:
        rank = plan["ranks"].get(name)
        if rank is None or rank > min(matrix.shape[-2:]):
            problem = f"is of another architecture: '{name}' has rank {rank} in the file, {tuple(matrix.shape)} in the model"
            raise FormatError(path, problem, hint=_hint(plan))
        return Factors.empty(weight, matrix, rank)

    built = build(model, lambda name, module: plan["factorized"].get(name, {}).get("scheme"), make)
    targets = dict(built.named_modules())
    built = replace(built, _without_batchnorms(targets, plan.get("folded")))
    written = []
    for name, description in plan["merged"].items():
        target = targets.get(name)
        if target is None:
            raise FormatError(path, f"is of another architecture: the model has no layer '{name}'", hint=_hint(plan))
        kind = kind_of(target)
        if kind is None:
            if isinstance(target, PlainPair | PlainRecurrent | PlainAttention):  # the original has such a module itself
                continue
            raise _unregistered(path, name, type(target).__name__)
        wanted, own = _dense(description), _found(target, description)
        if plan.get("folded") and wanted.get("bias") and own.get("bias") is False:
            own["bias"] = True  # it came with a BatchNorm
        replayed = None if wanted == own else _replayed(target, description)
        if wanted != own and replayed is None:
            key = next(key for key in wanted if wanted[key] != own.get(key))
            problem = f"layer '{name}' had {key}={wanted[key]}, the model has {own.get(key)}"
            raise FormatError(path, f"is of another architecture: {problem}", hint=_hint(plan))
        weight = next(target.parameters())
        with torch.random.fork_rng(devices=[]):
            made = replayed if replayed is not None else _construct(description, conv1d=hasattr(target, "nx"))
        written.append(made.to(weight.device, weight.dtype))
        if isinstance(made, PlainAttention):
            become_attention(target, made)
        else:
            become(target, made, kind.base_of(type(target)))
    follow_layers(built)
    return built, written


def _materialize(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Give what is on the meta device and in the file storage on the CPU, in place; ties stay."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_meta:
            continue
        if name not in state:
            raise FormatError(path, f"does not hold '{name}', which is on the meta device", hint="pass a model with real tensors")
        empty = torch.empty_like(tensor, device="cpu")
        torch.utils.swap_tensors(tensor, nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty)  # type: ignore[no-untyped-call]


def _unregistered(path: Path, name: str, kind: str) -> FormatError:
    hint = "call spectrim.layers.register(kind, layer, *inputs) before loading"
    return FormatError(path, f"holds layer '{name}' in low-rank form, which was a {kind}: no kind of layer is registered for it", hint=hint)


def _replayed(target: Any, description: list[dict[str, Any]]) -> nn.Module | None:
    """Return what `merge` writes for a layer of a registered kind at the rank described, with zeros; None where that is something else."""
    last, kind = description[-1], kind_of(target)
    if kind is None or kind.weights(target) != ("weight",) or not ("in_features" in last or "in_channels" in last):
        return None
    rank = last["in_features"] if "in_features" in last else last["in_channels"] // last["groups"]
    for scheme in kind.schemes(target):
        matrix = kind.fold(target, "weight", target.weight.detach(), scheme)
        if rank <= min(matrix.shape[-2:]):
            factors = {"weight": Factors.empty(target.weight, matrix, rank)}
            made = kind.adopt(renew(target, type(target)), factors, scheme).split(lambda _, part, tensor: nn.Parameter(tensor), ("weight",))
            if made is not None and _describe(made) == description:
                return made
    return None


def _dense(description: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings of the dense layer that `merge` must have had before it, to write what is described."""
    first, last = description[0], description[-1]
    kind = _kind(description)
    if kind == "PlainAttention":
        given = first["given"]
        return {key: first[key] for key in ("kind", *ATTENTION)} | {"bias": "in_proj_bias" in given, "add_bias_kv": "bias_k" in given}
    if kind == "PlainRecurrent":
        return {key: first[key] for key in ("kind", *RECURRENT)}
    if kind == "Embedding":
        return {"kind": kind, "num_embeddings": first["num_embeddings"], "embedding_dim": last["out_features"]}
    with torch.device("meta"):
        pair = _construct(description)
    names = next(names for known, names in SETTINGS.items() if known.__name__ == kind)
    return {"kind": kind, "bias": last["bias"]} | {key: _listed(getattr(pair, key)) for key in names}


def _kind(description: list[dict[str, Any]]) -> str:
    """Return the class of the dense layer: that of a transposed convolution where one of two is."""
    kinds: list[str] = [entry["kind"] for entry in description]
    return next((kind for kind in kinds if kind.startswith("ConvTranspose")), kinds[0])


def _found(target: Any, description: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that a layer of the model has, as `_dense` gives them."""
    kind = _kind(description)
    classes: dict[str, Any] = {
        "PlainRecurrent": nn.RNNBase,
        "PlainAttention": nn.MultiheadAttention,
        **{known.__name__: known for known in SETTINGS},
    }
    if kind == "Linear" and hasattr(target, "nx"):  # the Conv1D of transformers
        return {"kind": kind, "in_features": target.nx, "out_features": target.nf, "bias": target.bias is not None}
    if not isinstance(target, classes[kind]):
        return {"kind": type(target).__name__}
    if kind == "PlainAttention":
        bias = {"bias": target.in_proj_bias is not None, "add_bias_kv": target.bias_k is not None}
    elif kind == "PlainRecurrent":
        bias = {"bias": target.bias}
    else:
        bias = {} if kind == "Embedding" else {"bias": target.bias is not None}
    return {"kind": kind, **bias, **{key: _listed(getattr(target, key)) for key in _dense(description) if key not in ("kind", *bias)}}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tie(model: nn.Module, plan: Mapping[str, Any], state: Mapping[str, Tensor], made: list[nn.Module], path: Path) -> None:
    """Tie what was tied when it was saved in the modules that were made anew; elsewhere the model must have the same ties itself."""
    new = {id(parameter) for module in made for parameter in module.parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for alias, kept in plan["aliases"].items():
        if alias in parameters and kept in parameters and parameters[alias] is not parameters[kept]:
            if not {id(parameters[alias]), id(parameters[kept])} & new:
                raise FormatError(
                    path, f"is of another architecture: '{alias}' was tied to '{kept}', in the model it is not", hint=_hint(plan)
                )
            owner, _, leaf = alias.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameters[kept])
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept = first.setdefault(id(tensor), name)
        if state[name] is not state[kept] and not torch.equal(state[name], state[kept]):
            raise FormatError(path, f"is of another architecture: the model ties '{name}' to '{kept}', the file does not", hint=_hint(plan))


def _describe(module: nn.Module) -> list[dict[str, Any]] | None:
    """Describe a module that only `merge` writes; None for any other."""
    if isinstance(module, PlainPair) and all(type(layer) in SETTINGS for layer in module):
        return [_settings(layer, SETTINGS[type(layer)]) | _bias(layer) for layer in module]
    if isinstance(module, PlainRecurrent):
        return [_settings(module, (*RECURRENT, "given"))]
    if isinstance(module, PlainAttention):
        return [_settings(module, (*ATTENTION, "given"))]
    return None


def _folded(model: nn.Module) -> dict[str, list[str]]:
    """Return where BatchNorms may have been folded, as an `Identity` is there, and which layers have a bias; nothing without the former."""
    gone = [name for name, module in model.named_modules() if type(module) is nn.Identity]
    biased = [name for name, module in model.named_modules() if type(module) in SETTINGS and getattr(module, "bias", None) is not None]
    return {"identities": gone, "biased": biased} if gone else {}


def _without_batchnorms(targets: Mapping[str, Any], folded: Mapping[str, list[str]] | None) -> dict[int, nn.Module]:
    """Return what stands in the place of BatchNorms that were folded, by their ``id``; the layers before them get a bias, in place."""
    gone = [targets[name] for name in (folded or {}).get("identities", []) if isinstance(targets.get(name), NORMS)]
    for name in (folded or {}).get("biased", []) if gone else []:
        layer = targets.get(name)
        if layer is not None and type(layer) in SETTINGS and layer.bias is None:
            features = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            layer.bias = nn.Parameter(layer.weight.new_zeros(features))
    return {id(norm): nn.Identity().train(norm.training) for norm in gone}


def _settings(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(module, name) for name in names}
    return {"kind": str(module._get_name())} | {name: _listed(value) for name, value in values.items()}  # type: ignore[no-untyped-call]


def _bias(module: nn.Module) -> dict[str, bool]:
    return {} if isinstance(module, nn.Embedding) else {"bias": module.bias is not None}


def _construct(description: list[dict[str, Any]], conv1d: bool = False) -> Any:
    """Build what `_describe` described, with zeros or torch's initial values as weights; `conv1d` as for `PlainPair`."""
    layers = []
    for entry in description:
        settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in entry.items() if key not in ("kind", "given")}
        kinds: dict[str, Any] = {kind.__name__: kind for kind in (*SETTINGS, PlainRecurrent, PlainAttention)}
        if "given" in entry:
            zeros = {name: tuple(torch.zeros(shape) for shape in shapes) for name, shapes in entry["given"].items()}
            settings["weights"] = {name: parts if len(parts) == 2 else parts[0] for name, parts in zeros.items()}
        if entry["kind"] == "PlainAttention":
            settings |= {"bias": "in_proj_bias" in entry["given"], "add_bias_kv": "bias_k" in entry["given"]}
        layers.append(kinds[entry["kind"]](**settings))
    return layers[0] if len(layers) == 1 else PlainPair(*layers, conv1d=conv1d)
