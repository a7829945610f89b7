"""A lesson that lets layers of a network encode and decode examples of its inputs or outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.errors import SettingError
from spectrim.protocols import Seen


@dataclass(frozen=True)
class Autoencoding:
    """``(1 - w) loss + w mean |decoder(encoder(v)) - v|^2`` on examples ``v`` of inputs or outputs, ``w = weight exp(-done / slope)``.

    For structured outputs and few labelled pairs. Outputs alone, without inputs, train the last layers of the network: they are the
    `decoder`, and a module of your own encodes. Inputs alone train the first layers, as the `encoder`. The share of it fades while training
    proceeds, so that the task has the last word.

    Args:
        encoder: from examples to the features between; for inputs, the first layers of the model itself.
        decoder: from these features to examples; for outputs, the last layers of the model itself.
        examples: ``(count, ...)``, on the model's device; no targets.
        weight: in [0, 1]: share of the loss at the start.
        slope: > 0: share of training after which the weight has fallen to a third.
        batch: examples in each step, >= 1, drawn from torch's global generator.
        corruption: in [0, 1): share of the entries of `examples` that are set to zero before they are encoded.

    Raises:
        SettingError: for a setting outside its range.

    Examples:
        >>> from spectrim import fit
        >>> model, encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)), nn.Linear(5, 8)
        >>> data, outputs = [(torch.randn(2, 4), torch.randn(2, 5))], torch.randn(100, 5)
        >>> optimizer = torch.optim.Adam([*model.parameters(), *encoder.parameters()])  # the encoder is no part of the model
        >>> lessons = [Autoencoding(encoder, model[1:], outputs)]
        >>> history = fit(model, data, nn.MSELoss(), optimizer, epochs=1, lessons=lessons, progress=False)
        >>> "Autoencoding" in history.last
        True

    Source: Belharbi, Herault, Chatelain and Adam, arXiv 1504.07550.
    Deviation: one exponential schedule for each lesson instead of weights that sum to one over all tasks; two lessons shrink each other's.
    """

    encoder: nn.Module
    decoder: nn.Module
    examples: Tensor
    weight: float = 0.5
    slope: float = 0.3
    batch: int = 100
    corruption: float = 0.0

    def __post_init__(self) -> None:
        for name, upper in (("weight", 1.0), ("corruption", 1.0 - 1e-9)):
            if not 0 <= getattr(self, name) <= upper:
                rule = "a fraction in [0, 1]" if name == "weight" else "a fraction in [0, 1)"
                raise SettingError("Autoencoding", name, got=getattr(self, name), rule=rule)
        if not 0 < self.slope < math.inf:
            raise SettingError("Autoencoding", "slope", got=self.slope, rule="a finite number > 0")
        if isinstance(self.batch, bool) or self.batch < 1:
            raise SettingError("Autoencoding", "batch", got=self.batch, rule="an integer >= 1")
        if len(self.examples) < 1 or not self.examples.is_floating_point():
            raise SettingError("Autoencoding", "examples", got=tuple(self.examples.shape), rule="floating-point examples, at least one")

    def watched_layers(self, model: nn.Module) -> Sequence[str]:
        """Return no layers, see `Lesson`."""
        return ()

    def share(self, done: float) -> float:
        """Return its share of the loss when a fraction of training is done."""
        return self.weight * math.exp(-done / self.slope)

    def __call__(self, seen: Seen) -> Tensor:
        """Return the loss of a step with its share in it, see `Lesson`."""
        share = self.share(seen.done)
        chosen = self.examples[torch.randint(len(self.examples), (self.batch,)).to(self.examples.device)]
        given = chosen * (torch.rand(chosen.shape).to(chosen.device) >= self.corruption) if self.corruption else chosen
        error = (self.decoder(self.encoder(given)).reshape(chosen.shape) - chosen).square().mean()
        mixed: Tensor = (1 - share) * seen.loss + share * error
        return mixed
