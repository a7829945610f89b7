"""Uses that a second hunt found wrong, crashing or without a way out: each is right now, or refused with a reason."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import LayerError, SettingError
from spectrim.surgery.correct import correct

LOSS = nn.CrossEntropyLoss()


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


# Experts to which examples are routed


class Routed(nn.Module):
    """Three experts, each of which gets the examples whose first feature is in its range."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        place = (h[:, 0] > 0).long()  # nothing goes to the last one
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            out = out.index_add(0, (rows := (place == number).nonzero()[:, 0]), expert(h[rows]))
        return out


def test_experts_that_meet_other_examples_after_the_cut_are_not_refitted() -> None:
    torch.manual_seed(0)
    model, data = Routed(), [torch.randn(40, 8) for _ in range(2)]
    low = sp.factorize(model, where=["first", "experts"])
    found = sp.calibrate(low, data)
    assert set(found.inputs) == {"first", "experts.0", "experts.1"}
    assert "did not call" in found.skipped["experts.2"]
    cut = sp.prune(low, {"first": 1, "experts.0": 2, "experts.1": 2})
    moved = (model.first(data[0])[:, 0] > 0) != (cut.first(data[0])[:, 0] > 0)  # type: ignore[operator]
    assert moved.any()
    fitted: Any = correct(cut, model, data)
    assert all(torch.isfinite(value).all() for value in fitted.state_dict().values())
    made = sp.compress(model, data, budget=0.7, progress=False)
    assert made.measured["final"].macs <= 0.7 * made.measured["dense"].macs


# What few examples leave undetermined


def test_a_refit_on_few_examples_does_not_grow_out_of_bounds() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, bias=False)).double()
    with torch.no_grad():
        model[0].weight[1:] = model[0].weight[:1] + 1e-4 * torch.randn(15, 16)  # what the second layer meets has hardly two directions
        model[0].bias.zero_()
    cut = sp.prune(sp.factorize(model, where=["0", "1"]), {"0": 1, "1": 12})
    fitted: Any = correct(cut, model, [torch.randn(6, 16, dtype=torch.float64)])
    assert fitted[1].weight.norm() <= 4.5 * model[1].weight.norm()


# Rounding that networks amplify, and random generators


class Centered(nn.Module):
    """Divides what is nearly constant by its deviation, as a LayerNorm without an epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(1 + 0 * x) + 1e-7 * x
        return (y - self.inner(torch.ones_like(x))) * 1e7  # type: ignore[no-any-return]


def test_differences_that_vanish_in_double_precision_are_rounding() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Centered(), nn.Linear(16, 2)), torch.randn(3, 16)
    low = sp.factorize(model, where=["0.inner"])
    sp.same_function(model, sp.merge(sp.prune(low, {"0.inner": 16})), x)
    with torch.no_grad():
        low[0].inner.bias.add_(x[0])  # type: ignore[index, union-attr]
    changed = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    with pytest.raises(LayerError, match="differs from that in the first"):
        sp.same_function(changed, nn.Sequential(nn.Linear(16, 16), changed[1]), x)


class Dropping(nn.Sequential):
    """Leaves layers out by numpy's generator, as speech encoders do."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            if not (self.training and np.random.uniform() < 0.5):  # noqa: NPY002
                x = layer(x)
        return x


def test_layers_that_other_generators_leave_out_are_the_same_ones() -> None:
    model = Dropping(*(nn.Linear(8, 8) for _ in range(6)))
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    sp.same_function(model, sp.factorize(model), torch.randn(2, 8))
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


# Gradients


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise AssertionError("only in training mode")


def test_without_a_backward_pass_only_inputs_count() -> None:
    class Forward(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return NoBackward.apply(super().forward(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, data = Forward(*net()), [(torch.randn(8, 16), torch.randint(4, (8,)))]
    with pytest.raises(LayerError, match=r"backward pass fails in eval mode \(AssertionError: only in training mode\)"):
        sp.calibrate(sp.factorize(model), data, LOSS)
    made = sp.compress(model, data, LOSS, 0.7, progress=False)
    assert any("no known curvature" in note for note in made.notes)


# Messages with a way out


def test_outputs_of_another_shape_need_a_loss() -> None:
    class Kept(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return y[y > 0]

    torch.manual_seed(0)
    with pytest.raises(SettingError, match="loss must be given, since the shapes of the outputs depend on their values"):
        sp.compress(Kept(*net()), [torch.randn(64, 16)], budget=0.5, example_inputs=torch.randn(64, 16), progress=False)


class Rescaling(nn.Sequential):
    """Changes a weight in place while it runs, as RWKV does."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self[2].weight.mul_(1.0)  # type: ignore[union-attr, operator]
        return super().forward(x)  # type: ignore[no-any-return]


def test_a_weight_that_is_changed_in_place_is_named() -> None:
    data = [(torch.randn(8, 16), torch.randint(4, (8,)))]
    with pytest.raises(LayerError, match=r"layer '2': the factorized network fails .* leave those out with where="):
        sp.compress(Rescaling(*net()), data, LOSS, 0.7, progress=False)
    made = sp.compress(Rescaling(*net()), data, LOSS, 0.9, where=["0"], progress=False)
    assert type(made.model[2]) is nn.Linear  # type: ignore[index]


# Tensors of a user's class


class Labeled(Tensor):
    """As torchvision's ``Image`` and others: data of a class of their own."""


def test_factors_made_of_a_users_tensors_are_ordinary() -> None:
    torch.manual_seed(0)
    model, data = net(), [torch.randn(8, 16).as_subclass(Labeled) for _ in range(2)]
    low = sp.factorize(model)
    cut = sp.prune(low, sp.budget.Fixed(3), calibration=sp.calibrate(low, data))
    fitted = correct(cut, model, data)
    assert {type(value) for value in fitted.state_dict().values()} == {Tensor}
    sp.merge(fitted)


class Reading(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * 1.0, self.bias)


def test_weights_that_calibration_does_not_see_are_told() -> None:
    torch.manual_seed(0)
    model = net()
    model[2] = Reading(16, 16)
    made = sp.compress(model, [torch.randn(8, 16)], budget=0.7, cut="whitened", progress=False)
    assert "cut by their spectra alone, since the layer's own forward reads this weight: 2" in made.notes
