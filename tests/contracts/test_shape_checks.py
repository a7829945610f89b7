"""The suite's decorator for shapes refuses what jaxtyping's refuses, and the library's functions wear it."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import jaxtyping
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import spectrim
from shape_checks import KNOWN, THEIRS, WAITING, jaxtyped
from spectrim import linalg

if jaxtyping.config.jaxtyping_disable or jaxtyping.jaxtyped is THEIRS:
    pytest.skip("needs the hook", allow_module_level=True)


@jaxtyped
def product(x: Float[Tensor, "a b"], y: Float[Tensor, "b c"], *, wrong: bool = False) -> Float[Tensor, "a c"]:
    return x if wrong else x @ y


@jaxtyped
def numbers(until: int) -> Iterator[int]:
    yield from range(until)


@jaxtyped
def named(x: "int", y: "Unknown") -> "int":  # type: ignore[name-defined] # noqa: F821
    return x


@jaxtyped
@dataclass
class Point:
    x: int
    y: Float[Tensor, " n"]


class Kinds:
    @jaxtyped
    @staticmethod
    def still(x: int) -> int:
        return x

    @jaxtyped
    @classmethod
    def of(cls, x: int) -> int:
        return x

    @jaxtyped
    @property
    def value(self) -> int:
        return "text"  # type: ignore[return-value]


def adder(k: int, kind: type = int) -> Callable[..., Any]:
    @jaxtyped
    def add(x: kind, y: int = 0) -> kind:  # type: ignore[valid-type]
        return x + k + y  # type: ignore[operator,no-any-return]

    return add


def test_shapes_of_arguments_and_of_the_result_are_held_together() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    assert product(a, b).shape == (2, 4)
    assert product(b.T, a.T).shape == (4, 2)  # sizes are forgotten after a call
    with pytest.raises(TypeCheckError, match="parameter y"):
        product(a, a)
    with pytest.raises(TypeCheckError, match="return"):
        product(a, b, wrong=True)
    with pytest.raises(TypeError, match="missing 1 required"):
        product(a)  # type: ignore[call-arg]
    assert WAITING.stack == []


@pytest.mark.parametrize(
    "call",
    [
        lambda: numbers("3"),
        lambda: named("1", None),
        lambda: Point("1", torch.ones(2)),
        lambda: Point(1, torch.ones(2, 2)),
        lambda: Kinds.still("1"),
        lambda: Kinds.of("1"),
        lambda: Kinds().value,
        lambda: adder(1)("1"),
        lambda: adder(1)(1, "2"),
        lambda: adder(1, kind=float)("1"),
    ],
)
def test_every_kind_of_function_is_checked(call: Callable[[], object]) -> None:
    with pytest.raises(TypeCheckError):
        call()


def test_they_can_be_turned_off() -> None:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert named("1", None) == Kinds.of("1") == "1"  # type: ignore[arg-type]
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_what_is_right_goes_through() -> None:
    assert list(numbers(3)) == [0, 1, 2]
    assert named(1, "anything") == 1
    assert Point(1, torch.ones(2)).x == 1
    assert Kinds.still(1) == Kinds.of(1) == 1


def test_a_function_in_a_function_is_checked_by_one_set_of_checks_and_kept_alive_by_none() -> None:
    first, second = adder(1), adder(2)
    assert (first(1), second(1), first(1, y=2)) == (2, 3, 4)
    known = len(KNOWN)
    assert (adder(3)(1), adder(4)(1)) == (4, 5)
    assert len(KNOWN) == known
    assert adder(1, kind=float)(1.5) == 2.5  # other annotations, other checks
    with pytest.raises(TypeCheckError):
        adder(1)(1.5)

    held = torch.ones(2)

    def around(value: Tensor) -> Callable[[], int]:
        @jaxtyped
        def inside() -> int:
            return len(value)

        return inside

    assert around(held)() == 2
    gone = weakref.ref(held)
    del held
    gc.collect()
    assert gone() is None


def test_calls_in_threads_and_in_themselves_do_not_mix() -> None:
    @jaxtyped
    def down(n: int, x: Float[Tensor, " n"]) -> int:
        return n if n == 0 else down(n - 1, x[1:])

    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.extend(down(20, torch.ones(20)) for _ in range(50))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [0] * 200


def test_the_library_is_checked() -> None:
    with pytest.raises(TypeCheckError):
        spectrim.compress(1, 2)  # type: ignore[arg-type]
    functions = [value for value in vars(linalg).values() if isinstance(value, FunctionType)]
    assert functions
    assert all(hasattr(function, "checked") for function in functions)
