"""The loader of the project, augmentation in batches, and the data folder."""

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from spectrim.errors import FormatError, SettingError

__all__ = ["Batches", "CropFlip", "Normalize", "Splits", "as_float", "data_file", "data_folder"]

Augment = Callable[[Tensor, torch.Generator], Tensor]
Transform = Callable[[Tensor], Tensor]


def data_folder() -> Path:
    """Where data sets and pretrained weights lie: ``$SPECTRIM_DATA``, else ``data`` in the working directory."""
    return Path(os.environ.get("SPECTRIM_DATA") or "data")


def data_file(path: str | Path, standard: str) -> Path:
    """Find a file of the data folder.

    Args:
        path: relative to `data_folder`, or absolute.
        standard: what is expected there, in words, for the error.

    Raises:
        FormatError: there is no such file.
    """
    file = data_folder() / path
    if not file.is_file():
        hint = f"put it there, or point SPECTRIM_DATA at the folder that holds {path}"
        if Path(path).is_absolute():
            hint = "check the path"
        raise FormatError(file, f"no such file; expected the {standard}", hint=hint)
    return file


class Batches:
    """Batches of tensors in memory, in an order that depends on ``(seed, epoch)`` only.

    Each pass takes a fresh generator from `seed` and the epoch's number, for the order and then batch by batch for the augmentation; the
    global generators are neither read nor moved, so a resumed run gets the same bytes. Passes count epochs from 0 by
    themselves; `set_epoch` says which one comes next. Batches are copies: changing one in place does not change the data.

    Args:
        inputs: the examples, first dimension ``examples``; images may stay uint8, `transform` turns each batch into floats.
        targets: as many targets.
        batch_size: examples in a batch, >= 1; the last batch is what remains.
        shuffle: draw a new order each epoch.
        seed: any integer >= 0.
        augment: ``(batch, generator) -> batch``, random, before `transform`; for example `CropFlip`.
        transform: ``(batch) -> batch``, deterministic; for example `Normalize`.
        drop_last: leave out a last batch that is not full.

    Raises:
        SettingError: an argument outside these ranges, or not as many targets as inputs.

    Examples:
        >>> data = Batches(torch.arange(5.0), torch.arange(5), batch_size=2, shuffle=True, seed=1)
        >>> first = [targets.tolist() for _, targets in data]
        >>> data.set_epoch(0)
        >>> [targets.tolist() for _, targets in data] == first, len(data), data.examples
        (True, 3, 5)
    """

    def __init__(
        self,
        inputs: Shaped[Tensor, "examples ..."],
        targets: Shaped[Tensor, "any ..."],
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        augment: Augment | None = None,
        transform: Transform | None = None,
        drop_last: bool = False,
    ) -> None:
        if len(inputs) != len(targets):
            raise SettingError("Batches", "targets", got=len(targets), rule=f"as many as inputs ({len(inputs)})")
        if batch_size < 1:
            raise SettingError("Batches", "batch_size", got=batch_size, rule="an integer >= 1")
        if seed < 0:
            raise SettingError("Batches", "seed", got=seed, rule="an integer >= 0")
        self.inputs, self.targets = inputs, targets
        self.batch_size, self.shuffle, self.seed, self.drop_last = batch_size, shuffle, seed, drop_last
        self.augment, self.transform = augment, transform
        self._epoch = 0

    @property
    def examples(self) -> int:
        """Examples that one pass yields."""
        return len(self) * self.batch_size if self.drop_last else len(self.targets)

    def __len__(self) -> int:
        full, rest = divmod(len(self.targets), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of `epoch` (>= 0)."""
        if epoch < 0:
            raise SettingError("Batches", "epoch", got=epoch, rule="an integer >= 0")
        self._epoch = epoch

    def to(self, device: torch.device | str) -> "Batches":
        """Return the same batches from tensors on `device`; the draws stay those of the CPU, whatever the device.

        A small data set that lies on an accelerator is augmented there, and no step waits for a copy.
        """
        moved = copy.copy(self)
        moved.inputs, moved.targets = self.inputs.to(device), self.targets.to(device)
        return moved

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        return self._pass(epoch)

    def _pass(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]))
        count = len(self.targets)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = order[start : start + self.batch_size]
            inputs, targets = self.inputs[chosen], self.targets[chosen]
            if self.augment is not None:
                inputs = self.augment(inputs, generator)
            yield inputs if self.transform is None else self.transform(inputs), targets


class Splits(NamedTuple):
    """Three loaders: training (shuffled, augmented where asked), validation (chooses) and test (touched once)."""

    train: Batches
    val: Batches
    test: Batches

    def to(self, device: torch.device | str) -> "Splits":
        """Return the three with their tensors on `device`, see `Batches.to`."""
        return Splits(*(part.to(device) for part in self))


@dataclass(frozen=True)
class CropFlip:
    """Random crops of the zero-padded images, and mirror images with probability one half; one draw for each image.

    As in the usual CIFAR pipelines, padding comes before normalization, so the border is black rather than the mean color.

    Args:
        padding: zero pixels on each side, >= 0; the crop has the size of the input.
        flip: mirror left-right half of the time.

    Raises:
        SettingError: `padding` is negative.

    Examples:
        >>> images = torch.ones(2, 3, 8, 8)
        >>> CropFlip(padding=2)(images, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise SettingError("CropFlip", "padding", got=self.padding, rule="an integer >= 0")

    def __call__(
        self, images: Shaped[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> Shaped[Tensor, "batch channels height width"]:
        """Return new images of the same shape and dtype; draws only from `generator`."""
        batch, _, height, width = images.shape
        if self.padding:
            top, left = torch.randint(2 * self.padding + 1, (2, batch), generator=generator)
            windows = F.pad(images, (self.padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
            images = windows[torch.arange(batch), :, top, left]
        if self.flip:
            mirrored = (torch.rand(batch, generator=generator) < 0.5).to(images.device)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images


@dataclass(frozen=True)
class Normalize:
    """Bytes to floats: ``(pixel / 255 - mean) / std``, channel by channel.

    Args:
        mean: of each channel, in units of 255.
        std: of each channel, in units of 255, > 0.

    Raises:
        SettingError: the two differ in length, or a `std` is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or min(self.std, default=0) <= 0:
            raise SettingError("Normalize", "std", got=self.std, rule=f"as many positive numbers as mean ({len(self.mean)})")

    def __call__(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Return the normalized images in float32, channels last in memory, which CPU convolutions are faster on."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return images.float().sub_(255 * mean).div_(255 * std).contiguous(memory_format=torch.channels_last)


def as_float(images: UInt8[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Bytes to floats 0..255, unscaled; images channels last in memory, as `Normalize` puts them."""
    return images.float().contiguous(memory_format=torch.channels_last if images.dim() == 4 else torch.contiguous_format)
