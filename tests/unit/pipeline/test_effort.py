"""How many examples and cuts a calibration takes: by cost, or by a time box."""

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.pipeline import cutter
from spectrim.pipeline.effort import LEAST, MOST, WORK, examples_for, work_of_a_cut
from spectrim.surgery.factorize import factorize

BATCHES = [(torch.randn(8, 12, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 4) for i in range(6)]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4)).eval()


class Repeated(nn.Module):
    """As many multiply-accumulates as asked for, in one layer that runs many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(100, 100), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[:, None].expand(-1, self.times, -1))


@pytest.mark.parametrize(
    ("macs", "examples"), [(10_000, MOST), (2 * WORK / MOST, MOST // 2), (10 * WORK / LEAST, LEAST)], ids=["cheap", "between", "expensive"]
)
def test_examples_follow_the_cost(macs: float, examples: int) -> None:
    network = Repeated(round(macs / 10_000)).to("meta")
    assert examples_for(network, torch.zeros(2, 100, device="meta"), 2) == pytest.approx(examples, rel=0.01)


def test_a_cut_of_a_large_weight_is_work() -> None:
    """By hand: 30^3 / 3 for the triangle, 8 x 30 x 60 x 30 for the products."""
    assert work_of_a_cut(factorize(nn.Linear(60, 30), rank=30)) == 9_000 + 432_000


def test_a_large_network_is_cut_in_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutter, "LARGE", 0.0)
    made = sp.compress(small(), BATCHES, nn.CrossEntropyLoss(), 0.6, where="*", progress=False)
    assert made.cut == "both"
    assert any(note.startswith("not tried: whitened, plain, sensitive (the network is large") for note in made.notes)


def test_a_time_box_stops_after_one_batch_and_one_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is turned by hand: an hour at each look."""
    ticks = iter(range(10_000))
    monkeypatch.setattr("time.monotonic", lambda: 3600.0 * next(ticks))
    made = sp.compress(small(), BATCHES, nn.CrossEntropyLoss(), 0.6, where="*", calibration_seconds=60.0, progress=False)
    assert made.cut == "both"
    assert "calibrated on 8 examples: calibration_seconds=60 allows no more" in made.notes
    assert any("not tried: whitened, plain, sensitive (calibration_seconds=60 are spent)" in note for note in made.notes)


def test_a_box_that_is_never_full_changes_nothing() -> None:
    free, boxed = (
        sp.compress(small(), BATCHES, nn.CrossEntropyLoss(), 0.6, where="*", calibration_seconds=box, progress=False) for box in (None, 1e6)
    )
    assert free.cut == boxed.cut
    assert free.measured["final"].loss == boxed.measured["final"].loss


def test_a_box_without_time_is_refused() -> None:
    with pytest.raises(SettingError, match="calibration_seconds"):
        sp.compress(small(), BATCHES, nn.CrossEntropyLoss(), 0.6, calibration_seconds=0.0)
