"""`Basis`: a few orthonormal directions in the space of all parameters of a network."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from spectrim.checks import check, unwrapped
from spectrim.errors import LayerError, SettingError
from spectrim.layers.sharded import refuse_shards
from spectrim.linalg.principal import orthonormal_, overlaps

Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""Name and shape of each parameter that trains, in the order of ``model.named_parameters()``."""


def trained(model: nn.Module, owner: str) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name; tied ones once, under the first name.

    Raises:
        LayerError: for a model that is sharded over processes, or a parameter that is not real.
        SettingError: where all are frozen.
    """
    model = unwrapped(model)
    refuse_shards(model, owner)
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in found.items():
        if not parameter.is_floating_point():
            raise LayerError(name, f"is of {parameter.dtype}", hint="subspace training is for real parameters")
    if not found:
        hint = "model.requires_grad_(True) lets it train"
        raise SettingError(owner, "model", got="one whose parameters are all frozen", rule="one to train", hint=hint)
    return found


def layout_of(parameters: dict[str, nn.Parameter]) -> Layout:
    """Return names and shapes."""
    return tuple((name, tuple(p.shape)) for name, p in parameters.items())


def check_shapes(layout: Layout, parameters: Sequence[Tensor], owner: str) -> None:
    """Raise a LayerError at the first parameter of another shape than in the layout, or a SettingError for another number of them."""
    if len(layout) != len(parameters):
        hint = "freeze and unfreeze before the first sample is taken, and give the optimizer the parameters that train"
        raise SettingError(owner, "parameters", got=f"{len(parameters)} of them", rule=f"the {len(layout)} of the trajectory", hint=hint)
    for (name, shape), parameter in zip(layout, parameters, strict=True):
        if tuple(parameter.shape) != shape:
            problem = f"has shape {tuple(parameter.shape)}, in the trajectory {shape}"
            raise LayerError(name, problem, hint="cut ranks before the first sample, and not while training in the subspace")


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal directions ``P`` in the space of a network's parameters, with ``P P^T = 1``.

    Made by `Trajectory.basis`, or by `of` from any directions.

    Attributes:
        directions: ``P``, ``(size, parameters)``, on the CPU.
        variances: of the trajectory along each direction, descending; ones for directions of another origin.
        layout: names and shapes of the parameters, in the order of the columns.
        total: variance of the trajectory along all directions.
    """

    directions: Tensor
    variances: Tensor
    layout: Layout
    total: float

    @classmethod
    def of(cls, model: nn.Module, directions: Tensor) -> "Basis":
        """Make linearly independent directions orthonormal.

        Args:
            model: whose parameters that train are the columns, flattened, in the order of ``model.named_parameters()``.
            directions: ``(size, parameters)``, copied; its dtype is kept.

        Raises:
            SettingError: for another shape, or directions that are linearly dependent.

        Examples:
            >>> model = nn.Linear(3, 1)
            >>> basis = Basis.of(model, torch.tensor([[2.0, 0.0, 0.0, 0.0], [1.0, 3.0, 0.0, 0.0]]))
            >>> basis.directions.tolist()
            [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
        """
        check("Basis.of", model=model)
        layout = layout_of(trained(model, "Basis.of"))
        width = sum(torch.Size(shape).numel() for _, shape in layout)
        if directions.dim() != 2 or not 1 <= len(directions) <= width or directions.shape[1] != width:
            raise SettingError("Basis.of", "directions", got=tuple(directions.shape), rule=f"(size, {width}) with size <= {width}")
        try:
            made = orthonormal_(directions.detach().cpu().clone())
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise SettingError("Basis.of", "directions", got="dependent ones", rule="linearly independent") from error
        return cls(made, torch.ones(len(made), dtype=torch.float64), layout, float(len(made)))

    @property
    def size(self) -> int:
        """Number of directions."""
        return len(self.directions)

    @property
    def kept(self) -> float:
        """Share of the trajectory's variance along these directions, in (0, 1]."""
        return float(self.variances.sum()) / self.total

    @property
    def defect(self) -> float:
        """Largest entry of ``P P^T - 1``, in float64."""
        return float((overlaps(self.directions) - torch.eye(self.size, dtype=torch.float64)).abs().max())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the directions: a state of training in another subspace is refused."""
        return hashlib.sha256(self.directions.contiguous().view(torch.uint8).numpy().data).hexdigest()
