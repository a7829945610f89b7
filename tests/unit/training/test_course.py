"""Courses and lessons: functions of their arguments and memory alone, whose memory a checkpoint keeps to the bit."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import FormatError, SettingError
from spectrim.layers import named_factors
from spectrim.projections import Levels, TopK
from spectrim.protocols import Change, Course, Lesson, Seen
from spectrim.training.admm import ADMM
from spectrim.training.course import Cuts
from spectrim.training.magnitude import Gradual, Hold, OneShot
from spectrim.training.precision import CyclicPrecision, LearnedPrecision, StaticPrecision
from spectrim.training.retraction import Retraction
from spectrim.training.step import Step
from spectrim.training.straight_through import StraightThrough

EVERYTHING = sp.match("*")


def low() -> nn.Module:
    torch.manual_seed(1)
    return sp.factorize(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)), where=EVERYTHING)


def batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 12, generator=generator), torch.randn(8, 4, generator=generator)) for _ in range(count)]


@dataclass(frozen=True)
class Pull:
    """Half the squared distance of the biases to tensors that a course has in its memory."""

    goals: dict[str, Tensor]
    weight: float

    def __call__(self, model: nn.Module) -> Tensor:
        biases = dict(model.named_parameters())
        return self.weight * torch.stack([(biases[name] - goal).square().sum() for name, goal in self.goals.items()]).sum()


@dataclass(frozen=True)
class Trail:
    """A toy: pulls biases to their running average, masks what is small after each step, and cuts one rank half way."""

    rate: float = 0.3

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        biases = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
        return {"average": biases, "asked": 0, "log": [("start", steps)]}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        memory["asked"] += 1
        ranks = {name: factors.rank - 1 for name, factors in named_factors(model)} if step == steps // 2 else None
        return Change(ranks, Pull(memory["average"], 0.1 * memory["asked"]))

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        memory["log"] = [*memory["log"][-3:], ("after", step)]
        for name, p in model.named_parameters():
            if name in memory["average"]:
                memory["average"][name] = torch.lerp(memory["average"][name], p.detach(), self.rate)
                p.mul_(p.abs() > 1e-3)


COURSES = [
    Trail(),
    sp.Ramp(sp.Budget(macs=0.5), cuts=3),
    sp.Ramp(0.8, cuts=2),
    sp.Squeeze(sp.Budget(macs=0.5), updates=5),
    sp.Squeeze(sp.Budget(macs=0.5), updates=5, cut=False),
    ADMM({"0.*.U": TopK(9), "*.S": Levels(3)}, rounds=4, end=0.8, residual=0.9),
    OneShot({"*.S": TopK(2)}, at=0.5),
    Gradual({"*": TopK(0.1)}, cuts=5),
    StraightThrough({"*.S": TopK(3), "2.*.U": Levels(2)}, begin=0.2, end=0.8),
    Hold(),
    LearnedPrecision(0.6),
    CyclicPrecision(cycles=3),
    StaticPrecision(5),
    Cuts(lambda model, inputs, step, steps: {"0": 5} if step == 3 else None),
]


@pytest.mark.parametrize("course", COURSES, ids=lambda course: type(course).__name__)
def test_a_course_is_a_function_of_its_arguments_and_memory_alone(course: Any) -> None:
    """Asked again, with a copy of the memory, in another order and after other questions, it says the same and leaves the same memory."""
    assert isinstance(course, Course)
    model, (inputs, _) = low(), batches()[0]
    asked = []
    memory = course.start(model, inputs, 20)
    for step in range(20):
        before = copy.deepcopy(memory)
        change = course.before(model, inputs, step, 20, memory)
        middle = copy.deepcopy(memory)
        with torch.no_grad():
            twin = copy.deepcopy(model)
            course.after(twin, step, 20, memory)
        asked.append((step, before, copy.deepcopy(change), middle, twin.state_dict(), copy.deepcopy(memory)))
    for step, before, change, middle, weights, end in reversed(asked):
        again = course.before(model, inputs, step, 20, before)
        assert alike(before, middle), step
        assert alike(vars(again), vars(change)), step
        with torch.no_grad():
            twin = copy.deepcopy(model)
            course.after(twin, step, 20, before)
        assert alike(before, end), step
        assert alike(twin.state_dict(), weights), step


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return bool(vars(a).keys() == vars(b).keys() and alike(vars(a), vars(b)) if hasattr(a, "__dict__") else a == b)


class StoppedError(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_memory_with_tensors_resumes_with_the_same_bits(tmp_path: Path, accumulate: int) -> None:
    def train(folder: Path | None, until: int = 9) -> tuple[nn.Module, Any]:
        def stop(epoch: int, line: dict[str, float], model: nn.Module) -> None:
            if epoch == until:
                raise StoppedError

        model = low()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        settings: dict[str, Any] = {
            "courses": [Trail(), sp.Ramp(0.9, end=0.8, cuts=1)],
            "tuning": sp.Tuning(accumulate=accumulate),
            "callbacks": [stop],
        }
        return model, sp.fit(model, batches(), nn.MSELoss(), optimizer, 6, checkpoint=folder, progress=False, **settings)

    whole, history = train(None)
    for until in (1, 3, 5):
        with pytest.raises(StoppedError):
            train(tmp_path, until)
    model, resumed = train(tmp_path)
    assert alike(whole.state_dict(), model.state_dict())
    assert resumed.cuts == history.cuts
    assert len(history.cuts) == 2
    assert [line["Trail"] for line in resumed.epochs] == [line["Trail"] for line in history.epochs]
    assert history.epochs[0]["Trail"] > 0, "what a course adds is in the log"
    assert "Ramp" not in history.epochs[0]
    other = low()
    with pytest.raises(FormatError, match=r"another (optimizer or schedule|model)"):
        sp.fit(
            other, batches(), nn.MSELoss(), torch.optim.Adam(other.parameters()), 9, courses=[Trail()], checkpoint=tmp_path, progress=False
        )


def test_the_penalty_of_a_course_is_part_of_the_gradient() -> None:
    class Constant(Trail):
        def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
            return Change(penalty=sp.Orthogonality(0.5))

        def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
            pass

    a, b = low(), low()
    for model, settings in ((a, {"courses": [Constant()]}), (b, {"penalties": [sp.Orthogonality(0.5)]})):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        sp.fit(model, batches(), nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1), 2, progress=False, **settings)
    assert alike(a.state_dict(), b.state_dict())


def test_a_function_is_a_course_and_is_named_in_the_log() -> None:
    def half(model: nn.Module, inputs: Any, step: int, steps: int) -> dict[str, int] | None:
        return {"0": 6} if step == 2 else None

    model = low()
    history = sp.fit(model, batches(), nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1), 1, courses=[half], progress=False)
    assert [cut["step"] for cut in history.cuts] == [2]
    assert list(Step("fit", [sp.Hoyer(0.1), sp.Hoyer(0.2)], [half, sp.Ramp(0.5)]).courses) == ["half", "Ramp"]


# Lessons


@dataclass(frozen=True)
class Small:
    """Keeps what a layer returns small; a scalar of the step that sees one layer."""

    layer: str
    weight: float

    def watched_layers(self, model: nn.Module) -> tuple[str, ...]:
        return (self.layer,)

    def __call__(self, seen: Seen) -> Tensor:
        assert 0 <= seen.done < 1
        return seen.loss + self.weight * seen.layers[self.layer].square().mean()


def test_a_lesson_by_hand_and_its_column() -> None:
    model, (batch, *_) = low(), batches(1)
    reference, (inputs, target) = copy.deepcopy(model), batch
    lesson = Small("0", 0.7)
    assert isinstance(lesson, Lesson)
    assert isinstance(sp.Distillation(model), Lesson)
    hidden = reference[0](inputs)
    task, share = nn.functional.mse_loss(reference[1:](hidden), target), 0.7 * hidden.square().mean()
    (task + share).backward()
    task, share = task.detach(), share.detach()
    torch.optim.SGD(reference.parameters(), 0.1).step()
    history = sp.fit(model, [batch], nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1), 1, lessons=[lesson], progress=False)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())
    assert history.last["loss"] == pytest.approx(float(task + share))
    assert history.last["Small"] == pytest.approx(float(share))
    assert not any(module._forward_hooks for module in model.modules())


def test_lessons_come_one_after_the_other() -> None:
    model, teacher = low(), low()
    lessons = [sp.Distillation(teacher, weight=0.5), Small("0", 0.1), Small("2", 0.1)]
    history = sp.fit(model, batches(), nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.0), 1, lessons=lessons, progress=False)
    assert list(history.last)[:4] == ["loss", "Distillation", "Small 1", "Small 2"]
    task = sp.evaluate(model, batches(), nn.MSELoss())["loss"]
    assert history.last["loss"] == pytest.approx(task + sum(history.last[name] for name in ("Distillation", "Small 1", "Small 2")))


def test_a_lesson_outside_of_training() -> None:
    """Called by hand on what was seen: as in a loop of one's own."""
    teacher, (inputs, target) = low(), batches()[0]
    student = sp.prune(teacher, sp.budget.Fixed(2))
    lesson = sp.Distillation(teacher, features=2.0)
    with sp.training.distillation.outputs_of(student, lesson.watched_layers(student)) as layers:
        output = student(inputs)
        task = nn.functional.mse_loss(output, target)
        loss = lesson(Seen(task, inputs, output, target, layers, 0.0))
    assert loss > lesson(Seen(task, inputs, output, target, layers, 1.0)), "hints end at the share `until` of training"


def test_courses_and_lessons_that_are_none_are_refused() -> None:
    for given in (3, sp.Ramp, "auto"):
        with pytest.raises(SettingError, match=r"mine: courses must be courses, such as Ramp"):
            Step("mine", courses=[given])
    for given in (3, sp.Distillation, lambda seen: seen.loss):
        with pytest.raises(SettingError, match=r"mine: lessons must be a lesson"):
            Step("mine", lessons=[given])


# Orthonormal factors at a fraction of the price


def test_a_penalty_for_every_third_step_counts_three_times_then_and_not_between() -> None:
    model = low()
    with torch.no_grad():
        for _, factors in named_factors(model):
            factors.U.mul_(1.1)
    every, once = sp.Orthogonality(2.0, every=3), float(sp.Orthogonality(2.0)(model).detach())
    assert float(every(model).detach()) == once > 0, "called by hand it is the penalty"
    step, optimizer, seen = Step("fit", [every]), torch.optim.SGD(model.parameters(), 0.0), []
    for at in range(7):
        step.before(model, None, optimizer, at, 7)
        seen.append(float(step.added(model)[0].detach()))
    assert seen == pytest.approx([3 * once, 0, 0, 3 * once, 0, 0, 3 * once])
    for kind in (sp.Orthogonality, sp.penalties.PolarHoyer, sp.penalties.NuclearNorm):
        twice, once = Step("fit", [kind(1.0, every=2)]).added(model)[0].detach(), kind(1.0)(model).detach()
        assert float(twice) == pytest.approx(2 * float(once))
        assert float(once) > 0
        with pytest.raises(SettingError, match="whole number of steps"):
            kind(1.0, every=0)


def test_retraction_keeps_factors_orthonormal_without_a_penalty() -> None:
    data, defects = batches(12), {}
    for name, courses in {"none": [], "retraction": [Retraction(every=4)]}.items():
        model = low()
        history = sp.fit(model, data, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), 0.3), 3, courses=courses, progress=False)
        defects[name] = max(history.layers[-1]["defects"].values())
    assert defects["retraction"] < 0.1 * defects["none"]
