"""CP and tensor-train forms through every verb."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.analysis.conv_spectra import conv_singular_values
from spectrim.budget.distortion import LossSensitivity, MeasuredLoss, NormalizedEnergy, SpectralEnergy, WhitenedEnergy
from spectrim.budget.distortion.base import distortions_of
from spectrim.budget.latency_table import latency_table
from spectrim.budget.rules import Fixed
from spectrim.budget.schemes import schemes_at
from spectrim.errors import LayerError, RankError, SettingError
from spectrim.forms import CP, FORMS, TensorTrain
from spectrim.forms.form import ranks_in
from spectrim.layers import named_factors
from spectrim.layers.sharded import refuse_sharded_factors
from spectrim.linalg.fold import FOLDS, to_matrix
from spectrim.plain.chain import PlainPair
from spectrim.surgery.optimizer_state import _carry
from spectrim.training.bits import counted
from spectrim.training.ramp import Ramp

SEED = 3
both = pytest.mark.parametrize("scheme", ["cp", "tt"])


def kernel() -> Tensor:
    return torch.randn(8, 6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))


def form_of(scheme: Any) -> Any:
    return FORMS[scheme].of(kernel(), to_matrix(kernel(), scheme))


def network() -> nn.Module:
    torch.manual_seed(SEED)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4))


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(SEED))


def dense_with(layer: Any, weight: Tensor) -> Any:
    """Return a copy of a layer with another weight."""
    made = copy.deepcopy(layer)
    made.weight = nn.Parameter(weight.detach())
    return made


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(images(), torch.arange(8) % 4)] * 3


def low_network(scheme: Any) -> nn.Module:
    return sp.factorize(network(), scheme=scheme)


@both
def test_the_budget_is_met_by_count_and_the_merged_network_is_plain(scheme: Any) -> None:
    model, x = network().eval(), images()
    low = low_network(scheme).eval()
    torch.testing.assert_close(low(x), model(x))
    cut = sp.prune(low, sp.allocate(low, sp.Budget(macs=0.4), x))
    merged = sp.merge(cut)
    torch.testing.assert_close(merged(x), cut(x))
    counted, dense = (sp.measure(network_, x, latency=False).macs for network_ in (merged, model))
    assert counted is not None
    assert counted <= 0.4 * dense
    pieces = [module for module in merged.modules() if type(module) is nn.Conv2d]
    made = [(conv.kernel_size, conv.groups == conv.in_channels > 1) for conv in pieces][-(3 if scheme == "cp" else 4) :]
    taps = [((3, 3), True)] if scheme == "cp" else [((3, 1), False), ((1, 3), False)]
    assert made == [((1, 1), False), *taps, ((1, 1), False)]
    words = {line.reason.split(" (")[0] for line in sp.coverage(cut) if line.scheme}
    assert f"merges to {'three' if scheme == 'cp' else 'four'} layers" in words


@both
@pytest.mark.parametrize(
    "dense", [nn.Conv2d(6, 8, 3, 2, 1), nn.ConvTranspose2d(6, 8, (3, 2), 2, 1, 1), nn.Conv2d(6, 8, (2, 3), dilation=2)]
)
def test_a_merged_layer_has_the_attributes_and_the_weight_of_the_dense_one(scheme: Any, dense: Any) -> None:
    cut = sp.factorize(nn.Sequential(dense), scheme, "*", rank=2)
    (layer,) = sp.merge(cut)
    assert isinstance(layer, PlainPair)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(layer, name) == getattr(dense, name), name
    torch.testing.assert_close(layer.weight + 0, cut[0].weight + 0)
    x = torch.randn(1, 6, 7, 8)
    torch.testing.assert_close(layer(x), type(dense).forward(dense_with(dense, layer.weight + 0), x))


@both
def test_compress_and_plan_take_the_scheme(scheme: Any) -> None:
    data, loss = batches(), nn.CrossEntropyLoss()
    settings: dict[str, Any] = {"epochs": 2, "squeeze": 0.5, "penalties": [sp.Orthogonality(), sp.Hoyer(0.01)], "progress": False}
    made = sp.compress(network().eval(), data, loss, 0.5, scheme=scheme, **settings)
    assert made.measured["final"].macs <= 0.5 * made.measured["dense"].macs
    assert {line.scheme for line in made.coverage if line.scheme} == {scheme}
    if scheme == "tt":  # `plan` has met tuples in the test of Tucker-2
        return
    found = sp.plan(network().eval(), images(), data, loss, scheme=scheme, budgets=[0.5])
    assert type(found).from_dict(found.to_dict()) == found
    assert str(found)


@both
def test_files_hold_sizes(scheme: Any, tmp_path: Path) -> None:
    x = images()
    cut = sp.prune(low_network(scheme).eval(), {"0": 3 if scheme == "cp" else (2, 4, 5), "3": 7})
    for name, saved in (("low", cut), ("merged", sp.merge(cut))):
        sp.save(saved, tmp_path / name)
        torch.testing.assert_close(sp.load(tmp_path / name, network().eval())(x), saved(x), rtol=0, atol=0)


@both
def test_a_dense_state_dict_loads_where_the_size_holds_it(scheme: Any) -> None:
    low, other = low_network(scheme).eval(), network().eval()
    other[0].weight.data.mul_(-0.5)
    low.load_state_dict(other.state_dict())
    torch.testing.assert_close(low(images()), other(images()))
    with pytest.raises(RuntimeError, match="a dense weight of a higher rank than the"):
        sp.prune(low, Fixed(2)).load_state_dict(other.state_dict())


@both
def test_optimizers_go_on_behind_a_cut_and_averages_follow(scheme: Any) -> None:
    model = low_network(scheme)
    average = copy.deepcopy(model)
    x = images()
    before = average.eval()(x)
    sp.prune_(model, {name: form.size for name, form in named_factors(model)}, followers=[average])
    torch.testing.assert_close(average(x), before, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()
        sp.prune_(model, Fixed(6), optimizer, followers=[average])
    assert set(ranks_in(form.size for _, form in named_factors(model))) <= {3, 6}
    assert all(state["exp_avg"].shape == parameter.shape for parameter, state in optimizer.state.items())
    assert {form.size for _, form in named_factors(average)} == {form.size for _, form in named_factors(model)}


def test_gradients_are_carried_to_rotated_cores() -> None:
    """With bases ``Q`` at a cut, gradients are those before times ``Q`` on either side: what moments of them follow."""
    old = form_of("tt").requires_grad_()
    turns = [torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q for rank in old.size]
    first, second, third, last = old.cores
    cores = first @ turns[0], torch.einsum("anb,ac,bd->cnd", second, turns[0], turns[1])
    new = old.like(*cores, torch.einsum("anb,ac,bd->cnd", third, turns[1], turns[2]), turns[2].mT @ last)
    torch.testing.assert_close(new.matrix(), old.matrix())
    weights = torch.randn_like(old.matrix())
    for form in (old, new):
        (form.matrix() * weights).sum().backward()
    for name, maps in old.turns(new).items():
        before, after = (form.get_parameter(name) for form in (old, new))
        torch.testing.assert_close(_carry(before.grad, "exp_avg", after, maps), after.grad)


def test_moments_follow_each_component_with_its_sign() -> None:
    old = form_of("cp").cut_to(5)
    order, signs = torch.tensor([3, 0, 4]), torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
    new = old.like(old.A[:, order] * signs, old.B[:, order] * signs, old.C[:, order])
    for name, maps in old.turns(new).items():
        before, after = (form.get_parameter(name).detach() for form in (old, new))
        torch.testing.assert_close(_carry(before, "exp_avg", after, maps), after)
        torch.testing.assert_close(_carry(before.square(), "exp_avg_sq", after, maps), after.square())


@both
def test_training_with_cuts_resumes(scheme: Any, tmp_path: Path) -> None:
    def train(stop: int | None, path: Path) -> nn.Module:
        torch.manual_seed(0)
        model = low_network(scheme)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)

        def stopping(epoch: int, line: Any, model: nn.Module) -> None:
            if epoch == stop:
                raise KeyboardInterrupt

        with nullcontext() if stop is None else pytest.raises(KeyboardInterrupt):
            settings: dict[str, Any] = {"courses": [Ramp(0.9, cuts=3)], "callbacks": [stopping], "checkpoint": path, "progress": False}
            sp.fit(model, batches(), nn.CrossEntropyLoss(), optimizer, 4, **settings)
        return model

    whole = train(None, tmp_path / "whole.pt")
    assert all(form.size != form.full_size for _, form in named_factors(whole))
    train(3, tmp_path / "stopped.pt")
    for (name, a), (_, b) in zip(whole.named_parameters(), train(None, tmp_path / "stopped.pt").named_parameters(), strict=True):
        assert torch.equal(a, b), name


@both
def test_a_cut_in_the_metrics_of_a_calibration_is_nearer_in_them(scheme: Any) -> None:
    W = kernel().flatten(2)
    root_in, root_out = torch.randn(6, 6, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    left, right, form = root_out @ root_out.T, root_in @ root_in.T, form_of(scheme)

    def error(cut: Any) -> float:
        rest = W - cut.matrix().detach().flatten(2)
        return float(torch.einsum("oit,op,ij,pjt->", rest, left, right, rest))

    tail = form.tail(left, right)
    torch.testing.assert_close(tail[0], torch.einsum("oit,op,ij,pjt->", W, left, right, W))
    for rung in (4, form.rank // 3):
        size = form.size_of(rung)
        assert error(form.cut_to(size, left, right)) < error(form.cut_to(size))
        assert error(form.cut_to(size, left, right)) <= float(tail[rung]) * (1 + 1e-9)
    again = form.cut_to(form.size_of(form.rank // 2))  # with fewer columns than there are channels, too
    assert error(again.cut_to(again.size_of(3), left, right)) < 1.1 * float(again.tail(left, right)[3]) + error(again)


@both
def test_distortions_of_every_kind_fit_the_path(scheme: Any) -> None:
    low, data, loss = low_network(scheme).eval(), batches(), nn.CrossEntropyLoss()
    moments = sp.calibrate(low, data, loss)
    for measure in (SpectralEnergy(), WhitenedEnergy(moments), NormalizedEnergy(images()), LossSensitivity(moments)):
        for name, distortion in distortions_of(low, measure).items():
            assert len(distortion) == dict(named_factors(low))[name].rank + 1
    assert distortions_of(low, MeasuredLoss(data, loss, points=2)).keys() == dict(named_factors(low)).keys()
    first_order = LossSensitivity(moments, order=1)
    with nullcontext() if scheme == "cp" else pytest.raises(LayerError, match="a tensor train': has no first-order distortion"):
        for distortion in distortions_of(low, first_order).values():
            assert bool((distortion.diff() <= 0).all())
    cut = sp.prune(low, sp.allocate(low, sp.Budget(macs=0.5), images(), importance=WhitenedEnergy(moments)), calibration=moments)
    assert cut(images()).isfinite().all()


def test_first_order_rises_are_those_of_scaling_components() -> None:
    form = form_of("cp").requires_grad_()
    weights = torch.randn_like(form.matrix())
    (form.matrix() * weights).sum().backward()
    rises = form.first_order_rises(form.C.grad)
    A, B, C = form.held()
    by_hand = torch.einsum("ok,ik,tk,oit->k", A, B, C, weights).abs().tolist()
    assert float(rises[-1]) == 0
    assert float(rises[0]) == pytest.approx(sum(by_hand))
    assert float(rises[4]) == pytest.approx(sum(by_hand[4:]))


def test_sizes_are_checked() -> None:
    train, components = form_of("tt"), form_of("cp")
    assert isinstance(train, TensorTrain)
    assert isinstance(components, CP)
    assert train.checked("", 7) == (6, 7, 7)  # a number stands for all
    assert train.checked("", [3, 2, 5]) == (3, 2, 5)  # as JSON and YAML have it
    for wrong in (0, 19, (9, 1, 1), (1, 2), True, 2.0, "4"):
        with pytest.raises(RankError, match=r"layer 'conv' \(8 x 6\)"):
            train.checked("conv", wrong)
    for wrong in (0, 49, (3, 2), True, 2.0):
        with pytest.raises(RankError, match=r"layer 'conv' \(8 x 6\)"):
            components.checked("conv", wrong)


@both
def test_what_such_a_form_cannot_do_is_refused(scheme: Any) -> None:
    called = {"cp": "a CP form", "tt": "a tensor train"}[scheme]
    with pytest.raises(LayerError, match=f"layer '0.factors.weight': is {called}, whose penalties and cuts need whole tensors"):
        refuse_sharded_factors(low_network(scheme))
    with pytest.raises(SettingError, match="one of matrices on the meta device: sizes depend on values"):
        sp.factorize(nn.Sequential(nn.Conv2d(8, 8, 3, device="meta")), scheme=scheme, where="*")
    assert low_network(scheme)[0].why_untimed("weight", eager=True) == f"{called} is no pair of operations"
    table = latency_table(low_network(scheme), images(), backend="eager", time_box=0.01)
    assert table.limits(low_network(scheme)).keys() == dict(named_factors(low_network(scheme))).keys()


def test_groups_single_taps_and_single_axes_take_another_scheme() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, (1, 3)), nn.Conv2d(8, 8, 3))
    assert [layer.scheme for layer in sp.factorize(model, scheme="tt", where="*")] == ["channel", "channel", "tucker", "tt"]
    assert [layer.scheme for layer in sp.factorize(model, scheme="cp", where="*")] == ["channel", "channel", "cp", "cp"]


@both
def test_a_zero_kernel_is_held_and_trains(scheme: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    nn.init.zeros_(model[0].weight)
    low = sp.factorize(model, scheme=scheme)
    low(images()).sum().backward()
    (form,) = (form for _, form in named_factors(low))
    assert float(form.slope_parameters()[0].grad.abs().sum()) > 0


@both
@pytest.mark.parametrize("merged", [False, True])
def test_spectra_of_the_operator_are_those_of_the_composed_kernel(scheme: Any, merged: bool) -> None:
    low = sp.factorize(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1).double()), scheme, "*", rank=2)
    dense = dense_with(nn.Conv2d(4, 6, 3, padding=1), low[0].weight + 0)
    layer = sp.merge(low)[0] if merged else low[0]
    for method in ("exact", "circular", "symbol"):
        found, expected = (conv_singular_values(each, 5, method=method) for each in (layer, dense))
        count = min(len(found), len(expected))
        torch.testing.assert_close(found[:count], expected[:count], rtol=1e-9, atol=1e-9)


@both
def test_each_operation_computes_in_its_own_bits(scheme: Any) -> None:
    low, x = sp.factorize(network(), scheme, rank=3).eval(), images(2)
    found = counted("counted", low, x)["macs"]
    layer = low[3]
    works = [macs for name, macs in found.items() if name.startswith("3")]
    assert len(works) == (3 if scheme == "cp" else 4)
    assert sum(works) == layer.work(layer, "weight", scheme, layer.factors_of("weight").size, (1, 16, 8, 8))


def test_a_layer_alone_can_be_priced_in_every_form() -> None:
    from spectrim.budget.ladder import ladder

    low = sp.factorize(nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)), where="*")
    x = torch.randn(2, 8, 9, 9)
    assert set(schemes_at(low, sp.Budget(params=0.4), x, ladder(low, x), among=FOLDS).values()) <= set(FOLDS)
