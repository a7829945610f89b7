"""Replays a plan on the original architecture: the layers that `save` listed take the places of the dense ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import FormatError, LayerError
from spectrim.forms import FORMS, Form, Size
from spectrim.forms.constrained import KINDS
from spectrim.layers import kind_of, named_layers
from spectrim.layers.attention import become_attention
from spectrim.layers.forwards import renew
from spectrim.layers.reader import FactorizedReader, readable
from spectrim.layers.taking_over import become
from spectrim.linalg.fold import MATRICES, Fold
from spectrim.plain.attention import PlainAttention
from spectrim.plain.chain import PlainPair
from spectrim.plain.encoder import follow_layers
from spectrim.plain.pieces import PlainInterpolative
from spectrim.plain.recurrent import PlainRecurrent
from spectrim.storage.describe import SETTINGS, construct, dense_settings, describe, difference, found_settings, interpolative
from spectrim.surgery.batchnorm import NORMS
from spectrim.surgery.exchange import replace
from spectrim.surgery.factorize import build
from spectrim.surgery.resized import resized


def replayed(model: nn.Module, plan: Mapping[str, Any], path: Path) -> nn.Module:
    """Return a copy of `model` rebuilt by a plan, with any values in the tensors that are new.

    Args:
        model: the original architecture, dense, on the meta device too; it is left untouched.
        plan: what `plan_of` returned.
        path: of the plan, for errors.

    Raises:
        FormatError: for another architecture.
    """
    try:
        return exchanged(model, plan, path)[0]
    except FormatError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise FormatError(path, f"its plan does not fit the model ({error!r})", hint=hint_of(plan)) from error


def hint_of(plan: Mapping[str, Any]) -> str:
    """Return what to do about a plan that does not fit."""
    return f"pass the dense {plan['model']} it was made from, in the same dtype"


def exchanged(model: nn.Module, plan: Mapping[str, Any], path: Path) -> tuple[nn.Module, list[nn.Module]]:
    """Replay a plan on the original architecture; return the model, with any values in the new tensors, and what `merge` had written."""
    if plan.get("narrowed"):
        model = _resized(model, plan, path)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, entry in plan["factorized"].items():
        found = type(modules[name]).__name__ if name in modules else "nothing"
        if found == entry["kind"] and kind_of(modules[name]) is None:
            raise _unregistered(path, name, found)
        if found != entry["kind"] or kind_of(modules[name]) is None:
            raise FormatError(
                path, f"is of another architecture: layer '{name}' was a {entry['kind']}, the model has {found}", hint=hint_of(plan)
            )

    def make(name: str, weight: Tensor, matrix: Tensor, scheme: Fold) -> Form:
        rank = _size(plan["ranks"].get(name))
        kind: Any = FORMS[scheme]
        if name in plan.get("held", ()):
            kind = KINDS[plan["held"][name]].over(kind)
        if rank is None or not _fits(rank, kind.full_size_of(matrix)):
            problem = f"is of another architecture: '{name}' has rank {rank} in the file, {tuple(matrix.shape)} in the model"
            raise FormatError(path, problem, hint=hint_of(plan))
        made: Form = kind.empty(weight, matrix, rank)
        return made

    built = build(model, lambda name, module: plan["factorized"].get(name, {}).get("scheme"), make)
    targets = dict(built.named_modules())
    built = replace(built, _without_batchnorms(targets, plan.get("folded")))
    written = []
    for name, description in plan["merged"].items():
        target = targets.get(name)
        if target is None:
            raise FormatError(path, f"is of another architecture: the model has no layer '{name}'", hint=hint_of(plan))
        kind = kind_of(target)
        if kind is None:
            if isinstance(
                target, PlainPair | PlainInterpolative | PlainRecurrent | PlainAttention
            ):  # the original has such a module itself
                continue
            raise _unregistered(path, name, type(target).__name__)
        if description[0]["kind"] in ("PlainRows", "PlainColumns"):
            parts = interpolative(description[0])
            if (problem := difference(parts, target)) is not None:
                raise FormatError(path, f"is of another architecture: layer '{name}' had {problem}", hint=hint_of(plan))
            weight = next(target.parameters())
            written.append(become(target, parts.to(weight.device, weight.dtype), kind.base_of(type(target))))
            continue
        if description[0]["kind"] == "PlainReader":
            written.append(_reader(target, description[0]["pairs"], name, path, plan))
            continue
        wanted, own = dense_settings(description), found_settings(target, description)
        if plan.get("folded") and wanted.get("bias") and own.get("bias") is False:
            own["bias"] = True  # it came with a BatchNorm
        replayed = None if wanted == own else _replayed(target, description)
        if wanted != own and replayed is None:
            key = next(key for key in wanted if wanted[key] != own.get(key))
            problem = f"layer '{name}' had {key}={wanted[key]}, the model has {own.get(key)}"
            raise FormatError(path, f"is of another architecture: {problem}", hint=hint_of(plan))
        weight = next(target.parameters())
        with torch.random.fork_rng(devices=[]):
            made = replayed if replayed is not None else construct(description, conv1d=hasattr(target, "nx"))
        written.append(made.to(weight.device, weight.dtype))
        if isinstance(made, PlainAttention):
            become_attention(target, made)
        else:
            become(target, made, kind.base_of(type(target)))
    for name, layer in named_layers(built):
        layer.__dict__["writing"] = plan["factorized"][name].get("writing", "pair")
    follow_layers(built)
    return built, written


def _resized(model: nn.Module, plan: Mapping[str, Any], path: Path) -> nn.Module:
    try:
        return resized(model, plan["narrowed"])
    except LayerError as error:
        raise FormatError(path, f"is of another architecture: {error}", hint=hint_of(plan)) from error


def _reader(target: nn.Module, pairs: Mapping[str, Any], name: str, path: Path, plan: Mapping[str, Any]) -> nn.Module:
    """Make a layer with a forward of its own what `merge` had written, with zeros; in place."""
    ranks = {}
    for key, (left, right) in pairs.items():
        weight = getattr(target, key, None) if key in readable(target) else None
        *lead, out, in_ = FactorizedReader.fold(target, key, weight.detach(), "channel").shape if isinstance(weight, Tensor) else (0, 0)
        ranks[key] = left[-1]
        if [*lead, out, ranks[key]] != left or [*lead, ranks[key], in_] != right or not 1 <= ranks[key] <= min(out, in_):
            problem = f"layer '{name}' had '{key}' in two parts {tuple(left)} and {tuple(right)}, which the model's do not fit"
            raise FormatError(path, f"is of another architecture: {problem}", hint=hint_of(plan))
    factors: dict[str, Form] = {}
    for key in readable(target):
        weight = getattr(target, key)
        matrix = FactorizedReader.fold(target, key, weight.detach(), "channel")
        factors[key] = FORMS["channel"].empty(weight, matrix, ranks.get(key, 1))
    layer = FactorizedReader.adopt(target, factors, "channel")
    plain = layer.split(lambda _, part, tensor: nn.Parameter(tensor), tuple(pairs))
    assert plain is not None
    return become(layer, plain)


def _size(stored: Any) -> Size | None:
    """Return a size as JSON holds it: a number, or a list of them."""
    return tuple(stored) if isinstance(stored, list) else stored


def _fits(size: Size, full: Size) -> bool:
    """Whether a size is at most the full one, along as many axes."""
    mine, most = (given if isinstance(given, tuple) else (given,) for given in (size, full))
    return len(mine) == len(most) and all(rank <= limit for rank, limit in zip(mine, most, strict=True))


def _unregistered(path: Path, name: str, kind: str) -> FormatError:
    hint = "call spectrim.layers.register(kind, layer, *inputs) before loading"
    return FormatError(path, f"holds layer '{name}' in low-rank form, which was a {kind}: no kind of layer is registered for it", hint=hint)


def _replayed(target: Any, description: list[dict[str, Any]]) -> nn.Module | None:
    """Return what `merge` writes for a layer of a registered kind at the rank described, with zeros; None where that is something else."""
    last, kind = description[-1], kind_of(target)
    if kind is None or kind.weights(target) != ("weight",) or not ("in_features" in last or "in_channels" in last):
        return None
    rank = last["in_features"] if "in_features" in last else last["in_channels"] // last.get("groups", 1)
    for scheme in (scheme for scheme in kind.schemes(target) if scheme in MATRICES):
        matrix = kind.fold(target, "weight", target.weight.detach(), scheme)
        if rank <= min(matrix.shape[-2:]):
            factors = {"weight": FORMS[scheme].empty(target.weight, matrix, rank)}
            made = kind.adopt(renew(target, type(target)), factors, scheme).split(lambda _, part, tensor: nn.Parameter(tensor), ("weight",))
            if made is not None and describe(made) == description:
                return made
    return None


def _without_batchnorms(targets: Mapping[str, Any], folded: Mapping[str, list[str]] | None) -> dict[int, nn.Module]:
    """Return the replacements of BatchNorms that were folded, by their ``id``; the layers before them get a bias, in place."""
    gone = [targets[name] for name in (folded or {}).get("identities", []) if isinstance(targets.get(name), NORMS)]
    for name in (folded or {}).get("biased", []) if gone else []:
        layer = targets.get(name)
        if layer is not None and type(layer) in SETTINGS and layer.bias is None:
            features = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            layer.bias = nn.Parameter(layer.weight.new_zeros(features))
    return {id(norm): nn.Identity().train(norm.training) for norm in gone}
