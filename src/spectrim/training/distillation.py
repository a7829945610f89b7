"""Distillation from the dense network: logits and layer outputs."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from spectrim.errors import LayerError, SettingError
from spectrim.layers import named_layers
from spectrim.metrics.calls import call_model, evaluating, scores_of
from spectrim.protocols import Seen

Loss = Callable[[Any, Any], Tensor]


IGNORED = -100
"""The target that torch's `cross_entropy` leaves out, and transformers give padding."""


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """The settings of a `Distillation`, which explains them: everything but the teacher."""

    temperature: float = 4.0
    weight: float = 0.7
    dim: int = -1
    mix: float = 0.0
    features: float = 0.0
    until: float = 1.0
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("mix", "features"):
            if not getattr(self, name) >= 0:
                raise SettingError("Distillation", name, got=getattr(self, name), rule=">= 0")
        if not self.temperature > 0:
            raise SettingError("Distillation", "temperature", got=self.temperature, rule="> 0")
        for name in ("weight", "until"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError("Distillation", name, got=getattr(self, name), rule="a fraction in [0, 1]")


@dataclass(frozen=True)
class Distillation(DistillationSettings):
    """Distillation: ``(1 - weight) * task + weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + features * hints``.

    `hints` is the sum over layers of ``mean((f - f_teacher)^2) / var(f_teacher)``, where ``f`` is the output of a layer of the student:
    the fraction of the teacher's variance that is unexplained, so that the scale of a layer does not matter. A low-rank network has
    the layers of the dense one, at the same sizes, so that no projection is needed. Hints reduce a large gap to the teacher quickly; in
    late training they transfer what the teacher memorized of the training examples, so that it is better to stop them before (`until`).

    Args:
        teacher: the dense network; it is run without gradient, in eval mode.
        temperature: ``T > 0``.
        weight: in [0, 1]: the teacher's share of the loss; with 0 outputs are arbitrary, and only `features` count.
        dim: the axis of the classes.
        mix: ``a >= 0``. Above 0, each batch is mixed with itself in another order, ``q * x + (1 - q) * x'`` with one ``q`` from
            Beta(a, a); the loss of the task is mixed alike. For inputs of floating-point
            numbers.
        features: ``>= 0``: the weight of each layer's hint, independent of the other two. Student and teacher need the same layers.
        until: in [0, 1]: the share of the steps, from the first one on, in which `features` are used.
        layers: names of the modules whose outputs are compared; None for those that `hint_layers` chooses.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531, section 2; `features`: Romero et al., arXiv 1412.6550, equation 3; `mix`: Zhang et
    al., arXiv 1710.09412, and Beyer et al., arXiv 2106.05237, for teachers.
    Deviation: hints need no regressor between student and teacher, are in units of the teacher's variance, come from all layers, and beside
    the other two losses instead of in a stage before them.
    """

    teacher: nn.Module

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the teacher, as plain data for JSON."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "teacher"}
        return plain | {"layers": None if self.layers is None else list(self.layers)}

    def watched_layers(self, model: nn.Module) -> tuple[str, ...]:
        """Return the modules whose outputs are compared with the teacher's, see `Lesson`; none without `features`."""
        if not self.features:
            return ()
        return hint_layers(model) if self.layers is None else self.layers

    def __call__(self, seen: Seen) -> Tensor:
        """Return the loss of a step with the teacher's share in it, see `Lesson`."""
        with outputs_of(self.teacher, seen.layers if self.features else ()) as taught:
            return self._of(seen, taught, unexplained_variance)

    @contextmanager
    def opened(self, model: nn.Module, device: torch.device, compiled: bool) -> Iterator[Callable[[Seen], Tensor]]:
        """Watch the teacher's layers for the time of training, on the device, compiled or not, see `Lesson`."""
        self.teacher.to(device)
        names, share = self.watched_layers(model), unexplained_variance
        with outputs_of(self.teacher, names) as taught:
            lesson = self
            if compiled:  # with the watching inside
                share = _compiled(unexplained_variance)
                lesson = replace(self, teacher=cast(nn.Module, torch.compile(self.teacher, dynamic=False)))
            yield lambda seen: lesson._of(seen, taught, share)

    def _of(self, seen: Seen, taught: dict[str, Tensor], share: Callable[..., Tensor]) -> Tensor:
        """Return the loss of a step; `taught` gets the teacher's outputs and is empty again afterwards: nothing is kept."""
        hints = partial(share, seen.layers, taught) if self.features and self.layers != () and seen.done < self.until else None
        loss = self.loss(seen.loss, seen.inputs, seen.output, hints, seen.target)
        taught.clear()
        return loss

    def loss(self, task: Tensor, inputs: Any, output: Any, hints: Callable[[], Tensor] | None = None, target: Any = None) -> Tensor:
        """Mix the task's loss with the teacher's.

        Args:
            task: the loss of the task.
            inputs: of this step, as the model takes them.
            output: the student's; of one with ``logits`` these are compared (`scores_of`).
            hints: returns the `unexplained_variance` of the layers' outputs, once the teacher has run; what `features` weighs.
            target: of this step; where it holds `IGNORED`, at a place that has scores, the teacher is ignored: padding.
        """
        with evaluating(self.teacher):
            theirs = call_model(self.teacher, inputs)
        loss = task
        if self.weight:  # else outputs are arbitrary
            teacher = F.log_softmax(scores_of(theirs).float() / self.temperature, self.dim)
            student = F.log_softmax(scores_of(output).float() / self.temperature, self.dim)
            divergence = _mean((teacher.exp() * (teacher - student)).sum(self.dim), target)
            loss = (1 - self.weight) * task + self.weight * self.temperature**2 * divergence
        return loss if hints is None else loss + self.features * hints()

    def mixed(self, inputs: Any, loss: Loss) -> tuple[Any, Loss]:
        """Return the inputs of a step, mixed where `mix` is above 0, and the loss that belongs to them.

        Args:
            inputs: tensors ``(batch, ...)`` as the model takes them.
            loss: ``(output, target) -> scalar``, of the unmixed batch.

        Raises:
            SettingError: for inputs that are no floating numbers.
        """
        if not self.mix:
            return inputs, loss
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if not tensors or not all(tensor.is_floating_point() for tensor in tensors):
            got = ", ".join(str(tensor.dtype) for tensor in tensors) or "no tensor"
            raise SettingError("Distillation", "mix", got=self.mix, rule=f"0 for inputs of {got}", hint="indices cannot be mixed")
        share = float(torch.distributions.Beta(self.mix, self.mix).sample())
        order = torch.randperm(len(tensors[0])).to(tensors[0].device)

        def mixed_loss(output: Any, target: Any) -> Tensor:
            other = tree_map_only(Tensor, lambda tensor: tensor[order], target)
            return share * loss(output, target) + (1 - share) * loss(output, other)

        return tree_map_only(Tensor, lambda tensor: torch.lerp(tensor[order], tensor, share), inputs), mixed_loss


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function of tensors that are results: torch's compiler looks at their gradients, and torch warns of that."""
    fast = torch.compile(function, dynamic=False)

    def call(*arguments: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            return fast(*arguments)

    return call


def _mean(divergence: Tensor, target: Any) -> Tensor:
    """Return the mean over the places that the target counts; over all where it does not say."""
    if not isinstance(target, Tensor) or target.shape != divergence.shape or target.is_floating_point():
        return divergence.mean()
    counted = target != IGNORED
    return torch.where(counted, divergence, 0.0).sum() / counted.sum().clamp_min(1)


def hint_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the modules whose outputs are compared by default: the factorized layers, which a cut has changed.

    Args:
        model: the student.

    Raises:
        LayerError: for a model without factorized layers: name its modules then.

    Examples:
        >>> from spectrim.surgery.factorize import factorize
        >>> hint_layers(factorize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))))
        ('0',)
    """
    names = tuple(name for name, _ in named_layers(model))
    if not names:
        hint = "name the modules to compare: Distillation(..., layers=('block1', 'block2'))"
        raise LayerError(type(model).__name__, "has no factorized layer whose output can be compared with a teacher's", hint=hint)
    return names


@contextmanager
def outputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict with the latest output of each named module (its first tensor), updated whenever the model runs.

    Args:
        model: any module.
        names: of modules in it.

    Raises:
        LayerError: when the model has no such module.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
        >>> with outputs_of(model, ["0"]) as seen:
        ...     y = model(torch.ones(3, 4))
        >>> torch.equal(y, seen["0"].relu())
        True
    """
    modules, seen = dict(model.named_modules()), {}  # type: tuple[dict[str, nn.Module], dict[str, Tensor]]
    names = list(names)
    if absent := [name for name in names if name not in modules]:
        raise LayerError(absent[0], f"is not in {type(model).__name__}, so that its outputs cannot be compared")

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            if tensors:
                seen[name] = tensors[0]

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def unexplained_variance(own: Mapping[str, Tensor], taught: Mapping[str, Tensor]) -> Tensor:
    """Return the fraction of the teacher's variance that the student's outputs do not explain, summed over layers, a scalar.

    Args:
        own: the student's outputs by layer.
        taught: the teacher's, of the same shapes.

    Raises:
        LayerError: for a layer whose outputs differ in shape.

    Examples:
        >>> float(unexplained_variance({"fc": torch.zeros(4)}, {"fc": torch.tensor([1.0, -1.0, 1.0, -1.0])}))
        1.0
    """
    shares = []
    for name, theirs in taught.items():
        if name not in own:
            continue
        mine, theirs = own[name].float(), theirs.detach().float()
        if mine.shape != theirs.shape:
            found = f"its output has shape {tuple(mine.shape)}, the teacher's {tuple(theirs.shape)}"
            raise LayerError(name, found, hint="only outputs of equal shape can be compared: name other layers")
        shares.append((mine - theirs).square().mean() / theirs.var(correction=0).clamp_min(torch.finfo(torch.float32).tiny))
    if not shares:
        raise LayerError(", ".join(taught), "have no outputs that could be compared", hint="name modules whose outputs are tensors")
    return torch.stack(shares).sum()
