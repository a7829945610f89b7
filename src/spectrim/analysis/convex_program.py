"""Two-layer networks as convex programs: the optimum over all widths, without local minima."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spectrim.analysis.arrangements import arrangements
from spectrim.errors import SettingError

Formulation = Literal["relu", "gated_relu"]


@dataclass(frozen=True)
class NeuronGL1:
    """``decay * sum_i ||V_i||_*``: what weight decay of both layers is in the convex program; for one output the norm of each neuron.

    Args:
        decay: > 0.

    Raises:
        SettingError: for another value.

    Examples:
        >>> regularizer = NeuronGL1(1.0)
        >>> regularizer.nearest(torch.tensor([[[3.0], [4.0]]]).double(), step=1.0).flatten().round(decimals=6).tolist()  # norm 4
        [2.4, 3.2]
    """

    decay: float

    def __post_init__(self) -> None:
        if not 0 < self.decay < math.inf:
            raise SettingError("NeuronGL1", "decay", got=self.decay, rule="a finite number > 0")

    def __call__(self, V: Tensor) -> Tensor:
        """Return the value for matrices ``(patterns, in, out)``."""
        value: Tensor = self.decay * torch.linalg.svdvals(V).sum()
        return value

    def nearest(self, V: Tensor, step: float) -> Tensor:
        """Return the proximal point: singular values of each matrix reduced by ``decay * step``."""
        if V.shape[-1] == 1:
            norms: Tensor = torch.linalg.vector_norm(V, dim=1, keepdim=True)
            return V * (1 - self.decay * step / norms.clamp(min=1e-300)).clamp(min=0)
        U, S, Vh = torch.linalg.svd(V, full_matrices=False)
        shrunk: Tensor = (U * (S - self.decay * step).clamp(min=0).unsqueeze(-2)) @ Vh
        return shrunk


@dataclass(frozen=True)
class ConvexSolution:
    """A solved program.

    Attributes:
        loss: ``1/2 ||f(X) - Y||_F^2 + regularizer``.
        V: of each pattern ``(patterns, in, out)``; for ``relu`` first those of positive, then those of negative output weights.
        patterns: of active examples ``(patterns, n)``.
        residual: relative violation of the constraints at the end; 0 for ``gated_relu``.
    """

    loss: float
    V: Tensor
    patterns: Tensor
    residual: float

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return the layers of an optimal ReLU network with one output, as `nn.Linear` has them: ``(neurons, in)`` and ``(1, neurons)``."""
        V = self.V[..., 0]
        signs = torch.ones(len(V), dtype=V.dtype)
        signs[len(self.patterns) :] = -1
        norms = V.norm(dim=1)
        used = norms > 1e-6 * norms.max()
        root = norms[used].sqrt()
        return V[used] / root[:, None], (signs[used] * root)[None]


def convex_optimum(
    inputs: Tensor,
    targets: Tensor,
    regularizer: NeuronGL1,
    formulation: Formulation = "relu",
    *,
    patterns: Tensor | None = None,
    steps: int = 20000,
    tol: float = 1e-7,
) -> ConvexSolution:
    """Solve ``min 1/2 ||sum_i D_i X V_i - Y||^2 + decay sum_i ||V_i||_*`` over patterns ``D_i`` of active examples.

    ``relu``: with one output, ``V_i = v_i - w_i`` whose neurons must have the pattern, ``(2 D_i - I) X v_i >= 0``; with all patterns
    this is the optimum of ReLU networks of every width. By the alternating direction method of multipliers. ``gated_relu``: without these
    constraints, any number of outputs: networks whose gates are fixed; by accelerated proximal gradients.

    Args:
        inputs: ``(n, in)``.
        targets: ``(n, out)``; ``(n, 1)`` for ``relu``.
        regularizer: `NeuronGL1`.
        formulation: see above.
        patterns: ``(patterns, n)`` of zeros and ones; all of them when omitted, see `arrangements`.
        steps: iterations, at most.
        tol: relative change, and violation of the constraints, at which they end.

    Raises:
        SettingError: for several outputs with ``relu``, or another formulation.

    Examples:
        >>> X, Y = torch.eye(2), torch.tensor([[3.0], [0.0]])
        >>> round(convex_optimum(X, Y, NeuronGL1(1.0)).loss, 4)  # one neuron: (9 - (3 - 1)^2) / 2
        2.5

    Source: Pilanci and Ergen, arXiv 2002.10553; Mishkin, Sahiner and Pilanci, arXiv 2202.01331 (gated ReLU; names of pyscnn).
    """
    if formulation not in get_args(Formulation):
        raise SettingError("convex_optimum", "formulation", got=formulation, rule="'relu' or 'gated_relu'")
    X, Y = inputs.double(), targets.double()
    if X.dim() != 2 or Y.dim() != 2 or len(X) != len(Y) or (formulation == "relu" and Y.shape[1] != 1):
        rule = "(n, in) and (n, out), one output for 'relu'"
        raise SettingError("convex_optimum", "inputs and targets", got=(tuple(X.shape), tuple(Y.shape)), rule=rule)
    if not len(X) or not bool(torch.isfinite(X).all()) or not bool(torch.isfinite(Y).all()):
        raise SettingError("convex_optimum", "inputs and targets", got=f"{len(X)} examples", rule="finite numbers of one example at least")
    D = arrangements(X) if patterns is None else patterns.double()
    if formulation == "gated_relu":
        return _accelerated(X, Y, D, regularizer, steps, tol)
    return _multipliers(X, Y, D, regularizer, steps, tol)


def _accelerated(X: Tensor, Y: Tensor, D: Tensor, regularizer: NeuronGL1, steps: int, tol: float) -> ConvexSolution:
    """Proximal gradients with momentum that restarts where the loss rises."""
    blocks = D[:, :, None] * X  # (patterns, n, in)
    step = 1 / float(torch.linalg.matrix_norm(torch.einsum("pni,pmi->nm", blocks, blocks), 2))

    def loss_of(V: Tensor) -> float:
        return float((torch.einsum("pni,pio->no", blocks, V) - Y).square().sum() / 2 + regularizer(V))

    V = ahead = torch.zeros(len(D), X.shape[1], Y.shape[1], dtype=torch.float64)
    pace, loss = 1.0, loss_of(V)
    for _ in range(steps):
        gradient = torch.einsum("pni,no->pio", blocks, torch.einsum("pni,pio->no", blocks, ahead) - Y)
        new = regularizer.nearest(ahead - step * gradient, step)
        now = loss_of(new)
        if now > loss:
            ahead, pace = V, 1.0
            continue
        faster = (1 + math.sqrt(1 + 4 * pace**2)) / 2
        ahead, pace, done = new + (pace - 1) / faster * (new - V), faster, loss - now <= tol**2 * loss
        V, loss = new, now
        if done:
            break
    return ConvexSolution(loss, V, D, 0.0)


def _multipliers(X: Tensor, Y: Tensor, D: Tensor, regularizer: NeuronGL1, steps: int, tol: float) -> ConvexSolution:
    """Split into a least-squares problem, shrunk norms and signs of the pre-activations; the penalty adapts to balance the residuals."""
    count, width = len(D), X.shape[1]
    both = torch.cat([D[:, :, None] * X, -D[:, :, None] * X])  # (2 patterns, n, in)
    sides = (2 * torch.cat([D, D]) - 1)[:, :, None] * X
    M = both.transpose(0, 1).flatten(1)
    gram, linear = M.mT @ M, M.mT @ Y[:, 0]
    cones = torch.block_diag(*(side.mT @ side for side in sides))  # type: ignore[no-untyped-call]
    cones = cones + torch.eye(2 * count * width, dtype=torch.float64)
    penalty = 1.0
    factor = torch.linalg.cholesky(gram + penalty * cones)
    u = z = a = torch.zeros(2 * count, width, dtype=torch.float64)
    s = b = torch.zeros(2 * count, len(X), dtype=torch.float64)
    violation = math.inf
    for number in range(steps):
        right = linear + penalty * ((z - a) + torch.einsum("pni,pn->pi", sides, s - b)).flatten()
        u = torch.cholesky_solve(right[:, None], factor).reshape(2 * count, width)
        heights = torch.einsum("pni,pi->pn", sides, u)
        before_z, before_s = z, s
        z = regularizer.nearest((u + a)[..., None], 1 / penalty)[..., 0]
        s = (heights + b).clamp(min=0)
        a, b = a + u - z, b + heights - s
        primal = math.hypot(float((u - z).norm()), float((heights - s).norm()))
        dual = penalty * math.hypot(float((z - before_z).norm()), float((s - before_s).norm()))
        scale = max(float(u.norm()), 1e-12)
        violation = primal / scale
        if violation <= tol and dual <= tol * max(1.0, scale):
            break
        if number % 50 == 49 and number < 2000 and not 0.1 < primal / max(dual, 1e-300) < 10:
            change = 2.0 if primal > dual else 0.5
            penalty, a, b = penalty * change, a / change, b / change
            factor = torch.linalg.cholesky(gram + penalty * cones)
    fit = torch.einsum("pni,pi->n", both, z) - Y[:, 0]
    return ConvexSolution(float(fit.square().sum() / 2 + regularizer(z[..., None])), z[..., None], D, violation)
