"""What a reader should know before trusting a result: where it falls short."""

from collections.abc import Iterable, Mapping
from typing import Any

from spectrim.budget.plan_table import Plan
from spectrim.metrics.measurement import Measurement
from spectrim.report.data import measurements


def shortfalls(plan: Plan | None, run: Mapping[str, Any] | None) -> list[str]:
    """Return sentences about results that are worse than wanted.

    Args:
        plan: of the network, if there is one.
        run: from `run_data`, if there is one.
    """
    found = []
    if plan is not None:
        found += [f"Budget {_limits(row.budget)}: {row.problem}" for row in plan.budgets if row.totals is None]
    if run is not None and not run["measured"]:
        found.append("The run is not finished: nothing is measured yet.")
    elif run is not None:
        found += _measured_shortfalls(measurements(run), told=run.get("verdict") is not None)
        found += _cut_shortfalls(run["stages"])
    return found


def _limits(budget: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in budget.items())


def _measured_shortfalls(measured: Mapping[str, Measurement], told: bool) -> list[str]:
    """Compare with the dense network, unless a verdict has told it, and with truncated SVD."""
    dense, final = measured.get("dense"), measured.get("low-rank")
    if dense is None or final is None:
        return []
    found = [] if told else _beside_dense(dense, final)
    other = measured.get("truncated SVD")
    if other is not None and other.accuracy is not None and final.accuracy is not None and other.accuracy > final.accuracy:
        found.append(f"Plain truncated SVD with fine-tuning is {100 * (other.accuracy - final.accuracy):.2f} points better.")
    return found


def _beside_dense(dense: Measurement, final: Measurement) -> list[str]:
    found: list[str] = []
    if dense.accuracy is not None and final.accuracy is not None and final.accuracy < dense.accuracy:
        found.append(f"{100 * (dense.accuracy - final.accuracy):.2f} points of accuracy below the dense network.")
    elif dense.accuracy is None and dense.loss is not None and final.loss is not None and final.loss > dense.loss:
        found.append(f"A loss {final.loss - dense.loss:.4f} above that of the dense network.")
    if dense.latency_s and final.latency_s and (dense.batch, dense.threads) == (final.batch, final.threads):
        gain, spread = dense.latency_s - final.latency_s, max(dense.latency_iqr_s or 0, final.latency_iqr_s or 0)
        if gain <= 0:
            found.append(f"Slower than the dense network: {1e3 * final.latency_s:.3f} against {1e3 * dense.latency_s:.3f} ms.")
        elif gain < spread:
            found.append(f"The gain in latency, {1e3 * gain:.3f} ms, is within the spread of the measurement, {1e3 * spread:.3f} ms.")
    return found


def _cut_shortfalls(stages: Iterable[Mapping[str, Any]]) -> list[str]:
    found: list[str] = []
    before = None
    for stage in stages:
        if stage["name"].startswith("b"):
            continue
        after = stage["val"].get("val_cut", {}).get("accuracy")
        if after is not None and before is not None and before - after > 0.01:
            found.append(
                f"The cut alone cost {100 * (before - after):.1f} points on the validation split, before recalibration and fine-tuning."
            )
        before = stage["val"].get("val", {}).get("accuracy", before)
    return found
