"""What goes into the page is what the plan and the run's folder hold, and nothing in it can break out."""

import base64
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim import cli
from spectrim.budget.plan import plan
from spectrim.budget.plan_rows import SkippedLayer, Totals, WeightPlan
from spectrim.budget.plan_table import Plan
from spectrim.errors import FormatError
from spectrim.files import read_json
from spectrim.pipeline import recipe
from spectrim.pipeline.run import Run
from spectrim.report import data, page, shortfalls, text_report, write_report
from spectrim.report.data import WORDS


@pytest.fixture(scope="module")
def found() -> Plan:
    torch.default_generator.manual_seed(0)
    layers = (nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 12, (3, 2)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return plan(nn.Sequential(*layers, nn.Linear(12, 5)), torch.randn(2, 3, 8, 8), budgets=[0.5, 0.001], where=sp.match("*"))


def unpacked(weight: Mapping[str, Any]) -> dict[str, Any]:
    """What page.js makes of a weight, written again in Python."""
    first, *rest = weight["ranks"]
    ranks = [*(first + rest[0] * index for index in range(rest[1])), rest[2]] if first else rest
    costs = {}
    for kind in ("macs", "params"):
        head, *tail = weight[kind]
        costs[kind] = tail if head < 0 else [*(head * rank for rank in ranks[:-1]), tail[0]]
    distortions = {name: np.frombuffer(base64.b64decode(text), "<f4").tolist() for name, text in weight["distortions"].items()}
    return {"ranks": ranks, "distortions": distortions, **costs}


def test_the_compact_form_holds_the_costs_and_harms_of_every_choice(found: Plan) -> None:
    compact = json.loads(json.dumps(data.plan_data(found)))
    assert compact["step"] == 1
    for weight, entry in zip(found.weights, compact["weights"], strict=True):
        got = unpacked(entry)
        assert got["ranks"] == [*range(1, min(weight.break_even, len(weight.macs) - 1) + 1), len(weight.macs)]
        assert got["macs"] == [weight.macs[rank - 1] for rank in got["ranks"]]
        assert got["params"] == [weight.params[rank - 1] for rank in got["ranks"]]
        for name, distortions in weight.distortions.items():
            assert got["distortions"][name] == pytest.approx([distortions[rank] for rank in got["ranks"]], rel=1e-6), "32-bit floats"


def test_what_is_left_out_could_not_be_chosen(found: Plan) -> None:
    """Ranks between the break-even and all cost as much as all, and distortion no less."""
    for weight in found.weights:
        for rank in range(weight.break_even + 1, len(weight.macs)):
            assert weight.macs[rank - 1] == weight.macs[-1] == weight.dense_macs
            assert weight.params[rank - 1] == weight.params[-1]


def test_runs_of_ranks() -> None:
    assert data._runs([1, 2, 3, 9]) == [1, 1, 3, 9]
    assert data._runs([8, 16, 24]) == [8, 8, 2, 24]
    assert data._runs([5]) == [1, 1, 0, 5]
    assert data._runs([1, 4, 8, 9]) == [0, 1, 4, 8, 9]


def big(layers: int, size: int) -> Plan:
    """A plan of square layers with spectra that fall at different rates."""
    weights = []
    for index in range(layers):
        spectrum = np.exp(-np.arange(size) * (1 + index % 7) / size * 3)
        tail = np.append(np.cumsum(spectrum[::-1] ** 2)[::-1], 0.0)
        distortions = {"SpectralEnergy": tuple((tail / tail[0]).tolist())}
        even = size // 2 - 1
        costs = tuple(2 * size * rank if rank <= even else size * size for rank in range(1, size + 1))
        name = f"blocks.{index}.linear"
        weights.append(
            WeightPlan(
                *(name, "Linear", "channel", (size, size), 1, tuple(spectrum.tolist()), distortions, tuple(map(float, costs)), costs, None),
                *(float(size * size), size * size, None, even, 4),
            )
        )
    total = layers * size * size
    dense, fixed = Totals(total + 1000, total + 500, 4 * total + 2000), Totals(1000, 500, 2000)
    return Plan(tuple(weights), (), "SpectralEnergy", dense, fixed, (), {"model": "Deep"})


def test_a_large_plan_goes_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data.plan_data(big(20, 64))
    assert whole["step"] == 1
    monkeypatch.setattr(data, "CHOICES", 200)
    compact = data.plan_data(big(20, 64))
    assert compact["step"] == 4
    assert unpacked(compact["weights"][0])["ranks"] == [1, 4, 8, 12, 16, 20, 24, 28, 64], "the smallest network stays within reach"
    assert set(unpacked(compact["weights"][3])["macs"]) < set(unpacked(whole["weights"][3])["macs"])


def test_nothing_breaks_out_of_the_page(tmp_path: Path, found: Plan) -> None:
    nasty = "</script><script>alert(1)</script><!-- & %%data%%"
    evil = replace(found, skipped=(SkippedLayer(nasty, nasty, nasty),), settings={"model": nasty})
    text = write_report(evil, tmp_path / "page.html").read_text()
    assert text.count("<script") == 2
    assert "alert(1)</script>" not in text
    embedded = re.search(r'id="data">(.*?)</script>', text, re.S)
    assert embedded is not None
    assert json.loads(embedded[1])["plan"]["skipped"][0]["reason"] == nasty


def test_numbers_that_are_none_become_null() -> None:
    assert json.loads(page.escaped_json({"a": [math.nan, math.inf, 1.5]})) == {"a": [None, None, 1.5]}


def test_the_page_needs_nothing_else(tmp_path: Path, found: Plan) -> None:
    text = write_report(found, tmp_path / "page.html").read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", text)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", text)
    addresses = set(re.findall(r"https?://[^\s\"'`<)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "https://github.com/leeoniya/uPlot"}, "names, which nobody requests"


RECIPE = "model: {class_path: torch.nn.Identity}\n"


def run_folder(folder: Path, *, finished: bool = True) -> Path:
    """A run's folder as `Run` writes it, of a network whose numbers are made up."""
    epochs = [
        {"loss": 1.0 / (n + 1), "Hoyer": 0.1, "mean_rank": 9.0 - n, "examples_per_s": 100.0, "eval_loss": 0.5, "eval_accuracy": 0.9}
        for n in range(3)
    ]
    numbers: dict[str, dict[str, Any]] = {
        "1-dense": {"epochs": [], "val": {"loss": 0.3, "accuracy": 0.95}, "seconds": 1.0},
        "2-train": {"phases": [epochs, epochs], "val": {"loss": 0.3, "accuracy": 0.94}, "spectra": {"0": [3.0, 2.0, 1.0]}},
        "3-prune": {"ranks": {"0": 2}, "val_cut": {"loss": 1.0, "accuracy": 0.5}, "val": {"loss": 0.4, "accuracy": 0.9}},
        "4-finetune": {"epochs": epochs, "val": {"loss": 0.3, "accuracy": 0.93}},
        "b1-truncated": {
            "epochs": epochs,
            "ranks": {"0": 1},
            "val_cut": {"loss": 2.0, "accuracy": 0.1},
            "val": {"loss": 0.3, "accuracy": 0.9},
        },
    }
    for name, entry in numbers.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "stage.json").write_text(json.dumps({"finished": True, "numbers": entry}))
    (folder / "5-merge").mkdir()
    (folder / "5-merge" / "stage.json").write_text(json.dumps({"finished": False}))
    (folder / "recipe.yaml").write_text(RECIPE)
    timed = {"latency_iqr_s": 0.0005, "batch": 1, "threads": 1}
    measured = {
        "dense": {"params": 100, "macs": 1000, "size_bytes": 400, "accuracy": 0.95, "loss": 0.3, "latency_s": 0.002} | timed,
        "final": {"params": 50, "macs": 500, "size_bytes": 200, "ranks": {"0": 2}, "accuracy": 0.93, "loss": 0.4, "latency_s": 0.003}
        | timed,
        "truncated": {"params": 50, "macs": 500, "size_bytes": 200, "accuracy": 0.94, "loss": 0.4, "latency_s": 0.002} | timed,
    }
    if finished:
        (folder / "result.json").write_text(json.dumps(measured | {"stages": numbers, "environment": {"device": "cpu"}}))
    return folder


def test_a_runs_folder_is_read_whole(tmp_path: Path) -> None:
    run = data.run_data(run_folder(tmp_path / "net"))
    assert run["name"] == "net"
    assert list(run["measured"]) == ["dense", "low-rank", "truncated SVD"]
    assert [stage["name"] for stage in run["stages"]] == ["1-dense", "2-train", "3-prune", "4-finetune", "b1-truncated"]
    assert [len(stage["phases"]) for stage in run["stages"]] == [0, 2, 0, 1, 1]
    assert run["ranks"] == {"0": 2}
    assert run["spectra"] == {"0": [[1, 3.0], [2, 2.0], [3, 1.0]]}


def test_runs_of_before_cuts_and_layers_were_logged(tmp_path: Path) -> None:
    stages = data.run_data(run_folder(tmp_path / "net"))["stages"]
    assert [stage["cuts"] for stage in stages] == [[], [[], []], [], [[]], [[]]]
    assert [part["ranks"] for stage in stages for part in stage["layers"]] == [{}] * 4
    numbers = {"epochs": [{}, {}], "cuts": [{"step": 4, "ranks": {"0": 2}}]}
    assert data._stage("x", numbers)["cuts"] == [[]], "a step alone has no place among the epochs"


def test_cuts_and_layers_of_each_phase() -> None:
    lines = [{"ranks": {"0": rank, "1": 4}, "defects": {"0": 0.12345, "1": 0.5}} for rank in (3, 2)]
    cut = {"step": 7, "epoch": 1.75, "ranks": {"0": 2, "1": 4}}
    first, second = {"epochs": [{}, {}], "cuts": [cut], "layers": lines}, {"epochs": [{}, {}, {}], "cuts": [], "layers": lines}
    apart = {key: [phase[key] for phase in (first, second)] for key in ("cuts", "layers")} | {"phases": [first["epochs"], second["epochs"]]}
    for numbers in (apart, {"phases": [first, second]}):
        stage = data._stage("2-train", numbers)
        assert stage["cuts"] == [[{"step": 7, "epoch": 1.75}], []]
        assert [part["epochs"] for part in stage["layers"]] == [[1, 2], [2, 3]], "the first epoch of the second phase is not known"
        assert all(part["ranks"] == {"0": [3, 2], "1": [4, 4]} for part in stage["layers"])
        assert all(part["defects"] == {"0": [0.123, 0.123], "1": [0.5, 0.5]} for part in stage["layers"])
    assert data._stage("4-finetune", first)["layers"] == stage["layers"][:1]


def test_a_long_course_is_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "POINTS", 3)
    lines = [{"ranks": {"0": rank}, "defects": {"0": 0.1}} for rank in range(9, 0, -1)]
    part = data._stage("x", {"epochs": [{}] * 9, "layers": lines})["layers"][0]
    assert (part["epochs"], part["ranks"]) == ([1, 5, 9], {"0": [9, 5, 1]})


def test_what_a_run_writes_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped path: recipe, stages on the disk, data of the page."""
    monkeypatch.setattr(
        sys.modules["spectrim.metrics.measurement"], "compare_latency", partial(sp.compare_latency, repeats=1, min_time=1e-3)
    )
    module = "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))\n"
    (tmp_path / "smallnet.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}
    ramp = {"class_path": "spectrim.Ramp", "init_args": {"target": {"macs": 0.5}, "end": 1.0, "cuts": 2}}
    small = recipe.parse_recipe(
        {
            "model": "smallnet.net",
            "factorize": {"where": ["*"]},
            "data": {"class_path": "spectrim.zoo.digits", "init_args": {"batch_size": 256}},
            "loss": "torch.nn.CrossEntropyLoss",
            "train": [{"epochs": 2, "optimizer": optimizer, "courses": [ramp]}, {"epochs": 1, "optimizer": optimizer}],
            "prune": {"rule": {"class_path": "spectrim.Energy", "init_args": {"keep": 1.0}}},
            "finetune": {"epochs": 1, "optimizer": optimizer},
        }
    )
    Run(small, tmp_path / "net", progress=False).run()
    stages = {stage["name"]: stage for stage in data.run_data(tmp_path / "net")["stages"]}
    assert [len(part["epochs"]) for part in stages["2-train"]["layers"]] == [2, 1]
    assert [len(cuts) for cuts in stages["2-train"]["cuts"]] == [2, 0]
    falling = stages["2-train"]["layers"][0]["ranks"]
    assert any(ranks[0] > ranks[1] for ranks in falling.values())
    assert {name: ranks[-1] for name, ranks in stages["4-finetune"]["layers"][0]["ranks"].items()} == data.run_data(tmp_path / "net")[
        "ranks"
    ]


def test_what_fell_short_is_said(tmp_path: Path, found: Plan) -> None:
    lines = shortfalls.shortfalls(found, data.run_data(run_folder(tmp_path / "net")))
    says = (
        *("Budget macs=0.001: Budget: macs must be at least", "2.00 points of accuracy below the dense network"),
        *("Slower than the dense network: 3.000 against 2.000 ms", "Plain truncated SVD with fine-tuning is 1.00 points better"),
        "The cut alone cost 44.0 points",
    )
    assert len(lines) == len(says)
    assert all(line.startswith(words) for line, words in zip(lines, says, strict=True))


def test_nothing_fell_short_where_all_is_well(tmp_path: Path) -> None:
    run = data.run_data(run_folder(tmp_path / "net"))
    run["measured"]["low-rank"] |= {"accuracy": 0.96, "latency_s": 0.001}
    run["stages"][2]["val"]["val_cut"]["accuracy"] = 0.935
    assert shortfalls.shortfalls(None, run) == []
    run["measured"]["low-rank"]["latency_s"] = 0.0018
    assert "is within the spread" in shortfalls.shortfalls(None, run)[0]


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "net", finished=False)
    assert "not finished" in text_report(folder)
    assert write_report(folder) == folder / "report.html"


def test_text_has_the_essentials(tmp_path: Path, found: Plan) -> None:
    text = text_report(run_folder(tmp_path / "net"))
    for words in ("| accuracy ", "low-rank", "What fell short:", "3-prune, right after the cut: loss 1, accuracy 0.5", "  0: 2"):
        assert words in text
    assert text_report(found) == str(found)


def test_plan_files_and_plans_of_runs(tmp_path: Path, found: Plan) -> None:
    found.save(tmp_path / "some.plan.json")
    assert write_report(tmp_path / "some.plan.json") == tmp_path / "some.plan.html"
    folder = run_folder(tmp_path / "net")
    without = write_report(folder).stat().st_size
    found.save(folder / page.PLAN)
    assert write_report(folder).stat().st_size > without
    assert str(found) in text_report(folder)


def test_a_plan_with_results_beside_it(tmp_path: Path, found: Plan) -> None:
    result = read_json(run_folder(tmp_path / "net") / "result.json")
    text = text_report(found, result=result)
    assert "low-rank" in text
    assert str(found) in text
    assert "low-rank" in write_report(found, tmp_path / "page.html", result=result).read_text()


def test_compress_is_shown_as_a_run(tmp_path: Path, found: Plan) -> None:
    measured = read_json(run_folder(tmp_path / "net") / "result.json")
    epochs = [{"loss": 0.5, "mean_rank": 3.0}]
    scores = {"dense": {"accuracy": 0.9}, "cut": {"accuracy": 0.5}, "corrected": {"accuracy": 0.8}, "final": {"accuracy": 0.88}}
    report = {"dense": measured["dense"], "final": measured["final"], "scores": scores, "history": {"epochs": epochs, "cuts": []}}
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(report))
    for text in (text_report(folder), text_report(found, result=report)):
        for words in ("dense, at the end: accuracy 0.9", "cut, right after the cut: accuracy 0.5", "cut, refitted: accuracy 0.8"):
            assert words in text
        assert "The cut alone cost 40.0 points" in text
        assert "fine-tuning, at the end: accuracy 0.88" in text
    assert [stage["phases"] for stage in data.run_data(folder)["stages"]] == [[], [], [epochs]]


def test_what_is_neither_is_refused(tmp_path: Path, found: Plan) -> None:
    with pytest.raises(FormatError, match="it has no recipe"):
        write_report(tmp_path)
    with pytest.raises(FormatError, match="does not exist"):
        text_report(tmp_path / "missing.json")
    with pytest.raises(FormatError, match="has no path"):
        write_report(found)
    folder = run_folder(tmp_path / "net")
    (folder / "result.json").write_text("{")
    with pytest.raises(FormatError, match="is damaged"):
        write_report(folder)


def test_command_line(tmp_path: Path, found: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found.save(tmp_path / "plan.json")
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    cli.main(["report", str(tmp_path / "plan.json"), "--out", str(tmp_path / "deep" / "page.html"), "--open"])
    assert f"written to {tmp_path / 'deep' / 'page.html'}" in capsys.readouterr().out
    assert opened == [(tmp_path / "deep" / "page.html").as_uri()]
    cli.main(["report", str(tmp_path / "plan.json"), "--text"])
    assert capsys.readouterr().out == f"{found}\n"


def test_budgets_of_a_plan_reach_the_page(found: Plan) -> None:
    rows = data.plan_data(found)["budgets"]
    assert [row["totals"] is None for row in rows] == [False, True]
    totals = found.budgets[0].totals
    assert totals is not None
    assert rows[0]["totals"]["macs"] == totals.macs


def test_words_are_those_of_the_glossary() -> None:
    glossary = (Path(__file__).resolve().parents[3] / "docs" / "glossary.md").read_text(encoding="utf-8")
    for word, meaning in WORDS.items():
        assert f"| {word} | {meaning} |" in glossary, word
