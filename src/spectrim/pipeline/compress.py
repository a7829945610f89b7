"""All verbs in order, in one call: `compress`."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from operator import index
from pathlib import Path
from typing import Any, Literal

from torch import nn

from spectrim.budget.allocate import check_floor
from spectrim.budget.budget import Budget, as_budget
from spectrim.budget.priced import priced
from spectrim.budget.promise import counted, recounted
from spectrim.budget.schemes import AMONG, at_budget
from spectrim.budget.timing import Backend
from spectrim.checks import check, naming, outside_inference_mode, unwrapped
from spectrim.checks.words import worded
from spectrim.layers.exchanged import Writing
from spectrim.metrics.batch import BatchDims
from spectrim.metrics.distance import Unlabeled
from spectrim.metrics.inputs import first_examples, inputs_of
from spectrim.metrics.verdict import worse_than
from spectrim.pipeline.behavior import attributes_of, said
from spectrim.pipeline.checking import check_recovery, check_settings, check_tuning, check_unlabeled, example_of, step_count, without_labels
from spectrim.pipeline.coding import uncut, with_levels
from spectrim.pipeline.compressed import Compressed
from spectrim.pipeline.cutter import Cutter
from spectrim.pipeline.effort import examples_for
from spectrim.pipeline.judge import Judge, scores_of_measurement
from spectrim.pipeline.narrowing import check_narrow, narrower, narrowing
from spectrim.pipeline.search import searching
from spectrim.pipeline.seconds import backend_of, own_table
from spectrim.pipeline.store import Store, Told, finished, given_of, identity_of
from spectrim.pipeline.teaching import MEMORIZED, TEACHING, chosen_teacher
from spectrim.pipeline.tuner import Tuner, squeezed
from spectrim.pipeline.ways import Cut
from spectrim.protocols import Importance, Latencies, Penalty, Where
from spectrim.runtimes.crossbar import Crossbars
from spectrim.steps import steps
from spectrim.surgery.balance import balanced
from spectrim.surgery.coverage import coverage
from spectrim.surgery.factorize import Scheme, factorize
from spectrim.surgery.moments import Calibration
from spectrim.surgery.readers import leaving_readers, with_reasons
from spectrim.surgery.select import layer_filter
from spectrim.training.distillation import Distillation, Loss
from spectrim.training.fit import DEFAULT
from spectrim.training.history import History
from spectrim.training.parts import Reconstruction
from spectrim.training.tuning import Tuning


@outside_inference_mode
@naming
@worded
@searching
@narrowing
def compress(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss | Budget | None = None,
    budget: Budget | float | Mapping[str, Any] | None = None,
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
    tuning: Tuning = DEFAULT,
    penalties: Sequence[Penalty] = (),
    examples: int | None = None,
    calibration_seconds: float | None = None,
    calibration: Calibration | None = None,
    reconstruct: Reconstruction | None = None,
    recovery: int = 0,
    narrow: float | Sequence[float] | None = None,
    latency: Latencies | None = None,
    backend: Backend | None = None,
    crossbars: Crossbars | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Compressed:
    """Return a smaller, faster network of ordinary layers within a budget: factorize, allocate, cut, fine-tune, merge, measure.

    Ranks and factors come from second moments on some training examples; each layer is then refitted to the dense network's outputs by
    least squares, and BatchNorm statistics are renewed; both are kept only where the loss is lower. Without epochs that is
    all, and nothing is trained. With epochs the cut network is fine-tuned, by default with the dense network as its teacher.

    Args:
        model: dense and trained; it is left untouched.
        data: the training split, batches ``(inputs, target)``, iterable more than once; without a loss also bare inputs (a tuple or list of
            two is taken for inputs and target).
        loss: ``(output, target) -> scalar``, a mean over examples. Without one, nothing needs labels, and nothing is fine-tuned: the loss
            in all scores is the distance of the outputs from the dense network's, as a share of their variance
            (`spectrim.metrics.distance.RelativeDistance`), and sensitivities come from random directions of the output. ``Divergence()``,
            in the same room, compares logits.
        budget: what the whole network may keep: a `Budget`, a fraction of the multiply-accumulates, or a dict of `Budget`'s fields. It may
            take the place of a loss that is left out. ``coded_bytes`` limits the file that `pack` writes: the network is rounded last, see
            `spectrim.budget.rounding.round_to.round_to`; alone, nothing is cut.
            With ``max_drop`` or ``max_loss_rise`` the smallest network that is at most so much worse on `eval_data`, by bisection over
            budgets: five calls with budgets of limits alone, each in a folder inside `folder`.
        epochs: passes over `data`, >= 0; 0 for calibration only.
        example_inputs: one batch for costs and latency; the first example of `data` when omitted. That is cut along axes whose sizes agree
            with the target's or among the inputs, and tried in the network.
        batch_dims: the batch axes of the inputs instead: one for all tensors, or a dict or list by argument; None is shared by all.
        eval_data: the validation split, for the scores at each stage and the choice of ``cut="auto"``.
        scheme: how convolution kernels are folded, see `factorize`. ``auto`` chooses for each convolution together with all ranks, at the
            budget (`spectrim.budget.schemes`), among the matrices, ``all`` among Tucker-2, CP and tensor trains, too; with `calibration`
            or `latency`, which are of one set of schemes, as `factorize` does.
        writing: how `merge` writes what is cut, ``pair`` or ``interpolative``, see `factorize`.
        where: selects layers, see `factorize`.
        cut: ``plain`` keeps the largest singular values of each weight; ``whitened`` what changes each layer's output least on the
            examples; ``sensitive`` what changes the loss least to second order; ``mixed`` as ``whitened``, with ranks by the mean of the
            plain and the whitened energy; ``both`` as ``whitened``, with outputs weighted by the root of their curvature; ``curved`` as
            ``sensitive``, with a refit in the same metric, for language models. ``auto`` makes the first three, with
            ``mixed`` if there are epochs and ``both`` if not, and keeps the one that is best after the refit, on `eval_data` or else on the
            examples: by accuracy, where there is one and nothing is trained, else by loss. Without epochs, where one cut takes more than
            1e11 operations (some ten seconds), ``both`` alone is made, which was best most often.
        importance: ranks by this distortion instead of that of the cut method.
        squeeze: share of the epochs, in [0, 1), in which the network is first trained toward the budget (`Squeeze`); the cut comes then.
        distill: distillation from the dense network while fine-tuning. ``auto`` uses it for a classifier whose cut network has a large
            loss gap: at least twice the dense network's loss on the examples, or a quarter of a nat more. Logits are distilled throughout
            (temperature 2, half of the loss), intermediate features for the first half of the steps; where the dense network has memorized
            the examples (a loss below 0.05) logits alone (temperature 4, 0.7 of the loss). With `squeeze` distillation begins with the
            first epoch, however small the gap. None for never.
        tuning: optimizer, schedule, clipping, precision and the rest of how to fine-tune, see `Tuning`. The schedule is one for all epochs,
            by default `one_cycle`: the optimizer's rate rises for a fifth of the steps and falls along a cosine to zero.
        penalties: added to the loss while fine-tuning, for example ``Orthogonality()`` or `FrobeniusDecay`. Without any, and without
            `squeeze`, the factors of large weights are fine-tuned as `balance_` leaves them, and orthonormal again in the end.
        examples: number of training examples in the calibration set, >= 1; by default 1,024, fewer for networks of more than 127 million
            multiply-accumulates an example, at least 64.
        calibration_seconds: time for calibration and cuts, > 0. A quarter of it goes to the moments, from as many batches as that allows;
            with ``cut="auto"`` cuts are made in the order ``both`` (with epochs: ``plain``), ``whitened``, ``plain``, ``sensitive``
            until another one would take longer than what is left. One batch and one cut are the least. Results then depend on the machine.
        calibration: made before by `calibrate` of ``factorize(model, scheme, where)``, so that several budgets share it.
        reconstruct: after the cut, train each block for a few steps toward the dense network's block, on inputs without labels, see
            `Reconstruction`; kept where the loss is lower.
        recovery: optimizer steps, on batches held in memory, for which a copy of each cut is trained before ``cut="auto"`` compares them.
        narrow: share of what the budget limits to which hidden units are left out first, see `spectrim.budget.narrow.narrow`, before
            ranks are cut. Of several, such as ``(1, 0.9, 0.8)``, each is tried and the best is kept, as of cuts; 1 leaves out none.
        latency: a `LatencyTable` of ``factorize(model, scheme, where)``: ranks, and what `merge` writes, by measured seconds. Made here
            where the budget limits seconds; on another device by `spectrim.budget.device.latency_kit`.
        backend: the backend of the table that is made here, ``eager``, ``compile`` or ``onnx``; ``eager`` when omitted. The networks are
            then timed in ONNX Runtime, too, with ``onnx``.
        crossbars: `spectrim.runtimes.crossbar.Crossbars`, for a budget of tiles; tiles and their reads are then measured, too.
        folder: for the cut and final network, checkpoints, ``result.json``, ``model.spz``; a stopped call resumes there. None for none.
        progress: whether to show progress, on stderr: the name of each step.

    With epochs, a network that ends worse than its cut is not kept, and the cut is: a lower accuracy, or a higher loss at a level one,
    beyond the standard errors.

    Returns:
        The networks, their measurements side by side, and the choices made.

    Raises:
        SettingError: for a setting outside its range, or a budget that no ranks or no steps reach (the smallest feasible one is named).
        LayerError: when nothing can be factorized, or when the factorized or the merged network does not compute what the one before it
            does (see `same_function`).
        FormatError: when `folder` belongs to a call with other weights, data, layers or settings.
        WriteError: when another process is writing `folder`, or it cannot be written.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        >>> data = [(torch.randn(32, 16), torch.randint(16, (32,))) for _ in range(4)]
        >>> made = compress(model, data, nn.CrossEntropyLoss(), Budget(macs=0.5), where=lambda *layer: True, progress=False)
        >>> made.measured["final"].macs <= 256
        True
    """
    check("compress", model=model, epochs=epochs, example_inputs=example_inputs, where=where)
    assert not isinstance(loss, Budget)  # `searching` has put it in its place
    if loss is None or isinstance(loss, Unlabeled):
        data = check_unlabeled(data, eval_data, epochs)
    else:
        check("compress", data=data, loss=loss, eval_data=eval_data)
    given = data
    check("compress", squeeze=squeeze, tuning=tuning, penalties=penalties, latency=latency, crossbars=crossbars)
    check("compress", optional=("examples", "calibration_seconds"), examples=examples, calibration_seconds=calibration_seconds)
    model, budget, epochs = unwrapped(model), as_budget(budget, "compress", coded=True), index(epochs)
    where = layer_filter(where, model, "compress")
    check_settings(model, budget, epochs, distill, reconstruct)
    check_recovery(recovery, cut, epochs, squeeze)
    share, own = check_narrow(narrow, budget, calibration, latency), backend_of(budget, latency, backend)
    check_tuning(tuning, eval_data is not None)
    trained = round(epochs * squeeze)
    parts = (cut == "auto", recovery, reconstruct, budget.coded_bytes, own, trained, epochs > trained, share < 1)
    with (
        steps("compress", step_count(*parts), progress) as step,
        ExitStack() as held,
    ):
        step("reading the calibration set")
        start = attributes_of(model)
        inputs, batch = example_of(model, data, loss, example_inputs, batch_dims)
        examples = examples_for(model, inputs, batch) if examples is None else index(examples)
        if loss is None or isinstance(loss, Unlabeled):
            data, eval_data, loss = without_labels(model, data, eval_data, loss, examples, batch_dims)
        known = first_examples(data, examples, dims=batch_dims)
        more = None if reconstruct is None else reconstruct.examples
        unlabeled = [] if more is None else first_examples(given, more, dims=batch_dims)
        judge = Judge(model, loss, known, known if eval_data is None else eval_data, batch, crossbars=crossbars)
        split, whole, narrowed = "calibration" if eval_data is None else "validation", budget, list[str]()
        if share < 1:
            step("leaving out hidden units")
            judge.source, budget, narrowed = narrower(judge, share, budget, inputs, where, batch_dims)
        low = source = judge.source
        if budget.limits:
            step("factorizing", has_bar=True)
            low = factorize(source, scheme, where, example_inputs=inputs, writing=writing, progress=progress)
        store = Store(None if folder is None else Path(folder))
        held.enter_context(store.held())
        store.claim(
            budget=repr(whole),
            epochs=epochs,
            scheme=scheme,
            writing=writing,
            cut=cut,
            measure=type(loss).__name__ if isinstance(loss, Unlabeled) else "loss",
            importance=None if importance is None else said(importance),
            squeeze=squeeze,
            distill={"auto": [TEACHING, MEMORIZED]} if distill == "auto" else getattr(distill, "settings", None),
            penalties=[said(penalty) for penalty in penalties],
            **tuning.settings,
            examples=examples,
            calibration_seconds=calibration_seconds,
            reconstruct=None if reconstruct is None else repr(reconstruct),
            **given_of(recovery=recovery, narrow=share % 1, crossbars=crossbars and repr(crossbars), backend=own),
            **identity_of(folder, model, low, data, known, eval_data, inputs, loss, tuning, latency, calibration, start),
        )
        if not budget.limits:
            step("scoring the dense network")
            made = uncut(judge, where, inputs, store.settings, split)
            step("rounding", has_bar=True)
            return finished(with_levels(made, judge, budget, inputs, examples, progress=progress), store)
        budget = replace(budget, coded_bytes=None)
        if own is not None:
            step("timing layers", has_bar=True)
            latency = own_table(low, inputs, own, store, progress)
        step("comparing outputs and pricing ranks")
        build = partial(factorize, source, scheme, example_inputs=inputs, writing=writing)
        low, (used, prices), left = leaving_readers(low, build, partial(priced, source, inputs, latency, crossbars, inputs_of(known[0])))
        if scheme in AMONG and latency is None and calibration is None:
            low, prices = at_budget(low, budget, inputs, prices, source, used, among=AMONG[scheme])
        check_floor(low, budget, prices)
        cutter = Cutter(
            judge, budget, inputs, importance, prices, calibration, batch_dims, step, reconstruct, unlabeled, calibration_seconds, progress
        )
        step("scoring the dense network")
        scores: dict[str, dict[str, float]] = {"dense": judge.dense}
        history, told = History(), Told()
        teacher, chosen, untaught = distill if isinstance(distill, Distillation) else None, distill == "auto" and epochs > 0, ""
        if chosen:
            teacher, untaught = chosen_teacher(model, low, known, loss, judge.dense_on_known["loss"])
        tuner = Tuner(data, loss, epochs, tuning, teacher, eval_data, store, progress)
        cutter.recovery = tuner.recovery(recovery, penalties, chosen)
        if trained:
            step("training toward the budget", has_bar=True)
            history = squeezed(low, tuner, cutter, trained, penalties, scores, told)
        else:
            low, told, found = store.cut(source, lambda: cutter.cut(low, cut, epochs > 0))
            scores |= found
            if chosen and teacher is not None and not judge.far(told.how, low, scores):
                tuner.teacher = None
            tuner.start(low)
        if prices.corrected:
            recounted("compress", budget, low, inputs, prices)
        before = (list(scores.values())[-1], deepcopy(low.state_dict())) if epochs > trained else None
        if before is not None:
            step("fine-tuning", has_bar=True)
            with nullcontext() if trained or penalties else balanced(low):
                rest = tuner.run(low, epochs - trained, penalties, "finetune")
            history = History(history.epochs + rest.epochs, history.cuts + rest.cuts, history.layers + rest.layers)
        step("merging and measuring")
        final, measured = judge.finished(low, inputs, latency)
        if before is not None and worse_than(measured["final"], before[0]):
            told.dropped["fine-tuned"] = scores_of_measurement(measured["final"])
            low.load_state_dict(before[1])
            final, measured = judge.finished(low, inputs, latency)
        counted("compress", budget, final, measured["final"].macs, prices, inputs)
        if before is not None:
            scores["final"] = scores_of_measurement(measured["final"])
        taught = tuner.teacher.settings if tuner.teacher is not None and epochs else None
        lines = with_reasons(coverage(low, where, inputs=inputs, latency=latency), left)
        notes = [*narrowed, *told.notes, *([untaught] if untaught else [])]
        made = Compressed(final, low, measured, scores, told.how, taught, history, lines, store.settings, told.dropped, notes, split)
        made.latency = latency
        if whole.coded_bytes is not None:
            step("rounding", has_bar=True)
            joint = not epochs and where is None and latency is None and share == 1
            made = with_levels(made, judge, whole, inputs, examples, joint=joint, progress=progress)
        return finished(made, store)
