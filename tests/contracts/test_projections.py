"""The laws of a projection, over `spectrim.projections.METHODS`."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.projections import LAWS, METHODS
from spectrim.protocols import Bits, Projection
from spectrim.tables import Row


def obeying(*laws: str) -> pytest.MarkDecorator:
    rows = [row for row in METHODS if not laws or row.laws & set(laws)]
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.label)


every_method = obeying()
SHAPES = [(6, 9), (5, 2, 3, 3), (13, 4), (24,)]


def samples(seed: int = 0) -> list[Tensor]:
    """Tensors with and without ties and zeros; of several shapes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [*drawn, drawn[0].round(decimals=0), drawn[1] * (drawn[1].abs() > 0.7), torch.zeros(4, 4, dtype=torch.float64)]


def members(row: Row[Any], tensor: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Members of the set, near the tensor and far from it: projections of other tensors, moved as the set allows."""
    found = []
    for noise in (0.02, 0.1, 0.3, 1.0, 3.0):
        for _ in range(3):
            other = row.example(tensor + noise * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
            scale = float((tensor * other).sum() / other.square().sum().clamp(min=1e-12))
            found += [other, other * scale] if "scale-free" in row.laws and scale > 0 else [other]
    return found


def test_every_law_has_a_row() -> None:
    assert set().union(*(row.laws for row in METHODS)) == set(LAWS)


@every_method
def test_is_a_projection(row: Row[Any]) -> None:
    assert isinstance(row.example, Projection)
    again = row.method(**{field.name: getattr(row.example, field.name) for field in dataclasses.fields(row.method)})
    assert again == row.example
    assert hash(again) == hash(row.example)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_returns_a_new_tensor_of_the_same_kind(row: Row[Any], dtype: torch.dtype) -> None:
    """The live tensor is neither changed nor shared: what is done to the result does not reach it."""
    for tensor in samples():
        tensor = tensor.to(dtype)
        before = tensor.clone()
        made = row.example(tensor)
        assert (made.shape, made.dtype, made.device) == (tensor.shape, tensor.dtype, tensor.device)
        made.add_(1)
        assert torch.equal(tensor, before)


@every_method
def test_a_member_stays(row: Row[Any]) -> None:
    for tensor in samples():
        member = row.example(tensor)
        again = row.example(member)
        if "exact" in row.laws:
            assert torch.equal(again, member)
        torch.testing.assert_close(again, member, rtol=1e-9, atol=1e-9)


@obeying("nearest")
def test_no_random_member_is_nearer(row: Row[Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    nearer = 0
    for tensor in samples(1):
        least = float((tensor - row.example(tensor)).norm())
        for member in members(row, tensor, generator):
            distance = float((tensor - member).norm())
            assert distance >= least * (1 - 1e-9) - 1e-12
            nearer += distance < 1.1 * least
    assert nearer, "some members are about as near, or the test says little"


@obeying("prunes")
def test_entries_are_kept_or_zero(row: Row[Any]) -> None:
    for tensor in samples():
        made = row.example(tensor)
        assert torch.equal(made, torch.where(made != 0, tensor, 0))


@obeying("rounds")
def test_values_are_few_and_zeros_stay(row: Row[Any]) -> None:
    levels = getattr(row.example, "second", row.example)
    for tensor in samples():
        made = row.example(tensor)
        assert torch.equal(made[tensor == 0], torch.zeros_like(made[tensor == 0]))
        rows = (
            made.reshape(len(made), -1)
            if levels.per == "channel"
            else made.flatten().split(levels.per)
            if levels.per != "tensor"
            else [made]
        )
        for values in rows:
            kinds = values.unique() if levels.zero else values[values != 0].unique()
            assert len(kinds) <= 2**levels.width


@obeying("scale-free")
@pytest.mark.parametrize("factor", [0.25, 1024.0])
def test_a_multiple_gives_a_multiple(row: Row[Any], factor: float) -> None:
    for tensor in samples():
        torch.testing.assert_close(row.example(factor * tensor), factor * row.example(tensor), rtol=1e-9, atol=1e-9)


@every_method
def test_bits_are_whole_numbers_and_bounded(row: Row[Any]) -> None:
    for tensor in samples()[:4]:
        found = row.example.stored_bits(row.example(tensor))
        assert isinstance(found, Bits)
        assert found.data >= 0
        assert found.index >= 0
        assert found.total == found.data + found.index <= 64 * 2 * tensor.numel()
