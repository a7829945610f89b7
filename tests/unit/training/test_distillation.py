"""Distillation of the dense network's layer outputs."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spectrim.budget.rules import Fixed
from spectrim.errors import LayerError, SettingError
from spectrim.surgery.factorize import factorize
from spectrim.surgery.prune import prune
from spectrim.training.distillation import Distillation, hint_layers, outputs_of, unexplained_variance
from spectrim.training.fit import fit
from spectrim.training.tuning import Tuning


def everything(name: str, module: nn.Module) -> bool:
    return True


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3)
    )


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randn(16, 2, 8, 8, generator=generator) for _ in range(count)]
    return [(x, x.mean((2, 3)).argmax(1)) for x in draw]


def student_of(teacher: nn.Module) -> nn.Module:
    return prune(factorize(teacher, "channel", everything), Fixed(2))


def test_the_loss_by_hand() -> None:
    teacher = net()
    student, (x, y) = student_of(teacher), batches(1)[0]
    names = ("0", "3")
    with outputs_of(student, names) as own, outputs_of(teacher, names) as taught:
        output = student.eval()(x)
        task = nn.functional.cross_entropy(output, y)
        loss = Distillation(teacher, temperature=2.0, weight=0.4, features=5.0).loss(
            task, x, output, lambda: unexplained_variance(own, taught)
        )
    teacher.eval()
    first = teacher[0](x), student[0](x)
    second = teacher[:4](x), student[:4](x)
    hints = sum((a - b).square().mean() / a.var(correction=0) for a, b in (first, second))
    torch.testing.assert_close(loss, Distillation(teacher, temperature=2.0, weight=0.4).loss(task, x, output) + 5 * hints)


def test_padding_teaches_nothing() -> None:
    teacher, student = nn.Linear(3, 5), nn.Linear(3, 5)
    x, y = torch.randn(2, 4, 3), torch.randint(5, (2, 4))
    y[0, 2:], y[1, 3:] = -100, -100
    distill = Distillation(teacher, temperature=1.0, weight=1.0)
    kept = y != -100
    task = torch.zeros(())
    torch.testing.assert_close(distill.loss(task, x, student(x), target=y), distill.loss(task, x[kept], student(x[kept])))
    assert not torch.allclose(distill.loss(task, x, student(x), target=y), distill.loss(task, x, student(x)))
    assert distill.loss(task, x, student(x), target=torch.full_like(y, -100)) == 0
    torch.testing.assert_close(
        distill.loss(task, x, student(x), target=y[:, 0]), distill.loss(task, x, student(x))
    )  # says nothing of the places

    def masked(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.transpose(1, 2), target)

    ends = []
    for noise in (0.0, 5.0):  # what stands at the padding does not matter while training, either
        low, inputs = copy.deepcopy(student), torch.where(kept.unsqueeze(-1), x, x + noise)
        fit(low, [(inputs, y)], masked, torch.optim.SGD(low.parameters(), 0.1), 1, lessons=[distill], progress=False)
        ends.append(low.weight.detach())
    torch.testing.assert_close(*ends)


def test_the_share_that_is_unexplained_variance_is_blind_to_scale_and_zero_for_equal_outputs() -> None:
    f, g = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    for scale in (1e-3, 1.0, 1e3):
        torch.testing.assert_close(unexplained_variance({"a": scale * f}, {"a": scale * g}), unexplained_variance({"a": f}, {"a": g}))
    assert unexplained_variance({"a": g}, {"a": g}) == 0
    assert torch.isfinite(unexplained_variance({"a": f}, {"a": torch.zeros(4, 5)}).double()), "a layer whose output is constant"


def test_gradients_reach_the_student_alone() -> None:
    f, g = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    unexplained_variance({"a": f}, {"a": g}).backward()
    assert f.grad is not None
    assert g.grad is None


def fitted(teacher: nn.Module, student: nn.Module, epochs: int = 8, compiled: bool = False, **settings: object) -> list[float]:
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    distill = Distillation(teacher, **settings)  # type: ignore[arg-type]
    history = fit(
        student,
        batches(),
        nn.CrossEntropyLoss(),
        optimizer,
        epochs,
        lessons=[distill],
        eval_data=batches(1),
        tuning=Tuning(compiled=compiled),
        progress=False,
    )
    return [line["loss"] for line in history.epochs]


def gap(teacher: nn.Module, student: nn.Module) -> float:
    names, (x, _) = ("0", "3", "6"), batches(1)[0]
    with torch.no_grad(), outputs_of(student.eval(), names) as own, outputs_of(teacher.eval(), names) as taught:
        student(x), teacher(x)
    return float(unexplained_variance(own, taught))


def test_features_bring_the_layers_nearer_to_the_teachers() -> None:
    teacher = net()
    start = student_of(teacher)
    plain, hinted = copy.deepcopy(start), copy.deepcopy(start)
    fitted(teacher, plain)
    losses = fitted(teacher, hinted, features=10.0)
    assert losses[-1] < losses[0]
    assert gap(teacher, hinted) < 0.8 * gap(teacher, start)
    assert gap(teacher, hinted) < 0.8 * gap(teacher, plain)


def test_features_teach_until_a_share_of_the_steps() -> None:
    teacher = net()
    students = [student_of(teacher) for _ in range(4)]
    never, early, all_along, zero = (
        fitted(teacher, student, epochs=4, **settings)
        for student, settings in zip(
            students, ({}, {"features": 9.0, "until": 0.5}, {"features": 9.0}, {"features": 9.0, "until": 0.0}), strict=True
        )
    )
    assert zero == never
    assert early[:2] == all_along[:2]
    assert early[2] < all_along[2]
    assert early[2] != never[2]


def test_training_leaves_no_hook_and_no_output_behind() -> None:
    teacher = net()
    student = student_of(teacher)
    fitted(teacher, student, epochs=1, features=1.0)
    assert not any(module._forward_hooks for network in (teacher, student) for module in network.modules())


def test_features_alone_teach_networks_whose_outputs_are_no_scores() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.net(x)}

    teacher = Two()
    student = student_of(teacher)
    optimizer, distill = torch.optim.Adam(student.parameters(), 0.01), Distillation(teacher, weight=0.0, features=1.0)
    history = fit(student, batches(), lambda output, y: 0 * output["scores"].sum(), optimizer, 8, lessons=[distill], progress=False)
    assert history.epochs[-1]["loss"] < 0.8 * history.epochs[0]["loss"]


def test_a_weight_of_zero_is_as_without() -> None:
    teacher = net()
    one, other = student_of(teacher), student_of(teacher)
    assert fitted(teacher, one, epochs=2) == fitted(teacher, other, epochs=2, features=0.0, layers=("nowhere",))


@pytest.mark.parametrize("layers", [None, ("2", "4")])
def test_resumed_training_ends_with_the_same_bits(tmp_path: object, layers: tuple[str, ...] | None) -> None:
    teacher = net()
    whole, stopped = student_of(teacher), student_of(teacher)

    def run(model: nn.Module, *callbacks: Callable[..., None]) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        distill = Distillation(teacher, features=2.0, until=0.6, layers=layers)
        folder = tmp_path / ("whole" if model is whole else "stopped")  # type: ignore[operator]
        fit(
            model, batches(), nn.CrossEntropyLoss(), optimizer, 3, lessons=[distill], checkpoint=folder, callbacks=callbacks, progress=False
        )  # fmt: skip

    def stop(epoch: int, *_: object) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, stop)
    run(stopped)
    assert all(map(torch.equal, whole.state_dict().values(), stopped.state_dict().values()))


def test_layers_of_every_kind_of_output() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = nn.Embedding(12, 8), nn.LSTM(8, 8, batch_first=True)
            self.attend, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x, _ = self.rnn(self.embed(x))
            x, _ = self.attend(x, x, x)
            out: Tensor = self.head(x).mean(1)
            return out

    teacher = Net()
    student = student_of(teacher)
    x, y = torch.randint(12, (6, 5)), torch.randint(4, (6,))
    assert set(hint_layers(student)) >= {"embed", "rnn", "attend", "head"}
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    history = fit(student, [(x, y)], nn.CrossEntropyLoss(), optimizer, 5, lessons=[Distillation(teacher, features=3.0)], progress=False)
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda student: net(),
            "'Sequential': has no factorized layer whose output can be compared with a teacher's; name the modules to compare",
        ),
        (lambda student: nn.Sequential(student, nn.Identity()), "'0.0': is not in Sequential, so that its outputs cannot be compared"),
    ],
)
def test_students_that_cannot_be_taught(change: Callable[[nn.Module], nn.Module], message: str) -> None:
    teacher = net()
    with pytest.raises(LayerError, match=message):
        fitted(teacher, change(student_of(teacher)), features=1.0)


def test_outputs_of_another_shape_name_the_layer() -> None:
    teacher = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 3))
    student = factorize(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)), where=everything)
    with pytest.raises(LayerError, match=r"'0'.*its output has shape \(16, 4, 6, 6\), the teacher's \(16, 6, 6, 6\)"):
        fitted(teacher, student, features=1.0)


def test_modules_without_tensors_are_named() -> None:
    with pytest.raises(LayerError, match="have no outputs that could be compared"):
        unexplained_variance({}, {"a": torch.zeros(1)})


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(SettingError, match=r"Distillation: until must be a fraction in \[0, 1\], got 2"):
        Distillation(nn.Identity(), until=2.0)
    with pytest.raises(SettingError, match="Distillation: features must be >= 0, got -1"):
        Distillation(nn.Identity(), features=-1.0)
