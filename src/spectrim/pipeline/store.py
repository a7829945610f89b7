"""The folder of one call of `compress`: what a stopped call goes on from."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spectrim.errors import FormatError
from spectrim.files import make_folder, read_json, write_json
from spectrim.layers import named_factors
from spectrim.locks import locked
from spectrim.pipeline import identity
from spectrim.pipeline.behavior import Attributes, of_network, of_value
from spectrim.pipeline.compressed import Compressed
from spectrim.steps import LOGGER
from spectrim.storage.pack import pack
from spectrim.storage.save import load, save
from spectrim.training.tuning import Tuning

RESULT, SETTINGS, CUT, CODED_FILE = "result.json", "settings.json", "cut.json", "model.spz"
AGAIN = "delete the folder to begin again"


def identity_of(
    folder: Any,
    model: nn.Module,
    low: nn.Module,
    data: Any,
    known: Sequence[Any],
    eval_data: Any,
    inputs: Any,
    loss: Any,
    tuning: Tuning,
    latency: Any,
    calibration: Any,
    before: Attributes,
) -> dict[str, Any]:
    """Return what else changes the result; nothing without a folder."""
    if folder is None:
        return {}
    with torch.random.fork_rng([]):  # a loader draws a seed at each pass
        judging = [] if eval_data is None else list(islice(eval_data, 1))
    return {
        "weights": identity.of_weights(model),
        "network": of_network(model, before),
        "data": identity.of_data(data, known),
        "eval_data": None if eval_data is None else identity.of_data(eval_data, judging),
        "where": [f"{name} {factors.shape}" for name, factors in named_factors(low)],
        "example_inputs": identity.digest(tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)),
        "loss": of_value(loss),
        "optimizer": identity.of_optimizer(tuning.optimizer, low),
        "schedule": of_value(tuning.scheduler),
        "latency": identity.of_latency(latency, low),
        "calibration": None if calibration is None else identity.digest([calibration.examples, *calibration.inputs.values()]),
    }


def given_of(**settings: Any) -> dict[str, Any]:
    """Return the settings that were given, so that folders without them stay what they were.

    Args:
        **settings: None or 0 where left out.
    """
    return {name: value for name, value in settings.items() if value}


@dataclass
class Told:
    """How the cut was made: the way, the stages that were not kept, and sentences."""

    how: str = "squeezed"
    dropped: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Found = tuple[nn.Module, Told, dict[str, dict[str, float]]]


@dataclass
class Store:
    """The folder of one call, or nothing."""

    folder: Path | None
    settings: dict[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> Path | None:
        """Return a path in the folder; None without one."""
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
        """Take the folder for these settings; refuse one of another call."""
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
            return load(folder, dense), Told(found["how"], found["dropped"], found["notes"]), found["scores"]
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
            if made.packed is not None:
                made.packed = pack(made.model, self.folder / CODED_FILE)
            write_json(self.folder / RESULT, made.report)


def finished(made: Compressed, store: Store) -> Compressed:
    """Write what was made, and log the warnings of its verdict."""
    store.finish(made)
    for warning in made.verdict.warnings:
        LOGGER.warning("compress: %s", warning)
    return made
