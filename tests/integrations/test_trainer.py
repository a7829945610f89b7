"""transformers' Trainer: penalties of the right weight, cuts that keep training state, and a run that can be stopped."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectrim as sp
from spectrim.errors import FormatError, LayerError, SettingError
from spectrim.protocols import Change

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what transformers imports warns of its own dependencies
    transformers = pytest.importorskip("transformers")
    integration = pytest.importorskip("spectrim.integrations.transformers", exc_type=ImportError)
    from spectrim.integrations.transformers import STATE, LowRankTrainer, SpectrimCallback, SpectrimMixin

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::DeprecationWarning")  # of third parties

PENALTIES = [sp.Orthogonality(0.3), sp.Hoyer(0.05)]


class Classifier(nn.Module):
    """Takes no loss kwargs, so that the Trainer itself averages over batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 10), nn.Linear(10, 3)
        self.config = transformers.PretrainedConfig()  # label smoothing asks it for the kind of problem

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.last(self.first(x).relu())
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def classifier() -> nn.Module:
    torch.default_generator.manual_seed(3)
    return disturbed(sp.factorize(Classifier(), where=lambda name, module: True))


def language_model(where: Any = None, **settings: Any) -> nn.Module:
    torch.default_generator.manual_seed(3)
    sizes = {"vocab_size": 30, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=8, **settings)
    return disturbed(sp.factorize(transformers.LlamaForCausalLM(config), where=where))


def disturbed(model: nn.Module) -> nn.Module:
    """Away from orthonormal factors, where the gradient of that penalty is zero."""
    for _, factors in sp.layers.named_factors(model):
        with torch.no_grad():
            factors.U.add_(0.05 * torch.randn_like(factors.U))
    return model


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


def points(count: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(12, generator=generator), "labels": torch.randint(3, (), generator=generator)} for _ in range(count)]


def texts(count: int = 24, holes: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, 30, (8,), generator=generator) for _ in range(count)]
    labels = [row.clone() for row in rows]
    if holes:
        for index, row in enumerate(labels):
            row[: index % 7] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


class InOrder:
    """The order of the data is that of the list."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class Ordered(InOrder, LowRankTrainer):
    pass


class PlainOrdered(InOrder, transformers.Trainer):
    pass


def trainer(
    model: nn.Module,
    data: Any,
    folder: Path,
    callback: Any = None,
    kind: Any = Ordered,
    optimizer: Any = None,
    evaluated: bool = False,
    **settings: Any,
) -> Any:
    defaults = {"per_device_train_batch_size": 4, "max_grad_norm": 0.0, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    arguments = transformers.TrainingArguments(str(folder), **{**defaults, **quiet, "optim": "sgd", "max_steps": 1, "seed": 1, **settings})
    optimizers = (optimizer, None) if optimizer is not None else (None, None)
    own = {"train_dataset": data, "eval_dataset": data if evaluated else None, "callbacks": [callback] if callback else None}
    return kind(model, arguments, **own, optimizers=optimizers)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def penalty_gradients(model: nn.Module) -> dict[str, Tensor]:
    sum(penalty(model) for penalty in PENALTIES).backward()  # type: ignore[union-attr]
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def batches(data: list[dict[str, Tensor]], size: int) -> list[dict[str, Tensor]]:
    return [{key: torch.stack([row[key] for row in data[i : i + size]]) for key in data[0]} for i in range(0, len(data), size)]


CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "the Trainer averages": (classifier, points()),
    "the model averages": (language_model, texts()),
    "batches of different length": (language_model, texts(holes=True)),
}


@pytest.mark.parametrize(("accumulate", "smoothing"), [(1, 0.0), (3, 0.0), (3, 0.1)])
@pytest.mark.parametrize("case", CASES)
def test_each_step_has_every_penalty_once(case: str, accumulate: int, smoothing: float, tmp_path: Path) -> None:
    make, data = CASES[case]
    rate = 0.1
    settings = {"gradient_accumulation_steps": accumulate, "label_smoothing_factor": smoothing}
    found = []
    for penalties in ([], PENALTIES):
        model = make().double()
        rows = [{key: value.double() if value.is_floating_point() else value for key, value in row.items()} for row in data]
        expected = penalty_gradients(model)
        trainer(model, rows, tmp_path, SpectrimCallback(penalties), **settings).train()
        found.append(weights(model))
    for name, gradient in expected.items():
        torch.testing.assert_close((found[0][name] - found[1][name]) / rate, gradient, rtol=1e-9, atol=1e-12)


def test_the_last_smaller_group_has_every_penalty_once(tmp_path: Path) -> None:
    data, found = points(12), []
    for penalties in ([], PENALTIES):  # three batches, two at a time: the second step has one
        model = classifier()
        callback = SpectrimCallback(penalties)
        seen: list[dict[str, Tensor]] = []

        class Watch(transformers.TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, model: Any = None, seen: Any = seen, **__: Any) -> None:
                seen.append({name: p.grad.clone() for name, p in model.named_parameters()})

        run = trainer(model, data, tmp_path, callback, gradient_accumulation_steps=2, max_steps=2, learning_rate=0.0)
        run.add_callback(Watch())
        run.train()
        found.append(seen)
    for name, gradient in penalty_gradients(classifier()).items():
        for without, with_ in zip(*found, strict=True):
            torch.testing.assert_close(with_[name] - without[name], gradient)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", ["the Trainer averages", "the model averages"])
def test_it_trains_like_fit(case: str, accumulate: int, tmp_path: Path) -> None:
    make, data = CASES[case]

    def loss(output: Any, target: Tensor) -> Tensor:
        return output["loss"]

    other, mine = make(), make()
    schedule = sp.Ramp(0.9, cuts=2, end=0.9)
    pairs = [(batch, batch["labels"]) for batch in batches(data, 4)]
    steps = len(pairs) // accumulate
    fitted = sp.fit(
        other,
        pairs,
        loss,
        torch.optim.SGD(other.parameters(), 0.05, momentum=0.9),
        epochs=1,
        penalties=PENALTIES,
        courses=[schedule],
        tuning=sp.Tuning(accumulate=accumulate),
        progress=False,
    )
    callback = SpectrimCallback(PENALTIES, courses=[schedule])
    optimizer = torch.optim.SGD(mine.parameters(), 0.05, momentum=0.9)
    run = trainer(mine, data, tmp_path, callback, optimizer=optimizer, gradient_accumulation_steps=accumulate, max_steps=steps)
    run.train()
    assert [(cut["step"], cut["ranks"]) for cut in fitted.cuts] == [(cut["step"], cut["ranks"]) for cut in callback.cuts]
    assert fitted.cuts
    for (name, a), b in zip(weights(mine).items(), weights(other).values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_squeeze_trains_like_fit(tmp_path: Path) -> None:
    data = points()
    squeeze = sp.Squeeze(sp.Budget(params=0.5), begin=0.0, end=0.8)
    other, mine = classifier(), classifier()
    pairs = [(batch, batch["labels"]) for batch in batches(data, 4)]
    settings = {"penalties": PENALTIES, "courses": [squeeze], "progress": False}
    fitted = sp.fit(other, pairs, lambda output, _: output["loss"], torch.optim.Adam(other.parameters(), 0.01), 2, **settings)
    callback = SpectrimCallback(PENALTIES, courses=[squeeze])
    run = trainer(mine, data, tmp_path, callback, optimizer=torch.optim.Adam(mine.parameters(), 0.01), max_steps=12, logging_steps=6)
    run.args.logging_strategy = "steps"
    run.train()
    assert [cut["ranks"] for cut in fitted.cuts] == [cut["ranks"] for cut in callback.cuts]
    for (name, a), b in zip(weights(mine).items(), weights(other).values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", ["the Trainer averages", "the model averages"])
def test_courses_and_lessons_train_like_fit(case: str, accumulate: int, tmp_path: Path) -> None:
    make, data = CASES[case]
    torch.manual_seed(7)
    other, mine, teacher = make(), make(), disturbed(make())
    names = [name for name, _ in sp.layers.named_factors(other)][:1]
    lesson = sp.Distillation(teacher, temperature=2.0, weight=0.6, features=0.5, layers=tuple(names))
    pairs = [(batch, batch["labels"]) for batch in batches(data, 4)]
    settings = {
        "penalties": PENALTIES,
        "courses": [Shrink()],
        "lessons": [lesson],
        "tuning": sp.Tuning(accumulate=accumulate),
        "progress": False,
    }
    fitted = sp.fit(other, pairs, lambda output, _: output["loss"], torch.optim.SGD(other.parameters(), 0.05), 1, **settings)
    callback = SpectrimCallback(PENALTIES, courses=[Shrink()], lessons=[lesson])
    optimizer, steps = torch.optim.SGD(mine.parameters(), 0.05), len(pairs) // accumulate
    run = trainer(mine, data, tmp_path, callback, optimizer=optimizer, gradient_accumulation_steps=accumulate, max_steps=steps)
    run.args.logging_strategy, run.args.logging_steps = "steps", steps
    run.train()
    for (name, a), b in zip(weights(mine).items(), weights(other).values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    (line,) = [line for line in run.state.log_history if "loss" in line]
    for name in ("Shrink", "Distillation"):
        assert line[name] == pytest.approx(fitted.last[name], rel=1e-4)
    assert not any(layer._forward_hooks for layer in mine.modules())


def test_the_log_says_what_each_penalty_added(tmp_path: Path) -> None:
    model = classifier()
    expected = {type(penalty).__name__: float(penalty(model).detach()) for penalty in PENALTIES}
    heard: list[dict[str, float]] = []

    class Tracker(transformers.TrainerCallback):
        def on_log(self, *_: Any, logs: Mapping[str, float] | None = None, **__: Any) -> None:
            heard.append(dict(logs or {}))

    settings = {"learning_rate": 0.0, "gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 1, "logging_strategy": "steps"}
    run = trainer(model, points(), tmp_path, SpectrimCallback(PENALTIES), **settings)
    run.callback_handler.callbacks.insert(0, Tracker())  # a tracker that is asked before everybody else
    run.train()
    lines = [line for line in heard if "loss" in line]
    assert len(lines) == 3
    for line in lines:
        for name, value in expected.items():
            assert line[name] == pytest.approx(value)
        assert line["task_loss"] + sum(expected.values()) == pytest.approx(line["loss"])
        assert line["params"] == sum(parameter.numel() for parameter in model.parameters())
        assert line["mean_rank"] == (10 + 3) / 2
        assert line["orthogonality_defect"] > 0
    assert [line["task_loss"] for line in run.state.log_history if "loss" in line] == [line["task_loss"] for line in lines]


def test_an_evaluation_has_no_penalty(tmp_path: Path) -> None:
    found = []
    for penalties in ([], [sp.Orthogonality(100.0)]):
        callback = SpectrimCallback(penalties)
        settings = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1, "logging_strategy": "steps", "logging_steps": 1}
        run = trainer(classifier(), points(), tmp_path, callback, evaluated=True, **settings)
        run.train()
        found.append({key: line[key] for line in run.state.log_history for key in ("loss", "eval_loss") if key in line})
    assert found[0]["eval_loss"] == found[1]["eval_loss"]
    assert found[1]["loss"] > found[0]["loss"] + 1


def test_a_plain_trainer_is_warned_about(tmp_path: Path) -> None:
    run = trainer(classifier(), points(), tmp_path, SpectrimCallback(PENALTIES), kind=PlainOrdered, max_steps=3)
    with pytest.warns(UserWarning, match="penalties.*have no effect.*use LowRankTrainer") as warned:
        run.train()
    assert len([each for each in warned if "SpectrimCallback" in str(each.message)]) == 1


def test_a_callback_that_asks_for_nothing_is_silent(tmp_path: Path) -> None:
    trainer(classifier(), points(), tmp_path, SpectrimCallback(), kind=PlainOrdered).train()


def test_without_a_callback_it_is_a_trainer(tmp_path: Path) -> None:
    found = []
    for kind in (Ordered, PlainOrdered):
        model = classifier()
        trainer(model, points(), tmp_path, kind=kind, max_steps=3).train()
        found.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))


def test_the_mixin_goes_before_any_trainer(tmp_path: Path) -> None:
    class Doubled(InOrder, transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    class Both(SpectrimMixin, Doubled):
        pass

    found = []
    for kind, penalties in ((Doubled, []), (Both, PENALTIES)):
        model = classifier()
        trainer(model, points(), tmp_path, SpectrimCallback(penalties), kind=kind).train()
        found.append(weights(model))
    for name, gradient in penalty_gradients(classifier()).items():
        torch.testing.assert_close((found[0][name] - found[1][name]) / 0.1, gradient, rtol=1e-4, atol=1e-5)  # a difference of fp32 weights


def test_a_trainer_that_scales_in_its_own_way_is_refused(tmp_path: Path) -> None:
    class Own(SpectrimMixin, InOrder, transformers.Trainer):
        def _divides(self, num_items_in_batch: Any) -> bool:  # as if the Trainer had changed
            return not super()._divides(num_items_in_batch)

    run = trainer(classifier(), points(), tmp_path, SpectrimCallback(PENALTIES), kind=Own, gradient_accumulation_steps=2)
    with pytest.raises(SettingError, match=r"loss after training_step.*loss_is_scaled_for_ga"):
        run.train()


def test_a_loss_function_of_ones_own(tmp_path: Path) -> None:
    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    found = []
    for penalties in ([], PENALTIES):
        model = classifier()
        run = trainer(model, points(), tmp_path, SpectrimCallback(penalties), gradient_accumulation_steps=3)
        run.compute_loss_func = own
        run.train()
        found.append(weights(model))
    for name, gradient in penalty_gradients(classifier()).items():
        torch.testing.assert_close((found[0][name] - found[1][name]) / 0.1, gradient, rtol=1e-4, atol=1e-5)  # a difference of fp32 weights


def resumable(make: Callable[[], nn.Module], data: Any, folder: Path, schedule: Any, **settings: Any) -> Any:
    saving = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "linear", "max_steps": 6, "save_strategy": "steps"}
    return trainer(make(), data, folder, SpectrimCallback(PENALTIES, courses=[schedule]), **{**saving, "save_steps": 1, **settings})


RESUMED = [("the Trainer averages", sp.Ramp(0.7, cuts=2, end=0.7)), ("the model averages", sp.Squeeze(sp.Budget(params=0.5), end=0.7))]


@pytest.mark.parametrize(("case", "schedule"), RESUMED, ids=["cut", "squeeze"])
def test_a_run_resumes_through_cuts(case: str, schedule: Any, tmp_path: Path) -> None:
    make, data = CASES[case]
    whole = resumable(make, data, tmp_path, schedule)
    whole.train()
    cuts = whole._spectrim.cuts
    assert cuts
    for step in (cuts[0]["step"] - 1, cuts[0]["step"] + 1):  # before the first cut and after it
        again = resumable(make, data, tmp_path / "again", schedule, save_strategy="no")
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again._spectrim.cuts == cuts
        for (name, a), b in zip(weights(whole.model).items(), weights(again.model).values(), strict=True):
            assert torch.equal(a, b), name


def test_a_checkpoint_without_the_state_of_a_schedule_is_refused(tmp_path: Path) -> None:
    squeeze = sp.Squeeze(sp.Budget(params=0.5), begin=0.0, end=0.9)
    resumable(classifier, points(), tmp_path, squeeze, save_steps=2).train()
    state = tmp_path / "checkpoint-2" / STATE
    assert torch.load(state, weights_only=True)["step"]["memories"]["Squeeze"]["tail"]
    for damage, message in ((lambda: state.write_text("{"), "not a readable checkpoint"), (state.unlink, "is missing")):
        damage()
        with pytest.raises(FormatError, match=message):
            resumable(classifier, points(), tmp_path, squeeze).train(resume_from_checkpoint=str(state.parent))


@pytest.mark.parametrize("written", ["dense", "fewer layers", "more layers"])
def test_a_checkpoint_of_other_layers_is_refused_before_its_weights_are_half_loaded(written: str, tmp_path: Path) -> None:
    mlp, everything = (lambda name, module: "mlp" in name), (lambda name, module: True)
    dense = transformers.LlamaForCausalLM(language_model().config)
    wrote = {"dense": dense, "fewer layers": language_model(mlp), "more layers": language_model(everything)}[written]
    trainer(wrote, texts(), tmp_path, save_strategy="steps", save_steps=1, save_only_model=True).train()
    told = "is factorized in the checkpoint and not here" if written == "more layers" else "is factorized here, and not in the same way"
    with pytest.raises(LayerError, match=told):
        trainer(language_model(), texts(), tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_best_model_may_be_larger(tmp_path: Path) -> None:
    schedule = sp.Ramp(0.5, cuts=1, end=0.5)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss", "max_steps": 4}
    run = resumable(classifier, points(), tmp_path, schedule, learning_rate=0.0, evaluated=True, **settings)
    run.train()
    assert run._spectrim.cuts[0]["step"] == 2
    assert run.state.best_global_step == 1  # nothing was learned, and cutting cost accuracy
    assert {factors.rank for _, factors in sp.layers.named_factors(run.model)} == {10, 3}
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric)
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters()}


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    found = []
    for settings in ({}, {"gradient_checkpointing": True}):
        model = language_model()
        callback = SpectrimCallback(PENALTIES, courses=[sp.Ramp(0.8, cuts=1, end=0.5)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers renames the argument
            trainer(model, texts(), tmp_path, callback, max_steps=3, learning_rate=0.01, **settings).train()
        found.append(weights(model))
        assert callback.cuts
    for a, b in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(a, b)


def test_tied_factors_stay_tied_through_cuts_and_a_resume(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return language_model(where=lambda name, module: True, tie_word_embeddings=True)

    def tied(model: Any) -> bool:
        return model.lm_head.factors_of("weight") is model.model.embed_tokens.factors_of("weight")

    whole = resumable(make, texts(), tmp_path, sp.Ramp(0.6, cuts=1, end=0.5), max_steps=4)
    whole.train()
    assert tied(whole.model)
    assert whole.model.lm_head.rank < 12
    again = resumable(make, texts(), tmp_path, sp.Ramp(0.6, cuts=1, end=0.5), max_steps=4, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tied(again.model)
    for a, b in zip(weights(whole.model).values(), weights(again.model).values(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    run = trainer(classifier(), points(), tmp_path, SpectrimCallback(PENALTIES))
    run.add_callback(SpectrimCallback())
    with pytest.raises(SettingError, match="callbacks must be one"):
        run.train()
    with pytest.raises(LayerError, match="no factorized layer"):
        trainer(Classifier(), points(), tmp_path, SpectrimCallback(courses=[sp.Ramp(0.5)]), max_steps=20).train()


@pytest.mark.parametrize(("courses", "at"), [([sp.Ramp(0.5, cuts=1, end=0.5)], 6), ([sp.Ramp(0.5, cuts=1, end=0.5)], 1), ([], 6)])
def test_memory_that_runs_out_after_a_cut_ends_the_search_for_a_batch_size(courses: Any, at: int, tmp_path: Path) -> None:
    """Trained again, the network would be cut again; before the first cut, and without one, it may be."""
    calls = []

    class Small(LowRankTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            if len(calls) == at:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().training_step(*args, **kwargs)

    made = trainer(classifier(), points(), tmp_path, SpectrimCallback(courses=courses), Small, max_steps=8, auto_find_batch_size=True)
    if courses and at == 6:
        with pytest.raises(SettingError, match="per_device_train_batch_size"):
            made.train()
    else:
        made.train()
        assert len(calls) == at + 8


def test_several_processes_may_penalise_but_not_cut() -> None:
    callback = SpectrimCallback(PENALTIES, courses=[sp.Ramp(0.5)])
    with pytest.raises(SettingError, match="courses must be empty with 2 processes"):
        callback.steps.begin(classifier(), 2, 0)
    SpectrimCallback(PENALTIES).steps.begin(classifier(), 2, 0)


def test_sharded_factors_are_refused() -> None:
    model = classifier()
    _, factors = next(iter(sp.layers.named_factors(model)))
    factors.U = nn.Parameter(torch.empty(0))  # as sharding leaves them outside of forward
    with pytest.raises(LayerError, match="sharded"):
        SpectrimCallback(PENALTIES).steps.begin(model, 2, 0)


def test_courses_on_a_model_with_adapters_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    low = language_model(where=lambda name, module: "mlp" in name)
    adapted = peft.get_peft_model(low, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(SettingError, match="courses must be empty for a model with adapters of peft"):
        trainer(adapted, texts(), tmp_path, SpectrimCallback(courses=[sp.Ramp(0.5)])).train()
    trainer(adapted, texts(), tmp_path, SpectrimCallback(PENALTIES), save_strategy="steps", save_steps=1).train()
    trainer(adapted, texts(), tmp_path, SpectrimCallback(PENALTIES), max_steps=2).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
