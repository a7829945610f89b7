"""Lightning: penalties of the right weight, cuts that keep training state, and a run that can be stopped."""

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.protocols import Change

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Lightning imports warns of its own dependencies
    pl = pytest.importorskip("lightning.pytorch")
    integration = pytest.importorskip("spectrim.integrations.lightning", exc_type=ImportError)
    from spectrim.integrations.lightning import SpectrimCallback, penalty, taught

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # advice on speed
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader"),  # advice again: a run without validation is meant
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # meant: a run is resumed into its folder
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning uses what torch is to remove
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of third parties
]
PENALTIES = [sp.Orthogonality(0.3), sp.Hoyer(0.05)]
LOSS = nn.CrossEntropyLoss()


def network() -> nn.Module:
    torch.default_generator.manual_seed(3)
    model = sp.factorize(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)), where=lambda name, module: True)
    for _, factors in sp.layers.named_factors(model):  # away from orthonormal factors, where the gradient of that penalty is zero
        with torch.no_grad():
            factors.U.add_(0.05 * torch.randn_like(factors.U))
    return model


class Net(pl.LightningModule):
    def __init__(self, optimizer: Any = torch.optim.SGD, rate: float = 0.1, **settings: Any) -> None:
        super().__init__()
        self.model = network()
        self.make = lambda: optimizer(self.parameters(), rate, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1]) + penalty(self)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", F.cross_entropy(self(batch[0]), batch[1]) + penalty(self))

    def configure_optimizers(self) -> Any:
        return self.make()


class Forgetful(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Shrink:
    """A course that shrinks biases after each step and penalizes by a strength from its memory, a tensor."""

    def start(self, model: nn.Module, inputs: Any, steps: int) -> dict[str, Any]:
        return {"strength": torch.tensor(0.1), "steps": steps}

    def before(self, model: nn.Module, inputs: Any, step: int, steps: int, memory: dict[str, Any]) -> Change:
        memory["strength"] = memory["strength"] * 1.5
        return Change(penalty=sp.Orthogonality(float(memory["strength"])))

    def after(self, model: nn.Module, step: int, steps: int, memory: dict[str, Any]) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.mul_(0.5 + step / (2 * steps))


class Student(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self(batch[0])
        return taught(self, F.cross_entropy(output, batch[1]), *(batch[0], output, batch[1])) + penalty(self)


def points(count: int = 24, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(count, 12, generator=generator, dtype=dtype), torch.randint(3, (count,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def trainer(folder: Path, callbacks: Any = (), package: Any = pl, **settings: Any) -> Any:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
    once = {"max_epochs": 1, "enable_checkpointing": False, "default_root_dir": folder}
    return package.Trainer(**{**quiet, **once, "callbacks": list(callbacks), **settings})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Gradients(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen.append({name: p.grad.clone() for name, p in module.named_parameters()})


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_each_step_has_every_penalty_once(accumulate: int, tmp_path: Path) -> None:
    found = []
    for penalties in ([], PENALTIES):  # six batches: the last step of four has two
        gradients = Gradients()
        settings = {"accumulate_grad_batches": accumulate}
        trainer(tmp_path, [SpectrimCallback(penalties), gradients], **settings).fit(Net(rate=0.0).double(), points(dtype=torch.float64))
        found.append(gradients.seen)
    module = Net().double()
    sum(each(module) for each in PENALTIES).backward()  # type: ignore[union-attr]
    assert len(found[0]) == -(-6 // accumulate)
    for without, with_ in zip(*found, strict=True):
        for name, parameter in module.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(with_[name] - without[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "schedule", [sp.Ramp(0.9, cuts=2, end=0.9), sp.Squeeze(sp.Budget(macs=0.5), begin=0.0, end=0.8)], ids=["cut", "squeeze"]
)
def test_it_trains_like_fit(schedule: Any, accumulate: int, tmp_path: Path) -> None:
    other, module = network(), Net(torch.optim.Adam, 0.01)
    settings = {"penalties": PENALTIES, "courses": [schedule], "tuning": sp.Tuning(accumulate=accumulate), "progress": False}
    fitted = sp.fit(other, list(points()), LOSS, torch.optim.Adam(other.parameters(), 0.01), 2, **settings)
    callback = SpectrimCallback(PENALTIES, courses=[schedule])
    trainer(tmp_path, [callback], accumulate_grad_batches=accumulate, max_epochs=2).fit(module, points())
    ranks = [{f"model.{name}": rank for name, rank in cut["ranks"].items()} for cut in fitted.cuts]
    assert [(cut["step"], cut["ranks"]) for cut in callback.cuts] == [(cut["step"], r) for cut, r in zip(fitted.cuts, ranks, strict=True)]
    assert ranks
    for (name, a), b in zip(weights(module.model).items(), weights(other).values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_courses_and_lessons_train_like_fit(accumulate: int, tmp_path: Path) -> None:
    teacher = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    other, module = network(), Student(torch.optim.Adam, 0.01)
    lesson = {prefix: sp.Distillation(teacher, temperature=2.0, weight=0.6) for prefix in ("", "model.")}
    settings = {"penalties": PENALTIES, "courses": [Shrink()], "tuning": sp.Tuning(accumulate=accumulate), "progress": False}
    fitted = sp.fit(other, list(points()), LOSS, torch.optim.Adam(other.parameters(), 0.01), 2, lessons=[lesson[""]], **settings)
    callback = SpectrimCallback(PENALTIES, courses=[Shrink()], lessons=[lesson["model."]])
    run = trainer(tmp_path, [callback], accumulate_grad_batches=accumulate, max_epochs=2)
    run.fit(module, points())
    for (name, a), b in zip(weights(module.model).items(), weights(other).values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    assert {"Shrink", "Distillation"} <= set(run.callback_metrics) & set(fitted.last)
    assert not any(layer._forward_hooks for layer in module.modules())


def test_a_course_with_tensors_in_its_memory_is_resumed(tmp_path: Path) -> None:
    ends = []
    for path in (None, tmp_path / "epoch=1.ckpt"):
        module, callback = Net(torch.optim.Adam, 0.01), SpectrimCallback(PENALTIES, courses=[Shrink()])
        saver = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        run = trainer(tmp_path, [callback, saver], max_epochs=4, enable_checkpointing=True)
        run.fit(module, points(), ckpt_path=path, weights_only=True)
        ends.append((weights(module), callback.steps.memories["Shrink"]["strength"]))
    assert torch.equal(ends[0][1], ends[1][1])
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0].values(), ends[1][0].values(), strict=True))


def test_lessons_that_nobody_asks_for_give_a_warning(tmp_path: Path) -> None:
    callback = SpectrimCallback(lessons=[sp.Distillation(nn.Linear(12, 3))])
    with pytest.warns(UserWarning, match="taught was not called by training_step in the first optimizer step"):
        trainer(tmp_path, [callback]).fit(Net(), points())
    with pytest.raises(SettingError, match="SpectrimCallback: lessons must be ones with mix=0"):
        SpectrimCallback(lessons=[sp.Distillation(nn.Linear(12, 3), mix=0.5)])


def test_it_logs_what_was_added_and_the_ranks(tmp_path: Path) -> None:
    module = Net(rate=0.0)
    expected = {type(each).__name__: float(each(module).detach()) for each in PENALTIES}
    run = trainer(tmp_path, [SpectrimCallback(PENALTIES)], accumulate_grad_batches=2)
    run.fit(module, points())
    for name, value in expected.items():
        assert float(run.callback_metrics[name]) == pytest.approx(value)
    assert float(run.callback_metrics["mean_rank"]) == (10 + 3) / 2
    assert int(run.callback_metrics["params"]) == sum(parameter.numel() for parameter in module.parameters())
    assert float(run.callback_metrics["orthogonality_defect"]) > 0


def test_outside_of_training_it_is_zero(tmp_path: Path) -> None:
    assert float(penalty(Net())) == 0
    found = []
    for penalties in ([], PENALTIES):
        run = trainer(tmp_path, [SpectrimCallback(penalties)])
        module = Net(rate=0.0)
        run.fit(module, points(), points())
        found.append(float(run.callback_metrics["validation"]))
    assert found[0] == found[1]
    run = trainer(tmp_path)
    run.fit(Net(), points())  # without the callback nothing is added


def test_a_loss_that_never_asks_is_warned_about(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"penalties have no effect.*return loss \+ penalty\(self\)") as warned:
        trainer(tmp_path, [SpectrimCallback(PENALTIES)]).fit(Forgetful(), points())
    assert len([each for each in warned if "SpectrimCallback" in str(each.message)]) == 1
    trainer(tmp_path, [SpectrimCallback()]).fit(Forgetful(), points())  # one that asks for nothing is silent


def test_half_precision_penalises_in_full(tmp_path: Path) -> None:
    callback = SpectrimCallback([sp.Orthogonality(1.0)])
    module = Net(rate=0.0)
    expected = float(sp.Orthogonality(1.0)(module).detach())
    run = trainer(tmp_path, [callback], precision="bf16-mixed")
    run.fit(module, points())
    assert float(run.callback_metrics["Orthogonality"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    "schedule", [sp.Ramp(0.7, cuts=2, end=0.7), sp.Squeeze(sp.Budget(macs=0.5), begin=0.0, end=0.7)], ids=["cut", "squeeze"]
)
def test_a_run_resumes_through_cuts(schedule: Any, tmp_path: Path) -> None:
    def run(**settings: Any) -> Any:
        saver = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        return trainer(
            tmp_path, [SpectrimCallback(PENALTIES, courses=[schedule]), saver], max_epochs=4, enable_checkpointing=True, **settings
        )

    whole = Net(torch.optim.Adam, 0.01)
    first = run()
    first.fit(whole, points())
    cuts = first.callbacks[0].cuts
    assert cuts
    stops = {(cuts[0]["step"] - 1) // 6, -(-cuts[0]["step"] // 6)}  # epochs of six steps: before the first cut and after it
    for stop in (epoch - 1 for epoch in stops if epoch >= 1):
        again, second = Net(torch.optim.Adam, 0.01), run()
        second.fit(again, points(), ckpt_path=tmp_path / f"epoch={stop}.ckpt", weights_only=True)
        assert second.callbacks[0].cuts == cuts
        for (name, a), b in zip(weights(whole).items(), weights(again).values(), strict=True):
            assert torch.equal(a, b), name


def test_an_earlier_checkpoint_may_be_larger(tmp_path: Path) -> None:
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callback = SpectrimCallback(courses=[sp.Ramp(0.5, cuts=1, end=0.6)])
    run = trainer(tmp_path, [callback, saver], max_epochs=2, enable_checkpointing=True)
    module = Net()
    run.fit(module, points())
    assert callback.cuts[0]["ranks"]["model.0"] < 10
    run.validate(module, points(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False, weights_only=True)
    assert {name: factors.rank for name, factors in sp.layers.named_factors(module)} == {"model.0": 10, "model.2": 3}
    assert not module._load_state_dict_pre_hooks  # nothing lingers


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    ramp = sp.Ramp(0.5)
    module = Manual()
    with pytest.raises(SettingError, match="courses must be empty with manual optimization"):
        trainer(tmp_path, [SpectrimCallback(courses=[ramp])]).fit(module, points())
    assert not module._load_state_dict_pre_hooks
    with pytest.raises(SettingError, match=r"number of steps is not known.*max_steps"):
        trainer(tmp_path, [SpectrimCallback(courses=[ramp])], max_epochs=-1).fit(Net(), points())
    averaging = pl.callbacks.StochasticWeightAveraging(0.1)
    with pytest.raises(SettingError, match="courses must be empty beside StochasticWeightAveraging"):
        trainer(tmp_path, [SpectrimCallback(courses=[ramp]), averaging]).fit(Net(), points())
    with pytest.raises(SettingError, match="callbacks must be one"):
        trainer(tmp_path, [SpectrimCallback(), type("Other", (SpectrimCallback,), {})()]).fit(Net(), points())


def test_manual_optimisation_may_penalise(tmp_path: Path) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            return torch.zeros(())

    by_hand, automatic = Manual(), Net()
    for module in (by_hand, automatic):
        trainer(tmp_path, [SpectrimCallback(PENALTIES)]).fit(module, points())
    for a, b in zip(weights(by_hand).values(), weights(automatic).values(), strict=True):
        assert torch.equal(a, b)


def test_pytorch_lightning_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        older = pytest.importorskip("pytorch_lightning")
        monkeypatch.delitem(sys.modules, "lightning.pytorch")  # as if the user had imported the other one alone
        spec = importlib.util.spec_from_file_location("of_the_other", integration.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.undo()
    assert issubclass(module.SpectrimCallback, older.Callback)
    assert not issubclass(module.SpectrimCallback, pl.Callback)
    kind = type(
        "Other", (older.LightningModule,), {name: value for name, value in vars(Net).items() if callable(value) and name != "__init__"}
    )
    net = kind()
    net.model, net.make = network(), lambda: torch.optim.SGD(net.parameters(), 0.1)
    monkeypatch.setitem(kind.training_step.__globals__, "penalty", module.penalty)
    callback = module.SpectrimCallback([sp.Hoyer(0.1)], courses=[sp.Ramp(0.5, cuts=1)])
    run = trainer(tmp_path, [callback], older)
    run.fit(net, points())
    assert [cut["step"] for cut in callback.cuts] == [3]
    assert float(run.callback_metrics["Hoyer"]) > 0
