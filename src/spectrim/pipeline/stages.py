"""The stages of a run: each in a folder, skipped when it is finished with the same settings, with data as before their first pass."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from spectrim.errors import FormatError, RecipeError
from spectrim.files import make_folder, read_json, write_json
from spectrim.forms.form import Size
from spectrim.layers import factor_name, kind_of, named_factors
from spectrim.locks import locked
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import first_batch, inputs_of, one_example
from spectrim.pipeline.components import _made, make_loss, seed_everything
from spectrim.pipeline.data import Data, Source
from spectrim.pipeline.recipe import Recipe, phases
from spectrim.pipeline.weights import fill_
from spectrim.storage.save import load, save
from spectrim.surgery.same_function import same_function
from spectrim.surgery.select import decide
from spectrim.training.checkpoint import random_state, restore_random_state

STAGE = "stage.json"


def make_model(recipe: Recipe, *, filled: bool = True) -> nn.Module:
    """Build the dense network, seeded, with the weights that the recipe names.

    Args:
        recipe: from `read_recipe`.
        filled: False to leave out these weights, where others take their place.
    """
    seed_everything(recipe.seed)
    model = _made(recipe.model, "model")
    if not isinstance(model, nn.Module):
        raise RecipeError("model", f"{recipe.model['class_path']} gives a {type(model).__name__}", allowed="a torch.nn.Module")
    if filled and recipe.weights is not None:
        fill_(model, recipe.weights)
    return model


def make_data(recipe: Recipe) -> Data:
    """Build the data, seeded, and check that it has the three splits."""
    return Source(recipe.data, recipe.seed).data


class Stages:
    """What a run's stages share: its folder, its data, its dense network before training, and what is finished.

    A stage's folder holds its model (``model.safetensors``, ``spectrim.json``), its numbers (``stage.json``) and, while it trains, its
    checkpoints. The digest in ``stage.json`` covers the settings of the stage and of everything before it; when it differs, the stage is
    run again.
    """

    def __init__(self, recipe: Recipe, out: str | Path, *, progress: bool = True) -> None:
        """Prepare; nothing is written before `run`.

        Args:
            recipe: from `read_recipe`.
            out: the run's folder; made if missing.
            progress: whether to show progress, on stderr.
        """
        self.recipe, self.out, self.progress = recipe, Path(out), progress
        self.console = Console(stderr=True, quiet=not progress)
        self.source = Source(recipe.data, recipe.seed)
        self.data = self.source.data
        self.loss = make_loss(recipe.loss)
        self.initial = make_model(recipe)
        self.example = one_example(self.data.val, self.initial)
        self._check_layers()
        self.digest = ""
        self.seed, self.readings = recipe.seed, 0
        self.numbers: dict[str, dict[str, Any]] = {}

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other runs out of the folder, which is made if missing.

        Raises:
            WriteError: another process is writing it.
        """
        make_folder(self.out)
        try:
            with locked(self.out):
                yield
        finally:
            with suppress(OSError):  # of a call that wrote nothing no folder stays; one with anything in it is not removed
                self.out.rmdir()

    def _check_layers(self) -> None:
        """Check what the recipe says about layers before any work."""
        modules = dict(self.initial.named_modules())
        chosen = [name for name, reason in decide(self.initial, self.recipe.factorize.layers()).items() if reason is None]
        weights = [
            factor_name(name, weight) for name in chosen if (kind := kind_of(modules[name])) for weight in kind.weights(modules[name])
        ]
        if not weights:
            raise RecipeError("factorize.where", "selects no layer that can be factorized", allowed="see spectrim coverage RECIPE")
        for key, phase in phases(self.recipe):
            for name in (phase.distill.layers or ()) if phase.distill else ():
                if name not in modules:
                    raise RecipeError(
                        f"{key}.distill.layers", f"'{name}' is no layer of the model", allowed=", ".join(filter(None, modules))
                    )
        for name in self.recipe.prune.ranks or {}:
            if name not in weights:
                raise RecipeError(f"prune.ranks.{name}", "is no weight that will be factorized", allowed=", ".join(weights))

    def _stage(self, name: str, settings: Any, work: Callable[[Path], tuple[nn.Module, dict[str, Any]]]) -> nn.Module:
        """Run one stage, or load what it made when it is finished with the same settings."""
        self.digest = _digest([self.digest, name, settings])
        folder = self.out / name
        state = _read_stage(folder)
        if state.get("digest") == self.digest and state.get("finished"):
            self.numbers[name] = state["numbers"]
            self.console.print(f"{name}: finished before, skipped")
            try:
                return load(folder, self.initial)
            except FormatError as error:
                raise FormatError(
                    folder, f"the stage is finished but cannot be read ({error})", hint="delete the folder to run it again"
                ) from error
        if state.get("digest") != self.digest:
            if folder.exists():
                self.console.print(f"{name}: settings changed, run again")
                (folder / STAGE).unlink(missing_ok=True)  # first, so that a partly deleted folder never looks finished
                shutil.rmtree(folder)
            make_folder(folder)
            write_json(folder / STAGE, {"digest": self.digest, "finished": False})
        self.console.rule(name, align="left")
        self.begin(name)
        start = time.perf_counter()
        model, numbers = work(folder)
        numbers = {**numbers, "seconds": round(time.perf_counter() - start, 1)}
        save(model, folder)
        write_json(folder / STAGE, {"digest": self.digest, "finished": True, "numbers": numbers})
        self.numbers[name] = numbers
        for key, title in (("val_cut", "right after the cut"), ("val_recalibrated", "BatchNorm recalibrated"), ("val", "at the end")):
            if key in numbers:
                values = ", ".join(f"{metric} {value:.4g}" for metric, value in numbers[key].items())
                self.console.print(f"validation split, {title}: {values}", highlight=False)
        return model

    def begin(self, name: str) -> None:
        """Seed every generator for a stage and start with fresh data, so that it is the same whether or not stages before it are skipped.

        Args:
            name: of the stage.
        """
        self.seed, self.readings = self.recipe.seed + int(_digest(name)[:6], 16), 0
        self.data = self.source.fresh(self.seed)
        seed_everything(self.seed)

    def fresh(self) -> Data:
        """Return the data as they are before their first pass; loaders' own generators get a seed that belongs to this reading."""
        self.data = self.source.fresh(self.seed + self.readings)
        self.readings += 1
        return self.data

    def _check_same(self, a: nn.Module, b: nn.Module, names: tuple[str, str]) -> None:
        """Raise a LayerError unless two networks compute the same on a batch of the training split; no generator is behind afterwards."""
        state = random_state()
        try:
            batch = first_batch(self.fresh().train, "run")
            same_function(a, b, inputs_of(batch), names=names)
        finally:
            restore_random_state(state)

    def _validate(self, model: nn.Module) -> dict[str, float]:
        return evaluate(model, self.fresh().val, self.loss)


def ranks(model: nn.Module) -> dict[str, Size]:
    """Return the rank of each factorized weight."""
    return {name: factors.size for name, factors in named_factors(model)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_stage(folder: Path) -> dict[str, Any]:
    """Return a stage's file, or nothing when it is missing or damaged."""
    try:
        state = read_json(folder / STAGE)
    except FormatError:
        return {}
    return state if isinstance(state.get("numbers", {}), dict) and ("numbers" in state or not state.get("finished")) else {}
