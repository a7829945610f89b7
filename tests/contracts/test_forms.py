"""The laws of a form of a weight, over the table of forms."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.forms import FORMS, LAWS, METHODS, Form
from spectrim.linalg.fold import FOLDS
from spectrim.linalg.spectral import orthogonality_defect
from spectrim.tables import Row

CARDS = Path(__file__).resolve().parents[2] / "docs" / "methods"
every_form = pytest.mark.parametrize("row", METHODS, ids=lambda row: row.label)


def kernel(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(20, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def form_of(row: Row[Any], dtype: torch.dtype = torch.float64) -> Any:
    return row.example(kernel(dtype))


def test_every_fold_has_a_form_and_every_form_is_in_the_table() -> None:
    assert set(FORMS) == set(FOLDS)
    assert {row.method for row in METHODS if "of a form" not in row.laws} == set(FORMS.values())
    assert set().union(*(row.laws for row in METHODS)) == set(LAWS)


@every_form
def test_a_form_is_described(row: Row[Any]) -> None:
    assert issubclass(row.method, Form)
    assert f"spectrim.forms.{row.method.__name__}" in (CARDS / f"{row.card}.md").read_text(encoding="utf-8")


@every_form
def test_at_full_size_it_is_the_weight_and_its_gradients_reach_every_part(row: Row[Any]) -> None:
    form = form_of(row)
    assert form.size == form.full_size
    assert form.rank == form.full_rank
    torch.testing.assert_close(form.composed(*form.parameters()), kernel().flatten(1), rtol=1e-9, atol=1e-12)
    form.product().square().sum().backward()
    assert all(bool(part.grad.abs().sum() > 0) for part in form.parameters())


@every_form
def test_prices_rise_and_distortions_fall_along_the_rungs(row: Row[Any]) -> None:
    form = form_of(row)
    tail, sizes = form.tail(), [form.size_of(rung) for rung in range(1, form.rank + 1)]
    assert len(tail) == form.rank + 1
    assert float(tail[-1]) < 1e-12
    assert bool((tail.diff() <= 0).all())
    counts = [form.cut_to(size).coded_bits() if "of a form" in row.laws else form.count(size) for size in sizes]
    assert counts == sorted(set(counts))
    for rung, size in enumerate(sizes, 1):
        cut = form.cut_to(size)
        error = float((cut.matrix() - form.matrix()).square().sum().detach())
        assert error <= float(tail[rung]) * (1 + 1e-9) + 1e-15
        if "exact distortion" in row.laws:
            assert error == pytest.approx(float(tail[rung]), rel=1e-9, abs=1e-15)
        assert (cut.size, cut.rank, form.rung_of(size)) == (size, rung, rung)
        assert sum(part.numel() for part in cut.chain()) == form.count(size)
        assert all(orthogonality_defect(side) < 1e-12 for side in cut.sides())


@every_form
@pytest.mark.parametrize("far", [1e-3, 3.0], ids=["near", "far"])
def test_retraction_makes_sides_orthonormal_and_keeps_what_it_can_of_the_weight(row: Row[Any], far: float) -> None:
    form = form_of(row)
    if "sides held" not in row.laws:
        pytest.skip("its sides are computed from its parts")
    with torch.no_grad():
        for side in form.sides():
            side.add_(far * torch.randn(side.shape, dtype=side.dtype, generator=torch.Generator().manual_seed(1)))
            side.mul_(1 + far)
    defects, before, held = [orthogonality_defect(side) for side in form.sides()], form.matrix().detach(), copy.deepcopy(form)
    form.retract_()
    for side, defect in zip(form.sides(), defects, strict=True):
        assert orthogonality_defect(side) <= (2 * defect**2 if defect < 0.1 else 1e-6)
    with torch.no_grad():
        for side, made in zip(held.sides(), form.sides(), strict=True):
            side.copy_(made)  # the values not adapted
    adapted, not_adapted = (float((made.matrix().detach() - before).norm()) for made in (form, held))
    assert adapted < 0.9 * not_adapted or not defects  # the latter where nothing is orthonormal
    assert form.product().requires_grad


@every_form
def test_after_training_a_cut_is_that_of_the_weight_it_has_then(row: Row[Any]) -> None:
    form = form_of(row)
    assert form.exact
    with torch.no_grad():
        for part in form.parameters():
            part.mul_(1.3).add_(torch.randn_like(part), alpha=0.1)
    assert not form.exact
    held = form.matrix().detach()
    torch.testing.assert_close(form.in_order().matrix().detach(), held, rtol=1e-9, atol=1e-12)
    rung = min(4, form.rank)
    size, tail = form.size_of(rung), form.tail()
    error = float((form.cut_to(size).matrix() - held).square().sum().detach())
    assert error <= float(tail[rung]) * (1 + 1e-9)
    assert error > 0 or "one rung" in row.laws
    torch.testing.assert_close(tail[0], held.square().sum(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(form.half_squared_norm().double(), 0.5 * held.square().sum(), rtol=1e-5, atol=1e-5)


@every_form
def test_what_is_cut_is_the_tail(row: Row[Any]) -> None:
    """The share that penalties and schedules see is that of the distortion, as long as the parts are a decomposition."""
    form = form_of(row)
    for rung in sorted({1, min(3, form.rank), form.rank}):
        share = form.tail_share(form.size_of(rung)).double()
        lost = (type(form).like(form, *form.truncated_parts(rung)).matrix() - form.matrix()).square().sum().detach()
        torch.testing.assert_close(share, lost / form.tail()[0], rtol=1e-5, atol=1e-7)
        if "truncation" in row.laws:
            torch.testing.assert_close(lost, form.tail()[rung], rtol=1e-9, atol=1e-12)
        assert float(lost) <= float(form.tail()[rung]) * (1 + 1e-9) + 1e-12
    assert all(bool((values.diff() <= 1e-12).all()) for values in form.values())


@every_form
def test_parts_can_be_stored_resized_and_taken_from_a_dense_weight(row: Row[Any]) -> None:
    form = form_of(row)
    size = form.size_of(min(4, form.rank))
    cut = form.cut_to(size)
    assert form.size_of_parts(cut.state_dict()) == size
    assert form.size_of_parts({}) is None
    assert cut.resized(form.size).size == form.size
    torch.testing.assert_close(cut.resized(form.size).matrix(), cut.matrix())
    parts = cut.parts_of(cut.matrix().detach())
    assert parts is not None
    torch.testing.assert_close(form.like(*parts.values()).matrix(), cut.matrix(), rtol=1e-9, atol=1e-12)
    assert (cut.parts_of(form.matrix().detach()) is None) == ("one rung" not in row.laws)  # it does not hold that
    empty = type(form).empty(kernel(), form.matrix().detach(), size)
    assert (empty.size, empty.folded_shape, empty.dtype) == (size, form.folded_shape, form.dtype)


@every_form
def test_copies_pickles_and_half_precision(row: Row[Any]) -> None:
    form = form_of(row, torch.float32)
    for again in (copy.deepcopy(form), pickle.loads(pickle.dumps(form)), form.copied()):
        assert torch.equal(again.matrix(), form.matrix())
        assert [again.size_of(rung) for rung in (1, form.rank)] == [form.size_of(rung) for rung in (1, form.rank)]
    half = copy.deepcopy(form).half()
    assert half.dtype == half.matrix().dtype == torch.float16
    assert {part.dtype for part in half.parameters()} == {torch.float32}
    assert not any(part.requires_grad for part in row.example(kernel().detach()).parameters())
