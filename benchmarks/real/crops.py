"""Small crops with and without a face, from pictures at hand."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fetch
from spectrim import zoo

FACES = {"calibration": range(40), "validation": range(40, 60), "test": range(60, 100)}
"""Which of the hundred faces are in which set."""


def crops(name: str, count: int, seed: int, size: int) -> Tensor:
    """Return crops as MTCNN takes them, about (-1, 1): (count, 3, size, size).

    Half of them are faces: 25 x 25 gray pixels out of scikit-image, shifted, scaled, mirrored, in other light and tint. A quarter are
    pictures of the same source without a face, as the faces are; a quarter squares out of CIFAR-10's images.

    Args:
        name: of the set, see `FACES`; sets share no picture.
        count: how many.
        seed: of all that is drawn.
        size: in pixels.
    """
    g = torch.Generator().manual_seed(seed)
    gray = torch.from_numpy(np.load(fetch.read("scikit-image", "skimage/data/lfw_subset.npy"))).float()
    chosen = torch.tensor(FACES[name])
    gray = torch.cat([gray[chosen][:, None], gray[100 + chosen][:, None]])
    kinds = torch.randint(0, 4, (count,), generator=g)  # 0 and 1: a face
    which = torch.randint(0, len(chosen), (count,), generator=g) + len(chosen) * (kinds == 2)
    shift = (torch.rand(count, 2, generator=g) - 0.5) * 0.3
    scale = 0.75 + 0.35 * torch.rand(count, generator=g)
    mirror = torch.where(torch.rand(count, generator=g) < 0.5, -1.0, 1.0)
    tint = 0.7 + 0.6 * torch.rand(count, 3, 1, 1, generator=g)
    colored = colors(name, count, seed)
    sources = F.interpolate(gray, (32, 32), mode="bicubic", antialias=True).clamp(0, 1).expand(-1, 3, -1, -1)[which] * tint
    sources = torch.where((kinds == 3)[:, None, None, None], colored, sources.clamp(0, 1))
    zero = torch.zeros(count)
    where = torch.stack([torch.stack([scale * mirror, zero, shift[:, 0]], 1), torch.stack([zero, scale, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(where, [count, 3, size, size], align_corners=False)
    pixels = F.grid_sample(sources, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return (255 * pixels - 127.5) / 128


def colors(name: str, count: int, seed: int) -> Tensor:
    """Return images of CIFAR-10, of a part of the test split for each set: (count, 3, 32, 32), values in [0, 1]."""
    images = torch.cat([x for x, _ in zoo.cifar10(batch_size=1000, normalize="raw", augment=False).test]).unflatten(0, (5, -1))
    part = images[{"calibration": 0, "validation": 1, "test": 2}[name]]
    return part[torch.randint(0, len(part), (count,), generator=torch.Generator().manual_seed(seed))] / 255
