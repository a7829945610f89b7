"""Ranks as callers give them: a rule, one number, or one for each weight."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from operator import index
from typing import Any, SupportsIndex

from torch import Tensor, nn

from spectrim.errors import LayerError, RankError, SpectrimError
from spectrim.layers import named_factors
from spectrim.protocols import RankRule

Ranks = SupportsIndex | RankRule | Mapping[str, SupportsIndex | tuple[int, ...]]


def chooser(ranks: Ranks | None, name: str, shape: tuple[int, int], held: int | None = None) -> Callable[[Tensor], int]:
    """Return the function that chooses one weight's rank from its spectrum, or that along one axis of its size.

    Args:
        ranks: a number (capped at the full rank), a rule, a mapping from names to ranks, or None to keep all.
        name: the weight's name, as `named_factors` gives it.
        shape: ``(out, in)``, for the message of an error.
        held: number of singular values at hand; as many as the spectrum has when omitted.

    Raises:
        RankError: when the chosen rank is not an integer in ``[1, held]``.
    """

    def choose(spectrum: Tensor) -> int:
        rank: Any
        most = spectrum.shape[-1] if held is None else held
        if ranks is None:
            rank = most
        elif isinstance(ranks, Mapping):
            rank = ranks.get(name, most)
        elif isinstance(ranks, SupportsIndex):
            rank = min(ranks if isinstance(ranks, bool) else index(ranks), most)
        else:
            rank = _ruled(ranks, spectrum, name)
        return checked(rank, most)

    def checked(rank: Any, most: int) -> int:
        if isinstance(rank, bool) or not isinstance(rank, SupportsIndex) or not 1 <= index(rank) <= most:
            raise RankError(name, got=rank, out=shape[0], in_=shape[1], held=most)
        return index(rank)

    return choose


def _ruled(rule: Any, spectrum: Tensor, name: str) -> Any:
    """Call a rank rule; its failures name the layer."""
    try:
        return rule(spectrum)
    except SpectrimError:
        raise
    except Exception as error:  # whatever the caller's own code raises
        problem = f"its rank rule fails with {type(error).__name__}: {error}"
        raise LayerError(name, problem, hint="a rule takes the singular values, descending, and returns a rank") from error


def check_names(model: nn.Module, ranks: Mapping[str, Any]) -> None:
    """Raise a LayerError when a mapping names something that is not a factorized weight of `model`."""
    known = [name for name, _ in named_factors(model)]
    for name in ranks:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"factorized are: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
            raise LayerError(name, "is not a factorized weight of this model", hint=hint)
