"""Training flags: which modules a training pass runs in training mode, and which normalization layers are frozen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def is_frozen_norm(norm: nn.Module, model: nn.Module) -> bool:
    """Whether a normalization layer with running statistics is frozen: its statistics do not change.

    It is frozen when all its parameters are, when it is in eval mode inside a model that is in training mode, or when the model's own
    ``train`` method leaves it in eval mode. A model in eval mode as a whole freezes no layer, nor does a wrapper (new, and so in training
    mode) around such a model.

    Args:
        norm: any module of `model`; False for one without running statistics.
        model: the whole model.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> is_frozen_norm(model[1], model), is_frozen_norm(model[1].eval(), model), is_frozen_norm(model[1], model.eval())
        (False, True, False)
    """
    if not isinstance(norm, _NormBase):
        return False
    parameters = list(norm.parameters(recurse=False))
    fixed = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
    return fixed or (is_training(model) and not norm.training) or norm in left_in_eval(model)


def left_in_eval(model: nn.Module) -> set[nn.Module]:
    """Return the normalization layers that ``model.train()`` leaves in eval mode, because a class overrides it; flags stay as they are."""
    if all(type(module).train is nn.Module.train for module in model.modules()):
        return set()
    came = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        return {module for module in model.modules() if isinstance(module, _NormBase) and not module.training}
    finally:
        for module, flag in came:
            module.training = flag


def is_training(model: nn.Module) -> bool:
    """Whether a model is in training mode, and something inside it as well."""
    _, *inner = model.modules()
    return model.training and (not inner or any(module.training for module in inner))


@contextmanager
def training_mode(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Training mode inside, frozen layers excepted; each module's own flag again afterwards.

    A model in training mode keeps the flags of all its modules: what the caller put in eval mode stays there. A model in eval mode is put
    in training mode as a whole. Either way normalization layers with frozen parameters run in eval mode.

    Args:
        model: any module.

    Yields:
        A function that sets the flags again, for code inside that calls other code, which may have changed them.
    """
    came = [(module, module.training) for module in model.modules()]
    whole = not is_training(model)
    frozen = {module for module, _ in came if is_frozen_norm(module, model)}
    wanted = [(module, (flag or whole) and module not in frozen) for module, flag in came]

    def renew() -> None:
        for module, flag in wanted:
            module.training = flag

    renew()
    try:
        yield renew
    finally:
        for module, flag in came:
            module.training = flag
