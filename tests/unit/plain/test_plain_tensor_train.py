"""Linear layers as tensor trains."""

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.plain import tensor_train as module
from spectrim.plain.tensor_train import PlainTensorTrain
from spectrim.surgery.tensor_train import balanced_sizes, tensor_train

SIZES = [((4, 6), (3, 5)), ((2, 3, 4), (5, 1, 3)), ((24,), (15,)), ((1, 24), (15, 1))]


def by_hand(train: PlainTensorTrain) -> Tensor:
    """Compose the weight entry by entry: a product of matrices for each pair of positions."""
    rows = []
    for out in range(train.out_features):
        for in_ in range(train.in_features):
            product = torch.ones(1, 1, dtype=torch.float64)
            o, i = torch.unravel_index(torch.tensor(out), train.out_sizes), torch.unravel_index(torch.tensor(in_), train.in_sizes)
            for core, a, b in zip(train.cores, o, i, strict=True):
                product = product @ core.detach()[:, a, b]
            rows.append(product.squeeze())
    return torch.stack(rows).reshape(train.out_features, train.in_features)


@pytest.mark.parametrize(("into", "onto"), SIZES)
def test_it_multiplies_with_its_weight_which_is_the_product_of_its_cores(into: Any, onto: Any) -> None:
    torch.manual_seed(0)
    train = PlainTensorTrain(into, onto, (3,) * (len(into) - 1)).double()
    weight, x = by_hand(train), torch.randn(2, 3, math.prod(into), dtype=torch.float64)
    torch.testing.assert_close(train.weight, weight)
    torch.testing.assert_close(train(x), x @ weight.mT + train.bias)
    assert train(x[0, 0]).shape == (train.out_features,)


@pytest.mark.parametrize(("into", "onto"), SIZES)
def test_a_trained_layer_is_reproduced_at_full_rank_and_nearest_below(into: Any, onto: Any) -> None:
    layer = nn.Linear(24, 15).double()
    full = tensor_train(layer, 999, in_sizes=into, out_sizes=onto)
    torch.testing.assert_close(full.weight, layer.weight)
    errors = [
        float((tensor_train(layer, rank, in_sizes=into, out_sizes=onto).weight - layer.weight).norm().detach()) for rank in (1, 2, 4, 999)
    ]
    assert errors == sorted(errors, reverse=True)
    torch.testing.assert_close(full(torch.ones(24, dtype=torch.float64)), layer(torch.ones(24, dtype=torch.float64)))


def test_cores_are_those_of_tensorly() -> None:
    pytest.importorskip("tensorly")
    import tensorly
    from tensorly.decomposition import tensor_train_matrix

    layer = nn.Linear(24, 15).double()
    train = tensor_train(layer, 4, in_sizes=(4, 6), out_sizes=(3, 5))
    folded = layer.weight.detach().reshape(3, 5, 4, 6).numpy()
    theirs = tensor_train_matrix(folded, (1, 4, 1))
    expected = torch.from_numpy(tensorly.tt_matrix_to_tensor(theirs)).reshape(15, 24)
    torch.testing.assert_close(train.weight.detach(), expected, rtol=1e-9, atol=1e-12)


def test_random_cores_have_the_variance_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    drawn = torch.stack([PlainTensorTrain((8, 8), (8, 8), (6,)).weight.detach() for _ in range(50)])
    assert float(drawn.var()) == pytest.approx(1 / (3 * 64), rel=0.1)  # 50 draws of 64 x 64 entries, which share their cores


def test_sizes_are_folded_evenly_and_checked() -> None:
    assert [balanced_sizes(n, 2) for n in (784, 120, 10, 7)] == [(28, 28), (10, 12), (2, 5), (1, 7)]
    layer = nn.Linear(24, 15)
    assert tensor_train(layer, 2).in_sizes == (4, 6)
    with pytest.raises(SettingError, match="tensor_train: in_sizes must be 2 sizes with the product 24"):
        tensor_train(layer, 2, in_sizes=(5, 5))
    wrong: Any
    for wrong in (0, (2, 3), True, (0,)):
        with pytest.raises(SettingError, match="tensor_train: rank must be a number of at least 1, or 1 of them"):
            tensor_train(layer, wrong)
    with pytest.raises(ValueError, match="as many in_sizes as out_sizes"):
        PlainTensorTrain((4, 6), (3, 5), (0,))


def test_it_is_plain_and_counted() -> None:
    names = [node for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in names} <= {"collections.abc", "torch"}
    train = PlainTensorTrain((28, 28), (10, 12), (8,))
    assert sp.measure(nn.Sequential(train), torch.randn(1, 784), latency=False).macs == 28 * 28 * 80 + 10 * 8 * 28 * 12
    torch.testing.assert_close(torch.export.export(train, (torch.randn(3, 784),)).module()(torch.ones(3, 784)), train(torch.ones(3, 784)))
