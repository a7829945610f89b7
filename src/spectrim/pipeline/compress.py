"""The verbs in order, for the person who wants one call: `compress`."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils._pytree import tree_leaves

from spectrim.budget.allocate import allocate, check_floor
from spectrim.budget.budget import Budget, as_budget
from spectrim.budget.cut_to import CutNetwork, Workbench, has_norms, renew_statistics
from spectrim.budget.ladder import Ladder, ladder
from spectrim.budget.promise import counted, recounted
from spectrim.budget.ways import WAYS
from spectrim.checks import check, naming, outside_inference_mode, unwrapped
from spectrim.errors import FormatError, SettingError
from spectrim.files import make_folder, read_json, write_json
from spectrim.layers import named_factors
from spectrim.layers.base import Writing
from spectrim.locks import locked
from spectrim.metrics.batch import BatchDims
from spectrim.metrics.clock import compare_latency
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import batch_size_of, first_examples, inputs_of, one_example
from spectrim.metrics.measurement import Measurement, compare_table, measure
from spectrim.penalties import Orthogonality
from spectrim.pipeline import identity
from spectrim.pipeline.teaching import GAP, MEMORIZED, NATS_GAP, TEACHING, axis_of_classes, teacher_for, why_untaught, with_hint_layers
from spectrim.pipeline.ways import Cut, allowed_for_mixed
from spectrim.protocols import Importance, Latencies, Penalty, RankSchedule, Where
from spectrim.storage.save import load, save
from spectrim.surgery.balance import balanced
from spectrim.surgery.calibrate import Calibration, calibrate
from spectrim.surgery.coverage import Coverage, coverage
from spectrim.surgery.factorize import Scheme, factorize
from spectrim.surgery.merge import merge
from spectrim.surgery.prune import prune_
from spectrim.surgery.recalibrate import recalibrate
from spectrim.surgery.same_function import same_function
from spectrim.surgery.select import layer_filter
from spectrim.surgery.states import orthonormalize_
from spectrim.training.data import count_batches
from spectrim.training.distillation import Distillation, Loss
from spectrim.training.fit import Precision, fit
from spectrim.training.history import History
from spectrim.training.squeeze import Squeeze

RESULT, SETTINGS, CUT = "result.json", "settings.json", "cut.json"
AGAIN = "delete the folder to begin again"


LEARNING_RATE = 1e-3
"""Of the default optimizer, Adam."""


WARMUP = 0.2
"""Share of the steps in which the learning rate rises; it falls along a cosine to zero in the rest."""


@dataclass
class Compressed:
    """What `compress` made, and what it cost.

    Attributes:
        model: `torch.nn` layers (two in the place of one are a `PlainPair`), in eval mode: what is shipped.
        low: the same network before `merge`, factorized: to train on, to cut further, to `save`.
        measured: ``dense`` and ``final``: costs, latency side by side, and loss and accuracy as in `scores`.
        scores: loss and accuracy by stage: ``dense``, ``squeezed``, ``cut``, ``recalibrated``, ``corrected``, ``final``; what did not
            happen is missing. On the evaluation split, or without one on the training examples that calibrate.
        cut: how the cut was made.
        teacher: how the dense network taught (the fields of `Distillation`); None where it did not.
        history: of the fine-tuning; empty without epochs.
        coverage: each layer: factorized, or why not; and what `merge` wrote.
        settings: what was asked for, as plain data.
        dropped: scores of the stages that were tried and not kept, because the loss was not lower.
        notes: sentences about ways that were not tried, and why.
    """

    model: nn.Module
    low: nn.Module
    measured: dict[str, Measurement]
    scores: dict[str, dict[str, float]]
    cut: str
    teacher: dict[str, Any] | None
    history: History
    coverage: Coverage
    settings: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each factorized weight; `prune` takes it."""
        return {name: factors.rank for name, factors in named_factors(self.low)}

    @property
    def report(self) -> dict[str, Any]:
        """Everything but the networks, as plain data for JSON."""
        measured = {name: entry.to_dict() for name, entry in self.measured.items()}
        measured["final"]["ranks"] = self.ranks
        rest = {
            "scores": self.scores,
            "cut": self.cut,
            "teacher": self.teacher,
            "history": self.history.to_dict(),
            "settings": self.settings,
            "dropped": self.dropped,
            "notes": self.notes,
        }
        return measured | rest | {"coverage": [vars(line) for line in self.coverage]}

    def summary(self) -> str:
        """Return a table of the dense and the low-rank network side by side."""
        return compare_table({"dense": self.measured["dense"], "low-rank": self.measured["final"]})

    def stages(self) -> str:
        """Return one line for each stage that was scored, kept or not, how the cut was made, and how the dense network taught."""

        def line(stage: str, found: Mapping[str, float], end: str = "") -> str:
            return f"{stage:14}" + ", ".join(f"{name} {value:.4g}" for name, value in found.items()) + end

        lines = [line(stage, found) for stage, found in self.scores.items()]
        lines += [line(stage, found, " (not kept: the loss is not lower)") for stage, found in self.dropped.items()]
        told = {"weight": "logits", "features": "intermediate features"}
        by = [way for name, way in told.items() if (self.teacher or {}).get(name)]
        taught = [f"distilled from the dense network: {' and '.join(by)}"] if by else []
        return "\n".join([f"cut: {self.cut}", *self.notes, *taught, *lines])


@outside_inference_mode
@naming
def compress(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss,
    budget: Budget | float | Mapping[str, Any],
    epochs: int = 0,
    *,
    example_inputs: Any = None,
    batch_dims: BatchDims | None = None,
    eval_data: Iterable[Any] | None = None,
    scheme: Scheme = "auto",
    writing: Writing = "pair",
    where: Where | None = None,
    cut: Cut = "auto",
    importance: Importance | None = None,
    squeeze: float = 0.0,
    distill: Distillation | Literal["auto"] | None = "auto",
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    penalties: Sequence[Penalty] = (),
    clip: float | None = None,
    precision: Precision = "no",
    compiled: bool = False,
    examples: int = 1024,
    calibration: Calibration | None = None,
    latency: Latencies | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Compressed:
    """Return a smaller, faster network of ordinary layers within a budget: factorize, allocate, cut, fine-tune, merge, measure.

    Ranks and factors come from second moments on some training examples; each layer is then refitted to the dense network's outputs by
    least squares, and BatchNorm statistics are renewed; both are kept only where the loss is lower. Without epochs that is
    all, and nothing is trained. With epochs the cut network is fine-tuned, by default with the dense network as its teacher.

    Args:
        model: dense and trained; it is left untouched.
        data: the training split, batches ``(inputs, target)`` anew at each pass.
        loss: ``(output, target) -> scalar``, a mean over examples.
        budget: what the whole network may keep: a `Budget`, a fraction of the multiply-accumulates, or a dict of `Budget`'s fields.
        epochs: passes over `data`, >= 0; 0 for calibration only.
        example_inputs: one batch for costs and latency; the first example of `data` when omitted. That is cut along axes whose sizes agree
            with the target's or among the inputs, and tried in the network.
        batch_dims: states the batch axes of the inputs instead: one axis for all tensors, or a dict or list by argument, where None
            stands for what all examples share.
        eval_data: the validation split: scores at each stage, and what ``cut="auto"`` judges by.
        scheme: how convolution kernels are folded, see `factorize`.
        writing: how `merge` writes what is cut, ``pair`` or ``interpolative``, see `factorize`.
        where: selects layers, see `factorize`.
        cut: ``plain`` keeps the largest singular values of each weight; ``whitened`` what changes each layer's output least on the
            examples; ``sensitive`` what changes the loss least to second order; ``mixed`` as ``whitened``, with ranks by the mean of the
            plain and the whitened energy. ``auto`` makes the first three and keeps the one that is best after the refit, on `eval_data` or
            else on the examples: by accuracy, where there is one and nothing is trained, else by loss. With epochs, ``mixed`` takes its
            place where it starts little worse: with at most a quarter more added to the dense network's loss, or, with a large loss gap
            (as under `distill`), from a loss at most a quarter higher, and no higher than that of ``sensitive`` where that is lowest.
        importance: ranks by this instead of the importance that belongs to the cut.
        squeeze: share of the epochs, in [0, 1), in which the network is first trained toward the budget (`Squeeze`); the cut comes then.
        distill: how to learn from the dense network while fine-tuning. ``auto`` does for a classifier whose cut network has a large loss
            gap: at least twice the dense network's loss on the examples, or a quarter of a nat more. Logits are distilled throughout
            (temperature 2, half of the loss), intermediate features for the first half of the steps; where the dense network has memorized
            the examples (a loss below 0.05) logits alone (temperature 4, 0.7 of the loss). With `squeeze` distillation begins with the
            first epoch, however small the gap. None for never.
        optimizer: makes an optimizer from parameters; Adam with rate 0.001 when omitted. Its rate rises for a fifth of the steps and
            falls along a cosine to zero.
        penalties: added to the loss while fine-tuning, for example ``Orthogonality()`` or `FrobeniusDecay`. Without any, and without
            `squeeze`, the factors of large weights are fine-tuned as `balance_` leaves them, and orthonormal again in the end.
        clip: largest norm of the gradient, see `fit`.
        precision: of fine-tuning, see `fit`.
        compiled: fine-tune through `torch.compile`, see `fit`.
        examples: how many training examples calibrate, >= 1.
        calibration: made before by `calibrate` of ``factorize(model, scheme, where)``, so that several budgets share it.
        latency: a `LatencyTable` of ``factorize(model, scheme, where)``: ranks, and what `merge` writes, by measured seconds.
        folder: for the cut network, checkpoints, the final network and ``result.json``; a stopped call goes on from there. None for none.
        progress: whether to show progress, on stderr.

    Returns:
        The networks, their measurements side by side, and how they came about.

    Raises:
        SettingError: for a setting outside its range, or a budget that no ranks reach (the smallest reachable is named).
        LayerError: when nothing can be factorized, or when the factorized or the merged network does not compute what the one before it
            does (see `same_function`).
        FormatError: when `folder` holds another call's work: other weights, data, layers or settings.
        WriteError: when another process is writing `folder`, or it cannot be written.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        >>> data = [(torch.randn(32, 16), torch.randint(16, (32,))) for _ in range(4)]
        >>> everything = lambda name, module: True
        >>> made = compress(model, data, nn.CrossEntropyLoss(), Budget(macs=0.5), where=everything, progress=False)
        >>> made.measured["final"].macs <= 256
        True
    """
    check("compress", model=model, data=data, loss=loss, epochs=epochs, example_inputs=example_inputs, eval_data=eval_data, where=where)
    check("compress", squeeze=squeeze, factory=optimizer, penalties=penalties, clip=clip, examples=examples, latency=latency)
    model, budget, epochs, examples = unwrapped(model), as_budget(budget, "compress"), index(epochs), index(examples)
    where = layer_filter(where, model, "compress")
    _check(model, cut, distill)
    inputs = one_example(data, model, dims=batch_dims, owner="compress") if example_inputs is None else example_inputs
    batch = 1 if example_inputs is None else batch_size_of(inputs, model=model, unknown=1)
    known = first_examples(data, examples, dims=batch_dims)
    low = factorize(model, scheme, where, example_inputs=inputs, writing=writing, progress=progress)
    store = _Store(None if folder is None else Path(folder))
    with store.held():
        store.claim(
            budget=repr(budget),
            epochs=epochs,
            scheme=scheme,
            writing=writing,
            cut=cut,
            importance=None if importance is None else repr(importance),
            squeeze=squeeze,
            distill=distill.settings
            if isinstance(distill, Distillation)
            else {"auto": [TEACHING, MEMORIZED]}
            if distill == "auto"
            else distill,
            penalties=[repr(penalty) for penalty in penalties],
            clip=clip,
            precision=precision,
            examples=examples,
            **_identity(model, low, data, known, inputs, loss, optimizer, latency, calibration) if folder is not None else {},
        )
        same_function(model, low, inputs_of(known[0]), names=("dense", "factorized"))
        prices = ladder(low, inputs, latency, dense_model=model, check=True, own=True)
        check_floor(low, budget, prices)
        judge = _Judge(model, loss, known, known if eval_data is None else eval_data, batch)
        cutter = _Cutter(judge, budget, inputs, importance, prices, calibration, batch_dims)
        scores, history, told = {"dense": judge.dense}, History(), _Told()
        teacher, chosen = distill if isinstance(distill, Distillation) else None, distill == "auto" and epochs > 0
        able, untaught = teacher_for(model, known, loss, level=judge.dense_on_known["loss"]) if chosen else None, ""
        if able is not None:
            teacher = with_hint_layers(able, low, known[0])
        elif chosen:
            untaught = why_untaught(model, known[0])
        tuner = _Tuner(data, loss, epochs, optimizer, teacher, eval_data, clip, precision, compiled, store, progress)
        training = round(epochs * squeeze)
        if training:
            history = _squeezed(low, tuner, cutter, training, penalties, scores, told)
        else:
            low, told, found = store.cut(model, lambda: cutter.cut(low, cut, epochs > 0))
            scores |= found
            if chosen and teacher is not None and not judge.far(told.how, low, scores):
                tuner.teacher = None
            tuner.start(low)
        if prices.corrected:
            recounted("compress", budget, low, inputs, prices)
        if epochs > training:
            with nullcontext() if training or penalties else balanced(low):
                rest = tuner.run(low, epochs - training, penalties, "finetune")
            history = History(history.epochs + rest.epochs, history.cuts + rest.cuts, history.layers + rest.layers)
        low.eval()
        final = merge(low, latency=latency)
        same_function(low, final, inputs_of(known[0]), names=("cut", "merged"))
        measured = judge.measured(final, inputs)
        counted("compress", budget, final, measured["final"].macs, prices)
        if epochs > training:
            scores["final"] = _scores_of(measured["final"])
        taught = tuner.teacher.settings if tuner.teacher is not None and epochs else None
        lines = coverage(low, where, inputs=inputs, latency=latency)
        notes = [*told.notes, *([untaught] if untaught else [])]
        made = Compressed(final, low, measured, scores, told.how, taught, history, lines, store.settings, told.dropped, notes)
        store.finish(made)
    return made


def _check(model: nn.Module, cut: str, distill: Any) -> None:
    """Raise a SettingError for a model or a setting that is none of the allowed ones."""
    if next(named_factors(model), None) is not None:
        hint = "merge(model) makes it dense; to cut it as it is, allocate ranks and prune"
        raise SettingError("compress", "model", got="one that is factorized already", rule="dense", hint=hint)
    if cut not in get_args(Cut):
        raise SettingError("compress", "cut", got=cut, rule=f"one of {', '.join(get_args(Cut))}")
    if not (distill is None or distill == "auto" or isinstance(distill, Distillation)):
        raise SettingError("compress", "distill", got=distill, rule="'auto', a Distillation, or None")


def _identity(
    model: nn.Module,
    low: nn.Module,
    data: Any,
    known: Sequence[Any],
    inputs: Any,
    loss: Any,
    optimizer: Any,
    latency: Any,
    calibration: Any,
) -> dict[str, Any]:
    """Return what else changes the result."""
    return {
        "weights": identity.of_weights(model),
        "data": identity.of_data(data, known),
        "where": [f"{name} {factors.shape}" for name, factors in named_factors(low)],
        "example_inputs": identity.digest(tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)),
        "loss": getattr(loss, "__qualname__", repr(loss)),
        "optimizer": identity.of_optimizer(optimizer, low),
        "latency": identity.of_latency(latency, low),
        "calibration": None if calibration is None else identity.digest([calibration.examples, *calibration.inputs.values()]),
    }


@dataclass
class _Told:
    """How the cut was made: the way, the stages that were not kept, and sentences."""

    how: str = "squeezed"
    dropped: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Found = tuple[nn.Module, _Told, dict[str, dict[str, float]]]


@dataclass
class _Judge:
    """Scores networks: each network on each data set once."""

    model: nn.Module
    loss: Loss
    known: list[Any]
    judged: Iterable[Any]
    batch: int | None = None
    on_known: dict[str, float] = field(default_factory=dict)

    def __call__(self, network: nn.Module) -> dict[str, float]:
        return evaluate(network, self.judged, self.loss)

    @cached_property
    def dense(self) -> dict[str, float]:
        """The scores of the dense network."""
        return self(self.model)

    @cached_property
    def dense_on_known(self) -> dict[str, float]:
        """The scores of the dense network on the calibration set."""
        return self.dense if self.judged is self.known else evaluate(self.model, self.known, self.loss)

    def far(self, how: str, cut: nn.Module, scores: Mapping[str, Mapping[str, float]]) -> bool:
        """Return whether the loss of a cut network on the calibration set is that much higher than the dense one's; by its way, once."""
        if how not in self.on_known:
            own = list(scores.values())[-1] if self.judged is self.known else evaluate(cut, self.known, self.loss)
            self.on_known[how] = own["loss"]
        return self.on_known[how] >= self._level

    @cached_property
    def _level(self) -> float:
        """The loss on the calibration set from which on the loss gap is large."""
        dense = self.dense_on_known["loss"]
        classifies = axis_of_classes(self.model, self.known[0]) is not None
        return min(GAP * dense, dense + NATS_GAP) if classifies else GAP * dense

    def measured(self, final: nn.Module, inputs: Any) -> dict[str, Measurement]:
        """Return what the dense and the final network cost and achieve, timed side by side."""
        networks = {"dense": self.model, "final": final}
        times = compare_latency(networks, inputs)
        scores = {"dense": self.dense, "final": self(final)}
        return {
            name: replace(
                measure(network, inputs, latency=False, batch_size=self.batch),
                latency_s=times[name].median_s,
                latency_iqr_s=times[name].iqr_s,
                batch=times[name].batch,
                threads=times[name].threads,
                loss=scores[name]["loss"],
                accuracy=scores[name].get("accuracy"),
            )
            for name, network in networks.items()
        }


def _scores_of(measured: Measurement) -> dict[str, float]:
    return {name: value for name in ("loss", "accuracy") if (value := getattr(measured, name)) is not None}


def _squeezed(
    low: nn.Module, tuner: "_Tuner", cutter: "_Cutter", epochs: int, penalties: Sequence[Penalty], scores: dict[str, Any], told: _Told
) -> History:
    """Train toward the budget, cut, and renew BatchNorm statistics where that is better; all in place."""
    tuner.start(low)
    judge, prices = cutter.judge, cutter.prices
    toward = Squeeze(cutter.budget, end=1.0, importance=cutter.importance, latency=prices.latency, cut=False, prices=prices)
    history = tuner.run(low, epochs, [Orthogonality(), *penalties], "squeeze", toward)
    recalibrate(low, judge.known)  # at a high learning rate the running statistics are behind
    scores["squeezed"] = judge(low)
    prune_(low, allocate(low, cutter.budget, cutter.inputs, importance=cutter.importance, prices=prices), tuner.optimizer)
    scores["cut"] = judge(low)
    if has_norms(low):
        found, kept = renew_statistics(low, judge.known, judge, scores["cut"])
        (scores if kept else told.dropped)["recalibrated"] = dict(found)
    return history


@dataclass
class _Cutter:
    """Cuts a factorized network to the budget in place, in the way that suits best."""

    judge: _Judge
    budget: Budget
    inputs: Any
    importance: Importance | None
    prices: Ladder
    calibration: Calibration | None
    batch_dims: BatchDims | None = None

    def cut(self, low: nn.Module, cut: Cut, trains: bool) -> Found:
        """Cut the network as asked, or in the way that suits best; return it, how, and its scores by stage."""
        calibration = self.calibration
        if calibration is None and (cut == "auto" or WAYS[cut].needs != "none"):
            calibration = calibrate(low, self.judge.known, self.judge.loss, examples=None, batch_dims=self.batch_dims)
        bench = Workbench(low, self.inputs, calibration, latency=self.prices.latency, prices=self.prices)
        notes: list[str] = []
        best = self._made(bench, cut) if cut != "auto" else self._best(bench, trains, notes)
        bench.show(best)
        orthonormalize_(low)
        told = _Told(best.way, {stage: dict(found) for stage, found in best.dropped.items()}, notes)
        return low, told, {stage: dict(found) for stage, found in best.scores.items()}

    def _best(self, bench: Workbench, trains: bool, notes: list[str]) -> CutNetwork:
        made = [self._made(bench, kind) for kind in ("plain", "whitened")]
        try:
            made.append(self._made(bench, "sensitive"))
        except SettingError as error:
            notes.append(f"not tried: sensitive ({error})")
        if not trains:
            return min(made, key=_rank)
        best = min(made, key=lambda one: one.last["loss"])
        if self.importance is None:
            mixed = self._made(bench, "mixed")
            bench.show(best)
            if mixed.last["loss"] <= allowed_for_mixed(
                best, self.judge.dense["loss"], self.judge.far(best.way, bench.network, best.scores)
            ):
                return mixed
        return best

    def _made(self, bench: Workbench, kind: str) -> CutNetwork:
        way = WAYS[kind]
        if way.needs == "loss":
            bench.distortions(way)  # refuses a loss without gradients, whoever chooses the ranks
        return bench.cut_to(self.budget, way, self.judge, dense=self.judge.model, examples=self.judge.known, importance=self.importance)


def _rank(made: CutNetwork) -> tuple[float, float]:
    """Return what is smaller for a better network that is not trained any more: by accuracy where there is one, then by loss."""
    return -made.last.get("accuracy", 0.0), made.last["loss"]


@dataclass
class _Tuner:
    """Trains a network in one or several goes of a single schedule."""

    data: Iterable[Any]
    loss: Loss
    epochs: int
    make: Callable[[Iterable[nn.Parameter]], Optimizer] | None
    teacher: Distillation | None
    eval_data: Iterable[Any] | None
    clip: float | None
    precision: Precision
    compiled: bool
    store: "_Store"
    progress: bool
    optimizer: Optimizer = field(init=False)
    scheduler: OneCycleLR = field(init=False)
    done: int = field(init=False, default=0)

    def start(self, network: nn.Module) -> None:
        """Make the optimizer and its schedule over all epochs."""
        parameters = [p for p in network.parameters() if p.requires_grad]
        if not self.epochs:
            return
        if not parameters:
            hint = "epochs=0 compresses it without training; model.requires_grad_(True) lets it train"
            raise SettingError("compress", "model", got="one whose parameters are all frozen", rule="one to train, with epochs", hint=hint)
        self.optimizer = torch.optim.Adam(parameters, LEARNING_RATE) if self.make is None else self.make(parameters)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        steps = max(1, self.epochs * count_batches(self.data, "compress"))
        rise = WARMUP if WARMUP * steps != 1 else 2 * WARMUP  # torch divides by the steps of the rise less one
        self.scheduler = OneCycleLR(self.optimizer, rates, steps, pct_start=rise, cycle_momentum=False)

    def run(self, network: nn.Module, epochs: int, penalties: Sequence[Penalty], name: str, ranks: RankSchedule | None = None) -> History:
        """Train for some epochs, which follow those of earlier goes."""
        history = fit(
            network, self.data, self.loss, self.optimizer, epochs, penalties=penalties, eval_data=self.eval_data,
            scheduler=self.scheduler, scheduler_steps="batch", distill=self.teacher, clip=self.clip, precision=self.precision,
            rank_schedule=ranks, compiled=self.compiled, checkpoint=self.store.path(name), first_epoch=self.done, progress=self.progress,
        )  # fmt: skip
        self.done += epochs
        return history


@dataclass
class _Store:
    """The folder of one call, or nothing."""

    folder: Path | None
    settings: dict[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other calls out of the folder, which is made if missing.

        Raises:
            WriteError: another process is writing it.
        """
        if self.folder is None:
            yield
            return
        make_folder(self.folder)
        with locked(self.folder):
            yield

    def claim(self, **settings: Any) -> None:
        """Take the folder for these settings; refuse one that holds another call's work."""
        self.settings = settings
        plain = json.loads(json.dumps(settings))
        path = self.path(SETTINGS)
        if path is None:
            return
        if path.exists() and (held := read_json(path, AGAIN)) != plain:
            other = ", ".join(sorted(name for name in settings if name not in held or held[name] != plain[name]))
            raise FormatError(path.parent, f"holds a call with another {other}", hint="choose another folder, or delete this one")
        write_json(path, settings)

    def cut(self, dense: nn.Module, work: Callable[[], Found]) -> Found:
        """Return the cut network of an earlier, stopped call, or make it and keep it."""
        folder = self.path("cut")
        if folder is not None and (folder / CUT).exists():
            found = read_json(folder / CUT, AGAIN)
            return load(folder, dense), _Told(found["how"], found["dropped"], found["notes"]), found["scores"]
        network, told, scores = work()
        if folder is not None:
            save(network, folder)
            write_json(folder / CUT, {**vars(told), "scores": scores})
        return network, told, scores

    def finish(self, made: Compressed) -> None:
        """Write the networks and the result."""
        if self.folder is not None:
            save(made.low, self.folder / "low")
            save(made.model, self.folder / "final")
            write_json(self.folder / RESULT, made.report)
