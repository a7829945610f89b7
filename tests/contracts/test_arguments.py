"""Every public verb refuses wrong arguments before any work, with a sentence of its own that starts with the verb."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import spectrim as sp
from spectrim.budget.distortion import SpectralEnergy, compare_importances
from spectrim.errors import SpectrimError
from spectrim.runtimes.crossbar import Crossbars, Mapping

LOSS = nn.CrossEntropyLoss()
X, Y = torch.zeros(4, 6), torch.zeros(4, dtype=torch.long)
DATA = [(X, Y)]
SET = TensorDataset(X, Y)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about TorchScript
        return torch.jit.trace(net(), X)


def low() -> nn.Module:
    return sp.factorize(net())


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


@pytest.fixture(autouse=True)
def _as_users_call() -> Iterator[None]:
    """Turn the type checks of these tests off, which users do not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def fit(*, model: Any = None, data: Any = DATA, loss: Any = LOSS, optimizer: Any = None, epochs: Any = 1, **rest: Any) -> Any:
    model = net() if model is None else model
    optimizer = adam(model) if optimizer is None and isinstance(model, nn.Module) else optimizer
    return sp.fit(model, data, loss, optimizer, epochs, progress=False, **rest)


def compress(*, model: Any = None, data: Any = DATA, loss: Any = LOSS, budget: Any = 0.8, **rest: Any) -> Any:
    return sp.compress(net() if model is None else model, data, loss, budget, progress=False, **rest)


def plan(*, model: Any = None, inputs: Any = X, data: Any = None, loss: Any = None, **rest: Any) -> Any:
    return sp.plan(net() if model is None else model, inputs, data, loss, **rest)


def scheduled() -> sp.Tuning:
    return sp.Tuning(scheduler=torch.optim.lr_scheduler.StepLR(adam(net()), 1))


MODELS = (nn.Sequential, net().state_dict(), "model.pt", None, 3)
SETS = (SET, [], (b for b in DATA), [(X, Y, X)], X, (X, Y), [(X.numpy(), Y.numpy())], 3, None, "data", {"x": X}, iter(DATA))
ONCE = (SET, [], [(X, Y, X)], X, (X, Y), [(X.numpy(), Y.numpy())], 3, None, "data", {"x": X})
BARE = (SET, [], X.numpy(), 3, None, "data", {"x": X})
LOSSES = (nn.CrossEntropyLoss, "cross_entropy", nn.CrossEntropyLoss(reduction="none"), 0.5)
WHERES = (3, [], [3], {"a": 1}, nn.Linear, 0.5)
BUDGETS = (0, 1.5, 40, "50 %", None, sp.Budget, {}, {"flops": 0.5}, {3: 0.5}, True)
INPUTS = (X.numpy(), "x", 3, [], DataLoader(SET), SET, (X.numpy(),))
WHOLE = (1.5, -1, "3", True, 2.0, None)
COUNTS = (1.5, 0, -3, "3", True)
RANKS = (8, 2.5, "8", None, sp.Energy, [1, 2], {"0": 2.5}, {"0": True})
PATHS = (None, 3, "", nn.Linear(2, 2))

Verb = Callable[..., Any]
TABLE: dict[str, dict[str, tuple[Verb, tuple[Any, ...]]]] = {
    "factorize": {
        "model": (sp.factorize, (*MODELS, scripted())),
        "where": (partial(sp.factorize, net()), tuple({"where": v} for v in (*WHERES, "fc", ["0", "no such"]))),
        "rank": (partial(sp.factorize, net()), tuple({"rank": v} for v in (2.5, "8", [1], sp.Energy, {"0": 2.5}, {"0": "8"}, {"0": None}))),
        "example_inputs": (partial(sp.factorize, net()), tuple({"example_inputs": v} for v in INPUTS)),
    },
    "fit": {
        **{name: (fit, tuple({name: v} for v in values)) for name, values in {
            "model": MODELS[:3], "data": SETS, "loss": (*LOSSES, None), "optimizer": (torch.optim.Adam, "adam", 3, adam),
            "epochs": WHOLE, "first_epoch": WHOLE[:4], "tuning": (sp.Tuning, {"clip": 1.0}, 3, None),
            "penalties": (sp.Hoyer(0.1), [sp.Hoyer], ["hoyer"], 3, None), "eval_data": (SET, [], X, "val"),
        }.items()},
    },
    "calibrate": {
        "model": (lambda v: sp.calibrate(v, DATA), MODELS),
        "data": (lambda v: sp.calibrate(low(), v), BARE),
        "pairs": (lambda v: sp.calibrate(low(), v, LOSS), ([(X, Y, X)], [X], [X.numpy()])),
        "loss": (lambda v: sp.calibrate(low(), DATA, v), LOSSES),
        "examples": (lambda v: sp.calibrate(low(), DATA, examples=v), COUNTS),
    },
    "allocate": {
        "model": (lambda v: sp.allocate(v, 0.5, X), MODELS),
        "budget": (lambda v: sp.allocate(low(), v, X), BUDGETS),
        "inputs": (lambda v: sp.allocate(low(), 0.8, v), (*INPUTS, None)),
        "multiple": (lambda v: sp.allocate(low(), 0.8, X, multiple=v), COUNTS),
        "latency": (lambda v: sp.allocate(low(), 0.8, X, latency=v), (sp.budget.LatencyTable, 3, "table")),
        "crossbars": (lambda v: sp.allocate(low(), 0.8, X, crossbars=v), (Crossbars, Mapping(), 128)),
    },
    "prune": {
        "model": (lambda v: sp.prune(v, sp.Energy(0.9)), MODELS),
        "ranks": (lambda v: sp.prune(low(), v), RANKS),
        "calibration": (lambda v: sp.prune(low(), sp.Energy(0.9), calibration=v), (DATA, X, "data", 3)),
    },
    "prune_": {
        "model": (lambda v: sp.prune_(v, sp.Energy(0.9)), MODELS),
        "ranks": (lambda v: sp.prune_(low(), v), RANKS),
        "optimizer": (lambda v: sp.prune_(low(), sp.Energy(0.9), v), (torch.optim.Adam, "adam", 3)),
    },
    "correct": {
        "cut": (lambda v: sp.correct(v, net(), DATA), MODELS),
        "dense": (lambda v: sp.correct(low(), v, DATA), MODELS),
        "data": (lambda v: sp.correct(low(), net(), v), BARE),
        "examples": (lambda v: sp.correct(low(), net(), DATA, examples=v), COUNTS),
    },
    "recalibrate": {"model": (lambda v: sp.recalibrate(v, DATA), MODELS), "data": (lambda v: sp.recalibrate(net(), v), BARE)},
    "merge": {"model": (sp.merge, (*MODELS, scripted())), "latency": (lambda v: sp.merge(low(), latency=v), (3, "table", {}))},
    "evaluate": {
        "model": (lambda v: sp.evaluate(v, DATA, LOSS), MODELS),
        "data": (lambda v: sp.evaluate(net(), v, LOSS), ONCE),
        "loss": (lambda v: sp.evaluate(net(), DATA, v), (*LOSSES, None)),
        "batch_dims": (lambda v: sp.evaluate(net(), DATA, LOSS, batch_dims=v), (7, [5], {"no such": 0})),
        "dtypes": (lambda v: sp.evaluate(net(), v, LOSS), ([(X, X[:, :1])], [(X, Y.float())], [(X, Y[:2])])),
    },
    "measure": {
        "model": (lambda v: sp.measure(v, X, latency=False), MODELS),
        "inputs": (lambda v: sp.measure(net(), v, latency=False), INPUTS),
        "data": (lambda v: sp.measure(net(), data=v, loss=LOSS), ONCE),
        "loss": (lambda v: sp.measure(net(), data=DATA, loss=v), (*LOSSES, None)),
        "batch_size": (lambda v: sp.measure(net(), X, latency=False, batch_size=v), COUNTS),
        "threads": (lambda v: sp.measure(net(), X, threads=v), COUNTS),
        "batch_dims": (lambda v: sp.measure(net(), X, latency=False, batch_dims=v), (7, [5], {"no such": 0})),
        "crossbars": (lambda v: sp.measure(net(), X, latency=False, crossbars=v), (Crossbars, Mapping(), 128)),
    },
    "compare_latency": {
        "models": (lambda v: sp.compare_latency(v, X), (net(), [net()], {"a": nn.Linear}, None)),
        "inputs": (lambda v: sp.compare_latency({"a": net()}, v), (*INPUTS, None)),
        "repeats": (lambda v: sp.compare_latency({"a": net()}, X, repeats=v), COUNTS),
        "min_time": (lambda v: sp.compare_latency({"a": net()}, X, min_time=v), (0, -1, "1", None)),
    },
    "export": {
        "model": (lambda v: sp.export(v, X, "a.onnx"), MODELS),
        "inputs": (lambda v: sp.export(net(), v, "a.onnx"), (*INPUTS, None)),
        "path": (lambda v: sp.export(net(), X, v), PATHS),
        "max_batch": (lambda v: sp.export(net(), X, "a.onnx", max_batch=v), COUNTS),
    },
    "quantize": {
        "model": (lambda v: sp.quantize(v, DATA, "a.onnx"), (nn.Sequential, None, 3, net().state_dict())),
        "data": (lambda v: sp.quantize(net(), v, "a.onnx"), BARE),
        "path": (lambda v: sp.quantize(net(), DATA, v), PATHS),
        "keep": (lambda v: sp.quantize(net(), DATA, "a.onnx", keep=v), WHERES),
    },
    "save": {"model": (lambda v: sp.save(v, "folder"), MODELS), "folder": (lambda v: sp.save(net(), v), PATHS)},
    "load": {"model": (lambda v: sp.load("folder", v), MODELS), "folder": (lambda v: sp.load(v, net()), PATHS)},
    "same_function": {
        "a": (lambda v: sp.same_function(v, net(), X), (*MODELS, scripted())),
        "b": (lambda v: sp.same_function(net(), v, X), MODELS),
        "inputs": (lambda v: sp.same_function(net(), net(), v), (*INPUTS, None)),
        "tolerance": (lambda v: sp.same_function(net(), net(), X, tolerance=v), (0, -1.0, "1", float("nan"))),
    },
    "prune_optimizer_state": {
        "optimizer": (lambda v: sp.surgery.prune_optimizer_state(v, low(), low()), (torch.optim.Adam, "adam", 3, None)),
        "old": (lambda v: sp.surgery.prune_optimizer_state(adam(net()), v, low()), MODELS),
        "new": (lambda v: sp.surgery.prune_optimizer_state(adam(net()), low(), v), MODELS),
    },
    "compare_importances": {
        "model": (lambda v: compare_importances(v, {"a": SpectralEnergy()}, {"0": 1}), MODELS),
        "importances": (lambda v: compare_importances(low(), v, {"0": 1}), (SpectralEnergy(), {"a": 3}, {"a": SpectralEnergy})),
        "ranks": (lambda v: compare_importances(low(), {"a": SpectralEnergy()}, v), (*RANKS, {"0": 2.5})),
    },
    "compare_table": {"measurements": (sp.metrics.compare_table, (None, [1], {"a": 3}, net()))},
    "gathered": {"model": (sp.layers.gathered, MODELS)},
    "coverage": {
        "model": (sp.coverage, (*MODELS, scripted())),
        "where": (partial(sp.coverage, net()), tuple({"where": v} for v in WHERES)),
        "inputs": (partial(sp.coverage, net()), tuple({"inputs": v} for v in INPUTS)),
    },
    "match": {"patterns": (sp.match, (3, ["a", "b"], None, nn.Linear))},
    "plan": {
        **{name: (plan, tuple({name: v} for v in values)) for name, values in {
            "model": MODELS[:3], "inputs": (*INPUTS, None), "data": (SET, [], 3, "data", iter([X])),
            "budgets": (0.5, {"macs": 0.5}, [40], ["x"]),
            "where": (*WHERES, "fc"), "examples": (*COUNTS, None), "latency": (3, "table"), "loss": (LOSS,),
        }.items()},
        "losses": (lambda v: plan(data=DATA, loss=v), LOSSES),
    },
    "compress": {
        **{name: (compress, tuple({name: v} for v in values)) for name, values in {
            "model": (*MODELS[:3], scripted(), low()), "data": SETS, "loss": LOSSES, "budget": BUDGETS, "epochs": WHOLE,
            "examples": COUNTS,
            "where": (*WHERES, "fc"), "eval_data": (SET, [], X), "squeeze": (1, -0.1, "half", None), "example_inputs": INPUTS,
            "penalties": (sp.Hoyer(0.1), [sp.Hoyer], None), "tuning": (sp.Tuning, {"clip": 1.0}, torch.optim.Adam, scheduled(), None),
            "batch_dims": (7, [5], {"no such": 0}),
        }.items()},
        "dtypes": (lambda v: compress(data=v), ([(X, Y.float())], [(X, Y[:2])], [(X.double(), Y)])),
    },
    "latency_table": {
        "model": (lambda v: sp.latency_table(v, X), MODELS),
        "inputs": (lambda v: sp.latency_table(low(), v), (*INPUTS, None)),
        "threads": (lambda v: sp.latency_table(low(), X, threads=v), COUNTS),
        "margin": (lambda v: sp.latency_table(low(), X, margin=v), (1, -0.1, "x", None)),
    },
    "write_report": {"source": (sp.write_report, (None, 3, net(), {})), "path": (lambda v: sp.write_report("plan.json", v), (3, ""))},
    "balance_": {"model": (sp.surgery.balance_, MODELS), "above": (lambda v: sp.surgery.balance_(low(), v), WHOLE)},
    "choose_execution": {
        "model": (lambda v: sp.training.choose_execution(v, X), MODELS),
        "inputs": (lambda v: sp.training.choose_execution(low(), v), (*INPUTS, None)),
        "min_time": (lambda v: sp.training.choose_execution(low(), X, min_time=v), (0, -1, "1")),
    },
}  # fmt: skip


def outcome(call: Callable[[], Any]) -> str:
    """Return what a call ends with: the kind of its error and the message."""
    try:
        call()
    except SpectrimError as error:
        return f"SpectrimError {error}"
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return "no error"


def test_the_table_has_every_public_function() -> None:
    """Those at the top, and those of the rooms that are called on a model like them."""
    functions = {name for name in sp.__all__ if not isinstance(getattr(sp, name), type)}
    rooms = (sp.budget.distortion, sp.layers, sp.metrics, sp.surgery, sp.training)
    others = set(TABLE) - functions
    assert functions <= set(TABLE)
    assert others == {name for name in others if any(name in room.__all__ for room in rooms)}


@pytest.mark.parametrize(("verb", "argument"), [(verb, argument) for verb, rows in TABLE.items() for argument in rows])
def test_wrong_values_are_refused_by_name(verb: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, values = TABLE[verb][argument]
    named = isinstance(call, partial) or call in (fit, compress, plan)
    outcomes = [(value, outcome(partial(call, **value) if named else partial(call, value))) for value in values]
    wrong = [f"{value!r:.70}: {found}" for value, found in outcomes if not found.startswith(f"SpectrimError {verb}: ")]
    assert not wrong, "\n".join(wrong)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_whole_numbers_of_numpy_and_other_forms_are_taken() -> None:
    history = fit(epochs=np.int64(1), tuning=sp.Tuning(accumulate=np.int32(1)))
    assert len(history.epochs) == 1
    assert sp.factorize(net(), rank=np.int64(2))[0].rank == 2
    assert sp.calibrate(low(), DATA, examples=np.int64(2)).examples == 4
    made = compress(budget={"macs": 0.5}, where="*", epochs=np.int64(0), examples=np.int64(4))
    assert made.measured["final"].macs <= 0.5 * made.measured["dense"].macs
    model = sp.factorize(net(), where="*")
    assert sp.allocate(model, 0.5, X) == sp.allocate(model, {"macs": 0.5}, X) == sp.allocate(model, sp.Budget(macs=0.5), X)


@pytest.mark.parametrize("where", ["0", ["0"], "[0]", ("0",), {"0"}, lambda name, module: name == "0", sp.match("0")])
def test_where_takes_names_globs_lists_and_predicates(where: Any) -> None:
    assert [name for name, _ in sp.layers.named_factors(sp.factorize(net(), where=where))] == ["0"]
    assert [line.name for line in sp.coverage(net(), where) if line.reason == "can be factorized"] == ["0"]
    if where == "0":
        assert list(compress(budget=0.9, where=where).ranks) == ["0"]
        assert [weight.name for weight in plan(where=where).weights] == ["0"]


class Stream(IterableDataset[Any]):
    """Examples without a number."""

    def __iter__(self) -> Iterator[Any]:
        yield from zip(X, Y, strict=True)


def test_data_without_a_length_are_read() -> None:
    loader = DataLoader(Stream(), batch_size=2)
    assert compress(data=loader, examples=4).measured["final"].macs is not None
