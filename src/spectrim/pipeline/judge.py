"""Scores of networks: each network on each data set once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from spectrim.metrics.clock import compare_latency
from spectrim.metrics.evaluate import Scores, evaluate
from spectrim.metrics.inputs import inputs_of
from spectrim.metrics.measurement import Measurement, measure
from spectrim.pipeline.seconds import in_its_runtime
from spectrim.pipeline.teaching import GAP, NATS_GAP, axis_of_classes
from spectrim.protocols import Hardware, Latencies
from spectrim.surgery.merge import merge
from spectrim.surgery.same_function import same_function
from spectrim.training.distillation import Loss


@dataclass
class Judge:
    """Scores networks: each network on each data set once."""

    model: nn.Module
    loss: Loss
    known: list[Any]
    judged: Iterable[Any]
    batch: int | None = None
    on_known: dict[str, float] = field(default_factory=dict)
    crossbars: Hardware | None = None
    source: nn.Module = field(init=False)
    """What is factorized, and what the cut layers are refitted to: the dense network, or a narrower one."""

    def __post_init__(self) -> None:
        self.source = self.model

    def __call__(self, network: nn.Module) -> Scores:
        """Return the scores of a network on the data that decide."""
        return evaluate(network, self.judged, self.loss)

    @cached_property
    def dense(self) -> Scores:
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
        """The loss on the calibration set above which the loss gap is large."""
        dense = self.dense_on_known["loss"]
        classifies = axis_of_classes(self.model, self.known[0]) is not None
        return min(GAP * dense, dense + NATS_GAP) if classifies else GAP * dense

    def finished(self, low: nn.Module, inputs: Any, latency: Latencies | None) -> tuple[nn.Module, dict[str, Measurement]]:
        """Merge a network, compare its outputs and measure it beside the dense one."""
        low.eval()
        final = merge(low, latency=latency)
        same_function(low, final, inputs_of(self.known[0]), names=("cut", "merged"))
        return final, self.measured(final, inputs, latency)

    def measured(self, final: nn.Module, inputs: Any, latency: Latencies | None = None) -> dict[str, Measurement]:
        """Measure the dense and the final network, timed side by side; in ONNX Runtime where a table says that it counts here."""
        networks = {"dense": self.model, "final": final}
        times = compare_latency(in_its_runtime(networks, inputs, latency), inputs)
        scores = {"dense": self.dense, "final": self(final)}
        return {
            name: replace(
                measure(network, inputs, latency=False, batch_size=self.batch, crossbars=self.crossbars),
                latency_s=times[name].median_s,
                latency_iqr_s=times[name].iqr_s,
                batch=times[name].batch,
                threads=times[name].threads,
            ).scored(scores[name])
            for name, network in networks.items()
        }


def scores_of_measurement(measured: Measurement) -> dict[str, float]:
    """Return the loss and the accuracy of a measurement, where it has them."""
    return {name: value for name in ("loss", "accuracy") if (value := getattr(measured, name)) is not None}
