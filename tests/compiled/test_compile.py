"""`torch.compile` of a factorized model, and `torch.export` of a merged one.

The jaxtyping hook does not go through `torch.compile(fullgraph=True)`; this file is for the second pytest call of ``make test``.
"""

import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.layers import FactorizedLayer

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("JAXTYPING_DISABLE"),
        reason="needs JAXTYPING_DISABLE=1 and no jaxtyping hook: it does not go through torch.compile(fullgraph=True)",
    ),
    # dynamo itself instantiates every autograd function that it meets
    pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.Flatten(),
        nn.Linear(6 * 64, 12),
        nn.Linear(12, 3),
    )


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_factorized_network_compiles_in_one_graph(scheme: Any, rank: int | None) -> None:
    torch._dynamo.reset()
    low, x = sp.factorize(network(), scheme, rank=rank), torch.randn(4, 6, 8, 8)
    compiled = torch.compile(low, fullgraph=True, backend="aot_eager")
    gradients = []
    for model in (low, compiled):
        low.zero_grad()
        output = model(x)
        (output.square().mean() + sp.Orthogonality(1.0)(low) + sp.Hoyer(0.1)(low)).backward()
        gradients.append([output.detach(), *(p.grad.clone() for p in low.parameters() if p.grad is not None)])
    assert len(gradients[0]) > 12
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")  # inductor's own
def test_the_default_backend() -> None:
    torch._dynamo.reset()
    low, x = sp.factorize(nn.Conv2d(6, 8, 3), rank=2), torch.randn(4, 6, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(low, fullgraph=True)(x), low(x))


def test_attention_and_embedding_compile_in_one_graph() -> None:
    torch._dynamo.reset()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 12, padding_idx=0)
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embedding(tokens)
            return self.attention(x, x, x, need_weights=False)[0]

    low, tokens = sp.factorize(Block(), rank=3), torch.randint(0, 50, (2, 5))
    torch.testing.assert_close(torch.compile(low, fullgraph=True, backend="aot_eager")(tokens), low(tokens))


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_merged_network_exports_for_any_batch(scheme: Any, rank: int | None) -> None:
    low = sp.factorize(network(), scheme, rank=rank).eval()
    merged = sp.merge(low)
    assert not any(isinstance(module, FactorizedLayer) for module in merged.modules())
    program = torch.export.export(merged, (torch.randn(4, 6, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for batch in (2, 7):
        x = torch.randn(batch, 6, 8, 8)
        torch.testing.assert_close(program.module()(x), merged(x))
        torch.testing.assert_close(program.module()(x), low(x))


def test_a_factorized_network_exports() -> None:
    low, x = sp.factorize(network(), rank=2).eval(), torch.randn(4, 6, 8, 8)
    torch.testing.assert_close(torch.export.export(low, (x,)).module()(x), low(x))


@pytest.mark.parametrize("penalty", [sp.Orthogonality(1.0), sp.Hoyer(0.1)], ids=str)
def test_penalties_compile_in_one_graph(penalty: Any) -> None:
    torch._dynamo.reset()
    low = sp.factorize(network())
    gradients = []
    for call in (penalty, torch.compile(lambda model: penalty(model), fullgraph=True, backend="aot_eager")):
        low.zero_grad()
        value = call(low)
        value.backward()
        gradients.append([value.detach(), *(p.grad.clone() for p in low.parameters() if p.grad is not None)])
    assert len(gradients[0]) > 4
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")
def test_training_through_a_compiler_ends_where_it_ends_without() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(size, 12), torch.randint(3, (size,))) for size in (8, 8, 4)]
    dense, made, frames = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)), [], []
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        settings: dict[str, Any] = {"where": lambda name, module: True, "progress": False}
        settings["tuning"] = sp.Tuning(optimizer=partial(torch.optim.SGD, lr=0.1), compiled=compiled)
        settings["distill"] = sp.Distillation(dense, features=1.0)  # what layers put out is read within the compiled networks
        made.append(sp.compress(dense, data, nn.CrossEntropyLoss(), sp.Budget(macs=0.7), 2, **settings))
        frames.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert frames[0] == 0
    assert frames[1] >= 4, "the network and its teacher, for both sizes of batch"
    assert made[0].ranks == made[1].ranks
    torch.testing.assert_close(made[1].low.state_dict(), made[0].low.state_dict())
