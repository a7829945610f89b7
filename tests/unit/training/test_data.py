"""Data as people have them: without a length, with a wrong one, and with an order of their own that a resumed run has to find again."""

import random
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.training.data import count_batches
from spectrim.training.history import History


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(count)]


def tuned(settings: dict[str, Any]) -> dict[str, Any]:
    """Put the settings of a `Tuning` into one."""
    names = {entry.name for entry in fields(sp.Tuning)} & settings.keys()
    return {name: value for name, value in settings.items() if name not in names} | {"tuning": sp.Tuning(**{n: settings[n] for n in names})}


def run(model: nn.Module, data: Any, epochs: int = 2, **settings: Any) -> History:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    return sp.fit(model, data, nn.CrossEntropyLoss(), optimizer, epochs, progress=False, **tuned(settings))


def log(history: History) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key not in ("seconds", "examples_per_s")} for line in history.epochs]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


class Stream:
    """An iterable without a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        yield from batches(self.count)


class Lying(list[Any]):
    """Says another number of batches than it gives."""

    said = 0

    def __len__(self) -> int:
        return self.said


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for x, y in batches(3):
            yield from zip(x, y, strict=True)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_data_without_a_length_train_like_a_list(accumulate: int, tmp_path: Path) -> None:
    known, streamed, parts = net(), net(), net()
    histories = [run(model, data, 3, accumulate=accumulate) for model, data in ((known, batches(5)), (streamed, Stream(5)))]
    assert log(histories[0]) == log(histories[1])
    assert same(known, streamed)
    for epochs in (1, 3):
        parts = net()
        resumed = run(parts, Stream(5), epochs, accumulate=accumulate, checkpoint=tmp_path)
    assert log(resumed) == log(histories[0])
    assert same(parts, known)


def test_a_loader_over_an_iterable_data_set() -> None:
    known, streamed = net(), net()
    run(known, batches(3))
    run(streamed, DataLoader(Rows(), batch_size=8))
    assert same(known, streamed)
    assert count_batches(DataLoader(Rows(), batch_size=8)) == 3


def test_endless_data_need_a_number_and_have_one() -> None:
    class Endless:
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from batches(4)

    endless, known = net(), net()
    ramp = sp.Ramp(0.5, cuts=2)
    endless, known = (sp.factorize(model, where=sp.match("*")) for model in (endless, known))
    a = run(endless, Endless(), steps_per_epoch=4, courses=[ramp])
    b = run(known, batches(4), courses=[ramp])
    assert a.cuts == b.cuts
    assert same(endless, known)
    assert len(run(net(), batches(4), 1, steps_per_epoch=2).epochs) == 1


def test_what_counts_steps_says_that_it_needs_their_number() -> None:
    low = sp.factorize(net(), where=sp.match("*"))
    for settings, name in (
        ({"courses": [sp.Ramp(0.5)]}, "Ramp"),
        ({"courses": [sp.Squeeze(sp.Budget(macs=0.5))]}, "Squeeze"),
        ({"lessons": [sp.Distillation(net(), features=1.0, until=0.5, layers=("0",))]}, "Distillation"),
    ):
        with pytest.raises(SettingError, match=rf"fit: data must be of a known length for {name}, which counts steps, .*steps_per_epoch"):
            run(low, Stream(4), **settings)
    run(low, Stream(2), 1, lessons=[sp.Distillation(net())])


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize(("said", "came"), [(2, 5), (9, 5), (1, 2)])
def test_a_wrong_length_changes_nothing_but_a_warning(said: int, came: int, accumulate: int) -> None:
    known, lied = net(), net()
    data = Lying(batches(came))
    data.said = said
    right = run(known, batches(came), accumulate=accumulate)
    with pytest.warns(UserWarning, match=rf"{said} batches were announced \(by .*\), but {came} came in epoch 0") as caught:
        wrong = run(lied, data, accumulate=accumulate)
    assert len(caught) == 1
    assert log(right) == log(wrong)
    assert same(known, lied)


def test_data_that_run_dry_are_refused() -> None:
    class Once:
        def __init__(self) -> None:
            self.data: Any = iter(batches(2))

        def __iter__(self) -> Iterator[Any]:
            return self.data

    with pytest.raises(SettingError, match="fit: data must be at least one batch at each pass, got 'no batches in epoch 1'"):
        run(net(), Once())
    for data in (iter(batches(1)), (batch for batch in batches(1))):
        with pytest.raises(SettingError, match="an iterable that starts again at each epoch"):
            count_batches(data)


# The order of a resumed run


class Shuffled(Dataset[Any]):
    """Draws from a generator of its own; with a counter, too."""

    def __init__(self, rng: Any) -> None:
        self.rng, self.rows = rng, batches(3)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        x, y = self.rows[index // 8]
        draw = self.rng.uniform(0.5, 1.5)
        return x[index % 8] * draw, y[index % 8]


class Counting(list[Any]):
    """Counts its own passes, as case after case does."""

    passes = 0

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        order = random.Random(self.passes).sample(range(len(self)), len(self))
        self.passes += 1
        return (self[index] for index in order)


class Remembering(Counting):
    """The same with what torchdata's loaders have."""

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes = state["passes"]


class Announced(Counting):
    """The same with what torch's samplers have."""

    def set_epoch(self, epoch: int) -> None:
        self.passes = epoch


class Reordered(Dataset[Any]):
    """Items in an order that it turns and swaps in place, in a list, an array and a tensor, at the first one."""

    def __init__(self) -> None:
        self.x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
        self.order, self.array, self.tensor = list(range(24)), np.arange(24), torch.arange(24)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        if index == 0:
            self.order.append(self.order.pop(5))
            self.array[:] = np.roll(self.array, 3)
            self.tensor[:] = self.tensor.roll(7)
        at = self.tensor[self.array[self.order[index]]]
        return self.x[at], at % 3


KINDS = {
    "PCG64 of a data set": lambda: DataLoader(Shuffled(np.random.default_rng(1)), batch_size=8),
    "MT19937 of a data set": lambda: DataLoader(Shuffled(np.random.Generator(np.random.MT19937(1))), batch_size=8),
    "RandomState of a data set": lambda: DataLoader(Shuffled(np.random.RandomState(1)), batch_size=8),
    "Random of a data set": lambda: DataLoader(Shuffled(random.Random(1)), batch_size=8),
    "generator of a sampler": lambda: DataLoader(
        TensorDataset(torch.randn(24, 6, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3),
        batch_sampler=torch.utils.data.BatchSampler(RandomSampler(range(24), generator=torch.Generator().manual_seed(2)), 8, False),
    ),
    "state_dict": lambda: Remembering(batches(3)),
    "set_epoch": lambda: Announced(batches(3)),
    "count of passes": lambda: Counting(batches(3)),
    "order shuffled in place": lambda: DataLoader(Subset(Reordered(), range(24)), batch_size=8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_sees_the_same_batches(kind: str, tmp_path: Path) -> None:
    whole = net()
    history = run(whole, KINDS[kind](), 4)
    for epochs in (1, 3, 4):
        model = net()
        resumed = run(model, KINDS[kind](), epochs, checkpoint=tmp_path)
    assert log(resumed) == log(history)
    assert same(whole, model)


def test_a_loader_that_accelerate_prepared(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def loader() -> Any:
        generator = torch.Generator().manual_seed(1)
        return Accelerator().prepare_data_loader(DataLoader(batches(4), batch_size=None, shuffle=True, generator=generator))

    whole = net()
    history = run(whole, loader(), 3)
    for epochs in (1, 3):
        model = net()
        resumed = run(model, loader(), epochs, checkpoint=tmp_path)
    assert log(resumed) == log(history)
    assert same(whole, model)


def test_other_data_may_follow_those_that_count_and_what_is_read_on_is_named(tmp_path: Path) -> None:
    run(net(), Counting(batches(3)), 2, checkpoint=tmp_path)
    run(net(), batches(3), 3, checkpoint=tmp_path)

    class Reading(Counting):
        def __init__(self, kept: Any) -> None:
            super().__init__(kept)
            self.stream = iter(range(100))

    run(net(), Reading(batches(3)), 3, checkpoint=tmp_path)  # nothing is left to do, nothing can differ
    with pytest.warns(UserWarning, match=r"the data go on in Reading.stream from pass to pass.*give the data set_epoch"):
        run(net(), Reading(batches(3)), 4, checkpoint=tmp_path)
