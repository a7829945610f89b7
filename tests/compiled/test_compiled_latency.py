"""Timing compiled layers."""

import os

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.budget.latency_table import latency_table

pytestmark = pytest.mark.skipif(
    not os.environ.get("JAXTYPING_DISABLE"), reason="needs JAXTYPING_DISABLE=1: torch.compile does not go through the jaxtyping hook"
)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")  # inductor's own
def test_seconds_of_compiled_layers_are_positive_and_finite() -> None:
    table = latency_table(sp.factorize(nn.Linear(8, 8)), torch.randn(1, 8), backend="compile", multiple=3, time_box=1e-3)
    (timing,) = table.timings.values()
    assert timing.ranks == (3,)
    assert all(0 < seconds < 60 for seconds in (timing.dense_s, *timing.pair_s))
