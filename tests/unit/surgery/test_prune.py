"""`prune` is exact, and training goes on with its moments."""

import copy
import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import spectrim as sp
from spectrim.errors import LayerError, RankError
from spectrim.forms.svd import Factors
from spectrim.layers import named_factors
from spectrim.linalg.spectral import orthogonality_defect, tail_energy
from spectrim.surgery.calibrate import calibrate

EVERYTHING = sp.match("*")


class Net(nn.Module):
    """A grouped convolution, a recurrent layer, a tied pair and a dense norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.lstm = nn.LSTM(6, 5)
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).flatten(2).permute(2, 0, 1)
        return self.two(torch.tanh(self.one(self.lstm(y)[0])))


def trained(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A factorized model whose factors are neither orthonormal nor sorted, with singular values of both signs."""
    low = sp.factorize(Net().to(dtype), "channel", EVERYTHING)
    with torch.no_grad():
        for _, factors in named_factors(low):
            for parameter in factors.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, dtype=parameter.dtype))
            factors.S[..., 1] *= -1
    return low


def call(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    return model(torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3), dtype=dtype))


# ---- the cut


def test_a_rule_sees_true_singular_values() -> None:
    low = trained()
    seen: list[Tensor] = []

    def rule(spectrum: Tensor) -> int:
        seen.append(spectrum)
        return 2

    cut = sp.prune(low, rule)
    assert len(seen) == 4  # of the tied pair one
    for spectrum, (name, factors) in zip(seen, named_factors(low), strict=True):
        true = torch.linalg.svdvals(factors.matrix().detach())
        true = true if true.dim() == 1 else true.square().sum(0).sqrt()
        torch.testing.assert_close(spectrum, true, rtol=1e-9, atol=1e-12)
        new = dict(named_factors(cut))[name]
        error = (new.matrix() - factors.matrix()).detach().square().sum()
        torch.testing.assert_close(error, tail_energy(true)[2], rtol=1e-9, atol=1e-12)
        assert orthogonality_defect(new.U) < 1e-12
        assert orthogonality_defect(new.Vh.mT) < 1e-12
        assert (new.S > 0).all()
        assert (new.S.diff(dim=-1) <= 0).all()


def test_cutting_at_the_held_rank_changes_no_output() -> None:
    low = trained()
    torch.testing.assert_close(call(sp.prune(low, sp.budget.Fixed(99))), call(low), rtol=1e-9, atol=1e-9)
    once = sp.prune(low, sp.budget.Fixed(2))
    torch.testing.assert_close(call(sp.prune(once, sp.budget.Fixed(2))), call(once), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_tensors_really_become_smaller(dtype: torch.dtype) -> None:
    low = sp.factorize(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Linear(20, 30)).to(dtype), "channel", EVERYTHING)
    cut = sp.prune(low, {"0": 2, "1": 3})
    assert [tuple(p.shape) for p in cut[0].factors.parameters()] == [(2, 4, 2), (2, 2), (2, 2, 36)]
    assert [tuple(p.shape) for p in cut[1].factors.parameters()] == [(30, 3), (3,), (3, 20)]
    for parameter in cut.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    files = [io.BytesIO(), io.BytesIO()]
    for model, file in zip((cut, low), files, strict=True):
        torch.save(model.state_dict(), file)
    saved = sum(p.numel() * p.element_size() for p in low.parameters()) - sum(p.numel() * p.element_size() for p in cut.parameters())
    assert files[1].tell() - files[0].tell() == pytest.approx(saved, rel=0.2)  # zip archives align each tensor to 64 bytes


def test_the_input_is_untouched() -> None:
    low = trained()
    before = {name: value.clone() for name, value in low.state_dict().items()}
    for parameter in sp.prune(low, sp.budget.Fixed(1)).parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in low.state_dict().items())


def test_a_mapping_cuts_what_it_names() -> None:
    cut = sp.prune(trained(), {"lstm.weight_hh_l0": 2, "one": 3})
    assert {name: f.rank for name, f in named_factors(cut)} == {"conv": 3, "lstm.weight_ih_l0": 6, "lstm.weight_hh_l0": 2, "one": 3}
    assert cut.two.factors["weight"] is cut.one.factors["weight"]


def test_singular_vectors_keep_their_direction() -> None:
    """A cut of factors that are orthonormal and sorted already is a slice; the sign of a value goes to its row of Vh."""
    low = sp.factorize(Net().double(), "channel", EVERYTHING)
    with torch.no_grad():
        low.one.S[1] *= -1
    cut = sp.prune(low, sp.budget.Fixed(2))
    for (_, old), (_, new) in zip(named_factors(low), named_factors(cut), strict=True):
        torch.testing.assert_close(new.U, old.U[..., :2], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(new.S, old.S[..., :2].abs(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(new.Vh, (old.S.sign().unsqueeze(-1) * old.Vh)[..., :2, :], rtol=1e-9, atol=1e-9)


# ---- the cut that calibration data choose


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(3, 4, 4, 4).double(), torch.randn(4, 3, 5).double()) for _ in range(4)]


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


@pytest.mark.parametrize("loss", [None, mean_square], ids=["output", "loss"])
def test_a_calibrated_cut_has_the_weighted_error_of_its_tail(loss: Any) -> None:
    low = trained()
    found = calibrate(low, batches(), loss)
    seen: list[Tensor] = []

    def rule(spectrum: Tensor) -> int:
        seen.append(spectrum)
        return 2

    cut = dict(named_factors(sp.prune(low, rule, calibration=found)))
    for spectrum, (name, factors) in zip(seen, named_factors(low), strict=True):
        A, G = found.inputs[name], found.outputs.get(name, torch.eye(factors.shape[0]).double())
        difference, whole = (cut[name].matrix() - factors.matrix()).detach(), factors.matrix().detach()
        error, all_of_it = ((G @ D @ A * D).sum() for D in (difference, whole))
        assert abs(float(error - tail_energy(spectrum)[2])) < 1e-9 * float(all_of_it)
        plain = (dict(named_factors(sp.prune(low, sp.budget.Fixed(2))))[name].matrix() - whole).detach()
        assert error < (G @ plain @ A * plain).sum()
        assert orthogonality_defect(cut[name].U) < 1e-9
        assert orthogonality_defect(cut[name].Vh.mT) < 1e-9
        assert (cut[name].S.diff(dim=-1) <= 0).all()


def test_a_calibrated_cut_of_nothing_changes_nothing() -> None:
    low = trained()
    found = calibrate(low, batches(), mean_square)
    torch.testing.assert_close(call(sp.prune(low, sp.budget.Fixed(99), calibration=found)), call(low), rtol=1e-9, atol=1e-9)


def test_in_place_and_copy_cut_alike() -> None:
    low = trained()
    found = calibrate(low, batches(), mean_square)
    expected = call(sp.prune(low, sp.budget.Fixed(2), calibration=found))
    optimizer = torch.optim.Adam(low.parameters())
    call(low).sum().backward()
    optimizer.step()
    moved = sp.prune(low, sp.budget.Fixed(2), calibration=found)
    sp.prune_(low, sp.budget.Fixed(2), optimizer, calibration=found)
    assert torch.equal(call(moved), call(low))
    assert not torch.allclose(call(low), expected)
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in low.parameters() if p in optimizer.state)


def test_skipped_weights_are_cut_plainly_bit_for_bit() -> None:
    low = sp.factorize(nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 5)), where=EVERYTHING)
    found = calibrate(low, [torch.randint(6, (2, 3))])
    plain, cut = (sp.prune(low, sp.budget.Fixed(2), calibration=c) for c in (None, found))
    assert torch.equal(plain[0].weight, cut[0].weight)
    assert not torch.allclose(plain[1].weight, cut[1].weight)


def test_the_calibration_of_another_model_is_refused() -> None:
    found = calibrate(sp.factorize(nn.Linear(5, 5), where=EVERYTHING), [torch.ones(1, 5)])
    with pytest.raises(LayerError, match=re.escape("layer 'conv': (3 x 18) is not in the calibration; calibrate this model")):
        sp.prune(trained(), sp.budget.Fixed(2), calibration=found)
    with pytest.raises(LayerError, match=re.escape("(4 x 3) is not in the calibration")):
        sp.prune(sp.factorize(nn.Linear(3, 4), where=EVERYTHING), sp.budget.Fixed(2), calibration=found)


@pytest.mark.parametrize(
    ("ranks", "error", "message"),
    [
        ({"one": 6}, RankError, "layer 'one' (5 x 5): rank must be in [1, 5], got 6"),
        ({"lstm.weight_ih_l0": 0}, RankError, "layer 'lstm.weight_ih_l0' (20 x 6): rank must be in [1, 6], got 0"),
        (
            {"lstm.weight_ih": 1},
            LayerError,
            "layer 'lstm.weight_ih': is not a factorized weight of this model; did you mean 'lstm.weight_ih_l0'?",
        ),
        ({"norm": 1}, LayerError, "layer 'norm': is not a factorized weight of this model; "),
        (lambda spectrum: 99, RankError, "layer 'conv' (3 x 18): rank must be in [1, 3], got 99"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # the same in every process
)
def test_bad_ranks_are_refused(ranks: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        sp.prune(trained(), ranks)


def test_a_rank_that_is_cut_already_is_not_promised_back() -> None:
    cut = sp.prune(trained(), {"one": 2})
    with pytest.raises(RankError, match=re.escape("layer 'one' (5 x 5): rank must be in [1, 2] (2 of 5 singular values are left), got 4")):
        sp.prune(cut, {"one": 4})


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(LayerError, match=re.escape("layer 'Net': has no factorized layer; call factorize(model) first")):
        sp.prune(Net(), sp.budget.Fixed(1))


@pytest.mark.parametrize("which", ["U", "S", "Vh"])
def test_factors_that_are_not_finite_are_refused_by_name(which: str) -> None:
    low = trained()
    getattr(low.lstm.factors["weight_hh_l0"], which).data.view(-1)[0] = float("nan")
    with pytest.raises(
        LayerError, match=rf"layer 'lstm.weight_hh_l0': .*'{which}': holds NaN or infinite values; load the last good checkpoint"
    ):
        sp.prune(low, sp.budget.Fixed(1))


# ---- the optimizer

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01),
    "sgd-momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "adam-not-foreach": lambda p: torch.optim.Adam(p, 1e-2, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-3),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-3),
}


def warned(name: str) -> AbstractContextManager[Any]:
    """Rows and columns of the old factors say nothing about the new ones, and that is said."""
    if name != "adafactor":
        return nullcontext()
    return pytest.warns(UserWarning, match=r"Adafactor: a cut cannot carry its state 'row_var' \(\d+ parameters\), 'col_var'")


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = call(model).square().sum()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_after_a_cut(name: str) -> None:
    low = trained()
    optimizer = OPTIMIZERS[name](low.parameters())
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        step(low, optimizer)
    scheduler.step()
    cut = sp.prune(low, sp.budget.Fixed(2))
    states = sum(len(state) > 0 for state in optimizer.state.values())
    rate = optimizer.param_groups[0]["lr"]
    with warned(name):
        sp.surgery.prune_optimizer_state(optimizer, low, cut)
    assert optimizer.param_groups[0]["lr"] == rate
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in cut.parameters()}
    if name != "adafactor":  # rows and columns of the old factors say nothing about the new ones
        assert sum(len(state) > 0 for state in optimizer.state.values()) == states
    for parameter, state in optimizer.state.items():
        assert any(parameter is p for p in held)
        for value in state.values():
            if isinstance(value, Tensor) and value.dim():
                assert value.shape == parameter.shape
                assert value.dtype == parameter.dtype
                assert value.is_contiguous()
    before, old = [p.detach().clone() for p in cut.parameters()], [p.detach().clone() for p in low.parameters()]
    losses = [step(cut, optimizer) for _ in range(5)]
    assert all(torch.isfinite(p).all() for p in cut.parameters())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, cut.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(old, low.parameters(), strict=True))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == rate / 2
    again = OPTIMIZERS[name](cut.parameters())
    again.load_state_dict(optimizer.state_dict())


def state_after_one_gradient(model: nn.Module, make: Callable[[Any], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """An optimizer with filled moments, which has moved nothing."""
    optimizer = make(model.parameters())
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer)
    model.load_state_dict(before)
    return optimizer


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("sgd", "asgd")])
def test_for_sorted_orthonormal_factors_the_state_is_sliced(name: str) -> None:
    low = sp.factorize(Net().double(), "channel", EVERYTHING)
    optimizer = state_after_one_gradient(low, OPTIMIZERS[name])
    before = {key: dict(optimizer.state[p]) for key, p in low.named_parameters()}
    cut = sp.prune(low, sp.budget.Fixed(2))
    with warned(name):
        sp.surgery.prune_optimizer_state(optimizer, low, cut)
    compared = 0
    for key, parameter in cut.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            old = before[key][entry]
            if isinstance(old, Tensor) and old.dim():
                if "factors" in key:
                    old = old[..., :2, :] if key.endswith("Vh") else old[..., :2]
                torch.testing.assert_close(value, old, rtol=1e-9, atol=1e-12)
                compared += "factors" in key
            else:
                assert value == old
    assert compared >= (3 if name == "adafactor" else 12)  # adafactor has moments of the parameter's own shape for vectors only


FIRST = ("momentum_buffer", "exp_avg", "grad_avg", "mu_product", "prev")
NEVER_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "variance", "exp_inf", "step_size")


@pytest.mark.parametrize("entry", FIRST + NEVER_NEGATIVE)
def test_moments_of_a_singular_value_that_was_negative(entry: str) -> None:
    """``|S|`` enters the weight and the cut makes S positive: first moments change their sign, sizes and squares do not."""
    low = sp.factorize(nn.Linear(4, 4).double())
    low.S.data[1] *= -1
    optimizer = torch.optim.SGD(low.parameters(), 0.1)
    for parameter in low.parameters():
        optimizer.state[parameter][entry] = torch.full_like(parameter, 3.0)
    cut = sp.prune(low, sp.budget.Fixed(3))
    sp.surgery.prune_optimizer_state(optimizer, low, cut)
    expected = torch.tensor([3.0, -3.0 if entry in FIRST else 3.0, 3.0]).double()
    torch.testing.assert_close(optimizer.state[cut.S][entry], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [2, 99])
def test_a_carried_gradient_is_the_gradient_of_the_cut_factors(rank: int) -> None:
    """The law of the docstring, for factors that are not orthonormal: under a loss ``<G, weight>`` it is exact for U and Vh."""
    low = trained()
    G = {name: torch.randn_like(factors.matrix()) for name, factors in named_factors(low)}

    def fill(model: nn.Module) -> None:
        model.zero_grad()
        sum((G[name] * factors.matrix()).sum() for name, factors in named_factors(model)).backward()

    fill(low)
    parameters = [p for _, factors in named_factors(low) for p in factors.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    for parameter in parameters:
        optimizer.state[parameter]["momentum_buffer"] = parameter.grad.clone()
    cut = sp.prune(low, sp.budget.Fixed(rank))
    sp.surgery.prune_optimizer_state(optimizer, low, cut)
    fill(cut)
    for _, factors in named_factors(cut):
        for parameter in (factors.U, factors.Vh):
            torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], parameter.grad, rtol=1e-9, atol=1e-9)


def test_groups_keep_their_settings_and_frozen_parameters_need_no_state() -> None:
    low = trained()
    low.conv.requires_grad_(False)
    names = dict(low.named_parameters())
    groups = [{"params": [p for n, p in names.items() if n.startswith(key)], "lr": lr} for key, lr in (("conv", 1.0), ("lstm", 0.1))]
    optimizer = torch.optim.Adam(groups)
    step(low, optimizer)
    cut = sp.prune(low, sp.budget.Fixed(2))
    sp.surgery.prune_optimizer_state(optimizer, low, cut)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1]
    new = dict(cut.named_parameters())
    for group, key in zip(optimizer.param_groups, ("conv", "lstm"), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for n, p in new.items() if n.startswith(key)]
    step(cut, optimizer)


def test_foreign_parameters_are_refused_and_nothing_changes() -> None:
    low = trained()
    cut = sp.prune(low, sp.budget.Fixed(2))
    stranger = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.Adam([*low.parameters(), stranger])
    step(low, optimizer)
    before = list(optimizer.param_groups[0]["params"])
    for old, new, message in (
        (low, cut, "layer 'tensor (3, 2)': is trained by the optimizer but is not in both models"),
        (low, nn.Linear(3, 3), "layer 'conv.factors.weight.U': is trained by the optimizer but is not in both models"),
    ):
        with pytest.raises(LayerError, match=re.escape(message)):
            sp.surgery.prune_optimizer_state(optimizer, old, new)
        assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))
        assert set(map(id, optimizer.state)) <= set(map(id, before))


def test_every_factor_is_reached() -> None:
    low = trained()
    cut = sp.prune(low, sp.budget.Fixed(1))
    assert {f.rank for m in cut.modules() if isinstance(m, Factors) for f in [m]} == {1}
