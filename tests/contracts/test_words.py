"""Whatever is annotated with a few words, or as yes or no, refuses every other value: all public functions and methods."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest

import spectrim as sp
from spectrim.checks.words import _annotated
from spectrim.errors import SpectrimError
from spectrim.penalties import NuclearNorm
from spectrim.projections import Levels

LEFT_OUT = ("spectrim.zoo", "spectrim.files", "spectrim.layers", "spectrim.linalg")
"""Rooms of what users do not call with settings."""

WRONG = ("no such word", "yes", 2, 0.5, [], np.ones(2))
ROOMS = ["spectrim", *(found.name for found in pkgutil.walk_packages(sp.__path__, "spectrim.") if found.ispkg)]


def settings() -> Iterator[tuple[str, Any, str]]:
    """Yield each public function or dataclass and the name of a setting with few values."""
    seen = set()
    for room in (room for room in ROOMS if not room.startswith(LEFT_OUT)):
        module = importlib.import_module(room)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if id(value) not in seen and (inspect.isfunction(value) or (isinstance(value, type) and dataclasses.is_dataclass(value))):
                seen.add(id(value))
                yield from ((name, value, setting) for setting in _annotated(value) if setting not in ("return", "verdict"))


CASES = list(settings())


@pytest.fixture(autouse=True)
def _as_users_call() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def arguments(value: Any, setting: str, word: Any) -> dict[str, Any]:
    """Return a value for everything that is required: whatever is wrong with it, the words are seen first."""
    needed = [
        name
        for name, one in inspect.signature(value).parameters.items()
        if (one.default is one.empty and one.kind < 2) or (one.kind == 3 and one.default is one.empty)
    ]
    return {**{name: (0.5 if dataclasses.is_dataclass(value) else None) for name in needed}, setting: word}


@pytest.mark.parametrize(("name", "value", "setting"), CASES, ids=[f"{name}-{setting}" for name, _, setting in CASES])
def test_other_words_are_refused(name: str, value: Any, setting: str) -> None:
    for word in WRONG:
        with pytest.raises(SpectrimError, match=rf"^{name}: {setting} must be .* or .*, got "):
            value(**arguments(value, setting, word))


def test_words_of_numpy_are_taken_and_none_where_it_is_annotated() -> None:
    assert Levels(2, zero=np.bool_(True), kind=np.str_("affine")).kind == "affine"
    assert NuclearNorm(0.1).scheme == "channel"
    assert sp.Tuning(keep_best="eval_loss").keep_best == "eval_loss"
