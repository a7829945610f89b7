"""CIFAR-10 images of low rank: quaternions beside other decompositions at equal numbers; a minute.

python benchmarks/analysis/images.py    # writes benchmarks/results/analysis/images.json
"""

import statistics
from typing import Any

import torch

from common import write
from spectrim import zoo
from spectrim.analysis.images import compress_image
from spectrim.linalg.quaternion import Quaternions, qsvd, randomized_qsvd

COUNT, NUMBERS, RANKS = 50, (768, 1536, 2304), (3, 6, 9)


def main() -> None:
    x, _ = next(iter(zoo.cifar10(batch_size=COUNT, augment=False, normalize="raw").test))
    pictures = (x / 255).double()
    rows: list[dict[str, Any]] = []
    for numbers in NUMBERS:
        row: dict[str, Any] = {"numbers": numbers}
        for way in ("quaternion", "channels", "stacked"):
            made = [compress_image(one, numbers, way) for one in pictures]  # type: ignore[arg-type]
            row[way] = {
                "psnr": [one.psnr(original) for one, original in zip(made, pictures, strict=True)],
                "rank": made[0].rank,
                "numbers": made[0].numbers,
            }
        rows.append(row)
    randomized = []
    for rank in RANKS:
        for passes in (0, 1, 2):
            ratios = []
            for seed, picture in enumerate(pictures):
                Q = Quaternions.of(torch.zeros_like(picture[0]), *picture)
                errors = []
                for U, S, Vh in (randomized_qsvd(Q, rank, passes=passes, seed=seed), qsvd(Q, rank)):
                    errors.append((U.scaled(S) @ Vh - Q).norm())
                ratios.append(errors[0] / errors[1])
            randomized.append({"rank": rank, "passes": passes, "largest": max(ratios), "mean": statistics.mean(ratios)})
    write("images", {"settings": {"images": COUNT, "split": "first test images"}, "rows": rows, "randomized": randomized})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
