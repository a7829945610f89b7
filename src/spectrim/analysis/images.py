"""Color images of low rank: as quaternions, channel by channel, and side by side, at equal numbers."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spectrim import linalg
from spectrim.errors import SettingError
from spectrim.linalg.quaternion import Quaternions, qsvd, randomized_qsvd

Way = Literal["quaternion", "randomized", "channels", "stacked"]


@dataclass(frozen=True)
class CompressedImage:
    """An approximation of a color image.

    Attributes:
        image: ``(3, height, width)``, in float64.
        rank: of the factors; of one channel for ``channels``.
        numbers: real numbers that the factors hold.
    """

    image: Tensor
    rank: int
    numbers: int

    def psnr(self, original: Tensor, peak: float | None = None) -> float:
        """Return the peak signal-to-noise ratio in dB against an image whose values go up to `peak`: 255 for bytes and 1 when omitted."""
        peak = peak or (255.0 if original.dtype == torch.uint8 else 1.0)
        error = float((self.image - original.double()).square().mean())
        return float("inf") if error == 0 else float(10 * torch.log10(torch.tensor(peak**2 / error, dtype=torch.float64)))


def numbers_per_rank(height: int, width: int, way: Way) -> int:
    """Return the real numbers of one rank: a column and a row, of quaternions, for each channel, or for channels side by side.

    Examples:
        >>> [numbers_per_rank(32, 32, way) for way in ("quaternion", "channels", "stacked")]
        [256, 192, 128]
    """
    counts = {"channels": 3 * (height + width), "stacked": 3 * height + width}
    return counts.get(way, 4 * (height + width))


def compress_image(image: Tensor, numbers: int, way: Way = "quaternion") -> CompressedImage:
    """Approximate a color image with factors of at most so many real numbers.

    ``quaternion``: one matrix of pure quaternions ``R i + G j + B k``, by `qsvd`; ``randomized``: by `randomized_qsvd`. ``channels``: a
    truncated SVD for each. ``stacked``: one of the channels on top of each other, which share the row space.

    Args:
        image: ``(3, height, width)``, real.
        numbers: for the factors, at least those of rank 1, see `numbers_per_rank`.
        way: see above.

    Raises:
        SettingError: for another shape, or too few numbers.

    Examples:
        >>> stripes = torch.ones(3, 8, 8) * torch.linspace(0, 1, 8)
        >>> compress_image(stripes, 64).psnr(stripes) > 100  # rank 1 is all of it
        True

    Source: Liu, Ling and Jia, arXiv 2011.03368 (color images as quaternions).
    """
    if image.dim() != 3 or len(image) != 3:
        raise SettingError("compress_image", "image", got=tuple(image.shape), rule="(3, height, width)")
    if not image.numel() or not bool(torch.isfinite(image).all()):
        raise SettingError("compress_image", "image", got=tuple(image.shape), rule="of finite numbers, not empty")
    if way not in get_args(Way):
        raise SettingError("compress_image", "way", got=way, rule=f"one of {get_args(Way)}")
    height, width = image.shape[1:]
    each = numbers_per_rank(height, width, way)
    rank = min(numbers // each, 3 * height if way == "stacked" else height, width)
    if rank < 1:
        raise SettingError("compress_image", "numbers", got=numbers, rule=f"at least {each}, those of rank 1")
    pixels = image.detach().double()
    if way in ("quaternion", "randomized"):
        Q = Quaternions.of(torch.zeros_like(pixels[0]), *pixels)
        U, S, Vh = qsvd(Q, rank) if way == "quaternion" else randomized_qsvd(Q, rank)
        made = torch.stack((U.scaled(S) @ Vh).parts()[1:])
    else:
        matrix = pixels.flatten(0, 1) if way == "stacked" else pixels
        left, values, right = linalg.svd(matrix)
        made = ((left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]).reshape(pixels.shape)
    return CompressedImage(made, rank, rank * each)
