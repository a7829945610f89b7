"""The verbs in order, for the person who wants one call: `compress`."""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from spectrim.budget.allocate import allocate
from spectrim.budget.budget import Budget, as_budget
from spectrim.checks import check, naming, unwrapped
from spectrim.errors import FormatError, SettingError
from spectrim.files import write_text
from spectrim.layers import named_factors
from spectrim.metrics.batch import BatchDims
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import batch_size_of, first_examples, one_example
from spectrim.metrics.measurement import Measurement, compare_table, measure_together
from spectrim.penalties import Orthogonality
from spectrim.pipeline.teaching import AHEAD, NATS_AHEAD, RECITING, TEACHING, axis_of_classes, showing, teacher_for, why_untaught
from spectrim.pipeline.ways import LEVEL, Cut, way_to_cut
from spectrim.protocols import Importance, Latencies, Penalty, RankSchedule, Where
from spectrim.storage.save import load, save
from spectrim.surgery.balance import balanced
from spectrim.surgery.calibrate import Calibration, calibrate
from spectrim.surgery.correct import correct
from spectrim.surgery.coverage import Coverage, coverage
from spectrim.surgery.factorize import Scheme, factorize
from spectrim.surgery.merge import merge
from spectrim.surgery.prune import prune, prune_
from spectrim.surgery.recalibrate import recalibrate
from spectrim.surgery.select import layer_filter
from spectrim.training.data import count_batches
from spectrim.training.distillation import Distillation, Loss
from spectrim.training.fit import Precision, fit
from spectrim.training.history import History
from spectrim.training.squeeze import Squeeze

RESULT, SETTINGS, CUT = "result.json", "settings.json", "cut.json"


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
        untaught: why ``distill="auto"`` found no teacher; empty where it did or was not asked to.
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
    untaught: str = ""

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
        }
        return measured | rest | {"coverage": [vars(line) for line in self.coverage]}

    def summary(self) -> str:
        """Return a table of the dense and the low-rank network side by side."""
        return compare_table({"dense": self.measured["dense"], "low-rank": self.measured["final"]})

    def stages(self) -> str:
        """Return one line for each stage that was scored, how the cut was made, and how the dense network taught."""
        lines = [f"{stage:14}" + ", ".join(f"{name} {value:.4g}" for name, value in found.items()) for stage, found in self.scores.items()]
        told = {"weight": "what it says", "features": "what its layers put out"}
        ways = [way for name, way in told.items() if (self.teacher or {}).get(name)]
        taught = [f"the dense network taught by {' and '.join(ways)}"] if ways else [self.untaught] if self.untaught else []
        return "\n".join([f"cut: {self.cut}", *taught, *lines])


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
    latency: Latencies | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Compressed:
    """Return a smaller, faster network of ordinary layers within a budget: factorize, allocate, cut, fine-tune, merge, measure.

    Ranks and factors come from second moments on some training examples; each layer is then refitted to the dense network's outputs by
    least squares, and BatchNorm statistics are renewed. Without epochs that is all, and nothing is trained. With epochs the cut network is
    fine-tuned, by default with the dense network as its teacher.

    Args:
        model: dense and trained; it is left untouched.
        data: the training split, batches ``(inputs, target)`` anew at each pass.
        loss: ``(output, target) -> scalar``, a mean over examples.
        budget: what the whole network may keep: a `Budget`, a fraction of its multiply-accumulates, or a dict of a budget's fields.
        epochs: passes over `data`, >= 0; 0 for calibration only.
        example_inputs: one batch for costs and latency; the first example of `data` when omitted. That is cut along axes whose sizes agree
            with the target's or among the inputs, and tried in the network.
        batch_dims: states the batch axes of the inputs instead: one axis for all tensors, or a dict or list by argument, where None
            stands for what all examples share.
        eval_data: the validation split: scores at each stage, and what ``cut="auto"`` judges by.
        scheme: how convolution kernels are folded, see `factorize`.
        where: selects layers, see `factorize`.
        cut: ``plain`` keeps the largest singular values of each weight; ``whitened`` what changes each layer's output least on the
            examples; ``sensitive`` what changes the loss least to second order; ``mixed`` as ``whitened``, with ranks by the mean of the
            plain and the whitened energy. ``auto`` makes the first three and keeps the one that is best after the refit, on `eval_data` or
            else on the examples: by accuracy, where there is one and nothing is trained, else by loss. With epochs, ``mixed`` takes its
            place where it starts little worse: with at most a quarter more added to the dense network's loss, or, where training has far
            to go (as under `distill`), from a loss at most a quarter higher, and no higher than that of ``sensitive`` where that is lowest.
        importance: ranks by this instead of the importance that belongs to the cut.
        squeeze: share of the epochs, in [0, 1), in which the network is first trained toward the budget (`Squeeze`); the cut comes then.
        distill: how to learn from the dense network while fine-tuning. ``auto`` does where outputs (or their ``logits``) are scores of
            classes, targets are their numbers, and the network, once cut, has far to go: at least twice the dense network's loss on the
            examples, or a quarter of a nat more. It teaches by what it says (temperature 2, half of the loss) and, in the first half of the
            steps, by what its layers put out; where it knows the examples by heart (a loss below 0.05) by what it says alone (temperature
            4, 0.7 of the loss). With `squeeze` it teaches from the first epoch on, however near the cut network is. None for never.
        optimizer: makes an optimizer from parameters; Adam with rate 0.001 when omitted. Its rate rises for a fifth of the steps and
            falls along a cosine to zero.
        penalties: added to the loss while fine-tuning, for example ``Orthogonality()`` or `FrobeniusDecay`. Without any, and without
            `squeeze`, the factors of large weights are fine-tuned as `balance_` leaves them, and orthonormal again in the end.
        clip: largest norm of the gradient, see `fit`.
        precision: of fine-tuning, see `fit`.
        compiled: fine-tune through `torch.compile`, see `fit`.
        examples: how many training examples calibrate, >= 1.
        latency: a `LatencyTable` of ``factorize(model, scheme, where)``: ranks, and what `merge` writes, by measured seconds.
        folder: for the cut network, checkpoints, the final network and ``result.json``; a stopped call goes on from there. None for none.
        progress: whether to show progress, on stderr.

    Returns:
        The networks, their measurements side by side, and how they came about.

    Raises:
        SettingError: for a setting outside its range, or a budget that no ranks reach (the smallest reachable is named).
        LayerError: when nothing can be factorized.
        FormatError: when `folder` holds another call's work.

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
    if next(named_factors(model), None) is not None:
        hint = "merge(model) makes it dense; to cut it as it is, allocate ranks and prune"
        raise SettingError("compress", "model", got="one that is factorized already", rule="dense", hint=hint)
    if cut not in ("auto", "plain", "whitened", "sensitive", "mixed"):
        raise SettingError("compress", "cut", got=cut, rule="'auto', 'plain', 'whitened', 'sensitive' or 'mixed'")
    if not (distill is None or distill == "auto" or isinstance(distill, Distillation)):
        raise SettingError("compress", "distill", got=distill, rule="'auto', a Distillation, or None")
    store = _Store(None if folder is None else Path(folder))
    store.claim(
        budget=repr(budget),
        epochs=epochs,
        scheme=scheme,
        cut=cut,
        importance=None if importance is None else repr(importance),
        squeeze=squeeze,
        distill=distill.settings if isinstance(distill, Distillation) else {"auto": [TEACHING, RECITING]} if distill == "auto" else distill,
        penalties=[repr(penalty) for penalty in penalties],
        clip=clip,
        precision=precision,
        examples=examples,
    )
    inputs = one_example(data, model, dims=batch_dims, owner="compress") if example_inputs is None else example_inputs
    batch = 1 if example_inputs is None else batch_size_of(inputs, model=model, unknown=1)
    known = first_examples(data, examples, dims=batch_dims)
    dense = copy.deepcopy(model)
    judged = known if eval_data is None else eval_data
    cutter = _Cutter(dense, loss, budget, inputs, known, judged, importance, latency, batch_dims)
    scores, history = {"dense": cutter.uncut}, History()
    low = factorize(dense, scheme, where, example_inputs=inputs, progress=progress)
    teacher, chosen = distill if isinstance(distill, Distillation) else None, distill == "auto" and epochs > 0
    able, untaught = teacher_for(dense, known, loss) if chosen else None, ""
    if able is not None:
        teacher = showing(able, low, known[0])
    elif chosen:
        untaught = why_untaught(dense, known[0])
    tuner = _Tuner(data, loss, epochs, optimizer, teacher, eval_data, clip, precision, compiled, store, progress)
    training = round(epochs * squeeze)
    if training:
        how = "squeezed"
        tuner.start(low)
        toward = Squeeze(budget, end=1.0, importance=importance, latency=latency, cut=False)
        history = tuner.run(low, training, [Orthogonality(), *penalties], "squeeze", toward)
        recalibrate(low, known)  # at a high learning rate the running statistics are behind
        scores["squeezed"] = cutter.score(low)
        prune_(low, allocate(low, budget, inputs, importance=importance, latency=latency), tuner.optimizer)
        scores["cut"] = cutter.score(low)
        recalibrate(low, known)
        scores["recalibrated"] = cutter.score(low)
    else:
        low, how, found = store.cut(dense, lambda: cutter.cut(low, cut, epochs > 0))
        scores |= found
        if chosen and teacher is not None and not cutter.far(low):
            tuner.teacher = None
        tuner.start(low)
    if epochs > training:
        with nullcontext() if training or penalties else balanced(low):
            rest = tuner.run(low, epochs - training, penalties, "finetune")
        history = History(history.epochs + rest.epochs, history.cuts + rest.cuts, history.layers + rest.layers)
        scores["final"] = cutter.score(low)
    low.eval()
    final = merge(low, latency=latency)
    measured = measure_together({"dense": dense.eval(), "final": final}, inputs, cutter.judged, loss, batch_size=batch)
    taught = tuner.teacher.settings if tuner.teacher is not None and epochs else None
    made = Compressed(
        final, low, measured, scores, how, taught, history, coverage(low, where, inputs=inputs, latency=latency), store.settings, untaught
    )
    store.finish(made)
    return made


@dataclass(frozen=True)
class _Cutter:
    """Cuts a factorized network to the budget and scores it."""

    dense: nn.Module
    loss: Loss
    budget: Budget
    inputs: Any
    known: list[Any]
    judged: Iterable[Any]
    importance: Importance | None
    latency: Latencies | None
    batch_dims: BatchDims | None = None

    def score(self, network: nn.Module) -> dict[str, float]:
        return evaluate(network, self.judged, self.loss)

    @cached_property
    def uncut(self) -> dict[str, float]:
        """The scores of the dense network."""
        return self.score(self.dense)

    def far(self, cut: nn.Module) -> bool:
        """Return whether a cut network knows that much less of the training examples than the dense one."""
        return evaluate(cut, self.known, self.loss)["loss"] >= self._level

    @cached_property
    def _level(self) -> float:
        """The loss on the examples from which on a network has far to go."""
        ahead = evaluate(self.dense, self.known, self.loss)["loss"]
        classifies = axis_of_classes(self.dense, self.known[0]) is not None
        return min(AHEAD * ahead, ahead + NATS_AHEAD) if classifies else AHEAD * ahead

    def cut(self, full: nn.Module, cut: Cut, trains: bool) -> tuple[nn.Module, str, dict[str, dict[str, float]]]:
        """Return the network cut as asked, with that way's name and its scores by stage; left to itself the one that suits best."""
        if cut != "auto":
            return self._made(full, cut)
        moments = self._moments(full)
        kinds = ("plain", "whitened", "sensitive") if moments.outputs else ("plain", "whitened")  # weights may be too wide for gradients
        made = [self._made(full, kind, moments) for kind in kinds]
        if not trains:
            return min(made, key=lambda one: _rank(one[2]))
        best = min(made, key=lambda one: _last(one[2])["loss"])
        if self.importance is None:
            mixed = self._made(full, "mixed", moments)
            if _last(mixed[2])["loss"] <= self._allowed(best[0], best[1], _last(best[2])["loss"]):
                return mixed
        return best

    def _allowed(self, cut: nn.Module, kind: str, loss: float) -> float:
        """Return the largest loss from which mixed ranks may start in the place of the best start."""
        dense = self.uncut["loss"]
        if not self.far(cut):
            return max(loss, dense + LEVEL * (loss - dense))
        return loss if kind == "sensitive" else LEVEL * loss

    def _moments(self, full: nn.Module) -> Calibration:
        return calibrate(full, self.known, self.loss, examples=None, batch_dims=self.batch_dims)

    def _made(self, full: nn.Module, kind: str, moments: Calibration | None = None) -> tuple[nn.Module, str, dict[str, dict[str, float]]]:
        if kind != "plain" and moments is None:
            moments = self._moments(full)
        importance, metric = way_to_cut(kind, moments)
        return self._stages(full, kind, self.importance or importance, metric)

    def _stages(
        self, full: nn.Module, kind: str, importance: Importance | None, metric: Calibration | None
    ) -> tuple[nn.Module, str, dict[str, dict[str, float]]]:
        """Cut, renew the statistics of BatchNorm, refit the factors; keep the refit only where its loss is lower."""
        network = prune(full, allocate(full, self.budget, self.inputs, importance=importance, latency=self.latency), calibration=metric)
        scores = {"cut": self.score(network)}
        refitted = correct(network, self.dense, self.known, examples=None)
        for candidate in (network, refitted):
            recalibrate(candidate, self.known)
        scores["recalibrated"], found = self.score(network), self.score(refitted)
        if found["loss"] < scores["recalibrated"]["loss"]:
            return refitted, kind, scores | {"corrected": found}
        return network, kind, scores


def _last(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    return list(scores.values())[-1]


def _rank(scores: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Return what is smaller for a better network that is not trained any more: by accuracy where there is one, then by loss."""
    last = _last(scores)
    return -last.get("accuracy", 0.0), last["loss"]


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
        self.optimizer = torch.optim.Adam(parameters, LEARNING_RATE) if self.make is None else self.make(parameters)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        steps = max(1, self.epochs * count_batches(self.data, "compress")) if self.epochs else 1
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

    def claim(self, **settings: Any) -> None:
        """Take the folder for these settings; refuse one that holds another call's work."""
        self.settings = settings
        path = self.path(SETTINGS)
        if path is None:
            return
        if path.exists() and (held := json.loads(path.read_text(encoding="utf-8"))) != settings:
            other = ", ".join(sorted(name for name in settings if held.get(name) != settings[name]))
            raise FormatError(path.parent, f"holds a call with another {other}", hint="choose another folder, or delete this one")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=1))

    def cut(
        self, dense: nn.Module, work: Callable[[], tuple[nn.Module, str, dict[str, dict[str, float]]]]
    ) -> tuple[nn.Module, str, dict[str, dict[str, float]]]:
        """Return the cut network of an earlier, stopped call, or make it and keep it."""
        folder = self.path("cut")
        if folder is not None and (folder / CUT).exists():
            found = json.loads((folder / CUT).read_text(encoding="utf-8"))
            return load(folder, dense), found["how"], found["scores"]
        network, how, scores = work()
        if folder is not None:
            save(network, folder)
            write_text(folder / CUT, json.dumps({"how": how, "scores": scores}))
        return network, how, scores

    def finish(self, made: Compressed) -> None:
        """Write the networks and the result."""
        if self.folder is not None:
            save(made.low, self.folder / "low")
            save(made.model, self.folder / "final")
            write_text(self.folder / RESULT, json.dumps(made.report, indent=1) + "\n")
