"""Frozen means frozen: training flags are as they came, and statistics that the caller has frozen stay."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.surgery.frozen import training_mode

LOSS = nn.CrossEntropyLoss()


def net() -> nn.Sequential:
    head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), head).train()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(3 * torch.randn(16, 6, generator=generator) + 1, torch.randint(0, 4, (16,), generator=generator)) for _ in range(3)]


def freeze_by_mode(model: nn.Sequential) -> None:
    model[1].eval()


def freeze_by_parameters(model: nn.Sequential) -> None:
    model[1].requires_grad_(False)


def freeze_a_block(model: nn.Sequential) -> None:
    model[3].eval()


def freeze_in_an_eval_model(model: nn.Sequential) -> None:
    model[1].requires_grad_(False)
    model.eval()


def wrap_an_eval_model(model: nn.Sequential) -> None:
    model[1].requires_grad_(False)
    model.eval()
    model.training = True  # a wrapper is new, and so in training mode, and what it wraps may be in eval mode as a whole


WAYS: dict[Any, list[str]] = {
    freeze_by_mode: ["1"],
    freeze_by_parameters: ["1"],
    freeze_a_block: ["3.1"],
    freeze_in_an_eval_model: ["1"],
    wrap_an_eval_model: ["1"],
}


def fitted(model: nn.Module) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    sp.fit(model, batches(), LOSS, torch.optim.SGD(parameters, 0.01), 2, eval_data=batches(), progress=False)


def recalibrated(model: nn.Module) -> None:
    sp.recalibrate(model, batches())


@pytest.mark.parametrize("verb", [fitted, recalibrated])
@pytest.mark.parametrize("freeze", WAYS)
def test_frozen_statistics_stay_and_flags_are_as_before(freeze: Any, verb: Any) -> None:
    model = net()
    freeze(model)
    before, flags = copy.deepcopy(model.state_dict()), {name: module.training for name, module in model.named_modules()}
    verb(model)
    assert {name: module.training for name, module in model.named_modules()} == flags
    for name in ("1", "3.1"):
        moved = not torch.equal(before[f"{name}.running_mean"], model.get_submodule(name).running_mean)
        assert moved == (name not in WAYS[freeze]), name


def test_dropout_in_eval_mode_stays_there() -> None:
    model, seen = net(), []
    model[3][2].eval()
    model[3][2].register_forward_hook(lambda module, inputs, output: seen.append(torch.equal(inputs[0], output)))

    def meddle(epoch: int, line: dict[str, float], trained: nn.Module) -> None:
        trained.train()  # a callback of the user's own

    sp.fit(model, batches(), LOSS, torch.optim.SGD(model.parameters(), 0.01), 2, callbacks=[meddle], progress=False)
    assert len(seen) == 6
    assert all(seen)


def test_flags_come_back_after_an_error() -> None:
    model = net()
    model[1].eval()
    with pytest.raises(RuntimeError, match="mine"), training_mode(model):
        raise RuntimeError("mine")
    assert [model.training, model[1].training] == [True, False]


def test_recalibrating_on_nothing_is_refused_and_changes_nothing() -> None:
    model = net()
    recalibrated(model)
    before = copy.deepcopy(model.state_dict())
    for batches_ in ([], iter([])):
        with pytest.raises(SettingError, match=r"recalibrate: (data|batches) must be at least one batch"):
            sp.recalibrate(model, batches_)
    with pytest.raises(RuntimeError):
        sp.recalibrate(model, [*batches(), (torch.randn(4, 5), None)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm1d)] == [0.1, 0.1]


def test_a_layer_that_is_not_called_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6))
    model.spare = nn.BatchNorm1d(6)
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    model.spare.running_mean.fill_(3.0)
    sp.recalibrate(model, batches())
    assert torch.equal(model.spare.running_mean, torch.full((6,), 3.0))
    torch.testing.assert_close(model[0].running_mean, torch.stack([x.mean(0) for x, _ in batches()]).mean(0))


def test_compress_keeps_frozen_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).train()
    model[1].eval().requires_grad_(False)
    before = model[1].running_mean.clone()
    data = [(torch.randn(8, 3, 8, 8) * 3 + 1, torch.randint(0, 4, (8,))) for _ in range(2)]
    made = sp.compress(model, data, LOSS, sp.Budget(macs=0.6), where=sp.match("*"), examples=8, progress=False)
    assert torch.equal(made.model[1].running_mean, before)
