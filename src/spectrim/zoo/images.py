"""Readers for images: scikit-learn's digits, the CIFAR-10 binary version, and idx files (MNIST, Fashion-MNIST)."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from spectrim.errors import FormatError, SettingError
from spectrim.zoo.data import Augment, Batches, CropFlip, Normalize, Splits, Transform, as_float, data_file, data_folder

__all__ = ["cifar10", "digits", "fashion_mnist", "mnist"]

NORMALIZERS: dict[str, Transform] = {
    "imagenet": Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "raw": as_float,
}
CIFAR_RECORDS, CIFAR_BYTES = 10_000, 1 + 3 * 32 * 32


class Labelled(NamedTuple):
    """Images of unsigned bytes and their classes."""

    images: UInt8[Tensor, "examples channels height width"]
    labels: Int64[Tensor, " examples"]


def digits(batch_size: int = 64, seed: int = 0) -> Splits:
    """Scikit-learn's 1,797 embedded images of handwritten digits, (1, 8, 8) floats in [0, 1], split 60/20/20 within each class.

    The split is fixed; `seed` only orders the training batches. Nothing is read from the data folder.

    Args:
        batch_size: examples in a batch, >= 1.
        seed: of the training order, >= 0.

    Raises:
        ImportError: scikit-learn is missing (``pip install scikit-learn``, or the extra ``demo``).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits come with scikit-learn: pip install scikit-learn, or install the extra 'demo'") from error
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(raw.target, dtype=torch.int64)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for label in range(10):
        members = (labels == label).nonzero().flatten()
        members = members[_fixed_order(len(members))]
        cuts = (round(0.6 * len(members)), round(0.8 * len(members)))
        for part, chosen in zip(parts, members.tensor_split(cuts), strict=True):
            part.append(chosen)
    train, val, test = (torch.cat(part) for part in parts)
    return Splits(
        Batches(images[train], labels[train], batch_size, shuffle=True, seed=seed),
        Batches(images[val], labels[val], batch_size),
        Batches(images[test], labels[test], batch_size),
    )


def cifar10(
    batch_size: int = 128,
    val: int = 5000,
    augment: bool = True,
    seed: int = 0,
    limit: int | None = None,
    normalize: Literal["imagenet", "cifar10", "raw"] = "imagenet",
) -> Splits:
    """CIFAR-10, binary version: 50,000 training and 10,000 test images of (3, 32, 32) in ten classes.

    Reads ``cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin`` in the data folder. Which images are held out for validation is fixed
    and does not depend on `seed`. Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.

    Args:
        batch_size: examples in a batch, >= 1.
        val: training images held out for validation, in [0, 49999]; never augmented.
        augment: random crops (padding 4) and flips of the training images.
        seed: of the training order and augmentation, >= 0.
        limit: keep at most this many images of each split, >= 1; None keeps all.
        normalize: ``"imagenet"`` (the pretrained ResNets), ``"cifar10"`` (the set's own mean and deviation) or ``"raw"`` (0..255).

    Raises:
        FormatError: a file is missing, truncated or not in this format.
        SettingError: an argument outside these ranges.
    """
    if normalize not in NORMALIZERS:
        raise SettingError("cifar10", "normalize", got=normalize, rule=f"one of {sorted(NORMALIZERS)}")
    parts = [_cifar_file(f"data_batch_{part}.bin") for part in range(1, 6)]
    train = Labelled(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))
    test = _cifar_file("test_batch.bin")
    return _splits("cifar10", train, test, batch_size, val, CropFlip(4) if augment else None, seed, limit, NORMALIZERS[normalize])


def fashion_mnist(batch_size: int = 128, val: int = 5000, augment: bool = False, seed: int = 0, limit: int | None = None) -> Splits:
    """Fashion-MNIST: 60,000 training and 10,000 test images of (1, 28, 28) in ten classes, normalized by mean 0.2860, deviation 0.3530.

    Reads the idx files of ``FashionMNIST/raw`` in the data folder, gzipped or not. Arguments and errors as `cifar10`; `augment` crops
    with a padding of 2 and flips. Source: Xiao et al., arXiv 1708.07747.
    """
    return _idx_splits(
        "fashion_mnist", "FashionMNIST", CropFlip(2) if augment else None, Normalize((0.2860,), (0.3530,)), batch_size, val, seed, limit
    )


def mnist(batch_size: int = 128, val: int = 5000, augment: bool = False, seed: int = 0, limit: int | None = None) -> Splits:
    """MNIST: 60,000 training and 10,000 test images of (1, 28, 28) in ten classes, normalized by mean 0.1307, deviation 0.3081.

    Reads the idx files of ``MNIST/raw`` in the data folder, gzipped or not. Arguments and errors as `cifar10`; `augment` crops with a
    padding of 2 and never flips. Source: LeCun et al., Proc. IEEE 1998.
    """
    return _idx_splits(
        "mnist", "MNIST", CropFlip(2, flip=False) if augment else None, Normalize((0.1307,), (0.3081,)), batch_size, val, seed, limit
    )


def _fixed_order(count: int) -> Int64[Tensor, " count"]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _splits(
    name: str,
    train: Labelled,
    test: Labelled,
    batch_size: int,
    val: int,
    augment: Augment | None,
    seed: int,
    limit: int | None,
    transform: Transform,
) -> Splits:
    images, labels = train
    if not 0 <= val < len(labels):
        raise SettingError(name, "val", got=val, rule=f"a number of images in [0, {len(labels) - 1}]")
    if limit is not None and limit < 1:
        raise SettingError(name, "limit", got=limit, rule="None or an integer >= 1")
    order = _fixed_order(len(labels))
    held_out, kept = order[:val][:limit], order[val:][:limit]
    return Splits(
        Batches(images[kept], labels[kept], batch_size, shuffle=True, seed=seed, augment=augment, transform=transform),
        Batches(images[held_out], labels[held_out], batch_size, transform=transform),
        Batches(test.images[:limit], test.labels[:limit], batch_size, transform=transform),
    )


def _cifar_file(name: str) -> Labelled:
    file = data_file(
        Path("cifar-10-batches-bin") / name,
        f"CIFAR-10 binary version ({CIFAR_RECORDS:,} records of 1 label byte and 3,072 pixel bytes, R, G, B planes of 32 x 32)",
    )
    data = np.fromfile(file, np.uint8)
    if data.size != CIFAR_RECORDS * CIFAR_BYTES:
        raise FormatError(file, f"{data.size:,} bytes, expected {CIFAR_RECORDS * CIFAR_BYTES:,}", hint="truncated? copy it again")
    records = torch.from_numpy(data).view(CIFAR_RECORDS, CIFAR_BYTES)
    images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()
    return Labelled(images, _checked_labels(file, labels))


def _idx_splits(
    name: str, folder: str, augment: Augment | None, transform: Transform, batch_size: int, val: int, seed: int, limit: int | None
) -> Splits:
    def labelled(prefix: str) -> Labelled:
        images = torch.from_numpy(_idx_file(f"{folder}/raw/{prefix}-images-idx3-ubyte", 3))[:, None]
        labels = torch.from_numpy(_idx_file(f"{folder}/raw/{prefix}-labels-idx1-ubyte", 1)).long()
        if len(images) != len(labels):
            raise FormatError(data_folder() / folder / "raw", f"{len(images)} {prefix} images but {len(labels)} labels")
        return Labelled(images, _checked_labels(data_folder() / f"{folder}/raw/{prefix}-labels-idx1-ubyte", labels))

    return _splits(name, labelled("train"), labelled("t10k"), batch_size, val, augment, seed, limit, transform)


def _idx_file(path: str, ndim: int) -> NDArray[np.uint8]:
    plain = data_folder() / path
    file = (
        plain
        if plain.is_file()
        else data_file(f"{path}.gz", f"idx file of unsigned bytes in {ndim} dimensions (gzipped, or plain without .gz)")
    )
    try:
        data = file.read_bytes() if file == plain else gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(file, f"cannot be unpacked: {error}", hint="truncated? copy it again") from error
    magic = bytes((0, 0, 8, ndim))
    if data[:4] != magic:
        raise FormatError(file, f"starts with {data[:4].hex()}, an idx file of bytes in {ndim} dimensions starts with {magic.hex()}")
    start = 4 + 4 * ndim
    shape = tuple(int(side) for side in np.frombuffer(data[4:start], ">u4")) if len(data) >= start else ()
    if len(shape) != ndim or len(data) != start + math.prod(shape):
        raise FormatError(file, f"{len(data):,} bytes do not match the header's shape {shape}", hint="truncated? copy it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


def _checked_labels(file: Path, labels: Int64[Tensor, " examples"]) -> Int64[Tensor, " examples"]:
    if len(labels) and int(labels.max()) > 9:
        raise FormatError(file, f"holds the label {int(labels.max())}, expected 0..9")
    return labels
