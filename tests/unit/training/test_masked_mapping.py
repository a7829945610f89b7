"""Masked mapping: every weight ends on a level, zeros stay, what is set is held, and a resumed run ends with the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.projections import Levels, TopK
from spectrim.runtimes.crossbar import Mapping
from spectrim.training import Hold, MaskedMapping


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 8, generator=generator), torch.randn(16, 4, generator=generator)) for _ in range(5)]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 0.01)


def test_every_weight_ends_on_a_level_and_pruned_ones_at_zero() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.copy_(TopK(50)(model[0].weight))
    holes, before = model[0].weight == 0, model[0].bias.clone()
    course = MaskedMapping({"*": Levels(5)}, end=0.8, rounds=4)
    history = sp.fit(model, batches(), nn.MSELoss(), adam(model), 10, courses=[Hold(), course], progress=False)
    assert [round(line["MaskedMapping free"], 1) for line in history.epochs[1:8:2]] == [0.6, 0.2, 0.1, 0.0], "(3/4)^2, (2/4)^2 / ..."
    for layer in (model[0], model[2]):
        assert len(layer.weight.detach().abs().unique()) <= 16
        torch.testing.assert_close(Mapping(bits=4).quantized(layer.weight), layer.weight.detach(), rtol=1e-5, atol=0)
    assert bool((model[0].weight[holes] == 0).all())
    assert not torch.equal(model[0].bias, before), "what is not a weight trains on"


def test_the_nearest_are_set_first_and_the_step_stays() -> None:
    model, levels = network(), Levels(3)
    course = MaskedMapping({"0": levels}, end=1.0, rounds=2)
    memory, weight = course.start(model, None, 4), model[0].weight.detach().clone()
    table = levels.table(weight)
    course.after(model, 1, 4, memory)
    free, distance = memory["free"]["0.weight"], (weight - table(weight)).abs()
    assert int(free.sum()) == weight.numel() // 4
    assert distance[free].min() >= distance[~free].max()
    assert torch.equal(model[0].weight[~free], table(weight)[~free])
    with torch.no_grad():
        model[0].weight.mul_(1.3)  # a step of training
    course.after(model, 2, 4, memory)
    assert torch.equal(model[0].weight[~free], table(weight)[~free]), "what is set is held"
    course.after(model, 3, 4, memory)
    assert set(model[0].weight.detach().unique().tolist()) <= {float(torch.tensor(value)) for value in table.values}


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    def train(folder: Path | None, until: int = 99) -> nn.Module:
        def stop(epoch: int, line: dict[str, float], model: nn.Module) -> None:
            if epoch == until:
                raise InterruptedError

        model = network()
        parts = {"checkpoint": folder, "callbacks": [stop], "courses": [MaskedMapping({"*": Levels(4)}, rounds=3)], "progress": False}
        sp.fit(model, batches(), nn.MSELoss(), adam(model), 6, **parts)
        return model

    whole = train(None)
    for until in (1, 3):
        with pytest.raises(InterruptedError):
            train(tmp_path, until)
    for a, b in zip(whole.parameters(), train(tmp_path).parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "wrong",
    [{"rounds": 0}, {"begin": 0.5, "end": 0.5}, {"levels": {"*": Levels(4, kind="affine")}}, {"levels": {}}],
)
def test_settings_are_checked(wrong: Any) -> None:
    with pytest.raises(SettingError, match="MaskedMapping"):
        MaskedMapping(**({"levels": {"*": Levels(4)}} | wrong))
