"""Limits on the operator norm of layers: a penalty, the nearest kernel below a limit, and a parametrization that keeps below it."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectrim.analysis.operators import Convolution, operators_of
from spectrim.analysis.symbols import GRID, sampled_norm, slack, symbol
from spectrim.errors import LayerError, SettingError
from spectrim.layers import has_matrix, is_factorized
from spectrim.layers.geometry import PLAIN
from spectrim.protocols import LayerFilter

ROUNDS = 50
"""Rounds of alternating projections, at most."""


@dataclass(frozen=True)
class OperatorNorm:
    """``weight * sum_l max(0, ||T_l|| - limit)``: what the norm of each convolution and linear layer has above a limit.

    The norm is the largest one of the symbol on a grid of frequencies, see `spectral_norm_bound`; its gradient is that of the singular
    value where it is largest. Factorized layers are penalized through their composed weight.

    Args:
        weight: strength, >= 0.
        limit: norm that costs nothing, >= 0.
        where: which layers, a predicate ``(name, module)``; all that have a symbol when omitted.
        grid: frequencies along each axis.

    Raises:
        SettingError: for a setting outside its range.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
        >>> round(OperatorNorm(0.1, limit=1.0)(layer).item(), 4)  # 0.1 * (3 - 1)
        0.2

    Source: Yoshida and Miyato, arXiv 1705.10941 (spectral norm regularization, of the folded kernel).
    Deviation: the operator's norm, not the folded kernel's; linear above a limit instead of quadratic.
    """

    weight: float
    limit: float = 1.0
    where: LayerFilter | None = None
    grid: int = GRID

    def __post_init__(self) -> None:
        for name in ("weight", "limit"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError("OperatorNorm", name, got=getattr(self, name), rule="a finite number >= 0")
        if isinstance(self.grid, bool) or not isinstance(self.grid, int) or self.grid < 1:
            raise SettingError("OperatorNorm", "grid", got=self.grid, rule="an integer >= 1")

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty of all chosen layers, a scalar."""
        terms = [
            (sampled_norm((trained(layer),), self.grid) - self.limit).clamp(min=0)
            for name, layer in model.named_modules()
            if takes(layer) and (self.where is None or self.where(name, layer))
        ]
        zero = next(model.parameters()).new_zeros(())
        return self.weight * torch.stack([term.to(zero) for term in terms]).sum() if terms else zero


def takes(layer: nn.Module) -> bool:
    """Whether a layer is a dense or factorized convolution or linear layer whose operator has a symbol."""
    plain = isinstance(layer, nn.Linear) or (isinstance(layer, PLAIN) and layer.padding_mode in ("zeros", "circular"))
    return plain and isinstance(getattr(layer, "weight", None), Tensor) and has_matrix(layer)


def trained(layer: Any) -> Convolution:
    """Return the operator of a dense or factorized layer, whose gradient reaches its parameters."""
    weight = layer.dense_weight("weight") if is_factorized(layer) else layer.weight
    return replace(like(layer), kernel=weight.double())


def like(layer: Any) -> Convolution:
    """Return the operator of a layer, composed into one kernel."""
    if isinstance(layer, Convolution):
        return layer
    weight = layer.weight.detach().double() + 0
    if isinstance(layer, nn.Linear):
        return Convolution(weight)
    return Convolution(weight, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)


def clip_norm(layer: Any, limit: float, grid: int = GRID, rounds: int = ROUNDS) -> Tensor:
    """Return a kernel with an operator norm of at most `limit`, nearly the nearest in the Frobenius norm, in its shape, in float64.

    Two convex sets have to meet: symbols with singular values up to the limit, where clipping them is the projection, and kernels with
    these few taps, where dropping the others is. Dykstra's alternating projections converge to the nearest point of both, in 50 rounds to
    about 1 % of the distance; a last scaling makes the limit hold. It holds for inputs of every size, see `spectral_norm_bound`.

    Args:
        layer: a dense convolution or linear layer, a `Convolution`, or a kernel.
        limit: > 0.
        grid: frequencies along each axis.
        rounds: of projections, at most; 0 scales the kernel only.

    Raises:
        LayerError: for a layer of several operators.
        SettingError: for a limit or a number outside its range.

    Examples:
        >>> clip_norm(torch.diag(torch.tensor([3.0, 1.0])), limit=2.0).tolist()
        [[2.0, 0.0], [0.0, 1.0]]

    Source: Sedghi, Gupta and Long, arXiv 1805.10408, section 3 (clipping in the Fourier basis); Boyle and Dykstra, 1986.
    Deviation: they drop taps once, so that neither constraint holds; any stride and groups.
    """
    if not 0 < limit < math.inf:
        raise SettingError("clip_norm", "limit", got=limit, rule="a finite number > 0")
    parts = operators_of(layer)
    if len(parts) > 1:
        raise LayerError(type(layer).__name__, "is a product of two operators", hint="clip each part, or the dense layer")
    (part,) = parts
    allowed = limit / slack(parts, grid)
    with torch.no_grad():
        if float(sampled_norm(parts, grid)) > allowed:
            part = replace(part, kernel=_dykstra(part, allowed, grid, rounds))
            part = replace(part, kernel=part.kernel * min(1.0, allowed / float(sampled_norm((part,), grid))))
    return part.kernel


def _dykstra(part: Convolution, limit: float, grid: int, rounds: int) -> Tensor:
    """Alternate between the two sets; the correction is kept for the clipped symbols only, as the taps are a subspace."""
    points = [grid] * part.axes
    kernel, correction = part.kernel, torch.zeros(())
    for _ in range(rounds):
        raised = symbol(replace(part, kernel=kernel), points, (1,) * part.axes) + correction
        U, S, Vh = torch.linalg.svd(raised, full_matrices=False)
        clipped = (U * S.clamp(max=limit).unsqueeze(-2)) @ Vh
        correction, before = raised - clipped, kernel
        kernel = taps_of(part, clipped, points)
        if float((kernel - before).norm()) <= 1e-7 * float(kernel.norm()):
            break
    return kernel


def taps_of(part: Convolution, symbols: Tensor, points: list[int]) -> Tensor:
    """Return the kernel whose symbol is nearest to given matrices: the adjoint of `symbol`, over the number of frequencies."""
    lengths = symbols.shape[1:-2]
    if points:  # frequencies that stand for two, themselves and their conjugates
        twice = torch.full((lengths[-1], 1, 1), 2.0, dtype=torch.float64)
        twice[0] = 1.0
        if points[-1] % 2 == 0 and lengths[-1] > 1:
            twice[-1] = 1.0
        symbols = symbols * twice
    zeros = torch.zeros_like(part.kernel)
    pull: Any = torch.func.vjp(lambda kernel: symbol(replace(part, kernel=kernel), points, (1,) * part.axes), zeros)[1]
    kernel: Tensor = pull(symbols)[0]
    return kernel / math.prod(count for count, length in zip(points, lengths, strict=True) if length > 1)


class NormLimit(nn.Module):
    """A parametrization of torch: the weight divided by how often its operator norm exceeds a limit; see `limit_norm`.

    Args:
        layer: the dense layer, whose stride, padding and groups are read.
        limit: > 0.
        grid: frequencies along each axis.
    """

    def __init__(self, layer: nn.Module, limit: float, grid: int = GRID) -> None:
        super().__init__()
        if not 0 < limit < math.inf:
            raise SettingError("NormLimit", "limit", got=limit, rule="a finite number > 0")
        (self._like,) = operators_of(layer)
        self._like = replace(self._like, kernel=self._like.kernel.new_empty(self._like.kernel.shape, device="meta"))
        self.limit, self.grid = limit, grid
        self._slack = slack((self._like,), grid)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, scaled down to the limit where it is above."""
        part = replace(self._like, kernel=weight.double())
        norm = sampled_norm((part,), self.grid) * self._slack
        taps = math.prod(self._like.kernel.shape[2:])
        rounded: Tensor = math.sqrt(taps) * torch.finfo(weight.dtype).eps * part.kernel.detach().norm()  # what rounding twice adds
        return weight * (self.limit / (norm + rounded).clamp(min=self.limit)).to(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the nearest weight within the limit, which is stored."""
        return clip_norm(replace(self._like, kernel=weight.detach().double()), self.limit, self.grid).to(weight)

    def extra_repr(self) -> str:
        """Show the limit in the printed model."""
        return f"limit={self.limit:g}"


def limit_norm(layer: nn.Module, limit: float, grid: int = GRID) -> nn.Module:
    """Keep the operator norm of a dense convolution or linear layer below a limit while it trains, in place.

    Torch's own API: the layer's ``weight`` is parametrized, ``parametrize.remove_parametrizations(layer, "weight")`` makes it an ordinary
    parameter again, with the values it has then. The stored weight is clipped once, to the nearest within the limit. To compress the
    network, remove the parametrization first.

    Args:
        layer: a dense `nn.Linear` or convolution that is not transposed.
        limit: > 0; holds for inputs of every size.
        grid: frequencies along each axis.

    Returns:
        The layer.

    Raises:
        LayerError: for any other layer.

    Examples:
        >>> from spectrim.analysis.conv_spectra import spectral_norm_bound
        >>> conv = limit_norm(nn.Conv2d(3, 8, 3, padding=1), limit=0.5)
        >>> spectral_norm_bound(conv) <= 0.5 + 1e-6
        True

    Source: ours; the largest singular value of every frequency instead of one power iteration.
    """
    if is_factorized(layer) or not isinstance(layer, (nn.Linear, *PLAIN)):
        raise LayerError(type(layer).__name__, "cannot be limited", hint="dense convolutions that are not transposed and linear layers can")
    parametrize.register_parametrization(layer, "weight", NormLimit(layer, limit, grid))
    return layer
