"""Tensors that FSDP2 has sharded over processes: gathered one at a time, cut back into shards, and a plain copy of a sharded model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.checks import check
from spectrim.errors import LayerError
from spectrim.forms.form import Form
from spectrim.forms.form import whole as whole
from spectrim.layers.forwards import renew

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")


LOAD_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor: a tensor of which each process holds its shard."""
    return hasattr(tensor, "full_tensor")


def has_shards(model: nn.Module) -> bool:
    """Whether a model has sharded parameters, or is an FSDP2 module whose parameters are gathered at the moment."""
    return any(is_sharded(parameter) for parameter in model.parameters()) or any(_is_fsdp(module) for module in model.modules())


def refuse_sharded_factors(model: nn.Module) -> None:
    """Raise a LayerError where factors are a separate FSDP2 module, which no forward pass gathers, or of a form that cannot be sharded.

    Args:
        model: that is sharded, or will be.
    """
    for name, module in model.named_modules():
        if isinstance(module, Form) and not module.is_matrix:
            hint = "factorize with scheme='channel', 'spatial' or 'input', or train without FSDP2"
            raise LayerError(name, f"is {module.called}, whose penalties and cuts need whole tensors", hint=hint)
        if isinstance(module, Form) and _is_fsdp(module):
            raise LayerError(name, "is sharded by itself", hint="call fully_shard on the layer that holds it, or on the block around that")


def refuse_shards(model: nn.Module, verb: str) -> None:
    """Raise a LayerError for a sharded model, which `verb` cannot take."""
    if has_shards(model):
        hint = f"give {verb} what spectrim.layers.sharded.gathered(model) returns, a plain copy; all processes call that together"
        raise LayerError(type(model).__name__, "is sharded over processes", hint=hint)


def is_whole(factors: Form) -> bool:
    """Whether this process holds the whole parts of a weight: no shards of them, nor flat parameters in their place."""
    side = next(factors.parameters())
    return not is_sharded(side) and side.dim() >= 2 and side.numel() > 0


def whole_values(factors: Form) -> list[Tensor]:
    """Return the values of `Form.values`, detached and whole."""
    return [whole(values).detach() for values in factors.values()]


def whole_sides(factors: Form) -> list[Tensor]:
    """Return the sides of `Form.sides`, detached and whole: columns are singular vectors."""
    return [whole(side.detach()) for side in factors.sides()]


def shard_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor, sharded as `pattern` is; the tensor itself when that is not. No communication.

    Args:
        tensor: whole, and the same on all processes.
        pattern: of the same shape.
    """
    if not is_sharded(pattern):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    like: Any = pattern
    replicated = DTensor.from_local(tensor.to(like.device), like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=like.placements)


def reshard(model: nn.Module) -> None:
    """Give every FSDP2 module its sharded parameters back: after a forward pass the outermost one still has them whole."""
    for module in model.modules():
        if _is_fsdp(module):
            module.reshard()  # type: ignore[operator]


def gathered(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Return a plain copy of a model that FSDP2 has sharded: whole tensors, no hooks of FSDP, on every process.

    All processes have to call it together. `prune`, `merge`, `save`, `export` and `measure` take the copy.

    Args:
        model: sharded by ``fully_shard`` or by accelerate; it stays as it is. Of a model that is not sharded the copy shares nothing
            either.
        device: where the whole tensors go, one after the other, for example ``cpu`` for a model larger than a GPU; None to leave them.

    Returns:
        A model of the original classes; tied parameters are tied again.
    """
    check("gathered", model=model)
    reshard(model)
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}
    return _plain(model, modules, tensors, device)


def _plain(module: nn.Module, modules: dict[int, nn.Module], tensors: dict[int, Tensor], device: torch.device | str | None) -> nn.Module:
    """Copy a module and what it holds, each once."""
    if id(module) in modules:
        return modules[id(module)]
    kind = type(module).__mro__[2] if _is_fsdp(module) else type(module)  # FSDP<Class>, FSDPModule, Class
    marks = [name for name in vars(module) if name.startswith(("_is_fsdp", "_fsdp", "_is_accelerate", "__composable_api"))]
    new: nn.Module = renew(module, kind, drop=marks)
    modules[id(module)] = new
    for name in (*HOOKS, *LOAD_HOOKS):
        hooks = vars(new)[name]
        for key in [key for key, hook in hooks.items() if _of_fsdp(hook)]:
            del hooks[key]
    for name, parameter in module._parameters.items():
        new._parameters[name] = None if parameter is None else _copied(parameter, tensors, device)  # type: ignore[assignment]
    for name, buffer in module._buffers.items():
        new._buffers[name] = None if buffer is None else _copied(buffer, tensors, device)
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else _plain(child, modules, tensors, device)
    if isinstance(new, nn.RNNBase) and "_flat_weights" in vars(new):
        new._flat_weights = [getattr(new, name) for name in new._flat_weights_names]
    return new


def _copied(tensor: Tensor, tensors: dict[int, Tensor], device: torch.device | str | None) -> Tensor:
    """Copy a parameter or buffer whole; one that was seen before gives the same copy."""
    if id(tensor) not in tensors:
        copy = whole(tensor.detach()).to(device, copy=True)
        tensors[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return tensors[id(tensor)]


def _is_fsdp(module: nn.Module) -> bool:
    return callable(getattr(type(module), "reshard", None)) and callable(getattr(type(module), "unshard", None))


def _of_fsdp(hook: Any) -> bool:
    """Whether FSDP registered a hook; those of loading are wrapped in an object that keeps them as ``hook``."""
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.")


class _OfShards(torch.autograd.Function):
    """A measure of gathered tensors; what it keeps is the own shard of its gradient alone."""

    @staticmethod
    def forward(ctx: Any, measure: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        with torch.enable_grad():
            gathered = [whole(tensor.detach()).requires_grad_(tensor.requires_grad) for tensor in tensors]
            value = measure(*gathered)
            wanted = [tensor for tensor in gathered if tensor.requires_grad]
            found = iter(torch.autograd.grad(value, wanted) if wanted else ())
        ctx.gradients = [shard_like(next(found), tensor) if tensor.requires_grad else None for tensor in tensors]
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if gradient is None else gradient * grad for gradient in ctx.gradients)


def of_shards(measure: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return a scalar measure of sharded tensors: they are gathered for the call alone, so that one layer at a time is whole.

    All processes have to call it together.

    Args:
        measure: takes the whole tensors, returns a scalar. It can be differentiated once.
        tensors: sharded or not.
    """
    value: Tensor = _OfShards.apply(measure, *tensors)  # type: ignore[no-untyped-call]
    return value


class _Defect(torch.autograd.Function):
    """``||A^T A - I||_F^2`` of one sharded matrix, or of a stack of them, with the gradient ``4 A (A^T A - I)``.

    Where rows are sharded, ``A^T A`` is the sum over processes of what each computes from its own; where columns are, it takes the others'
    columns for a moment. The Gram matrix is whole, and kept; the gradient is computed shard by shard.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        with torch.autocast(A.device.type, enabled=False):
            defect = whole(A.mT @ A)
        defect.diagonal(dim1=-2, dim2=-1).sub_(1)
        ctx.save_for_backward(A, defect)
        return defect.square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate

        A, defect = ctx.saved_tensors
        replicated = DTensor.from_local(4 * grad * defect, A.device_mesh, [Replicate()] * A.device_mesh.ndim, run_check=False)
        with torch.autocast(grad.device.type, enabled=False):
            gradient: Tensor = (A @ replicated).redistribute(placements=A.placements)
        return gradient


def defect_of_shards(A: Tensor) -> Tensor:
    """Return ``||A^T A - I||_F^2`` of a sharded matrix ``(..., rows, rank)``, the same on all processes; they have to call it together."""
    value: Tensor = _Defect.apply(A)  # type: ignore[no-untyped-call]
    return value
