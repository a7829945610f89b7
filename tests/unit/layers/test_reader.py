"""Weights that a forward of the user's own reads: experts in stacked parameters, and sub-classes of torch's layers."""

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectrim as sp
from spectrim.errors import FormatError
from spectrim.layers import named_factors
from spectrim.metrics.macs import count_macs
from spectrim.plain.reader import PlainReader

LOSS = nn.CrossEntropyLoss()


def by_einsum(self: Any, x: Tensor) -> Tensor:
    gate, up = torch.einsum("bi,eoi->beo", x, self.up).chunk(2, -1)
    return torch.einsum("beo,eio->bi", gate.sigmoid() * up, self.down) + self.bias.sum(0)


def by_einsum_turned(self: Any, x: Tensor) -> Tensor:
    gate, up = torch.einsum("eoi, bi -> ebo", self.up, x).chunk(2, -1)
    return torch.einsum("ebo,eio->ebi", (gate.sigmoid() * up, self.down)[0], self.down).sum(0) + self.bias.sum(0)


def by_bmm(self: Any, x: Tensor) -> Tensor:
    gate, up = torch.bmm(x.expand(4, *x.shape), self.up.transpose(1, 2)).chunk(2, -1)
    return (torch.baddbmm(self.bias[:, None], gate.sigmoid() * up, self.down.mT)).sum(0)


def by_loop(self: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for index in range(len(self.up)):
        gate, up = F.linear(x, self.up[torch.tensor(index)]).chunk(2, -1)
        out = out + F.linear(gate.sigmoid() * up, self.down[index], self.bias[index])
    return out


def by_iteration(self: Any, x: Tensor) -> Tensor:
    out = self.bias.sum(0)
    for up, down in zip(self.up, self.down.unbind(0), strict=True):
        gate, value = (x @ up.T).chunk(2, -1)
        out = out + torch.mm(gate.sigmoid() * value, down.t())
    return out


def by_gathering(self: Any, x: Tensor) -> Tensor:
    chosen = torch.arange(len(x)) % 4
    gate, up = torch.bmm(self.up[chosen], x.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    return (self.down[chosen] @ (gate.sigmoid() * up).unsqueeze(-1)).squeeze(-1) + self.bias[chosen]


def by_groups(self: Any, x: Tensor) -> Tensor:
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    gate, up = F.grouped_mm(x, self.up.transpose(-2, -1), offs=ends).chunk(2, -1)
    return F.grouped_mm(gate.sigmoid() * up, self.down.mT, offs=ends) + self.bias.sum(0)


def by_values(self: Any, x: Tensor) -> Tensor:
    gate, up = torch.einsum("bi,eoi->beo", x, self.up.abs().cumsum(0)).chunk(2, -1)
    return torch.einsum("beo,eio->bi", gate.sigmoid() * up, 2 * self.down.float()) + self.bias.sum(0)


THIN = (by_einsum, by_einsum_turned, by_bmm, by_loop, by_iteration, by_gathering, by_groups)


class Experts(nn.Module):
    """Four experts, whose matrices are stacked."""

    def __init__(self, run: Callable[..., Tensor] = by_loop) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 48, 16) / 4), nn.Parameter(torch.randn(4, 16, 24) / 4)
        self.bias, self.run = nn.Parameter(torch.randn(4, 16)), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def network(run: Callable[..., Tensor] = by_loop) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), Experts(run), nn.ReLU(), nn.Linear(16, 4)).eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 16), torch.randint(4, (16,))) for _ in range(2)]


@pytest.mark.parametrize("run", [*THIN, by_values], ids=lambda run: run.__name__)
def test_experts_are_factorized_cut_and_merged_however_they_are_used(run: Callable[..., Tensor], tmp_path: Path) -> None:
    model, x = network(run), torch.randn(6, 16)
    low = sp.factorize(model)
    assert [name for name, _ in named_factors(low)] == ["0", "2.up", "2.down"]
    torch.testing.assert_close(low(x), model(x), rtol=1e-4, atol=1e-4)
    cut = sp.prune(low, {"2.up": 4, "2.down": 3})
    small = sp.merge(cut)
    torch.testing.assert_close(small(x), cut(x), rtol=1e-4, atol=1e-4)
    assert isinstance(small[2], Experts)
    assert isinstance(small[2], PlainReader)
    assert [tuple(p.shape) for p in small[2].parameters()] == [(4, 16), (4, 48, 4), (4, 4, 16), (4, 16, 3), (4, 3, 24)]
    dense = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), Experts(run), nn.ReLU(), nn.Linear(16, 4)).eval()
    dense[2].load_state_dict({"up": cut[2].up.detach(), "down": cut[2].down.detach(), "bias": model[2].bias})
    dense[0].load_state_dict(model[0].state_dict()), dense[4].load_state_dict(model[4].state_dict())
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-4)
    for network_ in (cut, small):
        network_(x).square().sum().backward()
        assert all(parameter.grad is not None for parameter in network_[2].parameters())
        sp.save(network_, tmp_path / "net")
        torch.testing.assert_close(sp.load(tmp_path / "net", network(run))(x), network_(x))
        torch.testing.assert_close(pickle.loads(pickle.dumps(copy.deepcopy(network_[2].state_dict()))), network_[2].state_dict())
    if run in THIN:
        rows = 6 * (1 if run in (by_gathering, by_groups) else 4)
        ranks = (4, 4) if run is by_groups else (4, 3)  # padded to 16 bytes
        linear = 6 * (16 * 16 + 16 * 4)
        assert count_macs(small, x, batch_size=1) == linear + rows * (ranks[0] * (48 + 16) + ranks[1] * (24 + 16))


def test_each_expert_is_the_nearest_of_its_rank() -> None:
    model = network()
    cut = sp.prune(sp.factorize(model), {"2.up": 5})
    for index in range(4):
        values = torch.linalg.svdvals(model[2].up[index].detach().double())
        error = (cut[2].up[index].double() - model[2].up[index].double()).norm()
        torch.testing.assert_close(error, values[5:].norm(), rtol=1e-5, atol=0)


def test_gradients_reach_the_factors_as_they_reach_the_stack() -> None:
    model, x = network().double(), torch.randn(6, 16, dtype=torch.float64)
    low = sp.factorize(model, rank=4)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense[2].up.copy_(low[2].up), dense[2].down.copy_(low[2].down)
        dense[0].load_state_dict(sp.merge(sp.factorize(model, rank=99))[0].state_dict())
    low = sp.factorize(dense, where="2", rank=4)
    for net in (low, dense):
        net(x).square().sum().backward()
    form = low[2].factors_of("up")
    torch.testing.assert_close(form.S.grad, torch.einsum("eor,eoi,eri->er", form.U, dense[2].up.grad, form.Vh), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.5}])
def test_a_budget_is_met_by_experts(budget: dict[str, float]) -> None:
    made = sp.compress(network(by_gathering), batches(), LOSS, budget, progress=False)
    dense, final = made.measured["dense"], made.measured["final"]
    assert final.macs <= budget.get("macs", 9) * dense.macs
    assert final.params <= budget.get("params", 1) * dense.params
    assert any(line.name.startswith("2.") and line.rank < line.full for line in made.coverage if line.factorized)


def test_training_and_optimizers_go_through_cuts_of_experts() -> None:
    low = sp.factorize(network())
    optimizer = torch.optim.Adam(low.parameters(), 1e-3)
    sp.fit(low, batches(), LOSS, optimizer, 1, penalties=[sp.Orthogonality(1.0), sp.Hoyer(0.01)], progress=False)
    sp.prune_(low, sp.Energy(0.7), optimizer)
    sp.fit(low, batches(), LOSS, optimizer, 1, progress=False)
    assert all(torch.isfinite(parameter).all() for parameter in low.parameters())


class SamePadding(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, [1, 1, 1, 1]), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, groups=self.groups)


class Doubled(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(input, weight, bias)


class Turned(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ (0.5 * self.weight / torch.tensor(2.0)).t() + self.bias


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return math.sqrt(self.embedding_dim) * F.embedding(input, self.weight, self.padding_idx)


class Renormed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
        return super().forward(input)


class Searching(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self._parameters["weight"], self.bias)


@pytest.mark.parametrize(
    ("layer", "x", "thin"),
    [
        (SamePadding(6, 16, 3, 2), torch.randn(2, 6, 9, 9), 2 * (6 * 9 + 16)),
        (SamePadding(8, 16, 3, groups=2), torch.randn(2, 8, 9, 9), 2 * (8 * 9 + 16)),
        (Doubled(6, 16, 3), torch.randn(2, 6, 9, 9), 2 * (6 * 9 + 16)),
        (Standardized(6, 16, 3), torch.randn(2, 6, 9, 9), None),
        (Turned(12, 16), torch.randn(2, 12), 2 * (12 + 16)),
        (Scaled(20, 12, padding_idx=0), torch.randint(20, (2, 5)), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_sub_classes_with_a_forward_of_their_own(layer: nn.Module, x: Tensor, thin: int | None, tmp_path: Path) -> None:
    model = nn.Sequential(layer).eval()
    low = sp.factorize(model, where="0")
    torch.testing.assert_close(low(x), model(x), rtol=1e-4, atol=1e-5)
    cut = sp.prune(low, {"0": 2})
    small = sp.merge(cut)
    torch.testing.assert_close(small(x), cut(x), rtol=1e-4, atol=1e-5)
    assert isinstance(small[0], type(layer))
    torch.testing.assert_close(small[0].weight.detach(), cut[0].weight.detach(), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    sp.save(small, tmp_path)
    torch.testing.assert_close(sp.load(tmp_path, copy.deepcopy(model))(x), small(x))
    if thin is not None:
        positions = small(x).numel() // len(x) // 16
        assert count_macs(small, x) == positions * thin


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Renormed(4, 4), "may change its weight in place"),
        (Searching(4, 4), "looks for its parameters"),
        (Scaled(9, 4, sparse=True), "sparse gradients need the dense table"),
        (SamePadding(4, 4, 3, groups=4), "depthwise"),
    ],
)
def test_forwards_that_no_product_can_be_put_under_stay_dense_with_the_reason(layer: nn.Module, reason: str) -> None:
    line = sp.coverage(nn.Sequential(layer, nn.Linear(4, 4)))[0]
    assert not line.factorized
    assert reason in line.reason


def test_tables_and_tokens_are_no_experts() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.tokens = nn.Parameter(torch.randn(1, 9, 16)), nn.Parameter(torch.randn(3, 9, 16))
            self.layer = nn.Linear(16, 16)

    assert [line.reason for line in sp.coverage(Model()) if not line.name] == ["no factorized form for Model"]


def test_a_file_of_other_experts_is_refused(tmp_path: Path) -> None:
    sp.save(sp.merge(sp.factorize(network(), rank=3)), tmp_path)
    other = network()
    other[2].up = nn.Parameter(torch.randn(5, 48, 16))
    with pytest.raises(FormatError, match=r"'2' had 'up' in two parts \(4, 48, 3\) and \(4, 3, 16\)"):
        sp.load(tmp_path, other)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_a_mixtral_is_compressed(implementation: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(vocab_size=30, hidden_size=16, intermediate_size=24, **settings)
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    ids = torch.randint(30, (2, 6))
    low = sp.factorize(model, where="*experts")
    names = [name for name, _ in named_factors(low)]
    assert names == ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    torch.testing.assert_close(low(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    cut = sp.prune(low, dict.fromkeys(names, 4))
    small = sp.merge(cut)
    torch.testing.assert_close(small(ids).logits, cut(ids).logits, rtol=1e-4, atol=1e-4)
    routed, tokens = 2, 6  # each token to two experts
    saved = tokens * routed * (48 * 16 + 16 * 24 - 4 * (48 + 16 + 24 + 16))
    assert count_macs(model, {"input_ids": ids}) - count_macs(small, {"input_ids": ids}) == saved
