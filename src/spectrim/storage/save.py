"""`save` and `load`: tensors in safetensors, the plan in JSON, no pickle."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.checks import check, outside_inference_mode, unwrapped
from spectrim.errors import FormatError
from spectrim.forms.constrained import kind_of_form
from spectrim.forms.tasks import TaskFactors
from spectrim.layers import named_factors, named_layers
from spectrim.layers.geometry import CHANNELS_LAST, memory_format_of
from spectrim.layers.sharded import refuse_shards
from spectrim.storage.describe import SETTINGS, describe
from spectrim.storage.folder import FORMAT, PLAN, read, tensors_of, write
from spectrim.storage.rebuild import exchanged, hint_of
from spectrim.storage.tasks import plan_of_tasks, rebuild_tasks
from spectrim.surgery.frozen import is_training
from spectrim.surgery.narrowed import sizes_of


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
    write(folder, plan_of(model) | {"aliases": aliases, "eval": not is_training(model)}, tensors)
    return folder


@outside_inference_mode
def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """Return a copy of `model` rebuilt by the plan in `folder`, with the weights stored there.

    Args:
        folder: what `save` wrote.
        model: the original architecture, dense; its weights do not matter. It is left untouched.

    Returns:
        The factorized (or merged) model, on the device of `model`; parameters that were frozen are frozen again. A model that was saved
        in eval mode is in eval mode; else the training flags are those of `model`.

    Raises:
        FormatError: for a missing, truncated, altered or foreign file, or for another architecture; nothing is changed then.
    """
    check("load", folder=folder, model=model)
    model = unwrapped(model)
    plan, tensors = read(Path(folder))
    built = rebuilt(model, plan, tensors, Path(folder) / PLAN)
    return built.eval() if plan.get("eval") else built


def rebuilt(model: nn.Module, plan: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Return a copy of `model` rebuilt by a plan, with the tensors stored beside it.

    Args:
        model: the original architecture, dense; it is left untouched.
        plan: what `plan_of` returned, with ``aliases``.
        tensors: verified.
        path: of the plan, for errors.

    Raises:
        FormatError: for another architecture; nothing is changed then.
    """
    try:
        built, made = exchanged(model, plan, path)
        state = {**tensors, **{alias: tensors[kept] for alias, kept in plan["aliases"].items()}}
        rebuild_tasks(built, plan, state)
    except FormatError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise FormatError(path, f"its plan does not fit the model ({error!r})", hint=hint_of(plan)) from error
    expected = built.state_dict()
    for key in sorted({*expected, *state}):
        if key not in state or key not in expected:
            whose = "the model" if key in expected else "the file"
            raise FormatError(path, f"is of another architecture: only {whose} has '{key}'", hint=hint_of(plan))
        if state[key].shape != expected[key].shape or state[key].dtype != expected[key].dtype:
            came, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (state[key], expected[key]))
            problem = f"is of another architecture: '{key}' is {came} in the file, {wanted} in the model"
            raise FormatError(path, problem, hint=hint_of(plan))
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
    merged, inside = {}, set[int]()
    factorized = {
        name: {"kind": layer.dense_kind.__name__, "scheme": layer.scheme, "writing": layer.writing} for name, layer in named_layers(model)
    }
    for name, module in model.named_modules():
        if name not in factorized and id(module) not in inside and (description := describe(module)):
            merged[name] = description
            inside.update(id(part) for part in module.modules())
    return {
        "format": FORMAT,
        "versions": {"spectrim": version("spectrim"), "torch": torch.__version__},
        "model": type(model).__name__,
        "factorized": factorized,
        "ranks": {name: 1 if isinstance(factors, TaskFactors) else factors.size for name, factors in named_factors(model)},
        "merged": merged,
        "folded": _folded(model),
        "channels_last": [name for name, p in model.named_parameters() if memory_format_of(p) is not torch.contiguous_format],
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        **plan_of_tasks(model),
        **_held(model),
    }


def _held(model: nn.Module) -> dict[str, Any]:
    """Return what a plan says of weights that are pruned or rounded, and of layers that are narrower; nothing where there are none."""
    held = {name: kind for name, form in named_factors(model) if (kind := kind_of_form(form))}
    narrower = sizes_of(model)
    return ({"held": held} if held else {}) | ({"narrowed": narrower} if narrower else {})


def _materialize(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Give what is on the meta device and in the file storage on the CPU, in place; ties stay."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_meta:
            continue
        if name not in state:
            raise FormatError(path, f"does not hold '{name}', which is on the meta device", hint="pass a model with real tensors")
        empty = torch.empty_like(tensor, device="cpu")
        torch.utils.swap_tensors(tensor, nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty)  # type: ignore[no-untyped-call]


def _tie(model: nn.Module, plan: Mapping[str, Any], state: Mapping[str, Tensor], made: list[nn.Module], path: Path) -> None:
    """Tie what was tied when it was saved in the modules that were rebuilt; elsewhere the model must have the same ties itself."""
    new = {id(parameter) for module in made for parameter in module.parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for alias, kept in plan["aliases"].items():
        if alias in parameters and kept in parameters and parameters[alias] is not parameters[kept]:
            if not {id(parameters[alias]), id(parameters[kept])} & new:
                raise FormatError(
                    path, f"is of another architecture: '{alias}' was tied to '{kept}', in the model it is not", hint=hint_of(plan)
                )
            owner, _, leaf = alias.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameters[kept])
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept = first.setdefault(id(tensor), name)
        if state[name] is not state[kept] and not torch.equal(state[name], state[kept]):
            raise FormatError(
                path, f"is of another architecture: the model ties '{name}' to '{kept}', the file does not", hint=hint_of(plan)
            )


def _folded(model: nn.Module) -> dict[str, list[str]]:
    """Return where BatchNorms may have been folded, as an `Identity` is there, and which layers have a bias; nothing without the former."""
    gone = [name for name, module in model.named_modules() if type(module) is nn.Identity]
    biased = [name for name, module in model.named_modules() if type(module) in SETTINGS and getattr(module, "bias", None) is not None]
    return {"identities": gone, "biased": biased} if gone else {}
