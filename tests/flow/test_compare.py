"""The comparison of methods on small real data: equal budgets and batches, finished runs skipped, stopped ones resumed, gaps reported."""

import json
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
from torch import nn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        first, second = max(1, round(16 * width)), max(1, round(32 * width))
        stem = nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU()
        self.features = nn.Sequential(*stem, nn.Conv2d(first, second, 3, stride=2), nn.BatchNorm2d(second), nn.ReLU())
        self.head = nn.Linear(second, 10)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def net(width: float = 1.0):
    return Net(width)
"""
TASK = {
    "model": "compare_net.net",
    "data": {"class_path": "spectrim.zoo.digits", "init_args": {"batch_size": 128}},
    "loss": "torch.nn.CrossEntropyLoss",
    "budgets": [0.5],
    "seeds": [0],
    "epochs": 3,
    "peak": 0.05,
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}},
    "scheduler": {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"pct_start": 0.2, "cycle_momentum": False}},
    "scheme": "spatial",
    "dense": {"epochs": 4, "peak": 0.2},
    "calibration": 256,
    "recalibration": 256,
    "methods": {
        "truncated": None,
        "truncated_distilled": None,
        "whitened": None,
        "paper": {"orthogonality": 1.0, "hoyer": 0.01},
        "l1": {"orthogonality": 1.0, "l1": 0.001},
        "polar_hoyer": {"weight": 0.001},
        "ours": None,
        "narrow": {"model": "compare_net.net", "peak": 0.2},
        "filters": None,
    },
}


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """The runner, with a network of its own; one thread, as the runner sets it."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "compare_net.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compare

    threads = torch.get_num_threads()
    yield compare
    torch.set_num_threads(threads)


def run(compare, task, folder, *methods, epochs=None):
    """Run methods at 0.5 with seed 0; return the contents of the files by name."""
    results = folder / "results"
    epochs = task.epochs if epochs is None else epochs
    failed = compare.run_task("small", task, methods, [0.5], [0], epochs, results, folder / "runs")
    assert not failed
    return {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}


@pytest.mark.parametrize("method", TASK["methods"])
def test_every_method_meets_the_budget_in_the_same_epochs(compare, tmp_path, method):
    if method == "filters":
        pytest.importorskip("torch_pruning")
    (content,) = run(compare, compare.parse_task(TASK), tmp_path, method).values()
    assert 0.3 < content["final"]["macs_fraction"] <= 0.5
    assert len(content["log"]) == TASK["epochs"]
    assert content["final"]["test"]["accuracy"] > 0.3  # ten classes: far from chance
    assert bool(content["ranks"]) == (method not in ("narrow", "filters"))
    if method != "narrow":
        assert {"dense", "before_cut", "cut", "recalibrated", "end"} <= set(content["val"])


def test_calibration_only_trains_nothing(compare, tmp_path):
    found = run(compare, compare.parse_task(TASK), tmp_path, *compare.CALIBRATION_ONLY, epochs=0)
    assert set(found) == {f"{method}-0.5-0-untrained" for method in compare.CALIBRATION_ONLY}
    assert not any(content["log"] for content in found.values())


def test_finished_runs_are_skipped_until_their_settings_change(compare, tmp_path):
    task = compare.parse_task(TASK)
    (first,) = run(compare, task, tmp_path, "truncated").values()
    (again,) = run(compare, task, tmp_path, "truncated").values()
    assert again == first  # seconds included
    others = {**TASK["methods"], "paper": {"orthogonality": 1.0, "hoyer": 0.5}}
    (unchanged,) = run(compare, compare.parse_task({**TASK, "methods": others}), tmp_path, "truncated").values()
    assert unchanged == first
    (changed,) = run(compare, compare.parse_task({**TASK, "peak": 0.01}), tmp_path, "truncated").values()
    assert changed["digest"] != first["digest"]
    assert changed["final"]["test"] != first["final"]["test"]


def test_a_stopped_run_ends_as_one_that_was_not(compare, tmp_path, monkeypatch):
    task = compare.parse_task(TASK)
    (whole,) = run(compare, task, tmp_path / "whole", "paper").values()
    with monkeypatch.context() as patch:
        patch.setattr(compare.Job, "renew", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(compare, task, tmp_path / "stopped", "paper")
    assert not list((tmp_path / "stopped" / "results").glob("*"))
    (resumed,) = run(compare, task, tmp_path / "stopped", "paper").values()
    assert resumed["final"] == whole["final"]
    assert resumed["val"] == whole["val"]


def interrupted(job, model):
    raise KeyboardInterrupt


def test_a_run_does_not_depend_on_those_before_it_in_the_process(compare, tmp_path):
    task = compare.parse_task(TASK)
    (alone,) = run(compare, task, tmp_path / "alone", "ours").values()
    after = run(compare, task, tmp_path / "after", "truncated", "ours")["ours-0.5-0"]
    assert after["val"] == alone["val"]
    assert after["final"] == alone["final"]


def test_a_budget_out_of_reach_is_reported_and_the_others_go_on(compare, tmp_path, capsys):
    task, results = compare.parse_task(TASK), tmp_path / "results"
    failed = compare.run_task("small", task, ["truncated"], [0.001, 0.5], [0], 0, results, tmp_path / "runs")
    assert failed == ["truncated-0.001-0-untrained"]
    assert [path.stem for path in results.glob("*.json")] == ["truncated-0.5-0-untrained"]
    assert "at least" in capsys.readouterr().out


def test_a_second_phase_sees_the_batches_that_follow(compare, tmp_path, monkeypatch):
    seen, own = [], compare.fit
    monkeypatch.setattr(compare, "fit", lambda *args, **more: seen.append(more.get("first_epoch")) or own(*args, **more))
    run(compare, compare.parse_task(TASK), tmp_path, "paper")
    assert seen == [None, 0, TASK["epochs"] // 2]  # the dense network, then two phases


def test_a_method_may_have_budgets_and_seeds_of_its_own(compare):
    methods = {"truncated": None, "narrow": {**TASK["methods"]["narrow"], "budgets": [0.5, 0.3], "seeds": [1]}}
    task = compare.parse_task({**TASK, "budgets": [0.5], "seeds": [0, 1], "methods": methods})
    names = ("truncated", "narrow")
    assert task.runs(names, None, None) == [(0, 0.5, "truncated"), (1, 0.5, "truncated"), (1, 0.5, "narrow"), (1, 0.3, "narrow")]
    assert task.runs(names, [0.3], [0]) == [(0, 0.3, "truncated"), (0, 0.3, "narrow")]
    plain = compare.parse_task({**TASK, "budgets": [0.5], "seeds": [0, 1]})
    assert compare.digest(task, "narrow", 0.5, 1, 2) == compare.digest(plain, "narrow", 0.5, 1, 2)


def test_the_report_says_what_is_missing_and_how_many_seeds(compare, tmp_path, monkeypatch):
    import compare_report

    run(compare, compare.parse_task(TASK), tmp_path / "small", "truncated", "narrow")
    results, tasks = tmp_path / "report", tmp_path / "tasks"
    results.mkdir()
    tasks.mkdir()
    (tmp_path / "small" / "results").rename(results / "small")
    (tasks / "small.yaml").write_text(yaml.safe_dump(TASK))
    monkeypatch.setattr(compare_report, "RESULTS", results)
    monkeypatch.setattr(compare_report, "TASKS", tasks)
    page = compare_report.render()
    accuracies = {
        content["method"]: 100 * content["final"]["test"]["accuracy"]
        for content in (json.loads(path.read_text()) for path in (results / "small").glob("*.json"))
    }
    best = max(accuracies, key=accuracies.get)
    assert f"| {compare_report.METHODS[best]} | **{accuracies[best]:.2f}** (n=1) |" in page
    runs = len(TASK["methods"]) * len(TASK["budgets"]) * len(TASK["seeds"])
    assert f"Every cell is of one seed, n=1. {runs - 2} of {runs} runs are missing." in page


def test_numbers_of_the_report_by_hand(compare):
    import compare_report

    assert compare_report.cell([90.0, 92.0], 2) == "91.00 ± 1.41 (n=2)"
    assert compare_report.cell([], 2) == "-"
    scores = {"val": {"before_cut": {"accuracy": 0.9, "loss": 1.0}, "cut": {"accuracy": 0.8, "loss": 1.5}}}
    assert compare_report.lost_at_cut({}, "cut")(scores) == pytest.approx(10)
    assert compare_report.lost_at_cut({"merit": "loss"}, "cut")(scores) == pytest.approx(0.5)
    assert compare_report.lost_at_cut({}, "recalibrated")(scores) is None
