"""`balance_` changes how a weight is written, and not the weight."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim import zoo
from spectrim.errors import SettingError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(300, 8), nn.Linear(8, 300, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.embedding(tokens))


NETWORKS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(300, 8), lambda: torch.randn(2, 300)),
    "half precision": (lambda: nn.Linear(300, 8).bfloat16(), lambda: torch.randn(2, 300, dtype=torch.bfloat16)),
    "groups": (lambda: nn.Conv2d(8, 512, 3, groups=2), lambda: torch.randn(2, 8, 5, 5)),
    "tied": (Tied, lambda: torch.arange(7)),
    "an LSTM": (lambda: zoo.LSTMLanguageModel(300, 8, 16, 1), lambda: torch.arange(14).view(2, 7)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
def test_outputs_stay_and_entries_get_one_size(name: str, scheme: Any) -> None:
    make, inputs = NETWORKS[name]
    x, low = inputs(), sp.prune(sp.factorize(make(), scheme, sp.match("*")).eval(), sp.budget.Fixed(3))
    with torch.no_grad():
        next(iter(sp.layers.named_factors(low)))[1].S.mul_(-1)
    before, written = low(x), copy.deepcopy(low)
    names = sp.surgery.balance_(low, above=200)
    assert names
    tolerance = 0.02 if x.dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(low(x), before, rtol=tolerance, atol=tolerance)
    for (weight, now), (_, then) in zip(sp.layers.named_factors(low), sp.layers.named_factors(written), strict=True):
        if weight in names:
            assert now.U.square().mean().item() == pytest.approx(now.Vh.square().mean().item(), rel=1e-4)
            assert bool((now.S == 1).all())
        else:
            assert max(now.shape) <= 200
            assert torch.equal(now.U, then.U)
    sp.prune_(low, {weight: factors.rank for weight, factors in sp.layers.named_factors(low)})
    for (_, now), (_, then) in zip(sp.layers.named_factors(low), sp.layers.named_factors(written), strict=True):
        assert torch.allclose(now.S, then.S.abs(), rtol=1e-4)


def test_weights_without_entries_stay() -> None:
    model = nn.Linear(300, 8)
    nn.init.zeros_(model.weight)
    low = sp.factorize(model)
    sp.surgery.balance_(low, above=0)
    assert torch.equal(low(torch.randn(2, 300)), model.bias.expand(2, -1))


def test_a_limit_below_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match="above must be an integer of at least 0, got -1"):
        sp.surgery.balance_(sp.factorize(nn.Linear(4, 4)), above=-1)


def test_adam_fine_tunes_a_vocabulary_that_it_would_overturn() -> None:
    """A regression on one-hot inputs, from the truncated weight, which is the optimum: what a step breaks stays broken for a while."""
    torch.manual_seed(0)
    words = torch.randn(4000, 4) @ torch.randn(4, 16) * 3
    dense = nn.Embedding.from_pretrained(words)
    losses = []
    for balanced in (False, True):
        low = sp.prune(sp.factorize(dense, where=sp.match("*")), sp.budget.Fixed(4))
        low.requires_grad_(True)
        if balanced:
            assert sp.surgery.balance_(low)
        optimizer = torch.optim.Adam(low.parameters(), 0.002)
        for _ in range(5):
            tokens = torch.randint(4000, (500,))
            loss = (low(tokens) - words[tokens] + 0.1 * torch.randn(500, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append((low(torch.arange(4000)) - words).square().mean().item())
    assert losses[1] < 0.1 * losses[0]
