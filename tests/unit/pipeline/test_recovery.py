"""Cuts are compared after a short recovery, which trains copies alone."""

import re
from functools import partial

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import FormatError, SettingError
from spectrim.pipeline import tuner
from spectrim.pipeline.recovery import Recovery


def counting(parameters, steps):
    optimizer = torch.optim.SGD(parameters, 0.1)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    return optimizer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_takes_so_many_steps_and_trains_a_copy_alone(task, accumulate):
    model, data = task
    low, steps = sp.factorize(model, rank=4), []
    before, random = {name: value.clone() for name, value in low.state_dict().items()}, torch.get_rng_state()
    tuning = sp.Tuning(optimizer=partial(counting, steps=steps), accumulate=accumulate)
    recovered = Recovery(5, nn.CrossEntropyLoss(), tuning, [], None, data[:3], False)(low, False)  # fewer batches than steps
    assert len(steps) == 5
    assert all(torch.equal(value, before[name]) for name, value in low.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    loss = nn.CrossEntropyLoss()
    assert sp.evaluate(recovered, data, loss)["loss"] < sp.evaluate(low, data, loss)["loss"]


@pytest.mark.parametrize("chosen", [False, True])
def test_a_teacher_that_was_chosen_for_a_large_gap_teaches_no_cut_with_a_small_one(task, chosen):
    model, data = task
    loss, teacher = nn.CrossEntropyLoss(), sp.Distillation(model, weight=1.0)
    states = [
        Recovery(3, loss, sp.Tuning(), [], who, data, chosen)(sp.factorize(model, rank=4), far=False).state_dict()
        for who in (teacher, None)
    ]
    alike = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert alike == chosen


def test_keeps_the_cut_with_the_lowest_loss_after_it(task):
    model, data = task
    made = sp.compress(model, data, nn.CrossEntropyLoss(), sp.Budget(macs=0.4), 1, recovery=4, progress=False)
    (note,) = [note for note in made.notes if "steps of recovery" in note]
    found = {way: float(loss) for way, loss in re.findall(r"(\w+) [\d.e-]+ -> ([\d.e-]+)", note)}
    assert note.startswith("compared by the loss after 4 steps of recovery: ")
    assert list(found) == ["plain", "whitened", "sensitive", "mixed"]
    assert found[made.cut] == min(found.values())


def test_is_part_of_a_folder_s_identity_and_resumes(task, tmp_path):
    model, data = task
    call = partial(sp.compress, model, data, nn.CrossEntropyLoss(), sp.Budget(macs=0.4), 1, folder=tmp_path, progress=False)
    first, again = call(recovery=2), call(recovery=2)
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in first.model.state_dict().items())
    with pytest.raises(FormatError, match="recovery"):
        call(recovery=3)


@pytest.mark.parametrize("given", [{"epochs": 0}, {"cut": "plain"}, {"squeeze": 0.5}, {"recovery": -1}])
def test_refuses_where_nothing_is_compared(task, given):
    model, data = task
    with pytest.raises(SettingError, match="recovery"):
        sp.compress(model, data, nn.CrossEntropyLoss(), sp.Budget(macs=0.4), **{"epochs": 2, "recovery": 3, "progress": False} | given)


def test_holds_no_more_batches_than_memory_allows(task, monkeypatch):
    model, data = task
    made, held = Recovery.__call__, []
    monkeypatch.setattr(tuner, "room", lambda device: 1)
    monkeypatch.setattr(Recovery, "__call__", lambda self, low, far: held.append(len(self.batches)) or made(self, low, far))
    found = sp.compress(model, data, nn.CrossEntropyLoss(), sp.Budget(macs=0.4), 1, recovery=2, progress=False)
    assert any("after 2 steps of recovery" in note for note in found.notes)
    assert held == [1] * 4
