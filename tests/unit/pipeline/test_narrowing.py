"""`compress(narrow=)`: budgets are those of the dense network, and of several shares the best one is kept."""

import json

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import LayerError, SettingError


def compressed(task, **settings):
    model, data = task
    settings = {"budget": sp.Budget(macs=0.4), "cut": "whitened", "where": lambda *layer: True, "progress": False} | settings
    return sp.compress(model, data, nn.CrossEntropyLoss(), **settings)


def test_the_budget_is_a_share_of_the_dense_network(task):
    made = compressed(task, narrow=0.7)
    dense = 16 * 32 + 32 * 32 + 32 * 4
    assert made.measured["dense"].macs == dense
    assert made.measured["final"].macs <= 0.4 * dense
    assert made.measured["final"].macs > 0.3 * dense
    assert made.scores["dense"] == compressed(task).scores["dense"]
    assert made.notes[0].startswith("narrowed first, to 0.7 of the macs; units read by 2 ")
    assert made.settings["narrow"] == 0.7
    assert "narrow" not in compressed(task).settings


def test_units_alone_may_meet_the_budget(task):
    made = compressed(task, narrow=0.4)
    assert made.measured["final"].macs <= 0.4 * made.measured["dense"].macs
    assert all(type(layer) is nn.Linear for layer in made.model if not isinstance(layer, nn.ReLU))  # no pair: no rank was cut


def test_of_several_shares_the_best_is_kept_and_each_has_its_folder(task, tmp_path):
    made = compressed(task, narrow=(1, 0.8, 0.6), folder=tmp_path)
    each = {share: compressed(task, narrow=share) for share in (1, 0.8, 0.6)}
    found = {share: list(one.scores.values())[-1] for share, one in each.items()}
    best = min(found, key=lambda share: (-found[share]["accuracy"], found[share]["loss"]))
    assert list(made.scores.values())[-1] == found[best]
    assert f"narrowed to several shares, {best:g} is kept: 1 (loss" in made.notes[-1]
    assert made.settings["narrow"] == [1.0, 0.8, 0.6]
    assert json.loads((tmp_path / "result.json").read_text())["notes"] == made.notes
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("narrow")) == ["narrow0.6", "narrow0.8", "narrow1"]
    x = task[1][0][0]
    assert torch.equal(sp.load(tmp_path / "final", task[0])(x), made.model(x))


def test_a_network_without_hidden_units_is_cut_as_it_is_where_that_is_allowed(task):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 16), nn.Softmax(1), nn.Linear(16, 4)), task[1]
    made = compressed((model, data), narrow=(1, 0.8))
    assert "not narrowed to 0.8: layer 'Sequential': has no hidden units" in made.notes[-1]
    with pytest.raises(LayerError, match="no hidden units"):
        compressed((model, data), narrow=0.8)


def test_a_stopped_call_goes_on_with_the_narrower_network(task, tmp_path):
    first = compressed(task, narrow=0.7, folder=tmp_path)
    again = compressed(task, narrow=0.7, folder=tmp_path)
    x = task[1][0][0]
    assert torch.equal(first.model(x), again.model(x))
    assert first.scores == again.scores


def test_without_labels_scores_are_against_the_dense_network(task):
    model, data = task
    made = sp.compress(model, [x for x, _ in data], sp.Budget(params=0.5), narrow=0.8, cut="both", progress=False)
    with torch.no_grad():
        target, out = (network(torch.cat([x for x, _ in data])) for network in (model, made.model))
    expected = float((out - target).square().mean() / (target - target.mean()).square().mean())
    assert list(made.scores.values())[-1]["loss"] == pytest.approx(expected, rel=1e-3)
    assert made.scores["dense"]["loss"] < 1e-9


def test_with_epochs_it_is_trained(task):
    made = compressed(task, narrow=0.7, epochs=1)
    assert len(made.history.epochs) == 1
    assert made.measured["final"].macs <= 0.4 * made.measured["dense"].macs


def test_blocks_are_reconstructed_toward_the_dense_network(task):
    from spectrim.training.parts import Reconstruction

    model, data = task
    made = sp.compress(
        model,
        [x for x, _ in data],
        sp.Budget(params=0.5),
        narrow=0.8,
        cut="both",
        reconstruct=Reconstruction(steps=5, whole=20),
        progress=False,
    )
    assert any("reconstructed" in note for note in made.notes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"narrow": 0.0}, "narrow must be a share"),
        ({"narrow": ()}, "narrow must be a share"),
        ({"narrow": (0.9, 0.9)}, "narrow must be a share"),
        ({"narrow": True}, "narrow must be a share"),
        ({"narrow": "0.9"}, "narrow must be a share"),
        ({"narrow": 0.9, "budget": sp.Budget(latency=0.5)}, "left out with a fraction of latency"),
        ({"narrow": 0.9, "budget": sp.Budget(coded_bytes=0.5)}, "left out where nothing but coded_bytes"),
        ({"narrow": 0.001}, "cannot be met by fewer hidden units"),
    ],
)
def test_refusals(task, settings, message):
    with pytest.raises(SettingError, match=message):
        compressed(task, **settings)


def test_what_was_made_of_the_dense_network_does_not_fit_a_narrower_one(task):
    model, data = task
    known = sp.calibrate(sp.factorize(model, where=lambda *layer: True), data, nn.CrossEntropyLoss())
    with pytest.raises(SettingError, match="calibration must be left out with narrow"):
        compressed(task, narrow=0.9, calibration=known)
