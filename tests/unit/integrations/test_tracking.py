"""Trackers get what the log holds: event files are read back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.integrations.tracking import Tracking
from spectrim.training.fit import fit
from spectrim.training.history import History

pytest.importorskip("tensorboard")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard", "ignore::DeprecationWarning:google")  # third-party


class HalfWay:
    """Cuts after the first of two epochs."""

    def __call__(self, model: nn.Module, inputs: Any, step: int, steps: int) -> dict[str, int] | None:
        return {"0": 2} if step == 2 else None


def train(tracking: Any, epochs: int = 2) -> tuple[History, nn.Module]:
    torch.default_generator.manual_seed(0)
    low = sp.factorize(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), where=sp.match("*"))
    data = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))] * 2
    settings: dict[str, Any] = {"penalties": [sp.Orthogonality(1.0), sp.Hoyer(0.1)], "eval_data": data, "progress": False}
    optimizer = torch.optim.SGD(low.parameters(), 0.1)
    return fit(low, data, nn.CrossEntropyLoss(), optimizer, epochs, courses=[HalfWay()], callbacks=[tracking], **settings), low


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def assert_logged(folder: Path, history: History, low: nn.Module) -> None:
    found = events(folder)
    logged = {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
    expected: dict[str, dict[int, float]] = {}
    for number, (line, layers) in enumerate(zip(history.epochs, history.layers, strict=True), 1):
        for tag, value in (line | {f"rank/{name}": rank for name, rank in layers["ranks"].items()}).items():
            expected.setdefault(tag, {})[number] = value
    assert logged.keys() == expected.keys()
    assert {"loss", "Orthogonality", "Hoyer", "eval_accuracy", "rank/0", "rank/2"} <= logged.keys()
    for tag, values in expected.items():
        assert logged[tag] == pytest.approx(values, rel=1e-6), tag  # TensorBoard keeps float32
    assert [logged["rank/0"][epoch] for epoch in (1, 2)] == [5, 2]
    for name, factors in (("0", low[0].factors_of("weight")), ("2", low[2].factors_of("weight"))):
        *_, last = found.Histograms(f"spectrum/{name}")
        S = factors.S.detach().abs().double()
        assert (last.step, last.histogram_value.num) == (2, factors.rank)
        assert last.histogram_value.sum == pytest.approx(float(S.sum()))
        assert (last.histogram_value.min, last.histogram_value.max) == pytest.approx((float(S.min()), float(S.max())))


def test_tensorboard_gets_losses_penalties_ranks_and_spectra(tmp_path: Path) -> None:
    with Tracking(tmp_path, project="run") as tracking:
        history, low = train(tracking)
    assert_logged(tmp_path / "run", history, low)


def test_trackers_of_ones_own_accelerator_stay_open(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("mine")
    with Tracking(accelerator=accelerator) as tracking:
        history, _ = train(tracking)
    accelerator.log({"after": 1.0}, step=3)
    assert events(tmp_path / "mine").Scalars("after")[0].value == 1.0
    accelerator.trackers[0].finish()
    assert len(history.epochs) == 2


def test_what_is_refused(tmp_path: Path) -> None:
    from accelerate import Accelerator

    with pytest.raises(SettingError, match="one of them, got 'neither'"):
        Tracking()
    with pytest.raises(SettingError, match="one of them, got 'both'"):
        Tracking(tmp_path, accelerator=Accelerator())
    with pytest.raises(SettingError, match="call init_trackers"):
        Tracking(accelerator=Accelerator())
    with pytest.raises(ImportError, match=r"\['abacus'\] are not installed"):
        Tracking(tmp_path, log_with=["tensorboard", "abacus"])
    assert not any(tmp_path.iterdir())
