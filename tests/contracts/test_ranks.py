"""The laws of a rank rule, over `spectrim.budget.rules.METHODS`."""

import math
from fractions import Fraction as Exact

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spectrim as sp
from spectrim.budget.rules import METHODS
from spectrim.protocols import RankRule

fractions = st.floats(min_value=0.0, max_value=1.0, exclude_min=True)
counts = st.integers(min_value=1, max_value=40)
KNOBS = {sp.Energy: fractions, sp.Fixed: counts, sp.Fraction: fractions}
values = st.floats(min_value=0.0, max_value=1e6, allow_subnormal=False)
spectra = st.lists(values, min_size=1, max_size=24)
every_method = pytest.mark.parametrize("method", METHODS)
thorough = settings(deadline=None, max_examples=60)


def tensor(spectrum: list[float]) -> torch.Tensor:
    return torch.tensor(spectrum, dtype=torch.float64)


def test_every_method_has_a_knob_here() -> None:
    assert set(KNOBS) == set(METHODS)


@every_method
def test_is_a_rank_rule(method: type) -> None:
    rule, again = (method(1 if method is sp.Fixed else 1.0) for _ in range(2))
    assert isinstance(rule, RankRule)
    assert rule == again
    assert hash(rule) == hash(again)


@every_method
@thorough
@given(data=st.data(), spectrum=spectra)
def test_in_range(method: type, data: st.DataObject, spectrum: list[float]) -> None:
    rank = method(data.draw(KNOBS[method]))(tensor(spectrum))
    assert type(rank) is int
    assert 1 <= rank <= len(spectrum)


@every_method
@thorough
@given(data=st.data(), spectrum=spectra)
def test_monotone_in_the_knob(method: type, data: st.DataObject, spectrum: list[float]) -> None:
    low, high = sorted((data.draw(KNOBS[method]), data.draw(KNOBS[method])))
    assert method(low)(tensor(spectrum)) <= method(high)(tensor(spectrum))


@every_method
@thorough
@given(data=st.data(), spectrum=spectra)
def test_blind_to_the_order(method: type, data: st.DataObject, spectrum: list[float]) -> None:
    rule = method(data.draw(KNOBS[method]))
    assert rule(tensor(data.draw(st.permutations(spectrum)))) == rule(tensor(spectrum))


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_and_gradient_do_not_matter(method: type, dtype: torch.dtype) -> None:
    spectrum = torch.tensor([300.0, 2.0, 0.25, 0.125], dtype=dtype, requires_grad=True)  # 300^2 overflows float16
    knob = 2 if method is sp.Fixed else 0.9999
    assert method(knob)(spectrum) == method(knob)(spectrum.detach().double())


@thorough
@given(keep=st.fractions(min_value=0, max_value=1, max_denominator=1000), spectrum=st.lists(st.integers(0, 50), min_size=1, max_size=24))
def test_energy_by_its_definition(keep: Exact, spectrum: list[int]) -> None:
    """The smallest rank whose largest values keep the fraction of the energy; in exact arithmetic."""
    if keep == 0:
        return
    energies = sorted((Exact(value) ** 2 for value in spectrum), reverse=True)
    expected = next(rank for rank in range(len(energies) + 1) if sum(energies[:rank]) >= keep * sum(energies))
    assert sp.Energy(float(keep))(tensor([float(value) for value in spectrum])) == max(1, expected)


@thorough
@given(spectrum=st.lists(st.floats(min_value=1e-6, max_value=1e6), min_size=1, max_size=24), zeros=st.integers(0, 5))
def test_energy_of_one_cuts_exactly_the_zeros(spectrum: list[float], zeros: int) -> None:
    assert sp.Energy(1.0)(tensor(spectrum + [0.0] * zeros)) == len(spectrum)


def test_energy_of_a_spectrum_of_zeros() -> None:
    assert sp.Energy(1.0)(torch.zeros(5)) == sp.Energy(0.5)(torch.zeros(5)) == 1


@thorough
@given(rank=counts, full=st.integers(1, 40))
def test_fixed_by_its_definition(rank: int, full: int) -> None:
    assert sp.Fixed(rank)(torch.rand(full)) == min(rank, full)


@thorough
@given(share=st.fractions(min_value=0, max_value=1, max_denominator=1000), full=st.integers(1, 2000))
def test_fraction_by_its_definition(share: Exact, full: int) -> None:
    if share > 0:
        assert sp.Fraction(float(share))(torch.zeros(full)) == math.ceil(share * full)


def born(method: type, **knobs: object) -> object:
    """Make a rule as it is made where nothing checks the types of arguments."""
    rule = object.__new__(method)
    for name, value in knobs.items():
        object.__setattr__(rule, name, value)
    rule.__post_init__()
    return rule


@pytest.mark.parametrize(("method", "knob"), [(sp.Energy, "keep"), (sp.Fraction, "of_full")])
@pytest.mark.parametrize("bad", [0, -0.1, 1.0001, 90, float("nan")])
def test_fractions_are_validated(method: type, knob: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"{method.__name__}: {knob} must be a fraction in \(0, 1\], got {bad}; for"):
        born(method, **{knob: bad})
    assert born(method, **{knob: 1}) == method(1.0)


@pytest.mark.parametrize("bad", [0, -3, 0.5, True, "4", None])
def test_counts_are_validated(bad: object) -> None:
    with pytest.raises(ValueError, match=rf"Fixed: rank must be an integer >= 1, got {bad!r}; for a fraction take Fraction"):
        born(sp.Fixed, rank=bad)
