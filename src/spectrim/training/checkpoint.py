"""The checkpoint of a training run: model, optimizer, scheduler, random state, all in one atomic file."""

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from spectrim.errors import FormatError
from spectrim.files import sweep
from spectrim.forms.form import Form
from spectrim.layers import named_layers
from spectrim.layers.sharded import has_shards, is_sharded, shard_like, whole
from spectrim.training import processes
from spectrim.training.data import generators_of as generators_of
from spectrim.training.history import History
from spectrim.training.statefile import read_state, write_state

CHECKPOINT = "checkpoint.pt"


class Checkpoint:
    """The state of a run in one file: weights, optimizer, schedule, random generators and history; replaced atomically."""

    def __init__(self, folder: Path, generators: Sequence[torch.Generator], accelerator: Any, **parts: Any) -> None:
        """Refer to what will be saved and restored, and remove what a killed run left half-written; what a living process writes stays.

        Args:
            folder: where the file is.
            generators: of the data; they are saved too.
            accelerator: accelerate's: the main process writes, all read.
            parts: ``model``, ``optimizer`` and whatever else has a ``state_dict``; None is left out.
        """
        self.path = folder / CHECKPOINT
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.generators = generators
        self.accelerator = accelerator
        self.resizes = False
        sweep(folder)

    def write(self, history: History) -> None:
        """Write the whole state, which all processes gather, to a temporary file and rename it.

        Raises:
            OSError: in every process, when the main one could not write.
        """
        state, error = self._state(), None
        if self.accelerator.is_main_process:
            try:
                self._write(state, history)
            except OSError as problem:
                error = problem
        if error is not None and self.accelerator.num_processes == 1:
            raise error
        problem_anywhere = processes.from_main(self.accelerator, None if error is None else str(error))
        if problem_anywhere is not None:
            raise error or OSError(problem_anywhere)

    def _write(self, state: dict[str, Any], history: History) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        happened = {"history": history.epochs, "cuts": history.cuts, "layers": history.layers, "stopped": history.stopped}
        write_state(self.path, state | {"kinds": self._kinds()} | happened)

    def restore(self) -> History:
        """Load the state into model, optimizer, schedule and generators; a new history when there is no checkpoint.

        Raises:
            FormatError: for a file that is damaged or of another model, optimizer or schedule; nothing is changed then.
        """
        if not self.path.exists():
            return History()
        state = read_state(self.path, "delete it to start again")
        try:
            weights = dict(state["model"])
            happened = {name: list(state.get(name, [])) for name in ("cuts", "layers")}
            history = History(list(state["history"]), happened["cuts"], happened["layers"], stopped=state.get("stopped"))
            sizes = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
        except Exception as error:
            raise FormatError(
                self.path, f"is not a readable checkpoint ({type(error).__name__})", hint="delete it to start again"
            ) from error
        again = "delete the checkpoint to start again"
        own = self.parts["model"].state_dict()
        smaller = self._smaller(weights) if self.resizes else {}
        for name, factors in smaller.items():
            own |= {f"{name}.{part}": tensor for part, tensor in factors.state_dict().items()}
        wrong = [key for key in {**own, **weights} if key not in own or key not in weights or not _alike(own[key], weights[key])]
        if wrong:
            problem = f"is the checkpoint of another model ({len(wrong)} of {len(own)} tensors differ)"
            raise FormatError(self.path, problem, hint=f"first difference: '{wrong[0]}'; {again}")
        own_sizes = [len(group["params"]) for group in self.parts["optimizer"].param_groups]
        if sizes != own_sizes or state.get("kinds", self._kinds()) != self._kinds():
            raise FormatError(self.path, "is the checkpoint of another optimizer or schedule", hint=again)
        before = copy.deepcopy(self._state())
        larger = self._resize(smaller)
        try:
            self._load(state)
        except Exception as error:
            self._resize(larger)
            self._load(before)
            raise FormatError(self.path, f"does not fit this run ({error})", hint=again) from error
        return history

    def _smaller(self, weights: dict[str, Any]) -> dict[str, Form]:
        """Return factors of the ranks that a schedule had cut to, where they are smaller than the model's, by module."""
        found = {}
        for name, factors in self.parts["model"].named_modules():
            if not isinstance(factors, Form):
                continue
            size = factors.size_of_parts({part: weights.get(f"{name}.{part}".removeprefix(".")) for part in factors._parameters})
            if size is not None and factors.rung_of(size) < factors.rank:
                found[name] = factors.resized(size)
        return found

    def _resize(self, sized: dict[str, Form]) -> dict[str, Form]:
        """Give model and optimizer the parameters of these factors, with no state yet; return what they had."""
        model, optimizer, had = self.parts["model"], self.parts["optimizer"], {}
        exchanged: dict[int, Any] = {}
        for name, factors in sized.items():
            module = model.get_submodule(name)
            had[name] = copy.copy(module)
            had[name]._parameters = dict(module._parameters)
            exchanged |= {id(module._parameters[part]): parameter for part, parameter in factors._parameters.items()}
            module._parameters.update(factors._parameters)
        for group in optimizer.param_groups:
            for index, parameter in enumerate(group["params"]):
                if id(parameter) in exchanged:
                    group["params"][index] = exchanged[id(parameter)]
                    optimizer.state.pop(parameter, None)
        return had

    def _state(self) -> dict[str, Any]:
        choices = {name: list(layer.execution.items()) for name, layer in named_layers(self.parts["model"])}
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if has_shards(self.parts["model"]):
            states = tree_map_only(Tensor, lambda tensor: whole(tensor).cpu() if is_sharded(tensor) else tensor, states)
        main, *others = processes.from_all(self.accelerator, random_state(self.generators))
        return states | {"random": main, "execution": choices} | ({"random_of_others": others} if others else {})

    def _load(self, state: dict[str, Any]) -> None:
        if has_shards(self.parts["model"]):
            state = state | self._shards_of(state)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name, layer in named_layers(self.parts["model"]):
            layer.execution.clear()
            layer.execution.update((tuple(key), choice) for key, choice in state.get("execution", {}).get(name, []))
        generators = [state["random"], *state.get("random_of_others", [])]
        index = self.accelerator.process_index
        if index < len(generators):  # with more processes than before, the new ones start from their initial state
            restore_random_state(generators[index], self.generators)

    def _shards_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the stored weights and moments, which are whole, as this process's shards."""
        own = self.parts["model"].state_dict()
        weights = {name: shard_like(value, own[name]) if isinstance(value, Tensor) else value for name, value in state["model"].items()}
        trained = [parameter for group in self.parts["optimizer"].param_groups for parameter in group["params"]]
        indices = [index for group in state["optimizer"]["param_groups"] for index in group["params"]]
        held = state["optimizer"]["state"]
        moments = {index: processes.shard_state(held[index], p) for index, p in zip(indices, trained, strict=True) if index in held}
        return {"model": weights, "optimizer": {**state["optimizer"], "state": moments}}

    def _kinds(self) -> dict[str, str]:
        return {name: getattr(part, "kind", type(part).__name__) for name, part in self.parts.items() if name != "model"}


def _alike(own: Any, stored: Any) -> bool:
    if not isinstance(own, Tensor) or not isinstance(stored, Tensor):
        return type(own) is type(stored)
    return own.shape == stored.shape and own.dtype == stored.dtype


def random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Return the state of every generator that training may draw from: torch (all devices), numpy, Python and the loader's own."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 the global generator is what users draw from
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in generators],
    }


def restore_random_state(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Set every generator to a state from `random_state`."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
    for generator, own in zip(generators, state["loader"] or [], strict=True):
        generator.set_state(own)
