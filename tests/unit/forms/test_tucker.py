"""Tucker-2 forms: sizes of two ranks through every verb."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.budget.distortion import LossSensitivity, MeasuredLoss, NormalizedEnergy, SpectralEnergy, WhitenedEnergy
from spectrim.budget.distortion.base import distortions_of
from spectrim.budget.rules import Fixed
from spectrim.errors import LayerError, RankError, SettingError
from spectrim.forms import Tucker2
from spectrim.layers import named_factors
from spectrim.layers.sharded import refuse_sharded_factors
from spectrim.linalg.tucker import hooi, hosvd
from spectrim.surgery.optimizer_state import _carry
from spectrim.training.ramp import Ramp

SEED = 3


def kernel(out: int = 8, in_: int = 6, taps: int = 9) -> Tensor:
    return torch.randn(out, in_, taps, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))


def composed(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return torch.einsum("rst,or,is->oit", parts[1], parts[0], parts[2])


def network() -> nn.Module:
    torch.manual_seed(SEED)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4))


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(SEED))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(images(), torch.arange(8) % 4)] * 4


class Interrupted(list[Any]):
    """Batches of which so many are given out in all, then the run is interrupted."""

    def __init__(self, content: list[Any], left: int) -> None:
        super().__init__(content)
        self.left = left

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


def low_network() -> nn.Module:
    return sp.factorize(network(), scheme="tucker")


def test_a_kernel_of_one_pattern_has_a_core_of_one_number() -> None:
    """``W[o, i, t] = a_o b_i c_t`` with norms 5, 1 and 2: one slice of the core holds all of the norm, 10."""
    a, b, c = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8, 0.0]), torch.tensor([2.0, 0.0])
    parts = hosvd(torch.einsum("o,i,t->oit", a, b, c), (1, 1))
    assert float(parts[1].norm()) == pytest.approx(10.0)
    torch.testing.assert_close(composed(parts), torch.einsum("o,i,t->oit", a, b, c).double())


@pytest.mark.parametrize("shape", [(8, 6, 9), (12, 2, 3), (2, 12, 3), (5, 5, 1)])
def test_the_full_size_reproduces_any_shape_and_hooi_never_loses_more(shape: tuple[int, int, int]) -> None:
    W = kernel(*shape)
    full = Tucker2.full_size_of(W)
    torch.testing.assert_close(composed(hosvd(W, full)), W, rtol=1e-9, atol=1e-12)
    for size in {(1, 1), (min(2, full[0]), min(2, full[1])), (full[0], 1)}:
        errors = [float((composed(hooi(W, size, sweeps)) - W).norm()) for sweeps in (0, 1, 2, 5)]
        assert errors == sorted(errors, reverse=True) or max(errors) - min(errors) < 1e-9


def test_the_path_is_nested_and_every_size_can_be_cut_to() -> None:
    form = Tucker2.of(kernel(), kernel())
    path = form.path()
    assert path[0] == (1, 1)
    assert path[-1] == form.size == (8, 6)
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(path)]
    assert set(steps) <= {(1, 0), (0, 1)}
    assert form.cut_to((5, 2)).size == (5, 2)  # on the path or not
    assert form.cut_to(path[4]).path() == path[:5]


def test_sizes_are_checked() -> None:
    form = Tucker2.of(kernel(), kernel())
    assert form.checked("", 7) == (7, 6)  # a number stands for both
    assert form.checked("", [3, 2]) == (3, 2)  # as JSON and YAML have it
    for wrong in (0, 9, (9, 1), (1, 0), (1, 2, 3), True, (True, 1), 2.0, "4"):
        with pytest.raises(RankError, match=r"layer 'conv' \(8 x 6\): size must be a number of at least 1, or one for each axis"):
            form.checked("conv", wrong)


def test_a_cut_in_the_metrics_of_a_calibration_is_nearer_in_them() -> None:
    W = kernel()
    root_in, root_out = torch.randn(6, 6, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    left, right, form = root_out @ root_out.T, root_in @ root_in.T, Tucker2.of(kernel(), kernel())

    def error(cut: Tucker2) -> float:
        rest = W - cut.matrix().detach()
        return float(torch.einsum("oit,op,ij,pjt->", rest, left, right, rest))

    for size in ((3, 3), (6, 2)):
        rung = form.rung_of(size)
        assert error(form.cut_to(size, left, right)) < error(form.cut_to(size))
        assert error(form.cut_to(form.size_of(rung), left, right)) <= float(form.tail(left, right)[rung]) * (1 + 1e-9)
    torch.testing.assert_close(form.tail(left, right)[0], torch.einsum("oit,op,ij,pjt->", W, left, right, W))


def test_rules_see_the_spectrum_along_each_channel_axis() -> None:
    form = Tucker2.of(kernel(), kernel())
    outputs, inputs = form.spectra()
    for axis, spectrum in enumerate((outputs, inputs)):
        torch.testing.assert_close(spectrum, torch.linalg.svdvals(kernel().movedim(axis, 0).flatten(1))[: len(spectrum)])
    assert form.cut(Fixed(2)).size == (2, 2)
    assert form.cut(sp.Energy(0.7)).size == (sp.Energy(0.7)(outputs), sp.Energy(0.7)(inputs))


def test_the_budget_is_met_by_count_and_the_merged_network_is_three_layers() -> None:
    model, x = network().eval(), images()
    low = sp.factorize(model, scheme="tucker")
    torch.testing.assert_close(low(x), model(x))
    sizes = sp.allocate(low, sp.Budget(macs=0.4), x)
    assert all(isinstance(size, tuple) for size in sizes.values())
    cut = sp.prune(low, sizes)
    merged = sp.merge(cut)
    torch.testing.assert_close(merged(x), cut(x))
    counted, dense = (sp.measure(network_, x, latency=False).macs for network_ in (merged, model))
    assert counted is not None
    assert counted <= 0.4 * dense
    convolutions = [module for module in merged.modules() if isinstance(module, nn.Conv2d) and type(module) is nn.Conv2d]
    assert [conv.kernel_size for conv in convolutions][-3:] == [(1, 1), (3, 3), (1, 1)]


def test_compress_and_plan_take_the_scheme() -> None:
    data, loss = batches(), nn.CrossEntropyLoss()
    for settings in ({}, {"epochs": 2, "squeeze": 0.5, "penalties": [sp.Orthogonality(), sp.Hoyer(0.01)]}):
        made = sp.compress(network().eval(), data, loss, 0.5, scheme="tucker", progress=False, **settings)  # type: ignore[arg-type]
        assert made.measured["final"].macs <= 0.5 * made.measured["dense"].macs
        assert {scheme for line in made.coverage if (scheme := line.scheme)} == {"tucker"}
    found = sp.plan(network().eval(), images(), data, loss, scheme="tucker", budgets=[0.6, 0.4])
    assert type(found).from_dict(found.to_dict()) == found
    assert " x " in str(found)
    for row in found.budgets:
        assert row.totals is not None
        assert row.totals.macs <= row.budget["macs"] * found.dense.macs


def test_files_hold_sizes(tmp_path: Path) -> None:
    model, x = network().eval(), images()
    cut = sp.prune(sp.factorize(model, scheme="tucker"), {"0": (5, 2), "3": 7})
    assert {name: form.size for name, form in named_factors(cut)} == {"0": (5, 2), "3": (7, 7)}
    for name, saved in (("low", cut), ("merged", sp.merge(cut))):
        sp.save(saved, tmp_path / name)
        torch.testing.assert_close(sp.load(tmp_path / name, network().eval())(x), saved(x), rtol=0, atol=0)


def test_a_dense_state_dict_loads_where_the_size_holds_it() -> None:
    low, other = low_network().eval(), network().eval()
    other[0].weight.data.mul_(-0.5)
    low.load_state_dict(other.state_dict())
    torch.testing.assert_close(low(images()), other(images()))
    with pytest.raises(RuntimeError, match="a dense weight of a higher rank than the"):
        sp.prune(low, Fixed(2)).load_state_dict(other.state_dict())


def test_gradients_are_carried_to_rotated_bases() -> None:
    """With bases ``A P`` and ``B Q`` the gradients are those before times ``P`` and ``Q``: what moments of them follow."""
    old = Tucker2.of(kernel().requires_grad_(), kernel())
    P, Q = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q for size in old.size)
    new = old.like(old.A @ P, torch.einsum("rst,ra,sb->abt", old.core, P, Q), old.B @ Q)
    torch.testing.assert_close(new.matrix(), old.matrix())
    weights = torch.randn_like(old.matrix())
    for form in (old, new):
        (form.matrix() * weights).sum().backward()
    for name, turns in old.turns(new).items():
        before, after = (form.get_parameter(name) for form in (old, new))
        assert before.grad is not None
        torch.testing.assert_close(_carry(before.grad, "exp_avg", after, turns), after.grad)


def test_optimizers_go_on_behind_a_cut() -> None:
    model = low_network()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()
        sp.prune_(model, Fixed(6), optimizer)
    assert {form.size for _, form in named_factors(model)} == {(6, 3), (6, 6)}
    assert all(state["exp_avg"].shape == parameter.shape for parameter, state in optimizer.state.items())


def test_an_average_follows_a_cut() -> None:
    model = low_network()
    average = copy.deepcopy(model)
    x = images()
    before = average.eval()(x)
    sp.prune_(model, {name: form.size for name, form in named_factors(model)}, followers=[average])
    torch.testing.assert_close(average(x), before, rtol=1e-4, atol=1e-5)


def test_training_with_cuts_resumes(tmp_path: Path) -> None:
    def train(epochs: int, path: Path) -> nn.Module:
        torch.manual_seed(0)
        model = low_network()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        with nullcontext() if epochs == 4 else pytest.raises(KeyboardInterrupt):
            data = batches() if epochs == 4 else Interrupted(batches(), 9)
            sp.fit(model, data, nn.CrossEntropyLoss(), optimizer, 4, courses=[Ramp(0.9, cuts=3)], checkpoint=path, progress=False)
        return model

    whole = train(4, tmp_path / "whole.pt")
    assert all(form.size != form.full_size for _, form in named_factors(whole))
    train(2, tmp_path / "stopped.pt")
    resumed = train(4, tmp_path / "stopped.pt")
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_distortions_of_every_kind_fit_the_path() -> None:
    low, data, loss = low_network().eval(), batches(), nn.CrossEntropyLoss()
    moments = sp.calibrate(low, data, loss)
    measures = [SpectralEnergy(), WhitenedEnergy(moments), NormalizedEnergy(images()), LossSensitivity(moments)]
    measures += [LossSensitivity(moments, order=1), MeasuredLoss(data, loss, points=2)]
    for measure in measures:
        for name, distortion in distortions_of(low, measure).items():
            assert len(distortion) == dict(named_factors(low))[name].rank + 1
    cut = sp.prune(low, sp.allocate(low, sp.Budget(macs=0.5), images(), importance=WhitenedEnergy(moments)), calibration=moments)
    assert cut(images()).isfinite().all()


def test_shards_are_refused() -> None:
    refuse_sharded_factors(sp.factorize(network(), scheme="channel"))
    with pytest.raises(LayerError, match=r"layer '0.factors.weight': is a Tucker form, whose penalties and cuts need whole tensors"):
        refuse_sharded_factors(low_network())


def test_a_zero_kernel_is_held_and_trains() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    nn.init.zeros_(model[0].weight)
    low = sp.factorize(model, scheme="tucker")
    low(images()).sum().backward()
    assert float(dict(named_factors(low))["0"].core.grad.abs().sum()) > 0


def test_groups_and_single_taps_keep_their_matrix_and_meta_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3))
    low = sp.factorize(model, scheme="tucker", where="*")
    assert [layer.scheme for layer in low] == ["channel", "channel", "tucker"]
    with pytest.raises(SettingError, match="one of matrices on the meta device: sizes depend on values"):
        sp.factorize(nn.Sequential(nn.Conv2d(8, 8, 3, device="meta")), scheme="tucker", where="*")
