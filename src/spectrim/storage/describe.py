"""What `merge` writes, described as plain data and built again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spectrim.plain.attention import PlainAttention
from spectrim.plain.chain import PlainPair
from spectrim.plain.interpolative import PlainColumns, PlainRows
from spectrim.plain.pieces import PlainInterpolative
from spectrim.plain.quaternion import QConv1d, QConv2d, QConv3d, QLinear
from spectrim.plain.reader import PlainReader
from spectrim.plain.recurrent import PlainRecurrent

CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


RECURRENT = ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")


ATTENTION = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")


SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq"),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), CONVOLUTION),
    QLinear: ("in_features", "out_features"),
    **dict.fromkeys((QConv1d, QConv2d, QConv3d), CONVOLUTION[:6]),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), (*CONVOLUTION, "output_padding")),
}
"""The constructor arguments of the layers that `merge` writes."""


def dense_settings(description: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings of the dense layer that `merge` must have had before it, to write what is described."""
    first, last = description[0], description[-1]
    kind = dense_kind(description)
    if kind == "PlainAttention":
        given = first["given"]
        return {key: first[key] for key in ("kind", *ATTENTION)} | {"bias": "in_proj_bias" in given, "add_bias_kv": "bias_k" in given}
    if kind == "PlainRecurrent":
        return {key: first[key] for key in ("kind", *RECURRENT)}
    if kind == "Embedding":
        return {"kind": kind, "num_embeddings": first["num_embeddings"], "embedding_dim": last["out_features"]}
    with torch.device("meta"):
        pair = construct(description)
    names = next(names for known, names in SETTINGS.items() if known.__name__ == kind)
    return {"kind": kind, "bias": last["bias"]} | {key: _listed(getattr(pair, key)) for key in names}


def dense_kind(description: list[dict[str, Any]]) -> str:
    """Return the class of the dense layer: that of a transposed convolution where one of two is."""
    kinds: list[str] = [entry["kind"] for entry in description]
    return next((kind for kind in kinds if kind.startswith("ConvTranspose")), kinds[0])


def found_settings(target: Any, description: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that a layer of the model has, as `dense_settings` gives them."""
    kind = dense_kind(description)
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
    return {
        "kind": kind,
        **bias,
        **{key: _listed(getattr(target, key)) for key in dense_settings(description) if key not in ("kind", *bias)},
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def describe(module: nn.Module) -> list[dict[str, Any]] | None:
    """Describe a module that only `merge` writes; None for any other."""
    if isinstance(module, PlainPair) and all(type(layer) in SETTINGS for layer in layers_of(module)):
        return [_settings(layer, SETTINGS[type(layer)]) | _bias(layer) for layer in layers_of(module)]
    if isinstance(module, PlainInterpolative):
        parts = [_settings(part, SETTINGS[type(part)]) | _bias(part) for part in (module.kept, module.mix)]
        pieces = {"start": module.start, "gather": module.gather is not None, "conv1d": hasattr(module, "nx")}
        return [{"kind": str(module._get_name()), "parts": parts} | pieces]
    if isinstance(module, PlainReader):
        held: dict[str, Any] = dict(module.thin_weights.items())
        pairs = {name: [list(pair.left.shape), list(pair.right.shape)] for name, pair in held.items()}
        return [{"kind": "PlainReader", "pairs": pairs}]
    if isinstance(module, PlainRecurrent):
        return [_settings(module, (*RECURRENT, "given"))]
    if isinstance(module, PlainAttention):
        return [_settings(module, (*ATTENTION, "given"))]
    return None


def layers_of(pair: PlainPair) -> list[nn.Module]:
    """Return the layers of a pair in order, those of a pair inside it too."""
    return [layer for part in pair for layer in (layers_of(part) if isinstance(part, PlainPair) else [part])]


def _settings(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(module, name) for name in names}
    return {"kind": str(module._get_name())} | {name: _listed(value) for name, value in values.items()}  # type: ignore[no-untyped-call]


def _bias(module: nn.Module) -> dict[str, bool]:
    return {} if isinstance(module, nn.Embedding) else {"bias": module.bias is not None}


def construct(description: list[dict[str, Any]], conv1d: bool = False) -> Any:
    """Build what `describe` described, with zeros or torch's initial values as weights; `conv1d` as for `PlainPair`."""
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
    *before, made = layers
    for layer in reversed(before):
        made = PlainPair(layer, made, conv1d=conv1d)
    return made


def interpolative(entry: Mapping[str, Any]) -> PlainInterpolative:
    """Build a layer of rows or columns that `describe` described, with zeros or torch's initial values as weights."""
    kept, mix = (construct([part]) for part in entry["parts"])
    kind = {"PlainRows": PlainRows, "PlainColumns": PlainColumns}[entry["kind"]]
    order = None
    if entry["gather"]:
        sides = ("embedding_dim", "out_features", "out_channels") if kind is PlainRows else ("in_features", "in_channels")
        order = torch.arange(sum(next(getattr(part, side) for side in sides if hasattr(part, side)) for part in (kept, mix)))
    return kind(kept, mix, start=entry["start"], order=order, conv1d=entry["conv1d"])


def difference(made: PlainInterpolative, target: Any) -> str | None:
    """Say which setting of a dense layer is not that of a layer of rows or columns; None where all are."""
    for name, value in made._settings(hasattr(made, "nx")).items():
        own = getattr(target, name, None)
        if _listed(own) != _listed(value):
            return f"{name}={value}, the model has {own}"
    return None
