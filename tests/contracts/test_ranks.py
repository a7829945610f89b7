"""The laws of a rank rule, over `spectrim.budget.rules.METHODS`."""

import math
from dataclasses import fields
from fractions import Fraction as Exact

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spectrim as sp
from spectrim.budget.rules import LAWS, METHODS
from spectrim.protocols import RankRule
from spectrim.tables import Row

fractions = st.floats(min_value=0.0, max_value=1.0, exclude_min=True)
counts = st.integers(min_value=1, max_value=40)
KNOBS = {"fraction": fractions, "count": counts}
"""By law: admissible values of a rule's only field."""
values = st.floats(min_value=0.0, max_value=1e6, allow_subnormal=False)
spectra = st.lists(values, min_size=1, max_size=24)


def obeying(*laws: str) -> pytest.MarkDecorator:
    rows = [row for row in METHODS if not laws or row.laws & set(laws)]
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.label)


every_method = obeying()
thorough = settings(deadline=None, max_examples=60)


def tensor(spectrum: list[float]) -> torch.Tensor:
    return torch.tensor(spectrum, dtype=torch.float64)


def knob(row: Row[RankRule]) -> st.SearchStrategy[float]:
    """Admissible values of the rule's only field."""
    (law,) = row.laws & set(KNOBS)
    return KNOBS[law]


def test_every_row_has_one_knob_and_every_law_a_row() -> None:
    assert all(len(row.laws & set(KNOBS)) == 1 and len(fields(row.method)) == 1 for row in METHODS)
    assert set().union(*(row.laws for row in METHODS)) == set(LAWS)


@every_method
def test_is_a_rank_rule(row: Row[RankRule]) -> None:
    (value,) = vars(row.example).values()
    rule, again = row.example, row.method(value)
    assert isinstance(rule, RankRule)
    assert isinstance(rule, row.method)
    assert rule == again
    assert hash(rule) == hash(again)


@every_method
@thorough
@given(data=st.data(), spectrum=spectra)
def test_in_range(row: Row[RankRule], data: st.DataObject, spectrum: list[float]) -> None:
    rank = row.method(data.draw(knob(row)))(tensor(spectrum))
    assert type(rank) is int
    assert 1 <= rank <= len(spectrum)


@every_method
@thorough
@given(data=st.data(), spectrum=spectra)
def test_monotone_in_the_knob(row: Row[RankRule], data: st.DataObject, spectrum: list[float]) -> None:
    low, high = sorted((data.draw(knob(row)), data.draw(knob(row))))
    assert row.method(low)(tensor(spectrum)) <= row.method(high)(tensor(spectrum))


@every_method
@thorough
@given(data=st.data(), spectrum=spectra)
def test_blind_to_the_order(row: Row[RankRule], data: st.DataObject, spectrum: list[float]) -> None:
    rule = row.method(data.draw(knob(row)))
    assert rule(tensor(data.draw(st.permutations(spectrum)))) == rule(tensor(spectrum))


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_and_gradient_do_not_matter(row: Row[RankRule], dtype: torch.dtype) -> None:
    spectrum = torch.tensor([300.0, 2.0, 0.25, 0.125], dtype=dtype, requires_grad=True)  # 300^2 overflows float16
    for rule in (row.example, row.method({"count": 2, "fraction": 0.9999}[next(iter(row.laws))])):
        assert rule(spectrum) == rule(spectrum.detach().double())


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
    assert sp.budget.Fixed(rank)(torch.rand(full)) == min(rank, full)


@thorough
@given(share=st.fractions(min_value=0, max_value=1, max_denominator=1000), full=st.integers(1, 2000))
def test_fraction_by_its_definition(share: Exact, full: int) -> None:
    if share > 0:
        assert sp.budget.Fraction(float(share))(torch.zeros(full)) == math.ceil(share * full)


def born(method: type, **knobs: object) -> object:
    """Make a rule as it is made where nothing checks the types of arguments."""
    rule = object.__new__(method)
    for name, value in knobs.items():
        object.__setattr__(rule, name, value)
    rule.__post_init__()
    return rule


def name_of_knob(row: Row[RankRule]) -> str:
    return fields(row.method)[0].name


@obeying("fraction")
@pytest.mark.parametrize("bad", [0, -0.1, 1.0001, 90, float("nan")])
def test_fractions_are_validated(row: Row[RankRule], bad: float) -> None:
    name = name_of_knob(row)
    with pytest.raises(ValueError, match=rf"{row.label}: {name} must be a fraction in \(0, 1\], got {bad}; for"):
        born(row.method, **{name: bad})
    assert born(row.method, **{name: 1}) == row.method(1.0)


@obeying("count")
@pytest.mark.parametrize("bad", [0, -3, 0.5, True, "4", None])
def test_counts_are_validated(row: Row[RankRule], bad: object) -> None:
    name = name_of_knob(row)
    with pytest.raises(ValueError, match=rf"{row.label}: {name} must be an integer >= 1, got {bad!r}; for a fraction use Fraction"):
        born(row.method, **{name: bad})


@obeying("fraction")
@thorough
@given(spectrum=st.lists(st.floats(min_value=1e-6, max_value=1e6), min_size=1, max_size=24))
def test_a_fraction_of_one_cuts_nothing(row: Row[RankRule], spectrum: list[float]) -> None:
    assert row.method(1.0)(tensor(spectrum)) == len(spectrum)
