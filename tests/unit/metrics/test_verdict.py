"""The verdict: what is called level, faster and at chance, and what is warned of."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.measurement import Measurement
from spectrim.metrics.verdict import accuracy_error, has_loops, verdict, worse_than

DENSE = Measurement(
    1000, 900, 4000, accuracy=0.9, loss=0.3, latency_s=2e-3, latency_iqr_s=1e-4, batch=1, threads=1, targets=400, chance=0.1
)
FINAL = replace(DENSE, params=500, size_bytes=2000, latency_s=1e-3)


def test_the_standard_error_is_that_of_a_fraction() -> None:
    assert accuracy_error(DENSE) == pytest.approx((0.9 * 0.1 / 400) ** 0.5)
    assert accuracy_error(replace(DENSE, targets=None)) is None


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [(0.9, "Accuracy level"), (0.886, "Accuracy level"), (0.88, "Accuracy 2.00 points lower"), (0.93, "Accuracy 3.00 points higher")],
)
def test_accuracy_is_level_within_the_standard_error(accuracy: float, words: str) -> None:
    assert verdict(DENSE, replace(FINAL, accuracy=accuracy)).quality.startswith(words)


def test_without_an_accuracy_the_loss_is_compared() -> None:
    dense, final = (replace(entry, accuracy=None, loss_error=0.02) for entry in (DENSE, FINAL))
    assert verdict(dense, replace(final, loss=0.31)).quality.startswith("Loss level")
    assert verdict(dense, replace(final, loss=0.4)).quality.startswith("Loss 0.1000 higher")
    assert verdict(dense, replace(final, loss=None)).quality == ""


@pytest.mark.parametrize(
    ("seconds", "words", "warned"),
    [(1e-3, "2.00x faster here", 0), (1.95e-3, "Speed not measurably different here", 0), (4e-3, "2.00x slower here", 1)],
)
def test_speed_is_told_beyond_the_interquartile_range(seconds: float, words: str, warned: int) -> None:
    found = verdict(DENSE, replace(FINAL, latency_s=seconds))
    assert found.speed.startswith(words)
    assert len(found.warnings) == warned


def test_unsteady_seconds_are_not_compared_however_far_apart() -> None:
    found = verdict(replace(DENSE, latency_s=4e-3, latency_iqr_s=2.1e-3), FINAL)
    assert found.speed.startswith("Speed not measurable, other work")
    assert (found.warnings, found.next.startswith("measure again on an idle machine")) == ((), True)
    assert "; speed not measurable" in str(found)


def test_bytes_that_are_left_are_limited_next() -> None:
    lean = replace(FINAL, macs=DENSE.macs and DENSE.macs // 2)
    told = [verdict(DENSE, replace(lean, size_bytes=size)).next for size in (3200, 2000)]
    told.append(verdict(DENSE, replace(lean, size_bytes=3200, coded_bytes=90, data_bytes=80, index_bytes=0)).next)
    assert ["Budget(macs=0.5, size=0.5)" in text for text in told] == [True, False, False]


def test_other_conditions_or_no_clock_say_nothing_about_speed() -> None:
    assert verdict(DENSE, replace(FINAL, threads=2)).speed == ""
    assert verdict(DENSE, replace(FINAL, latency_s=None)).speed == ""


def test_larger_and_as_large() -> None:
    assert verdict(DENSE, replace(FINAL, size_bytes=8000)).size == "2.00x larger (4,000 to 8,000 B)"
    assert "larger than the dense network" in verdict(DENSE, replace(FINAL, size_bytes=8000)).warnings
    assert verdict(DENSE, DENSE).size.startswith("As large")


def test_a_dense_network_at_chance_is_warned_of() -> None:
    assert "at chance" in verdict(replace(DENSE, accuracy=0.11), replace(FINAL, accuracy=0.11)).warnings[0]
    assert verdict(replace(DENSE, accuracy=0.3), FINAL).warnings == ()
    assert "train the dense network first" in str(verdict(replace(DENSE, accuracy=0.1), FINAL))


def test_a_slower_recurrent_network_says_why() -> None:
    torch.manual_seed(0)
    low = sp.factorize(nn.Sequential(nn.LSTM(32, 32)))
    assert not has_loops(sp.merge(low))
    assert not has_loops(sp.merge(sp.prune(low, {"0.weight_ih_l0": 2, "0.weight_hh_l0": 32})))
    looped = sp.merge(sp.prune(low, {"0.weight_ih_l0": 2, "0.weight_hh_l0": 2}))
    assert has_loops(looped)
    found = verdict(DENSE, replace(FINAL, latency_s=4e-3), loops=has_loops(looped))
    assert "outside torch's fused kernel" in found.warnings[0]
    assert "where=" in found.next


def test_the_line_has_every_part_and_ends_with_what_to_try() -> None:
    found = verdict(DENSE, replace(FINAL, latency_s=4e-3))
    line = str(found)
    assert [line.index(part) for part in (found.size, found.speed, found.quality, "Warning: ", "Next: ")] == sorted(
        line.index(part) for part in (found.size, found.speed, found.quality, "Warning: ", "Next: ")
    )
    assert "\n" not in line
    assert found.to_dict()["warnings"] == list(found.warnings)


def test_worse_is_a_lower_accuracy_or_a_higher_loss_at_a_level_one() -> None:
    before = {"accuracy": 0.9, "loss": 0.3}
    assert worse_than(replace(DENSE, accuracy=0.88), before)
    assert not worse_than(replace(DENSE, accuracy=0.92, loss=9.0), before)
    assert worse_than(replace(DENSE, accuracy=0.899, loss=0.4), before)
    assert not worse_than(replace(DENSE, loss=0.31, loss_error=0.02), before)
    assert worse_than(replace(DENSE, accuracy=None, loss=0.31), {"loss": 0.3})
    assert worse_than(DENSE, before, by={"accuracy": 0.8, "loss": 0.2})


def test_scores_say_how_sure_they_are() -> None:
    outputs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    targets = torch.tensor([0, 1, 1, 1])
    loss = nn.CrossEntropyLoss()
    found = evaluate(nn.Identity(), [(outputs[:2], targets[:2]), (outputs[2:], targets[2:])], loss)
    assert (found.targets, found.chance) == (4, 0.75)
    halves = torch.stack([loss(outputs[:2], targets[:2]), loss(outputs[2:], targets[2:])])
    assert found.loss_error == pytest.approx(float(halves.std() / 2**0.5))
    assert evaluate(nn.Identity(), [(outputs, targets)], loss).loss_error is None
