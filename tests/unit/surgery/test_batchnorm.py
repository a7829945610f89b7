"""BatchNorm is folded where it follows a layer and nothing else reads that layer; memory formats and hooks are kept."""

from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim import zoo
from spectrim.errors import LayerError
from spectrim.surgery.batchnorm import fold_batchnorms

EVERYTHING = sp.match("*")


@pytest.fixture
def unchecked() -> Any:
    """A trace hands proxies to functions whose annotations say Tensor."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def stir(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and weights of its own."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor, 0.5, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
def test_resnet20_after_a_cut(unchecked: Any, scheme: Any) -> None:
    low = sp.prune(sp.factorize(stir(zoo.resnet20(shortcut="projection")), scheme), sp.budget.Fraction(0.3))
    x = torch.randn(2, 3, 32, 32)
    plain, folded = sp.merge(low), sp.merge(low, fold_batchnorm=True)
    assert (norms(plain), norms(folded)) == (21, 0)
    torch.testing.assert_close(folded(x), plain(x))
    assert not any(module.training for module in folded.modules())
    assert folded.layer1[0].conv1[1].bias is not None, "into the second layer of the pair"
    assert folded.layer1[0].conv1[0].bias is None


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: [nn.Conv1d(6, 8, 3, groups=2), nn.BatchNorm1d(8)], (2, 6, 7)),
        (lambda: [nn.Conv3d(3, 8, 2, bias=False), nn.BatchNorm3d(8, affine=False)], (2, 3, 3, 4, 5)),
        (lambda: [nn.ConvTranspose2d(6, 8, 3, 2), nn.BatchNorm2d(8)], (2, 6, 4, 4)),
        (lambda: [nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4)], (5, 6)),
    ],
    ids=["conv1d-groups", "conv3d", "transposed", "linear"],
)
@pytest.mark.parametrize("rank", [None, 1])
def test_every_kind(make: Any, shape: tuple[int, ...], rank: int | None) -> None:
    model = stir(nn.Sequential(*make())).double()
    x = torch.randn(shape, dtype=torch.float64)
    low = sp.factorize(model, where=EVERYTHING, rank=rank)
    folded = sp.merge(low, fold_batchnorm=True)
    assert norms(folded) == 0
    torch.testing.assert_close(folded(x), low(x), rtol=1e-9, atol=1e-12)
    assert all(p.requires_grad for p in folded.parameters())


class Read(nn.Module):
    """The convolution is read by more than its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + x


class Again(Read):
    """Both run twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(self.conv(x))))


class Penalised(Read):
    """The weight itself is used."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.conv.weight.sum()


class Tied(Read):
    """Another layer has the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(4, 4, 1)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.other(x)


def transposed_groups() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4))


def without_statistics() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))


def activation_between() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "make", [Read, Again, Penalised, Tied, transposed_groups, activation_between, weight_normed], ids=lambda make: make.__name__
)
def test_what_cannot_be_folded_stays(make: Any) -> None:
    model, x = stir(make()), torch.randn(2, 4, 3, 3)
    expected = model(x)
    assert fold_batchnorms(model) == []
    assert torch.equal(model(x), expected)


def test_statistics_of_the_batch_cannot_be_folded() -> None:
    assert fold_batchnorms(without_statistics().eval()) == []


def test_hooks_keep_a_layer_as_it_is() -> None:
    for place in (0, 1):
        model, seen = stir(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))), []
        model[place].register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        model.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args))
        merged = sp.merge(sp.factorize(model, where=EVERYTHING, rank=1), fold_batchnorm=True)
        assert norms(merged) == 1
        assert seen == [], "tracing runs no hooks"
        merged(torch.randn(1, 4, 3, 3))
        assert len(seen) == 2


def test_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(LayerError, match=r"layer '1': is in training mode.*call model.eval\(\) first"):
        sp.merge(sp.factorize(model, where=EVERYTHING), fold_batchnorm=True)


def test_models_that_cannot_be_traced_are_refused() -> None:
    class Branches(Read):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    low = sp.factorize(stir(Branches()), where=EVERYTHING)
    with pytest.raises(LayerError, match=r"layer 'Branches': cannot be traced.*TraceError.*merge it without fold_batchnorm"):
        sp.merge(low, fold_batchnorm=True)
    assert sp.merge(sp.factorize(nn.Linear(4, 4)), fold_batchnorm=True)(torch.randn(1, 4)).shape == (1, 4), (
        "nothing to fold, nothing traced"
    )


# ---- memory format


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
@pytest.mark.parametrize("rank", [None, 2])
def test_channels_last_is_kept(scheme: Any, rank: int | None) -> None:
    model = stir(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 6, 3))).to(memory_format=torch.channels_last)
    low = sp.factorize(model, scheme, EVERYTHING, rank=rank)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    for merged in (sp.merge(low), sp.merge(sp.prune(low, sp.budget.Fixed(2))), sp.merge(low, fold_batchnorm=True)):
        kernels = [p for p in merged.parameters() if p.dim() == 4]
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
        assert not any(hasattr(module, "channels_last") for module in merged.modules())
        assert merged(x).is_contiguous(memory_format=torch.channels_last)
    assert all(p.is_contiguous() for p in sp.merge(sp.factorize(model.to(memory_format=torch.contiguous_format), rank=rank)).parameters())


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_factorized_network_computes_channels_last_where_the_dense_one_did(scheme: Any, rank: int | None) -> None:
    """A kernel that is laid out otherwise makes torch compute this layer, and all after it, the slow way."""
    model = nn.Sequential(nn.Conv2d(96, 96, 3), nn.ReLU(), nn.Conv2d(96, 8, 3, stride=2)).to(memory_format=torch.channels_last)
    low = sp.factorize(model, scheme, EVERYTHING, rank=rank)
    plain = sp.factorize(model.to(memory_format=torch.contiguous_format), scheme, EVERYTHING, rank=rank)
    x = torch.randn(2, 96, 9, 9)
    for network, last in ((low, True), (plain, False)):
        output = network(x)
        assert output.is_contiguous(memory_format=torch.channels_last) is last
        assert output.is_contiguous() is not last
        output.square().sum().backward()  # where the weight is large it is composed anew
    for found, wanted in zip(low.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-3)


def test_channels_last_in_three_dimensions() -> None:
    model = nn.Sequential(nn.Conv3d(8, 8, 3), nn.ReLU()).to(memory_format=torch.channels_last_3d)
    merged = sp.merge(sp.factorize(model, where=EVERYTHING, rank=2))
    assert merged[0][0].weight.is_contiguous(memory_format=torch.channels_last_3d)
