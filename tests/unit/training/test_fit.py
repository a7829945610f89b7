"""The training loop: what a step does, what the log says, and that a stopped run loses nothing."""

import copy
import math
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import spectrim as sp
from spectrim import zoo
from spectrim.errors import DivergedError, FormatError, SettingError
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import one_example
from spectrim.training.checkpoint import CHECKPOINT, random_state, restore_random_state
from spectrim.training.distillation import Distillation
from spectrim.training.fit import fit
from spectrim.training.history import History, largest_gradient, mean_rank
from spectrim.training.statefile import read_state

LOSS = nn.CrossEntropyLoss()


def net(dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    torch.default_generator.manual_seed(3)
    layers = [nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(24, 10))


def batches(count: int = 4, size: int = 8, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 1, 8, 8, generator=generator), torch.randint(0, 10, (size,), generator=generator)) for _ in range(count)]


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr)


def tuned(settings: dict[str, Any]) -> dict[str, Any]:
    """Put the settings of a `Tuning` into one."""
    names = {entry.name for entry in fields(sp.Tuning)} & settings.keys()
    return {name: value for name, value in settings.items() if name not in names} | {"tuning": sp.Tuning(**{n: settings[n] for n in names})}


def run(model: nn.Module, data: Any, optimizer: torch.optim.Optimizer | None = None, epochs: int = 1, **settings: Any) -> History:
    return fit(model, data, LOSS, optimizer or sgd(model), epochs, progress=False, **tuned(settings))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    """Bit for bit, through nested containers."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def log(history: History) -> list[dict[str, float]]:
    """The history without what a clock says."""
    return [{key: value for key, value in line.items() if key not in ("seconds", "examples_per_s")} for line in history.epochs]


# What a step does


def test_a_step_by_hand() -> None:
    model, data = net(), batches(1)
    reference = copy.deepcopy(model)
    loss = LOSS(reference(data[0][0]), data[0][1])
    loss.backward()
    with torch.no_grad():
        for p in reference.parameters():
            p -= 0.1 * p.grad
    history = run(model, data)
    assert history.last["loss"] == loss.item()
    torch.testing.assert_close(weights(model), weights(reference))


def test_the_log_holds_what_each_penalty_added() -> None:
    low, data = sp.factorize(net(norm=True), where=sp.match("*")), batches(3)
    penalties = [sp.Orthogonality(0.5), sp.Hoyer(0.02), sp.Hoyer(0.03)]
    expected: list[list[float]] = []

    def note(penalty: Any) -> Callable[[nn.Module], Tensor]:
        def call(model: nn.Module) -> Tensor:
            value = penalty(model)
            expected[-1].append(value.item())
            return value

        return call

    def task(output: Tensor, target: Tensor) -> Tensor:
        value = LOSS(output, target)
        expected.append([value.item()])
        return value

    class Noted:
        """A penalty class of the user's own."""

        def __init__(self, penalty: Any) -> None:
            self.call = note(penalty)

        def __call__(self, model: nn.Module) -> Tensor:
            return self.call(model)

    history = fit(low, data, task, sgd(low), 1, penalties=[Noted(p) for p in penalties], progress=False)
    sums = [sum(column) / 3 for column in zip(*expected, strict=True)]
    assert [history.last[name] for name in ("loss", "Noted 1", "Noted 2", "Noted 3")] == sums
    assert sums[2] > 0


def test_penalties_are_part_of_the_gradient() -> None:
    low, data = sp.factorize(net(), where=sp.match("*")), batches(1)
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.mul_(1.2)  # off the ideal point, where the gradient of the penalty is not zero
    reference = copy.deepcopy(low)
    penalties = [sp.Orthogonality(0.5), sp.Hoyer(0.02)]
    total = LOSS(reference(data[0][0]), data[0][1]) + sum(penalty(reference) for penalty in penalties)
    total.backward()
    sgd(reference).step()
    history = run(low, data, penalties=penalties)
    torch.testing.assert_close(weights(low), weights(reference))
    assert history.last["loss"] + history.last["Orthogonality"] + history.last["Hoyer"] == pytest.approx(total.item())
    assert history.last["mean_rank"] == mean_rank(low) == (24 + 10) / 2


def test_loss_falls_on_digits() -> None:
    data = zoo.digits(batch_size=64)
    low = sp.factorize(net(norm=True), where=sp.match("*"))
    history = run(
        low, data.train, torch.optim.Adam(low.parameters(), 5e-3), 4, penalties=[sp.Orthogonality(1.0), sp.Hoyer(0.01)], eval_data=data.val
    )
    losses = [line["loss"] for line in history.epochs]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
    assert history.last["eval_accuracy"] > 0.85
    assert history.last["eval_accuracy"] == sp.evaluate(low, data.val, LOSS)["accuracy"]
    assert history.last["examples_per_s"] > 0
    assert history.last["seconds"] > 0


@pytest.mark.parametrize("count", [4, 5, 1])
def test_accumulated_batches_are_one_larger_batch(count: int) -> None:
    """Two batches of 8 for a step are one of 16; the last group of an odd epoch is one batch of 8, at full weight."""
    small = batches(count)
    pairs = [small[i : i + 2] for i in range(0, count, 2)]
    large = [tuple(torch.cat(parts) for parts in zip(*pair, strict=True)) for pair in pairs]
    low = sp.factorize(net(), where=sp.match("*"))
    a, b = copy.deepcopy(low), copy.deepcopy(low)
    run(a, small, epochs=2, accumulate=2, penalties=[sp.Orthogonality(1.0)])
    run(b, large, epochs=2, penalties=[sp.Orthogonality(1.0)])
    torch.testing.assert_close(weights(a), weights(b))
    assert not same(weights(a), weights(low))


def test_clipping_bounds_the_whole_gradient() -> None:
    model, data = net(), batches(1)
    before = weights(model)
    run(model, data, sgd(model, 1.0), clip=1e-3)
    step = torch.cat([(before[name] - tensor).flatten() for name, tensor in weights(model).items()])
    assert float(step.norm()) == pytest.approx(1e-3, rel=1e-3)  # float32 differences of weights near 0.1 have 1e-8 of rounding each
    loose = net()
    run(loose, data, sgd(loose, 1.0), clip=1e6)
    plain = net()
    run(plain, data, sgd(plain, 1.0))
    assert same(weights(loose), weights(plain))


@pytest.mark.parametrize(("steps", "accumulate", "expected"), [("epoch", 1, 3), ("batch", 1, 12), ("batch", 3, 6)])
def test_schedules_advance(steps: Any, accumulate: int, expected: int) -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    history = run(model, batches(4), optimizer, 3, scheduler=scheduler, scheduler_steps=steps, accumulate=accumulate)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**expected)
    per_epoch = expected // 3
    rates = [0.1 * 0.5 ** (epoch * per_epoch + (per_epoch - 1 if steps == "batch" else 0)) for epoch in range(3)]
    assert [line["learning_rate"] for line in history.epochs] == pytest.approx(rates), "of the last step of each epoch"


def test_mixed_precision_leaves_the_model_as_it_was() -> None:
    low, seen = sp.factorize(net(norm=True), where=sp.match("*")), []
    low[1].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    before = {name: set(vars(module)) for name, module in low.named_modules()}
    history = run(low, batches(), precision="bf16", epochs=2, penalties=[sp.Orthogonality(1.0)], eval_data=batches(1), clip=1.0)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    assert {name: set(vars(module)) for name, module in low.named_modules()} == before
    assert "forward" not in vars(low)
    assert history.last["loss"] < history.epochs[0]["loss"]
    assert not torch.is_autocast_enabled("cpu")
    plain = run(net(), batches(), epochs=1)
    assert math.isfinite(plain.last["loss"]), "the precision of one call does not linger"


def test_an_output_in_half_precision_meets_the_loss_in_float32() -> None:
    seen = set()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.add(output.dtype)
        return LOSS(output, target)

    model = net()
    fit(model, batches(1), loss, sgd(model), 1, tuning=sp.Tuning(precision="bf16"), eval_data=batches(1), progress=False)
    assert seen == {torch.float32}


def test_distillation_by_hand() -> None:
    teacher, x = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), torch.randn(5, 4)
    output, task, T, share = torch.randn(5, 3), torch.tensor(0.7), 3.0, 0.4
    p, q = (teacher[0](x) / T).softmax(-1), (output / T).softmax(-1)
    expected = 0.6 * 0.7 + share * T**2 * (p * (p / q).log()).sum(-1).mean().item()
    assert Distillation(teacher, temperature=T, weight=share).loss(task, x, output).item() == pytest.approx(expected)
    assert teacher.training, "the teacher runs in eval mode and is left as it was"
    assert Distillation(teacher, temperature=T, weight=0.0).loss(task, x, output).item() == pytest.approx(0.7)
    kl = F.kl_div(output.log_softmax(-1), teacher[0](x).log_softmax(-1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(Distillation(teacher, temperature=1.0, weight=1.0).loss(task, x, output), kl)


def test_distillation_over_another_axis() -> None:
    teacher, x = nn.Identity(), torch.randn(2, 3, 5)
    output = torch.randn(2, 3, 5)
    turned = Distillation(teacher, temperature=2.0, weight=1.0).loss(torch.zeros(()), x.mT, output.mT)
    torch.testing.assert_close(Distillation(teacher, temperature=2.0, weight=1.0, dim=1).loss(torch.zeros(()), x, output), turned)


def test_distillation_trains_towards_the_teacher() -> None:
    teacher, student, data = net(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), batches()
    before = weights(teacher)
    history = run(student, data, epochs=6, lessons=[Distillation(teacher, temperature=2.0, weight=1.0)], eval_data=data)
    losses = [line["loss"] for line in history.epochs]
    assert losses == sorted(losses, reverse=True)
    assert same(weights(teacher), before)
    assert all(p.grad is None for p in teacher.parameters())


def test_mixed_batches_by_hand() -> None:
    """One share for the batch, and inputs and losses mixed alike: a linear loss cannot tell mixed targets from mixed losses."""
    x, target, output = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3), torch.randn(6, 3)
    torch.manual_seed(1)
    (inputs, same_inputs), mixed = Distillation(nn.Identity(), mix=0.5).mixed((x, x.float()), lambda output, y: (output * y).mean())
    torch.manual_seed(1)
    share, order = torch.distributions.Beta(0.5, 0.5).sample(), torch.randperm(6)
    assert 0 < share < 1
    assert not torch.equal(order, torch.arange(6))
    torch.testing.assert_close(inputs, share * x + (1 - share) * x[order])
    torch.testing.assert_close(same_inputs, inputs.float())
    torch.testing.assert_close(mixed(output, target), (output * (share * target + (1 - share) * target[order])).mean())
    x, loss = torch.zeros(6, dtype=torch.int64), nn.CrossEntropyLoss()
    assert Distillation(nn.Identity()).mixed(x, loss) == (x, loss)
    with pytest.raises(SettingError, match=r"Distillation: mix must be 0 for inputs of torch.int64, got 0.5; indices"):
        Distillation(nn.Identity(), mix=0.5).mixed(x, loss)


def test_student_and_teacher_see_the_same_mixture() -> None:
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    teacher, student, data = net(), net(), batches()
    for name, model in (("teacher", teacher), ("student", student)):
        model.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0]))
    run(student, data, lessons=[Distillation(teacher, mix=1.0)])
    assert len(seen["student"]) == 4
    assert all(map(torch.equal, seen["teacher"], seen["student"]))
    assert not any(torch.equal(x, batch) for x, (batch, _) in zip(seen["student"], data, strict=True))


def test_inputs_may_be_tuples_and_dicts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.a(left) + self.b(right)

    left, right, target = torch.randn(6, 3), torch.randn(6, 4), torch.randint(0, 2, (6,))
    results = []
    for inputs in ((left, right), [left, right], {"right": right, "left": left}):
        torch.default_generator.manual_seed(0)
        model = Two()
        history = run(model, [(inputs, target)] * 2, epochs=2, eval_data=[(inputs, target)])
        assert history.last["loss"] < history.epochs[0]["loss"]
        results.append(weights(model))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_epochs_are_announced() -> None:
    class Data(list[Any]):
        """Batches that want to know the epoch."""

        epochs: list[int]

        def set_epoch(self, epoch: int) -> None:
            self.epochs = [*getattr(self, "epochs", []), epoch]

    class Sampler(RandomSampler):
        epochs: tuple[int, ...] = ()

        def set_epoch(self, epoch: int) -> None:
            self.epochs += (epoch,)

    data = Data(batches(1))
    run(net(), data, epochs=3)
    assert data.epochs == [0, 1, 2]
    run(net(), data, epochs=2, first_epoch=3)
    assert data.epochs == [0, 1, 2, 3, 4]
    examples = TensorDataset(*batches(1)[0])
    loader = DataLoader(examples, sampler=Sampler(examples), batch_size=4)
    run(net(), loader, epochs=2)
    assert loader.sampler.epochs == (0, 1)


def test_evaluation_and_callbacks_see_each_epoch() -> None:
    model, data, seen = net(dropout=0.5), batches(), []

    def note(epoch: int, metrics: dict[str, float], trained: nn.Module) -> None:
        assert trained is model
        seen.append((epoch, metrics["eval_loss"], sp.evaluate(model, data, LOSS)["loss"]))
        metrics["mine"] = 3.0

    history = run(model, data, epochs=3, eval_data=data, callbacks=[note])
    assert [epoch for epoch, *_ in seen] == [1, 2, 3]
    assert all(logged == value for _, logged, value in seen)
    assert [line["mine"] for line in history.epochs] == [3.0] * 3
    assert set(history.last) == {*("loss", "mean_rank", "learning_rate", "examples_per_s", "seconds", "eval_loss", "eval_accuracy", "mine")}
    assert history.to_dict() == {"epochs": history.epochs, "cuts": [], "layers": []}, "a dense model has no ranks"
    assert History().last == {}
    assert model.training, "left in training mode"


def test_ranks_and_defects_of_every_epoch() -> None:
    low = sp.factorize(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), where=sp.match("*"))
    with torch.no_grad():
        low[0].factors_of("weight").U.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        low[0].factors_of("weight").Vh.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    data = [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))] * 2
    history = run(low, data, sgd(low, lr=0.0), epochs=2)
    assert [line["ranks"] for line in history.layers] == [{"0": 2, "1": 2}] * 2
    for line in history.layers:
        assert line["defects"]["0"] == 8 / math.sqrt(2), "U^T U - I = diag(3, 0) and Vh Vh^T - I = diag(0, 8), over the root of the rank"
        assert 0 < line["defects"]["1"] < 1e-6
    assert history.to_dict()["layers"] == history.layers


class HalfWay:
    """Cuts in the middle of the second epoch."""

    def __call__(self, model: nn.Module, inputs: Any, step: int, steps: int) -> dict[str, int] | None:
        return {"1": 7} if step == 6 else None


def test_a_resumed_run_has_the_layers_of_the_whole_one(tmp_path: Path) -> None:
    def go(folder: Path, epochs: int) -> History:
        return run(sp.factorize(net(), where=sp.match("*")), batches(), epochs=epochs, checkpoint=folder, courses=[HalfWay()])

    whole = go(tmp_path / "whole", 3)
    for epochs in (1, 2, 3):
        parts = go(tmp_path / "parts", epochs)
    assert parts.layers == whole.layers
    assert parts.cuts == whole.cuts
    assert [line["ranks"]["1"] for line in whole.layers] == [24, 7, 7]
    assert [(cut["step"], cut["epoch"]) for cut in whole.cuts] == [(6, 1.5)]
    assert whole.layers[0]["defects"] != whole.layers[2]["defects"]


def test_a_checkpoint_without_layers_is_resumed(tmp_path: Path) -> None:
    low = sp.factorize(net(), where=sp.match("*"))
    run(copy.deepcopy(low), batches(), epochs=2, checkpoint=tmp_path)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    del state["layers"]
    torch.save(state, tmp_path / CHECKPOINT)
    history = run(low, batches(), epochs=3, checkpoint=tmp_path)
    assert (len(history.epochs), len(history.layers)) == (3, 1)


def test_no_epochs_change_nothing() -> None:
    model = net()
    before = weights(model)
    assert run(model, batches(), epochs=0).epochs == []
    assert same(before, weights(model))


def test_a_users_own_accelerator() -> None:
    from accelerate import Accelerator

    a, b, accelerator = net(), net(), Accelerator()
    prepared = accelerator.prepare_optimizer(sgd(net()))
    run(a, batches(), epochs=2, accelerator=accelerator)
    assert accelerator._optimizers == [prepared], "what the user prepared stays, what fit prepared goes"
    run(b, batches(), epochs=2)
    assert same(weights(a), weights(b))
    with pytest.raises(SettingError, match="precision must be 'no', that of your accelerator, got 'bf16'"):
        run(a, batches(), accelerator=Accelerator(), precision="bf16")


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    low = sp.factorize(net(), where=sp.match("*"))
    fit(low, batches(), LOSS, sgd(low), 2, penalties=[sp.Orthogonality()], eval_data=batches(1))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all(word in lines[1] for word in ("loss ", "Orthogonality ", "mean_rank 17", "examples_per_s ", "eval_accuracy "))


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "fit: epochs must be an integer of at least 0, got -1"),
        ({"accumulate": 0}, "Tuning: accumulate must be an integer of at least 1, got 0"),
        ({"clip": 0.0}, "Tuning: clip must be above 0, got 0.0"),
        ({"clip": math.nan}, "Tuning: clip must be above 0, got nan"),
        ({"steps_per_epoch": 0}, "Tuning: steps_per_epoch must be an integer of at least 1, got 0"),
        ({"keep_best": True}, "fit: keep_best must be given with eval_data, the validation split, for 'eval_loss', got True"),
        ({"keep_best": "mine"}, "Tuning: keep_best must be True, a name that ends on 'loss' or 'accuracy', 'min NAME' or 'max NAME'"),
        ({"data": []}, "fit: data must be at least one batch, got []"),
        (
            {"data": iter(batches(1))},
            "fit: data must be an iterable of batches (inputs, target), such as a DataLoader or a list, got a list_iterator; a generator",
        ),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    model = net()
    before = weights(model)
    with pytest.raises(SettingError) as caught:
        run(model, **{"data": batches(1), **settings})
    assert str(caught.value).startswith(message)
    assert same(before, weights(model))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Types are checked while these tests run; users have no such checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler_steps": "batches"}, "Tuning: scheduler_steps must be 'epoch' or 'batch', got 'batches'"),
        ({"lessons": ["Auto"]}, "fit: lessons must be a lesson, such as Distillation(teacher), got 'Auto'"),
        ({"lessons": [Distillation]}, "fit: lessons must be a lesson"),
        ({"courses": ["auto"]}, "fit: courses must be courses, such as Ramp(0.9), or functions"),
        ({"penalties": [sp.Hoyer]}, "fit: penalties must be a list of penalties, such as [Orthogonality(0.1)], got the class Hoyer"),
    ],
)
def test_settings_of_another_type(unchecked: None, settings: dict[str, Any], message: str) -> None:
    model = net()
    before = weights(model)
    with pytest.raises(SettingError) as caught:
        run(model, **{"data": batches(1), **settings})
    assert str(caught.value).startswith(message)
    assert same(before, weights(model))


def test_the_optimizer_of_another_model_is_refused() -> None:
    """The classic: an optimizer made before `factorize` would train the model that was factorized."""
    model = net()
    with pytest.raises(SettingError, match="make the optimizer after factorize"):
        run(sp.factorize(model, where=sp.match("*")), batches(1), sgd(model))


def test_a_misspelled_teacher_of_compress_is_refused(unchecked: None) -> None:
    with pytest.raises(SettingError, match="compress: distill must be 'auto', a Distillation, or None, got 'Auto'"):
        sp.compress(net(), batches(1), LOSS, sp.Budget(macs=0.5), distill="Auto", progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"temperature": 0.0}, "temperature"), ({"weight": 1.5}, "weight"), ({"weight": -0.1}, "weight"), ({"mix": -1.0}, "mix")],
)
def test_distillation_settings(settings: dict[str, float], field: str) -> None:
    with pytest.raises(SettingError, match=f"Distillation: {field} must be"):
        Distillation(nn.Identity(), **settings)


# Divergence


class Bad(list[Any]):
    """Batches of which one, at a given epoch, is not finite."""

    def __init__(self, epoch: int, index: int, value: float) -> None:
        super().__init__(batches())
        self.bad = (epoch, index, value)
        self.epoch = -1

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        for index, (x, y) in enumerate(super().__iter__()):
            yield (torch.full_like(x, self.bad[2]) if (self.epoch, index) == self.bad[:2] else x), y


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = net()
    good: dict[str, Tensor] = {}
    with pytest.raises(DivergedError) as caught:
        run(
            model,
            Bad(1, 2, math.nan),
            epochs=3,
            checkpoint=tmp_path,
            callbacks=[lambda epoch, line, trained: good.update(weights(trained))],
        )
    layer, norm = largest_gradient(model)
    file = tmp_path / CHECKPOINT
    assert str(caught.value) == (
        f"loss became nan at step 6 (epoch 1); the largest gradient before it was in '{layer}' (norm {norm:.3g}); last good checkpoint: "
        f"{file}; try a lower learning rate, Tuning(clip=1.0) or weaker penalties"
    )
    assert layer in dict(model.named_parameters())
    assert norm == max(float(p.grad.norm()) for p in model.parameters())
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    fresh = net()
    assert len(run(fresh, batches(), epochs=1, checkpoint=tmp_path).epochs) == 1
    assert same(weights(fresh), good)


def test_weights_that_are_not_finite_are_named() -> None:
    low = sp.factorize(net(), where=sp.match("*"))
    with torch.no_grad():
        low[1].factors["weight"].S.fill_(torch.inf)
    with pytest.raises(DivergedError, match=r"loss became (nan|inf), and so is parameter '1\.\S+' before the step, at step 0 \(epoch 0\)"):
        run(low, batches())


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    model = net()
    with pytest.raises(SettingError, match="fit: optimizer must be one whose step needs no closure, got 'LBFGS'"):
        run(model, batches(), torch.optim.LBFGS(model.parameters()))


def test_divergence_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"loss became nan at step 0 \(epoch 0\).*no gradient yet.*no checkpoint was written"):
        run(net(), Bad(0, 0, math.nan))
    with pytest.raises(DivergedError, match="no checkpoint was written"):
        run(net(), Bad(0, 1, math.inf), checkpoint=tmp_path)


def test_a_penalty_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(DivergedError, match="loss became inf"):
        run(net(), batches(1), penalties=[lambda model: torch.tensor(math.inf)])


def test_weights_that_diverge_in_the_last_step_are_not_saved(tmp_path: Path) -> None:
    """The loss is finite to the end of the epoch, but the last step ruins the weights: the good checkpoint must stay."""

    class Ruin(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> None:
            super().step(closure)
            self.steps += 1
            if self.steps == 8:
                with torch.no_grad():
                    self.param_groups[0]["params"][0][0, 0] = math.nan

    model = net()
    with pytest.raises(DivergedError, match=r"a parameter stopped being finite at step 7 \(epoch 1\).*checkpoint\.pt"):
        run(model, batches(), Ruin(model.parameters(), 0.1), epochs=3, checkpoint=tmp_path)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert len(state["history"]) == 1
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


# Checkpoints


def loaders(kind: str) -> Any:
    examples = TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))
    if kind == "global generator":
        return DataLoader(examples, batch_size=8, shuffle=True)
    if kind == "own generator":
        return DataLoader(examples, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(7))
    if kind == "sampler's generator":
        return DataLoader(examples, batch_size=8, sampler=RandomSampler(examples, generator=torch.Generator().manual_seed(7)))
    if kind == "numpy":

        class Data(list[Any]):
            def __iter__(self) -> Iterator[Any]:
                scale = np.random.rand()  # noqa: NPY002 what a user's code does
                return ((x * scale, y) for x, y in super().__iter__())

        return Data(batches())
    return zoo.Batches(*examples.tensors, batch_size=8, shuffle=True, seed=1, augment=zoo.CropFlip(1))


def session(kind: str, epochs: int, folder: Path | None, precision: Any = "no", seed: int = 11) -> tuple[Any, ...]:
    """Everything anew, as a process that starts again would make it."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    model = sp.factorize(net(dropout=0.3, norm=True), where=sp.match("*"))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=4 * 4)
    history = run(
        model,
        loaders(kind),
        optimizer,
        epochs,
        scheduler=scheduler,
        scheduler_steps="batch",
        penalties=[sp.Orthogonality(1.0), sp.Hoyer(0.02)],
        eval_data=loaders("global generator"),  # draws a seed from the global generator on each pass
        checkpoint=folder,
        precision=precision,
        callbacks=[lambda epoch, line, trained: line.update(draw=float(torch.rand(())))],
    )
    return weights(model), optimizer.state_dict(), scheduler.state_dict(), log(history), torch.rand(3)


@pytest.mark.parametrize("kind", ["global generator", "own generator", "sampler's generator", "numpy", "zoo"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, kind: str) -> None:
    whole = session(kind, 3, None)
    part = session(kind, 1, tmp_path)
    assert not same(whole[0], part[0])
    resumed = session(kind, 3, tmp_path, seed=100)  # another process starts from another random state
    assert len(resumed[3]) == 3
    for a, b in zip(whole, resumed, strict=True):
        assert same(a, b)


def test_a_run_resumed_again_and_again(tmp_path: Path) -> None:
    whole = session("global generator", 4, None)
    for epochs in (0, 1, 1, 3, 4, 4):
        resumed = session("global generator", epochs, tmp_path, seed=11 if epochs < 2 else epochs)
        assert len(resumed[3]) == epochs
    for a, b in zip(whole, resumed, strict=True):
        assert same(a, b), "the last call, on a finished run, gives its result again"


def test_a_resumed_run_in_mixed_precision(tmp_path: Path) -> None:
    whole = session("zoo", 2, None, "bf16")
    session("zoo", 1, tmp_path, "bf16")
    assert same(session("zoo", 2, tmp_path, "bf16", seed=12)[:4], whole[:4])


def test_every_generator_is_restored() -> None:
    """Python's own is tested here alone: beartype, which checks types while these tests run, draws from it."""
    own = torch.Generator().manual_seed(1)

    def draw() -> list[float]:
        restore_random_state(state, [own])
        numbers = [random.random(), np.random.rand(), np.random.randn(), float(torch.rand(())), float(torch.rand((), generator=own))]  # noqa: NPY002
        return [*numbers, random.gauss(0, 1), np.random.randn()]  # noqa: NPY002

    np.random.randn()  # noqa: NPY002 half of a pair: the other half is part of the state
    state = random_state([own])
    first = draw()
    assert len(set(first)) == 7
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    own.manual_seed(2)
    assert draw() == first


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(SettingError, match="precision must be 'no' or 'bf16' on a CPU, got 'fp16'"):
        run(net(), batches(1), precision="fp16")


def test_without_its_checkpoint_a_run_begins_again(tmp_path: Path) -> None:
    session("zoo", 2, tmp_path)
    (tmp_path / CHECKPOINT).unlink()
    (tmp_path / "checkpoint.pt.123-0123abcd.tmp").write_bytes(b"half")
    model = net()
    history = run(model, batches(), epochs=1, checkpoint=tmp_path)
    assert len(history.epochs) == 1
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_fewer_epochs_than_were_run_change_nothing(tmp_path: Path) -> None:
    model = net()
    run(model, batches(), epochs=3, checkpoint=tmp_path)
    bits = (tmp_path / CHECKPOINT).read_bytes()
    again = net()
    assert len(run(again, batches(), epochs=2, checkpoint=tmp_path).epochs) == 3
    assert same(weights(again), weights(model))
    assert (tmp_path / CHECKPOINT).read_bytes() == bits


def snapshot(model: nn.Module, optimizer: Any, scheduler: Any, generator: torch.Generator) -> Any:
    states = (weights(model), optimizer.state_dict(), None if scheduler is None else scheduler.state_dict())
    generators = (torch.get_rng_state(), np.random.get_state()[1].tolist(), generator.get_state())  # noqa: NPY002
    return copy.deepcopy((states, generators))


def assert_refused(folder: Path, model: nn.Module, match: str, optimizer: Any = None, scheduler: Any = None) -> None:
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(1)
    data = DataLoader(TensorDataset(*batches(1)[0]), batch_size=4, shuffle=True, generator=generator)
    before, file = snapshot(model, optimizer, scheduler, generator), (folder / CHECKPOINT).read_bytes()
    with pytest.raises(FormatError, match=match) as caught:
        run(model, data, optimizer, 9, checkpoint=folder, scheduler=scheduler)
    assert str(folder / CHECKPOINT) in str(caught.value)
    assert same(before, snapshot(model, optimizer, scheduler, generator))
    assert (folder / CHECKPOINT).read_bytes() == file


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a run that was stopped after two epochs."""
    model = net()
    generator = torch.Generator().manual_seed(1)
    data = DataLoader(TensorDataset(*batches(1)[0]), batch_size=4, shuffle=True, generator=generator)
    run(model, data, torch.optim.Adam(model.parameters(), 1e-2), 2, checkpoint=tmp_path)
    return tmp_path


def test_the_checkpoint_of_another_model(stopped: Path) -> None:
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 25), nn.Identity(), nn.ReLU(), nn.Dropout(0.0), nn.Linear(25, 10))
    assert_refused(
        stopped, wide, r"another model \(3 of 4 tensors differ\); first difference: '1.weight'; delete the checkpoint to start again"
    )
    assert_refused(stopped, net(norm=True), "another model")
    assert_refused(stopped, net()[:2], "another model")
    assert_refused(stopped, sp.factorize(net(), where=sp.match("*")), "another model")
    assert_refused(stopped, net().double(), r"another model \(4 of 4 tensors differ\)")


def test_the_checkpoint_of_another_optimizer(stopped: Path) -> None:
    model = net()
    assert_refused(stopped, model, "another optimizer or schedule", sgd(model))
    groups = [{"params": [p]} for p in model.parameters()]
    assert_refused(stopped, model, "another optimizer or schedule", torch.optim.Adam(groups))
    adam = torch.optim.Adam(model.parameters())
    assert_refused(stopped, model, "another optimizer or schedule", adam, torch.optim.lr_scheduler.StepLR(adam, 1))


def test_damaged_checkpoints(stopped: Path) -> None:
    file = stopped / CHECKPOINT
    whole = file.read_bytes()
    draw = random.Random(0)
    for length in (0, 1, 10, *draw.sample(range(len(whole)), 5), len(whole) - 1):
        file.write_bytes(whole[:length])
        assert_refused(stopped, net(), "is not a readable checkpoint")
    for garbage in (b"garbage" * 100, b"\x80\x04K\x03.", whole[::-1]):
        file.write_bytes(garbage)
        assert_refused(stopped, net(), "is not a readable checkpoint")
    torch.save({"model": {}}, file)
    assert_refused(stopped, net(), "is not a readable checkpoint")
    torch.save([1, 2], file)
    assert_refused(stopped, net(), "is not a readable checkpoint")


def test_damaged_bytes_are_refused_or_harmless(stopped: Path) -> None:
    """Flipped bits, runs of garbage and cuts anywhere: refused with nothing changed, or the same bits as from the whole file."""
    file = stopped / CHECKPOINT
    whole, expected = file.read_bytes(), net()
    examples = TensorDataset(*batches(1)[0])

    def data() -> Any:
        return DataLoader(examples, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1))

    assert len(run(expected, data(), torch.optim.Adam(expected.parameters(), 1e-2), 2, checkpoint=stopped).epochs) == 2
    draw, refused = random.Random(4), 0
    model = net()
    start = weights(model)
    for index in range(30):
        damaged = bytearray(whole)
        at = draw.randrange(len(damaged))
        if index % 3 == 0:
            damaged[at] ^= 1 << draw.randrange(8)
        elif index % 3 == 1:
            damaged[at : at + 64] = draw.randbytes(len(damaged[at : at + 64]))
        else:
            damaged = damaged[:at]
        file.write_bytes(damaged)
        model.load_state_dict(start)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        try:
            history = run(model, data(), optimizer, 2, checkpoint=stopped)
        except FormatError:
            refused += 1
            assert same(weights(model), start), index
            assert not optimizer.state, index
        else:
            assert len(history.epochs) == 2, index
            assert same(weights(model), weights(expected)), index
    assert refused >= 25, "most of the file is data"


def test_damaged_tensors_are_noticed(stopped: Path) -> None:
    """Every tensor of the file, one bit of it flipped: each is refused."""
    file = stopped / CHECKPOINT
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size]
    assert len(entries) > 10
    for entry in entries:
        start = whole.index(entry.filename.encode(), entry.header_offset) + len(entry.filename)
        extra = int.from_bytes(whole[entry.header_offset + 28 : entry.header_offset + 30], "little")
        damaged = bytearray(whole)
        damaged[start + extra + entry.file_size // 2] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"is not a readable checkpoint \(BadZipFile: the checksum of"):
            read_state(file, "delete it")


def test_no_pickle_is_run(stopped: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("code in a checkpoint was run",))

    torch.save({"model": Payload()}, stopped / CHECKPOINT)
    assert_refused(stopped, net(), "is not a readable checkpoint")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("random", {}),
        ("random", {"torch": torch.zeros(3)}),
        ("random.numpy", ["MT19937", torch.zeros(2), 0, 0, 0.0]),
        ("random.loader", []),
        ("random.loader", [torch.zeros(3)]),
        ("optimizer.state", 3),
        ("optimizer.param_groups", 3),
        ("optimizer", 3),
        ("history", 3),
        ("model", [1]),
        ("model", {"1.weight": "text"}),
    ],
    ids=str,
)
def test_a_checkpoint_that_fails_half_way_through_changes_nothing(stopped: Path, part: str, value: Any) -> None:
    state = torch.load(stopped / CHECKPOINT, weights_only=True)
    node, (*path, last) = state, part.split(".")
    for key in path:
        node = node[key]
    assert last in node
    node[last] = value
    torch.save(state, stopped / CHECKPOINT)
    model = net()
    assert_refused(stopped, model, "is not a readable checkpoint|does not fit this run|another model|another optimizer")


def test_half_written_files_are_ignored_and_removed(stopped: Path) -> None:
    (stopped / "checkpoint.pt.4711-0123abcd.tmp").write_bytes((stopped / CHECKPOINT).read_bytes()[:100])
    (stopped / "mine.tmp").write_text("kept")
    model = net()
    assert len(run(model, loaders("own generator"), torch.optim.Adam(model.parameters(), 1e-2), 3, checkpoint=stopped).epochs) == 3
    assert sorted(path.name for path in stopped.iterdir()) == [CHECKPOINT, "mine.tmp"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (stopped / CHECKPOINT).read_bytes()

    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    model = net()
    with pytest.raises(OSError, match="no space"):
        run(model, loaders("own generator"), torch.optim.Adam(model.parameters(), 1e-2), 3, checkpoint=stopped)
    assert (stopped / CHECKPOINT).read_bytes() == before
    assert [path.name for path in stopped.iterdir()] == [CHECKPOINT]


# Going on after a cut


def test_training_goes_on_after_a_cut(tmp_path: Path) -> None:
    data = zoo.digits(batch_size=128)
    low = sp.factorize(net(norm=True), where=sp.match("*"))
    optimizer = torch.optim.Adam(low.parameters(), 5e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=6 * len(data.train))
    settings: dict[str, Any] = {"scheduler": scheduler, "scheduler_steps": "batch", "penalties": [sp.Orthogonality(1.0)]}
    run(low, data.train, optimizer, 3, **settings)
    cut = sp.prune(low, sp.budget.Fraction(0.5))
    with pytest.raises(SettingError, match="call prune_optimizer_state after prune"):
        run(cut, data.train, optimizer, 1, **settings)
    steps = scheduler.last_epoch
    sp.surgery.prune_optimizer_state(optimizer, low, cut)
    frozen = weights(low)
    history = run(cut, data.train, optimizer, 3, checkpoint=tmp_path, **settings)
    assert same(frozen, weights(low)), "the uncut model is no longer trained"
    losses = [line["loss"] for line in history.epochs]
    assert losses[-1] < losses[0]
    assert history.last["mean_rank"] == (12 + 5) / 2
    assert scheduler.last_epoch == steps + 3 * len(data.train)
    resumed = sp.prune(low, sp.budget.Fraction(0.5))
    other = torch.optim.Adam(resumed.parameters(), 5e-3)
    again = run(
        resumed,
        data.train,
        other,
        3,
        checkpoint=tmp_path,
        **settings | {"scheduler": torch.optim.lr_scheduler.OneCycleLR(other, 5e-3, total_steps=9)},
    )
    assert log(again) == log(history)
    assert same(weights(resumed), weights(cut))


def test_a_batch_that_is_no_pair_is_refused_with_what_to_do() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = {"input_ids": torch.zeros(1, 2), "labels": torch.zeros(1)}
    with pytest.raises(SettingError, match=r"fit: data must be batches \(inputs, target\), got <class 'dict'>; .*batches.pairs"):
        fit(model, [batch], nn.MSELoss(), optimizer, 1, progress=False)
    with pytest.raises(SettingError, match=r"evaluate: data .*batches.pairs"):
        evaluate(model, [batch], nn.MSELoss())
    with pytest.raises(SettingError, match="one_example: data"):
        one_example([(1, 2, 3)])
