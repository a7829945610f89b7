"""Forms of a form: factors, kernels and dense weights that are pruned and rounded, through training, files and merging."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.budget.rounding.round_to import round_to
from spectrim.errors import LayerError, RankError, SettingError
from spectrim.forms import Dense, Factors, Rounded, RoundedSparse, Sparse
from spectrim.forms.constrained import kind_of_form
from spectrim.layers import named_factors
from spectrim.plain.chain import PlainPair
from spectrim.storage.coded.levels import found
from spectrim.storage.pack import pack, unpack
from spectrim.surgery.constrain import constrain
from spectrim.training.parts import Reconstruction
from spectrim.training.reconstruct import reconstruct


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 6)).eval()


def held(scheme: Any, **settings: Any) -> nn.Module:
    low = sp.factorize(network(), scheme, where="*")
    if scheme != "dense":
        low = sp.prune(low, {name: form.size_of(max(1, form.rank // 4)) for name, form in named_factors(low)})
    return constrain(low, **settings)


def matrices(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in model.parameters() if parameter.dim() > 1]


@pytest.mark.parametrize("scheme", ["dense", "channel", "spatial", "tucker", "cp", "tt"])
def test_merged_layers_have_the_zeros_and_the_levels_and_compute_the_same(scheme: Any, tmp_path: Path) -> None:
    x, low = torch.randn(3, 2, 6, 6), held(scheme, keep=0.5, bits=3)
    merged = sp.merge(low)
    torch.testing.assert_close(merged(x), low(x), rtol=1e-5, atol=1e-5)
    assert (scheme == "dense") == (not any(isinstance(module, PlainPair) for module in merged.modules()))
    for weight in matrices(merged):
        levels = found(weight.contiguous())
        assert levels is None or levels.table is None
        assert len(weight.unique()) <= 7
    kept = sum(int(weight.count_nonzero()) for weight in matrices(merged))
    assert kept <= 0.5 * sum(weight.numel() for weight in matrices(merged)) + 3
    packed = pack(merged, tmp_path / "net.spz")
    assert packed.coded_bytes < 0.25 * packed.size_bytes + 1500
    decoded = unpack(tmp_path / "net.spz", network())
    assert all(torch.equal(a, b) for a, b in zip(decoded.parameters(), merged.parameters(), strict=True))
    again = sp.load(sp.save(low, tmp_path / "folder"), network())
    assert torch.equal(again(x), low(x))
    assert [kind_of_form(form) for _, form in named_factors(again)] == ["RoundedSparse"] * 3
    assert [form.size for _, form in named_factors(again)] == [form.size for _, form in named_factors(low)]


def test_training_moves_weights_between_levels_and_keeps_zeros() -> None:
    low, x = held("channel", keep=0.3, bits=4), torch.randn(16, 2, 6, 6)
    before, forms = copy.deepcopy(low), dict(named_factors(low))
    zeros = {name: [part == 0 for part in form.shown()] for name, form in forms.items()}
    optimizer = torch.optim.Adam([p for p in low.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    start = float((low(x) - 1).square().mean().detach())
    for _ in range(30):
        optimizer.zero_grad()
        loss = (low(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * start
    for name, form in forms.items():
        assert isinstance(form, RoundedSparse)
        assert isinstance(form, Factors)
        assert torch.equal(form.S, torch.ones_like(form.S))
        assert all(bool((part[zero] == 0).all()) for part, zero in zip(form.shown(), zeros[name], strict=True))
        assert all(len(part.unique()) <= 15 for part in (form.U, form.Vh))
    assert any(not torch.equal(a, b) for a, b in zip(matrices(sp.merge(low)), matrices(sp.merge(before)), strict=True))


def test_distortions_of_ranks_bits_and_counts_are_squared_errors() -> None:
    """Worked by hand: 3, -1, 1, -4 keep 3 and -4; 2 bits hold -s, 0, s with s = 3.5 there."""
    form = Sparse.of(Dense(torch.tensor([[3.0, -1.0], [1.0, -4.0]], dtype=torch.float64)), 1.0)
    assert form.tail().tolist() == pytest.approx([27.0, 11.0, 2.0, 1.0, 0.0])
    both = Rounded.of(Sparse.of(form, 2), 2)
    assert both.matrix().tolist() == [[3.5, 0.0], [0.0, -3.5]]
    assert both.size == (2, 2)
    assert Rounded.of(form, 32).cut_to((2, 2)).size == (2, 2)


def test_every_size_of_an_svd_can_be_taken() -> None:
    weight = torch.randn(8, 6, dtype=torch.float64)
    form = Rounded.of(Factors.of(weight, weight), 32)
    assert form.full_size == form.size == (6, 32)
    cut = form.cut_to((3, 5))
    assert (cut.size, cut.plain_size, [tuple(part.shape) for part in cut.chain()]) == ((3, 5), 3, [(3, 6), (8, 3)])
    assert cut.cut_to(2).size == (3, 2)
    for wrong in ((3, 9), (7, 4), (3, 6), 33, "two", True):
        with pytest.raises(RankError, match="must be"):
            cut.checked("fc", wrong)
    assert form.cut(lambda spectrum: 2).size == (2, 32)


def test_what_cannot_be_held_says_so() -> None:
    low = sp.factorize(network(), "dense", where="*")
    with pytest.raises(SettingError, match=r"Rounded: bits must be an integer in \[2, 8\]"):
        constrain(low, bits=9)
    with pytest.raises(SettingError, match="Sparse: keep must be"):
        constrain(low, keep=0.0)
    with pytest.raises(LayerError, match="no factorized layer to constrain"):
        constrain(network(), bits=4)
    form = dict(named_factors(constrain(sp.factorize(network(), "channel", where="*"), bits=4)))["4"]
    with pytest.raises(LayerError, match="do not follow a cut of ranks"):
        form.turns(form.cut_to((2, 3)))


def test_a_budget_of_coded_bytes_chooses_bits() -> None:
    low, x = constrain(sp.factorize(network(), "dense", where="*"), bits=32), torch.zeros(1, 2, 6, 6)
    sizes = sp.allocate(low, sp.Budget(coded_bytes=0.2), x)
    assert set(sizes) == {"0", "2", "4"}
    cut = sp.prune(low, sizes)
    spent = sum(form.coded_bits() for _, form in named_factors(cut)) / 8 + 4 * (8 + 8 + 6)  # biases
    whole = 4 * sum(parameter.numel() for parameter in network().parameters())
    assert 0.14 * whole < spent <= 0.2 * whole
    best = {name: [float(error) for error in form.tail()[1:]] for name, form in named_factors(low)}
    bits = {name: [form.cut_to(size).coded_bits() / 8 for size in form.path()] for name, form in named_factors(low)}
    energies = {name: float(form.tail()[0]) for name, form in named_factors(low)}
    lost = sum(best[name][form.rung_of(sizes[name]) - 1] / energies[name] for name, form in named_factors(low))
    for one in range(8):  # brute force
        for two in range(8):
            for three in range(8):
                picked = dict(zip(best, (one, two, three), strict=True))
                if sum(bits[name][place] for name, place in picked.items()) + 88 <= 0.2 * whole:
                    assert lost <= sum(best[name][place] / energies[name] for name, place in picked.items()) * (1 + 1e-9) + 1e-12
    with pytest.raises(SettingError, match="at least"):
        sp.allocate(low, sp.Budget(coded_bytes=0.01), x)
    with pytest.raises(SettingError, match="constrain"):
        sp.allocate(sp.factorize(network(), where="*"), sp.Budget(coded_bytes=0.2), x)


def test_a_network_that_round_to_made_is_trained_on_its_own_levels() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(256, 32)
    made = round_to(model, [x], 1100, progress=False)
    low = constrain(sp.factorize(made.model, "dense", where="*"), steps=made.steps)
    assert torch.equal(low(x), made.model(x))
    optimizer = torch.optim.Adam(low.parameters(), 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        low(x).square().mean().backward()
        optimizer.step()
    trained = sp.merge(low)
    assert float(trained(x).detach().square().mean()) < 0.5 * float(made.model(x).detach().square().mean())
    for name, step in made.steps.items():
        levels = trained.get_parameter(f"{name}.weight").detach() / step
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    with pytest.raises(LayerError, match="8 bits reach 127 steps"):
        constrain(sp.factorize(model, "dense", where="*"), steps={"0": 1e-6})


def test_blocks_are_reconstructed_on_their_levels() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data = [torch.randn(64, 16) for _ in range(4)]
    cut = constrain(sp.factorize(dense, "dense", where="*"), bits=3)
    made, told = reconstruct(cut, dense, data, Reconstruction(steps=60))
    x = torch.cat(data)
    errors = [float((model(x) - dense(x)).square().mean().detach()) for model in (cut, made)]
    assert told
    assert errors[1] < 0.9 * errors[0]
    assert all(len(form.matrix().unique()) <= 7 for _, form in named_factors(made))
