"""Networks whose coded bytes are measured: where weights and data come from, what is read off, and the budgets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as sp
from networks import vit
from spectrim import zoo
from spectrim.metrics.inputs import first_examples

RUNS = Path(__file__).resolve().parents[1] / "runs" / "coded"


@dataclass(frozen=True)
class Network:
    """A network.

    Attributes:
        model: makes it, with its weights.
        data: makes its splits from a seed.
        merit: accuracy in %, or loss in nats for each token.
        budgets: coded bytes of a curve.
        examples: of the calibration set.
        held_out: validation examples on which the divergence is measured.
        test: examples of the test split, from its beginning; None for all.
        sequential: see `round_to`.
        note: what a reader of the page has to know.
    """

    title: str
    model: Callable[[], nn.Module]
    data: Callable[[int], Any]
    merit: str = "accuracy"
    budgets: tuple[int, ...] = ()
    examples: int = 1024
    held_out: int = 2048
    test: int | None = None
    sequential: bool = True
    note: str = ""

    @property
    def loss(self) -> Callable[[Any, Any], Tensor]:
        return nn.CrossEntropyLoss() if self.merit == "accuracy" else zoo.language_model_loss


class Logits(nn.Module):
    """A classifier of transformers whose output is the logits alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images).logits
        return logits


EPOCHS = {"vit": 2, "ptb_lstm": 8}
"""Of training the dense network: for the LSTM those of the comparison, for the ViT fewer than its 15."""


def trained(name: str, model: nn.Module, data: Any, loss: Any, peak: float, clip: float) -> nn.Module:
    """Train in place, with Adam and one cycle of its rate; a run that was finished before is read."""
    epochs = EPOCHS[name]
    optimizer = torch.optim.Adam(model.parameters(), peak)
    cycle = {"max_lr": peak, "total_steps": epochs * len(data.train), "pct_start": 0.2, "cycle_momentum": False}
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, **cycle)
    tuning = sp.Tuning(scheduler=scheduler, scheduler_steps="batch", clip=clip)
    sp.fit(model, data.train, loss, optimizer, epochs, tuning=tuning, checkpoint=RUNS / f"dense-{name}-{epochs}", progress=False)
    return model.eval()


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    model = Logits(vit(size=28, patch=7, channels=1, hidden=96))
    return trained("vit", model, zoo.fashion_mnist(batch_size=128), nn.CrossEntropyLoss(), 1e-3, 1.0)


def lstm() -> nn.Module:
    torch.manual_seed(0)
    model = zoo.LSTMLanguageModel(vocab=10_000, embedding=128, hidden=128, layers=2, dropout=0.2)
    return trained("ptb_lstm", model, zoo.ptb(batch_size=20, length=35, shuffle=True), zoo.language_model_loss, 5e-3, 0.25)


def lenet5() -> nn.Module:
    import pruning

    return pruning.dense_start(1)[0].to(memory_format=torch.contiguous_format)


NETWORKS = {
    "resnet20": Network(
        "ResNet-20, CIFAR-10",
        lambda: zoo.resnet20(pretrained="akamaster"),
        lambda seed: zoo.cifar10(batch_size=128, normalize="imagenet", augment=False, seed=seed),
        budgets=(90_000, 66_000, 50_000, 40_000),
    ),
    "resnet8": Network(
        "ResNet-8, CIFAR-10",
        lambda: zoo.mlperftiny_resnet8(pretrained=True),
        lambda seed: zoo.cifar10(batch_size=128, normalize="raw", augment=False, seed=seed),
        budgets=(24_000, 14_000, 9_000),
    ),
    "resnet56": Network(
        "ResNet-56, CIFAR-10",
        lambda: zoo.resnet56(pretrained="akamaster"),
        lambda seed: zoo.cifar10(batch_size=128, normalize="imagenet", augment=False, seed=seed),
        budgets=(240_000, 160_000, 110_000),
        examples=512,
        held_out=512,
        test=1000,
        sequential=False,
        note="published weights; rounded on the dense network's inputs (`sequential=False`)",
    ),
    "stories260k": Network(
        "stories260K, TinyStories",
        zoo.stories260k,
        lambda seed: zoo.stories(batch_size=16, length=256, seed=seed),
        merit="loss",
        budgets=(200_000, 140_000, 110_000),
        examples=64,
        held_out=64,
        note="published weights; an example is a window of 256 tokens",
    ),
    "vit": Network(
        "ViT of 4 blocks of 96, Fashion-MNIST",
        small_vit,
        lambda seed: zoo.fashion_mnist(batch_size=128, seed=seed),
        budgets=(200_000, 130_000, 80_000, 40_000),
        sequential=False,
        note=f"trained for {EPOCHS['vit']} epochs by this runner; rounded on the dense network's inputs",
    ),
    "ptb_lstm": Network(
        "LSTM of 2 layers of 128, Penn Treebank",
        lstm,
        lambda seed: zoo.ptb(batch_size=20, length=35, shuffle=True, seed=seed),
        merit="loss",
        budgets=(1_200_000, 800_000, 500_000),
        examples=80,
        held_out=60,
        test=1000,
        sequential=False,
        note=f"trained for {EPOCHS['ptb_lstm']} epochs by this runner; an example is 35 words from a zero state",
    ),
    "lenet5": Network(
        "LeNet-5 of Caffe, MNIST",
        lenet5,
        lambda seed: zoo.mnist(batch_size=128, seed=seed),
        budgets=(90_000, 50_000, 30_000),
        sequential=False,
        note="the dense network of seed 1 of `benchmarks/pruning.py`, which was trained on all 60,000 images, those held out here included",
    ),
}


@torch.no_grad()
def logits_of(model: nn.Module, data: Any, limit: int) -> Tensor:
    """Return the logits of the first examples, a row for each decision."""
    return torch.cat([model(x).flatten(0, -2) for x, _ in first_examples(data, limit)])
