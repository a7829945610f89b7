"""What a model costs and what it achieves: inputs, evaluation, multiply-accumulates, latency, tables."""

from spectrim.metrics.measurement import Measurement, compare_table

__all__ = ["Measurement", "compare_table"]
