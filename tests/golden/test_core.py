"""Small numbers, each with the line of numpy (float64), or of arithmetic, that produced it."""

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.forms.svd import Factors
from spectrim.layers.recurrent import FactorizedLSTM
from spectrim.linalg.fold import to_matrix
from spectrim.linalg.spectral import svd_of_product

EXACT = {"rel": 1e-12}

# W = np.array([[3.0, 1.0, 2.0], [0.0, 2.0, 1.0]])
W = torch.tensor([[3.0, 1.0, 2.0], [0.0, 2.0, 1.0]], dtype=torch.float64)
# np.linalg.svd(W, compute_uv=False)
SPECTRUM = [3.939644310010251, 1.8652621023877185]

# U = np.array([[1.0, 0.5], [0.0, 1.0], [0.5, 0.0]]); S = np.array([2.0, -1.0]); Vh = np.array([[1.0, 0.0], [0.6, 0.8]])
U = torch.tensor([[1.0, 0.5], [0.0, 1.0], [0.5, 0.0]], dtype=torch.float64)
S = torch.tensor([2.0, -1.0], dtype=torch.float64)
VH = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    layer.weight.data = weight.clone()
    return layer


def by_hand() -> nn.Module:
    """A factorized layer that holds U, S and Vh of above, neither orthonormal nor positive."""
    low = sp.factorize(linear(torch.randn(3, 2).double()))
    low.load_state_dict({"factors.weight.U": U, "factors.weight.S": S, "factors.weight.Vh": VH})
    return low.requires_grad_(False)


def test_singular_values() -> None:
    assert sp.factorize(linear(W)).S.tolist() == pytest.approx(SPECTRUM, **EXACT)


def test_error_of_rank_one() -> None:
    cut = sp.prune(sp.factorize(linear(W)), sp.budget.Fixed(1))
    # 1.8652621023877185 ** 2 = 3.4792027106
    assert float((cut.weight.detach() - W).square().sum()) == pytest.approx(1.8652621023877185**2, **EXACT)


def test_composed_weight() -> None:
    # U @ np.diag(S) @ Vh
    expected = [[1.7, -0.4], [-0.6, -0.8], [1.0, 0.0]]
    assert by_hand().weight.flatten().tolist() == pytest.approx([x for row in expected for x in row], rel=1e-12, abs=1e-15)


def test_true_singular_values_of_the_product() -> None:
    # np.linalg.svd(U @ np.diag(S) @ Vh, compute_uv=False)
    assert svd_of_product(U, S, VH)[1].tolist() == pytest.approx([2.0643535304499623, 0.8879439742003854], **EXACT)
    assert sp.prune(by_hand(), sp.budget.Fixed(2)).S.tolist() == pytest.approx([2.0643535304499623, 0.8879439742003854], **EXACT)


def test_penalties() -> None:
    low = by_hand()
    # (np.sum((U.T @ U - np.eye(2)) ** 2) + np.sum((Vh @ Vh.T - np.eye(2)) ** 2)) / 2**2
    assert float(sp.Orthogonality(1.0)(low)) == pytest.approx(0.33625, **EXACT)
    assert float(sp.Orthogonality(2.0)(low)) == pytest.approx(0.6725, **EXACT)
    # (2 + 1) / sqrt(4 + 1) - 1;  3**2 / 5 - 1;  2 + 1
    assert float(sp.Hoyer(1.0)(low)) == pytest.approx(0.3416407864998738, **EXACT)
    assert float(sp.penalties.HoyerSquare(1.0)(low)) == pytest.approx(0.8, **EXACT)
    assert float(sp.penalties.L1(0.1)(low)) == pytest.approx(0.3, **EXACT)


def test_both_folds_of_a_kernel() -> None:
    # K = (np.arange(36.0) ** 2 % 7).reshape(2, 2, 3, 3)
    K = (torch.arange(36, dtype=torch.float64) ** 2 % 7).reshape(2, 2, 3, 3)
    # np.linalg.svd(K.reshape(2, 18), compute_uv=False)
    assert torch.linalg.svdvals(to_matrix(K, "channel")).tolist() == pytest.approx([13.0, 6.40312423743285], **EXACT)
    # np.linalg.svd(K.transpose(0, 3, 1, 2).reshape(6, 6), compute_uv=False)
    spatial = [11.797189984584204, 5.15883360369705, 4.670135504095562, 4.137063339542726, 2.295896943239773, 0.1270544804886437]
    assert torch.linalg.svdvals(to_matrix(K, "spatial")).tolist() == pytest.approx(spatial, rel=1e-11)  # condition number 100


def test_rank_rules() -> None:
    # energies 9, 4, 1 of 14: 9/14 = 0.643, 13/14 = 0.929
    spectrum = torch.tensor([3.0, 2.0, 1.0])
    assert [sp.Energy(keep)(spectrum) for keep in (0.64, 0.65, 0.92, 0.93, 1.0)] == [1, 2, 2, 3, 3]
    assert [sp.budget.Fraction(share)(spectrum) for share in (0.1, 0.34, 0.67, 1.0)] == [1, 2, 3, 3]
    assert [sp.budget.Fixed(rank)(spectrum) for rank in (1, 3, 9)] == [1, 3, 3]


@pytest.mark.parametrize(
    ("layer", "scheme", "limit"),
    [
        (nn.Linear(64, 64), "channel", 31),  # 64 * 64 / (64 + 64) = 32: at 32 both cost the same
        (nn.Linear(100, 10), "channel", 9),  # 1000 / 110 = 9.09
        (nn.Conv2d(16, 32, 3), "channel", 26),  # 32 * 16 * 9 / (16 * 9 + 32) = 26.2; shared/specs/svd-training.md
        (nn.Conv2d(16, 32, 3), "spatial", 31),  # 32 * 16 * 9 / (16 * 3 + 32 * 3) = 32
        (nn.Conv2d(16, 32, 3, stride=2), "spatial", 23),  # 4608 / (2 * 48 + 96) = 24: the vertical kernel runs on every column
        (nn.Conv2d(16, 32, 3, groups=2), "channel", 13),  # per output position 2304 / (144 + 32) = 13.1
        (nn.Embedding(1000, 50), "channel", 47),  # 50000 / 1050 = 47.6, in parameters
        (nn.ConvTranspose2d(16, 32, 4, stride=2), "channel", 21),  # per input position 8192 / (16 * 16 + 4 * 32) = 21.3
    ],
    ids=str,
)
def test_break_even(layer: nn.Module, scheme: str, limit: int) -> None:
    assert sp.factorize(layer, scheme).break_even("weight") == limit


def test_break_even_of_a_recurrent_layer() -> None:
    dense = nn.LSTM(16, 512)
    low = FactorizedLSTM.adopt(dense, {name: Factors.empty(w, w, 1) for name, w in dense.named_parameters() if w.dim() == 2}, "channel")
    assert low.break_even("weight_ih_l0") == 15  # 2048 * 16 / (2048 + 16) = 15.9
    assert low.break_even("weight_hh_l0") == 409  # 2048 * 512 / (2048 + 512) = 409.6
    assert sp.factorize(nn.GRU(16, 300)).break_even("weight_hh_l0") == 224  # 900 * 300 / 1200 = 225, which saves nothing


def test_factors_of_a_given_matrix() -> None:
    factors = Factors.of(W, W)
    assert [tuple(p.shape) for p in factors.parameters()] == [(2, 2), (2,), (2, 3)]
    assert (factors.rank, factors.full_rank, factors.shape, factors.blocks) == (2, 2, (2, 3), 1)
