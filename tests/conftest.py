"""Every test starts from the same random state, on one thread: layers this small only lose time to a pool of threads."""

import inspect
from collections.abc import Iterator
from types import SimpleNamespace

import jaxtyping
import pytest
import torch

import shape_checks

jaxtyping.jaxtyped = shape_checks.jaxtyped
for kind in (torch.cuda, torch.xpu, torch.mtia):  # torch.manual_seed formats a stack trace for every kind of device that is not there
    kind.traceback = SimpleNamespace(format_stack=list)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _kinds() -> Iterator[None]:
    """Forget kinds of layers that a test registered."""
    from spectrim.layers import METHODS  # not above: the plugin that checks shapes must see the import

    before = list(METHODS)
    yield
    METHODS[:] = before


@pytest.fixture(autouse=True, scope="session")
def _imported() -> None:
    """Import every public name once, so that tests find modules in `sys.modules` whichever of them runs first."""
    import spectrim

    for name in spectrim.__all__:
        getattr(spectrim, name)


@pytest.fixture(autouse=True, scope="session")
def _short_timings(_imported: None) -> None:
    """Time networks for 20 ms instead of 200 in each round, where a test says nothing else: no test judges by seconds."""
    from spectrim.metrics import clock

    for timing in (clock.latency, clock.compare_latency):
        defaults = inspect.unwrap(timing).__kwdefaults__
        assert defaults["min_time"] > 0.02
        defaults["min_time"] = 0.02
