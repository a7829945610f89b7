"""The laws of a factorized layer, over every kind of layer and its options."""

import copy
import io
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import spectrim as sp
from spectrim import linalg
from spectrim.forms.form import ranks_in
from spectrim.forms.svd import Factors
from spectrim.layers import LAWS, METHODS, FactorizedLayer, kind_of, named_factors, row_of
from spectrim.layers.base import TRAFFIC
from spectrim.linalg.fold import KERNELS
from spectrim.plain.chain import PlainPair

pytest.importorskip("transformers")  # which one row has its example from

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")  # torch's own

EVERYTHING = sp.match("*")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One layer and what it is called with."""

    id: str
    make: Callable[[], nn.Module]
    call: Callable[[torch.dtype], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)


def tensor(*shape: int) -> Callable[[torch.dtype], tuple[Tensor]]:
    return lambda dtype: (torch.randn(*shape, dtype=torch.float64).to(dtype),)


def tokens(*shape: int) -> Callable[[torch.dtype], tuple[Tensor]]:
    return lambda dtype: (torch.randint(0, 11, shape),)


def packed(sorted_: bool) -> Callable[[torch.dtype], tuple[PackedSequence]]:
    lengths = torch.tensor([5, 3, 2] if sorted_ else [3, 5, 2])
    return lambda dtype: (pack_padded_sequence(tensor(5, 3, 12)(dtype)[0], lengths, enforce_sorted=sorted_),)


def with_state(*shapes: tuple[int, ...]) -> Callable[[torch.dtype], tuple[Any, ...]]:
    """A sequence ``(5, 3, 12)`` and an initial state: a tensor, or a pair of them."""

    def call(dtype: torch.dtype) -> tuple[Any, ...]:
        state = tuple(tensor(*shape)(dtype)[0] for shape in shapes)
        return (tensor(5, 3, 12)(dtype)[0], state if len(state) == 2 else state[0])

    return call


def attend(
    query: tuple[int, ...], key: tuple[int, ...] | None = None, value: tuple[int, ...] | None = None
) -> Callable[[torch.dtype], Any]:
    def call(dtype: torch.dtype) -> tuple[Tensor, ...]:
        q = tensor(*query)(dtype)[0]
        k = q if key is None else tensor(*key)(dtype)[0]
        return (q, k, k if value is None else tensor(*value)(dtype)[0])

    return call


HIDE_LAST = torch.tensor([[False, False, False, True], [False, False, True, True]])
CAUSAL = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)

OPTIONS = [
    Case("linear-no-bias-wide", lambda: nn.Linear(17, 5, bias=False), tensor(2, 3, 17)),
    Case("linear-tall-unbatched", lambda: nn.Linear(6, 19), tensor(6)),
    Case("embedding-padding", lambda: nn.Embedding(11, 8, padding_idx=3), tokens(3, 4)),
    Case("embedding-by-frequency", lambda: nn.Embedding(11, 8, scale_grad_by_freq=True), tokens(7)),
    Case("conv1d-stride-padding-dilation", lambda: nn.Conv1d(6, 7, 3, stride=2, padding=2, dilation=2, bias=False), tensor(2, 6, 13)),
    Case("conv1d-same-circular", lambda: nn.Conv1d(6, 8, 4, padding="same", padding_mode="circular"), tensor(2, 6, 11)),
    Case("conv1d-groups-unbatched", lambda: nn.Conv1d(6, 8, 3, groups=2), tensor(6, 11)),
    Case("conv2d-stride", lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), tensor(2, 6, 8, 9)),
    Case("conv2d-not-square", lambda: nn.Conv2d(5, 7, (3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1)), tensor(2, 5, 11, 13)),
    Case("conv2d-1x1", lambda: nn.Conv2d(12, 9, 1), tensor(2, 12, 5, 6)),
    Case("conv2d-1x1-stride", lambda: nn.Conv2d(12, 9, 1, stride=2), tensor(2, 12, 5, 6)),
    Case("conv2d-row", lambda: nn.Conv2d(6, 8, (1, 5), padding=(0, 2)), tensor(2, 6, 7, 9)),
    Case("conv1d-reflect-groups", lambda: nn.Conv1d(6, 8, 5, stride=3, padding=4, padding_mode="reflect", groups=2), tensor(2, 6, 11)),
    Case("conv1d-same-replicate", lambda: nn.Conv1d(6, 8, 4, padding="same", dilation=2, padding_mode="replicate"), tensor(6, 11)),
    Case("conv2d-column-stride", lambda: nn.Conv2d(6, 8, (5, 1), stride=(3, 2), padding=(2, 3)), tensor(2, 6, 9, 8)),
    Case("conv2d-row-circular-same", lambda: nn.Conv2d(6, 8, (1, 3), padding="same", padding_mode="circular"), tensor(2, 6, 7, 9)),
    Case("conv2d-column-reflect", lambda: nn.Conv2d(6, 8, (3, 1), padding=(1, 2), padding_mode="reflect", bias=False), tensor(6, 7, 9)),
    Case("conv2d-same", lambda: nn.Conv2d(6, 8, (3, 5), padding="same", dilation=(1, 2)), tensor(2, 6, 7, 9)),
    Case("conv2d-same-even-reflect", lambda: nn.Conv2d(6, 8, (4, 2), padding="same", padding_mode="reflect"), tensor(2, 6, 7, 9)),
    Case("conv2d-valid", lambda: nn.Conv2d(6, 8, 3, padding="valid"), tensor(2, 6, 7, 9)),
    Case("conv2d-valid-replicate", lambda: nn.Conv2d(6, 8, 3, padding="valid", padding_mode="replicate"), tensor(2, 6, 7, 9)),
    Case("conv2d-reflect", lambda: nn.Conv2d(6, 8, 3, padding=(2, 1), padding_mode="reflect"), tensor(2, 6, 7, 9)),
    Case("conv2d-replicate-stride", lambda: nn.Conv2d(6, 8, 3, 2, padding=(0, 2), padding_mode="replicate"), tensor(2, 6, 7, 9)),
    Case("conv2d-circular", lambda: nn.Conv2d(6, 8, (3, 5), padding=(1, 2), padding_mode="circular"), tensor(2, 6, 7, 9)),
    Case("conv2d-groups", lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), tensor(2, 6, 7, 9)),
    Case("conv2d-groups-stride-no-bias", lambda: nn.Conv2d(8, 12, (3, 2), stride=(1, 2), groups=2, bias=False), tensor(2, 8, 7, 9)),
    Case("conv2d-unbatched", lambda: nn.Conv2d(6, 8, 3), tensor(6, 7, 9)),
    Case("conv2d-unbatched-circular", lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), tensor(6, 7, 9)),
    Case(
        "conv3d-groups-replicate", lambda: nn.Conv3d(4, 6, (1, 2, 3), padding=1, padding_mode="replicate", groups=2), tensor(1, 4, 4, 5, 6)
    ),
    Case("conv3d-same-unbatched", lambda: nn.Conv3d(4, 6, 3, padding="same", bias=False), tensor(4, 4, 5, 6)),
    Case("conv3d-images", lambda: nn.Conv3d(4, 6, (1, 3, 2), stride=(2, 1, 2), padding=(1, 0, 1), bias=False), tensor(2, 4, 5, 4, 6)),
    Case("conv3d-circular", lambda: nn.Conv3d(4, 6, 2, (1, 2, 1), 1, (1, 1, 2), padding_mode="circular"), tensor(4, 4, 5, 6)),
    Case("transposed1d-groups-dilation", lambda: nn.ConvTranspose1d(6, 8, 3, groups=2, dilation=2, bias=False), tensor(6, 7)),
    Case("transposed2d-not-square", lambda: nn.ConvTranspose2d(6, 8, (3, 4), (2, 3), (1, 2), (1, 2)), tensor(2, 6, 5, 4)),
    Case("transposed2d-column", lambda: nn.ConvTranspose2d(6, 8, (3, 1), (2, 3), (1, 0), (1, 2)), tensor(2, 6, 5, 4)),
    Case("transposed2d-1x1", lambda: nn.ConvTranspose2d(6, 8, 1), tensor(2, 6, 5, 4)),
    Case("transposed2d-1x1-stride-groups", lambda: nn.ConvTranspose2d(6, 8, 1, 2, groups=2, bias=False), tensor(2, 6, 5, 4)),
    Case("transposed2d-groups", lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2, dilation=(1, 2)), tensor(2, 6, 5, 4)),
    Case("transposed2d-square-unbatched", lambda: nn.ConvTranspose2d(6, 6, 2, stride=2, bias=False), tensor(6, 5, 4)),
    Case("transposed3d", lambda: nn.ConvTranspose3d(4, 6, (2, 3, 2), stride=2, output_padding=(0, 1, 1)), tensor(2, 4, 3, 4, 2)),
    Case("transposed3d-images-groups", lambda: nn.ConvTranspose3d(4, 6, (1, 3, 2), (2, 2, 1), groups=2), tensor(4, 2, 3, 4)),
    Case("lstm-deep-bidirectional", lambda: nn.LSTM(12, 6, 2, bidirectional=True, batch_first=True), tensor(3, 5, 12)),
    Case("lstm-projected", lambda: nn.LSTM(12, 8, 2, proj_size=5, bidirectional=True), with_state((4, 3, 5), (4, 3, 8))),
    Case("lstm-no-bias-unbatched", lambda: nn.LSTM(12, 8, bias=False), tensor(5, 12)),
    Case("lstm-packed", lambda: nn.LSTM(12, 8, bidirectional=True), packed(sorted_=False)),
    Case("gru", lambda: nn.GRU(12, 8), with_state((1, 3, 8))),
    Case("gru-deep-bidirectional", lambda: nn.GRU(12, 6, 2, bidirectional=True, batch_first=True), tensor(3, 5, 12)),
    Case("gru-no-bias-unbatched", lambda: nn.GRU(12, 8, bias=False), tensor(5, 12)),
    Case("gru-packed", lambda: nn.GRU(12, 8, 2), packed(sorted_=True)),
    Case("attention-no-weights", lambda: nn.MultiheadAttention(12, 4, batch_first=True), attend((2, 4, 12)), {"need_weights": False}),
    Case("attention-separate", lambda: nn.MultiheadAttention(12, 3, kdim=7, vdim=5), attend((4, 2, 12), (6, 2, 7), (6, 2, 5))),
    Case("attention-cross-no-bias", lambda: nn.MultiheadAttention(12, 3, bias=False), attend((4, 2, 12), (6, 2, 12))),
    Case("attention-unbatched-heads", lambda: nn.MultiheadAttention(12, 3), attend((4, 12)), {"average_attn_weights": False}),
    Case(
        "attention-masks",
        lambda: nn.MultiheadAttention(12, 3, batch_first=True),
        attend((2, 4, 12)),
        {"key_padding_mask": HIDE_LAST, "attn_mask": CAUSAL},
    ),
    Case("attention-extra-key", lambda: nn.MultiheadAttention(12, 3, add_bias_kv=True, add_zero_attn=True), attend((4, 2, 12), (6, 2, 12))),
]
"""Options of layers beside the examples in the table of kinds."""

CASES = [Case(row.label, example.make, example.inputs) for row in METHODS for example in row.example[:1]] + OPTIONS

IN_ALL_FORMS = ("conv1d-same-circular", "conv2d-not-square", "conv2d-same-even-reflect", "conv3d-images")
IN_ALL_FORMS += ("transposed2d-not-square", "transposed3d")
"""Convolutions tested in every form of a kernel; the others in Tucker's alone, whose operations have the same geometry as those of CP."""


def schemes(case: Case) -> tuple[str, ...]:
    dense = case.make()
    kind = kind_of(dense)
    assert kind is not None
    return tuple(scheme for scheme in kind.schemes(dense) if scheme not in ("cp", "tt") or case.id in IN_ALL_FORMS)


def laws(case: Case) -> Collection[str]:
    row = row_of(case.make())
    assert row is not None
    return row.laws


LAYERS = [pytest.param(case, scheme, id=f"{case.id}-{scheme}") for case in CASES for scheme in schemes(case)]
SINGLE = [p for p in LAYERS if "one weight" in laws(p.values[0])]
SEVERAL = [case for case in CASES if "several weights" in laws(case)]
every_layer = pytest.mark.parametrize(("case", "scheme"), LAYERS)
every_single = pytest.mark.parametrize(("case", "scheme"), SINGLE)


def dense_of(case: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.default_generator.manual_seed(0)
    return case.make().to(dtype).eval()


def low_of(case: Case, scheme: Any, rank: int | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    return sp.factorize(dense_of(case, dtype), scheme, EVERYTHING, rank=rank)


def call_of(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    torch.default_generator.manual_seed(1)
    return case.call(dtype)


def flat(output: Any) -> list[Tensor]:
    """All floating-point tensors of an output: of tuples and packed sequences too."""
    if isinstance(output, PackedSequence):
        return [output.data]
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output if part is not None for tensor in flat(part)]


def run(model: nn.Module, case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Call the model; skips where this build of torch has no such dense operation in this dtype."""
    try:
        return flat(model(*call_of(case, dtype), **case.options))
    except RuntimeError as error:
        if dtype.itemsize == 2 and "not implemented for" in str(error):
            pytest.skip(f"torch: {str(error).splitlines()[0]}")
        raise


def assert_near(actual: list[Tensor], expected: list[Tensor], roundings: float) -> None:
    """Outputs differ by at most so many units of rounding, measured against the largest output."""
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = a.detach(), b.detach()
        assert float((a - b).abs().max()) <= roundings * torch.finfo(b.dtype).eps * float(b.abs().max())


def test_rows_have_names_of_their_own_known_laws_and_examples_of_their_kind() -> None:
    assert len({row.label for row in METHODS}) == len(METHODS)
    assert set().union(*(row.laws for row in METHODS)) == set(LAWS)
    assert all(kind_of(example.make()) is row.method for row in METHODS for example in row.example)
    assert all((row.method.__doc__ or "").split("\n\n")[0].endswith(".") for row in METHODS)


@every_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factorize_then_merge_reproduces_the_dense_output(case: Case, scheme: Any, dtype: torch.dtype) -> None:
    dense = dense_of(case, dtype)
    expected = run(dense, case, dtype)
    low = sp.factorize(dense, scheme, EVERYTHING)
    assert isinstance(low, FactorizedLayer)
    merged = sp.merge(low)
    assert type(merged) is type(dense)
    assert list(merged.state_dict()) == list(dense.state_dict())
    torch.testing.assert_close(run(merged, case, dtype), expected)
    if dtype.itemsize > 2:
        torch.testing.assert_close(run(low, case, dtype), expected)
    else:
        assert_near(run(low, case, dtype), expected, 16)  # two half-precision operations round three times where one rounds once


@every_layer
def test_cut_then_merge_equals_the_cut_model(case: Case, scheme: Any) -> None:
    exact = sp.prune(low_of(case, scheme), sp.budget.Fixed(2))
    assert set(ranks_in(factors.size for _, factors in named_factors(exact))) == {2}
    for dtype in DTYPES:
        cut = copy.deepcopy(exact).to(dtype)
        merged = sp.merge(cut)
        assert not any(isinstance(module, FactorizedLayer) for module in merged.modules())
        assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
        if dtype.itemsize > 2:
            torch.testing.assert_close(run(merged, case, dtype), run(cut, case, dtype))
        else:
            assert_near(run(merged, case, dtype), run(cut, case, dtype), 16)  # U diag(S), Vh and their balanced forms round differently


@every_layer
def test_merge_writes_two_small_layers_exactly_where_they_cost_less(case: Case, scheme: Any) -> None:
    cut = low_of(case, scheme, rank=1)
    layers = [m for m in cut.modules() if isinstance(m, FactorizedLayer)]
    pays = [layer.pays(name) for layer in layers for name, _ in layer.named_factors()]
    count = sum(parameter.numel() for parameter in sp.merge(cut).parameters())
    dense = sum(parameter.numel() for parameter in dense_of(case).parameters())
    assert (count < dense) if any(pays) else (count == dense)


@every_single
@pytest.mark.parametrize("rank", [2, None])
def test_both_executions_agree_with_their_gradients(case: Case, scheme: Any, rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for composes in (True, False):
        monkeypatch.setattr(FactorizedLayer, "composes", lambda self, name, shape, answer=composes: answer)
        low = low_of(case, scheme, rank)
        arguments = [a.requires_grad_() if a.is_floating_point() else a for a in call_of(case)]
        (output,) = flat(low(*arguments, **case.options))
        generator = torch.Generator().manual_seed(2)
        wanted = [p for p in low.parameters() if p.requires_grad] + [a for a in arguments if a.requires_grad]
        results.append(
            [output, *torch.autograd.grad((output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum(), wanted)]
        )
    assert len(results[0]) >= 4
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)  # the bound; tighter than the default for fp64


@every_layer
def test_gradients_follow_from_the_dense_gradient(case: Case, scheme: Any) -> None:
    """``dU = G Vh^T diag|S|``, ``dS = diag(U^T G Vh^T)``, ``dVh = diag|S| U^T G`` with ``G`` the gradient of the dense weight."""
    dense, low = dense_of(case), low_of(case, scheme)
    for model in (dense, low):
        loss = torch.zeros((), dtype=torch.float64)
        for index, output in enumerate(run(model, case)):
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(index), dtype=output.dtype)
            loss = loss + (output * weights).sum()
        loss.backward()
    for name, factors in low.named_factors():
        G = low.fold(dense, name, dense.get_parameter(name).grad, low.scheme)
        if not factors.is_matrix:
            parts = [part.detach().requires_grad_() for part in factors.parameters()]
            (factors.composed(*parts) * G.flatten(1)).sum().backward()
            for mine, theirs in zip(factors.parameters(), parts, strict=True):
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)
            continue
        U, S, Vh = factors.U.detach(), factors.S.detach(), factors.Vh.detach()
        torch.testing.assert_close(factors.U.grad, G @ Vh.mT * S.unsqueeze(-2), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(factors.S.grad, (U.mT @ G @ Vh.mT).diagonal(dim1=-2, dim2=-1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(factors.Vh.grad, S.unsqueeze(-1) * (U.mT @ G), rtol=1e-9, atol=1e-9)
    for name, parameter in dense.named_parameters():
        if name in dict(low.named_parameters()):
            torch.testing.assert_close(low.get_parameter(name).grad, parameter.grad, rtol=1e-9, atol=1e-9)


@every_layer
def test_weights_are_the_dense_weights(case: Case, scheme: Any) -> None:
    dense, low = dense_of(case), low_of(case, scheme)
    for name in low.weights(dense):
        weight = getattr(low, name)
        assert weight.shape == getattr(dense, name).shape
        torch.testing.assert_close(weight, getattr(dense, name).data, rtol=1e-9, atol=1e-12)
        assert weight.requires_grad


@every_layer
def test_the_input_model_is_untouched(case: Case, scheme: Any) -> None:
    dense = dense_of(case, torch.float32)
    low = sp.factorize(dense, scheme, EVERYTHING)
    cut = sp.prune(low, sp.budget.Fixed(1))
    for model, verb in (
        (dense, lambda m: sp.factorize(m, scheme, EVERYTHING, rank=1)),
        (low, lambda m: sp.prune(m, sp.budget.Fixed(2))),
        (cut, sp.merge),
    ):
        before, printed = {key: value.numpy().tobytes() for key, value in model.state_dict().items()}, repr(model)
        new = verb(model)
        for parameter in new.parameters():
            parameter.data.zero_()
        assert {key: value.numpy().tobytes() for key, value in model.state_dict().items()} == before
        assert repr(model) == printed


@every_layer
def test_error_of_a_cut_equals_the_discarded_energy(case: Case, scheme: Any) -> None:
    """Eckart and Young, 1936."""
    dense, low = dense_of(case), low_of(case, scheme)
    for name, factors in low.named_factors():
        if not factors.is_matrix:
            continue
        matrix = low.fold(dense, name, getattr(dense, name).detach(), scheme)
        tail = linalg.tail_energy(linalg.pooled_spectrum(torch.linalg.svdvals(matrix)))
        for rank in sorted({1, 2, factors.rank - 1} - {factors.rank}):
            cut = factors.cut(lambda spectrum, rank=rank: rank)
            assert (cut.U.shape[-1], cut.S.shape[-1], cut.Vh.shape[-2]) == (rank,) * 3
            error = (cut.matrix().detach() - matrix).square().sum()
            if factors.blocks == 1:
                torch.testing.assert_close(error, tail[rank], rtol=1e-9, atol=1e-15)
            else:
                each = torch.linalg.svdvals(matrix).square()[:, rank:].sum()
                torch.testing.assert_close(error, each, rtol=1e-9, atol=1e-15)
                torch.testing.assert_close(tail[rank], each, rtol=1e-9, atol=1e-15)


@every_layer
def test_distortion_of_a_rung_is_what_its_cut_loses(case: Case, scheme: Any) -> None:
    """Along its path every form gets larger and nearer; cutting to a rung loses its distortion, or less where it is improved further."""
    dense, low = dense_of(case), low_of(case, scheme)
    for name, factors in low.named_factors():
        weight = low.fold(dense, name, getattr(dense, name).detach(), scheme)
        tail, sizes = factors.tail(), [factors.size_of(rung) for rung in range(1, factors.rank + 1)]
        assert len(tail) == factors.rank + 1
        assert bool((tail.diff() <= 0).all())
        torch.testing.assert_close(tail[0], weight.square().sum(), rtol=1e-9, atol=1e-12)
        counts = [factors.count(size) for size in sizes]
        assert counts == sorted(set(counts))
        assert sizes[-1] == factors.size == factors.full_size
        some = sorted({1, 2, 3, len(sizes) // 3, len(sizes) // 2, len(sizes)} - {0})  # of kernels, whose cuts iterate
        for rung in range(1, len(sizes) + 1) if factors.is_matrix else (rung for rung in some if rung <= len(sizes)):
            size = sizes[rung - 1]
            cut = factors.cut_to(size)
            assert cut.size == size
            assert cut.rank == factors.rung_of(size) == rung
            assert factors.blocks * factors.count(size) == sum(part.numel() for part in cut.chain())
            lost = (cut.matrix().detach() - weight).square().sum()
            assert float(lost) <= float(tail[rung]) * (1 + 1e-9) + 1e-15
            if factors.is_matrix:
                torch.testing.assert_close(lost, tail[rung], rtol=1e-9, atol=1e-15)


def flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@every_single
@pytest.mark.parametrize("rank", [1, None])
def test_work_is_what_torch_counts_and_the_cheaper_execution_runs(case: Case, scheme: Any, rank: int | None) -> None:
    dense, low, arguments = dense_of(case), low_of(case, scheme, rank), call_of(case)
    shape, factors = arguments[0].shape, low.factors_of("weight")
    compose = factors.compose_macs
    assert flops(lambda: dense(*arguments)) == 2 * low.work(dense, "weight", scheme, None, shape)
    counts = []
    for composes in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FactorizedLayer, "composes", lambda self, name, shape, answer=composes: answer)
            counts.append(flops(lambda: low(*arguments)))
    assert counts[0] == 2 * (low.work(low, "weight", scheme, None, shape) + compose)
    if not getattr(low, "scale_grad_by_freq", False):  # composes always
        assert counts[1] == 2 * low.work(low, "weight", scheme, factors.size, shape)
    assert flops(lambda: low(*arguments)) == counts[0 if counts[0] <= (1 + TRAFFIC) * counts[1] else 1]


@pytest.mark.parametrize("case", SEVERAL, ids=lambda case: case.id)
def test_work_of_each_projection_is_what_torch_counts(case: Case) -> None:
    dense, kind = dense_of(case), kind_of(dense_of(case))
    assert kind is not None
    for name in kind.weights(dense):
        weight = getattr(dense, name).detach()
        pair = nn.Sequential(nn.Linear(weight.shape[1], 2, bias=False), nn.Linear(2, weight.shape[0], bias=False)).double()
        x = torch.randn(5, 3, weight.shape[1], dtype=torch.float64)
        assert flops(partial(F.linear, x, weight)) == 2 * kind.work(dense, name, "channel", None, x.shape)
        assert flops(partial(pair, x)) == 2 * kind.work(dense, name, "channel", 2, x.shape)


@every_layer
def test_break_even_is_the_last_rank_that_pays(case: Case, scheme: Any) -> None:
    low = low_of(case, scheme)
    for name, factors in low.named_factors():
        limit = low.break_even(name)
        sizes = [factors.size_of(rung) for rung in range(1, factors.full_rank + 1)]
        cost = [low.work(low, name, scheme, size, None) + low.overhead(name) for size in sizes]
        assert [c < low.work(low, name, scheme, None, None) for c in cost] == [rank <= limit for rank in range(1, factors.full_rank + 1)]


@every_layer
def test_state_dicts_round_trip(case: Case, scheme: Any) -> None:
    low = low_of(case, scheme, 3)
    torch.default_generator.manual_seed(5)
    other = sp.factorize(case.make().double().eval(), scheme, EVERYTHING, rank=3)
    assert not torch.equal(run(other, case)[0], run(low, case)[0])
    other.load_state_dict(low.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(run(other, case), run(low, case), strict=True))


@every_layer
def test_deepcopy_and_pickle(case: Case, scheme: Any) -> None:
    low = low_of(case, scheme, 3)
    file = io.BytesIO()
    torch.save(low, file)
    file.seek(0)
    for again in (copy.deepcopy(low), torch.load(file, weights_only=False)):
        assert type(again) is type(low)
        assert all(torch.equal(a, b) for a, b in zip(run(again, case), run(low, case), strict=True))
        next(again.parameters()).data.add_(1)
        assert not torch.equal(run(again, case)[0], run(low, case)[0])
        assert type(sp.merge(again)) is type(sp.merge(low))


@every_layer
def test_dtype_follows(case: Case, scheme: Any) -> None:
    low = low_of(case, scheme, 3, torch.float32)
    names = [name for name, _ in low.named_factors()]
    half = copy.deepcopy(low).half()
    assert {getattr(half, name).dtype for name in names} == {torch.float16}
    assert {p.dtype for _, factors in half.named_factors() for p in factors.parameters()} == {torch.float32}
    assert {p.dtype for p in sp.merge(half).parameters()} == {torch.float16}
    assert_near(run(half, case, torch.float16), [tensor.half() for tensor in run(low, case, torch.float32)], 64)  # fp16 inputs and sums
    double = half.to(torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    assert {getattr(double, name).dtype for name in names} == {torch.float64}
    for name in names:
        torch.testing.assert_close(getattr(double, name).float(), getattr(low, name))


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_hooks_training_mode_and_frozen_parameters_survive(case: Case, scheme: Any, training: bool) -> None:
    dense, seen = dense_of(case).train(training).requires_grad_(training), []
    dense.register_forward_pre_hook(lambda module, arguments: seen.append("before"))
    dense.register_forward_hook(lambda module, arguments, output: seen.append("after"))
    low = sp.factorize(dense, scheme, EVERYTHING, rank=None if training else 1)
    for model in (low, sp.merge(low)) if training else (low, sp.prune(low, sp.budget.Fixed(1)), sp.merge(low)):
        assert {module.training for module in model.modules()} == {training}
        assert {parameter.requires_grad for parameter in model.parameters()} == {training}
        seen.clear()
        assert {output.requires_grad for output in run(model, case)} == {training}
        assert seen == ["before", "after"]


def test_printing_names_scheme_and_rank() -> None:
    text = repr(sp.factorize(nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.LSTM(8, 4)), "spatial", rank=2))
    assert "FactorizedConv2d(\n    6, 8, kernel_size=(3, 3), stride=(1, 1), groups=2, scheme=spatial" in text
    assert "Factors(2 x 12 x 9, rank=2 of 9, dtype=torch.float32)" in text
    assert "(weight_ih_l0): Factors(16 x 8, rank=2 of 8, dtype=torch.float32)" in text


def test_autocast_keeps_the_output_close() -> None:
    dense = dense_of(CASES[0], torch.float32)
    low = sp.factorize(dense)
    x = call_of(CASES[0], torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert low(x).dtype == torch.bfloat16
        assert_near([low(x)], [dense(x)], 16)  # three bfloat16 factors round where the dense weight rounds once


def test_an_initial_bad_state_is_refused_as_torch_refuses_it() -> None:
    low = sp.factorize(nn.LSTM(12, 8))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        low(torch.zeros(5, 3, 12), (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)))
    assert low(torch.zeros(5, 3, 12))[0].shape == (5, 3, 8)


@pytest.mark.parametrize(("make", "weights"), [(lambda: nn.MultiheadAttention(12, 3), 1), (lambda: nn.LSTM(12, 8, 2), 4)])
@pytest.mark.parametrize("training", [True, False])
def test_each_weight_is_composed_once_a_call(make: Any, weights: int, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    low, compose, calls = sp.factorize(make(), where=sp.match("!out_proj")).train(training), Factors.matrix, []
    monkeypatch.setattr(Factors, "matrix", lambda self: calls.append(self) or compose(self))
    x = torch.randn(50, 2, 12)  # few rows would run as pairs
    with torch.set_grad_enabled(training):
        low(x, x, x) if isinstance(low, nn.MultiheadAttention) else low(x)
    assert len(calls) == weights
    assert "_flat_weights" not in vars(low)
    assert "in_proj_weight" not in vars(low)


def test_a_composed_weight_cannot_be_set() -> None:
    low = sp.factorize(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="composed and cannot be set"):
        low.weight = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="composed and cannot be set"):
        low.weight = nn.Parameter(torch.zeros(4, 4))


def test_padding_reaches_no_gradient_even_with_a_row_that_is_not_zero() -> None:
    dense = nn.Embedding(50, 8, padding_idx=2).double()
    with torch.no_grad():
        dense.weight[2] = 3.0
    low = sp.factorize(dense, rank=2)
    low(torch.tensor([2, 2])).sum().backward()
    assert not any(parameter.grad.any() for parameter in low.parameters())
    low(torch.tensor([2, 1])).sum().backward()
    assert all(parameter.grad.any() for parameter in low.parameters())


SIZED = [
    pytest.param(nn.ConvTranspose1d(6, 8, 5, 3, 1), (4,), [(12,), (13,), (14,)], id="1d"),
    pytest.param(nn.ConvTranspose2d(6, 8, 3, 2, 1), (5, 4), [(9, 7), (10, 7), (9, 8), (10, 8)], id="2d"),
    pytest.param(nn.ConvTranspose2d(6, 8, (3, 1), 2, groups=2), (5, 4), [(11, 7), (12, 8)], id="2d-column-groups"),
    pytest.param(nn.ConvTranspose3d(6, 8, (1, 3, 2), (2, 2, 3)), (3, 2, 2), [(5, 5, 5), (6, 6, 7)], id="3d"),
]


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
@pytest.mark.parametrize(("dense", "given", "sizes"), SIZED)
def test_a_transposed_convolution_takes_an_output_size(dense: Any, given: tuple[int, ...], sizes: Any, scheme: Any) -> None:
    dense, x = dense.double(), torch.randn(2, 6, *given).double()
    for size in sizes:
        expected = dense(x, output_size=size)
        assert expected.shape[2:] == size
        for model in (sp.factorize(dense, scheme, rank=None), sp.merge(sp.factorize(dense, scheme))):
            torch.testing.assert_close(model(x, output_size=size), expected)
            torch.testing.assert_close(model(x, size), expected)
        low = sp.factorize(dense, scheme, rank=1)
        pair = sp.merge(low)
        assert isinstance(pair, PlainPair)
        for wanted in (size, (2, 8, *size)):  # torch takes batch and channels along
            torch.testing.assert_close(pair(x, output_size=wanted), low(x, output_size=wanted))
        torch.testing.assert_close(pair(x[0], size), low(x[0], size))


def test_only_a_transposed_convolution_takes_an_output_size() -> None:
    for dense, x in ((nn.Linear(8, 8), torch.randn(2, 8)), (nn.Conv2d(8, 8, 3), torch.randn(2, 8, 5, 5))):
        with pytest.raises(TypeError, match="only a transposed convolution takes an output_size"):
            sp.merge(sp.factorize(dense, rank=1))(x, output_size=(9, 7))


@pytest.mark.parametrize(
    ("dense", "first", "second"),
    [
        (nn.Conv2d(6, 8, 3, 2, 1), {"channel": "(3, 3)/(2, 2)", "spatial": "(3, 1)/(2, 1)", "input": "(1, 1)/(1, 1)"}, (3, 3)),
        (nn.Conv2d(6, 8, (9, 1), 2), {"channel": "(9, 1)/(2, 2)", "input": "(1, 1)/(1, 2)"}, (9, 1)),
        (nn.Conv1d(6, 8, 9, 2), {"channel": "(9,)/(2,)", "input": "(1,)/(1,)"}, (9,)),
        (
            nn.Conv3d(6, 8, (1, 3, 3), 2),
            {"channel": "(1, 3, 3)/(2, 2, 2)", "spatial": "(1, 3, 1)/(2, 2, 1)", "input": "(1, 1, 1)/(2, 1, 1)"},
            (1, 3, 3),
        ),
        (nn.ConvTranspose2d(6, 8, (3, 1), 2), {"channel": "(3, 1)/(2, 1)", "input": "(1, 1)/(1, 1)"}, (3, 1)),
        (nn.Conv2d(6, 8, 1, 2), {"channel": "(1, 1)/(2, 2)"}, (1, 1)),
    ],
    ids=["3x3", "column", "1d", "images", "transposed column", "1x1"],
)
def test_an_axis_belongs_to_the_operation_that_has_its_taps(dense: Any, first: dict[str, str], second: Any) -> None:
    """A single tap belongs where it makes fewer positions: first in a plain convolution, second in a transposed one."""
    kind = kind_of(dense)
    assert kind is not None
    assert kind.schemes(dense) == (*first, *(KERNELS[: len(first)] if len(first) > 1 and dense.groups == 1 else ()))
    for scheme, expected in first.items():
        one, two = sp.merge(sp.factorize(dense, scheme, EVERYTHING, rank=1))
        assert f"{one.kernel_size}/{one.stride}" == expected
        assert tuple(a * b for a, b in zip(one.kernel_size, two.kernel_size, strict=True)) == second
        assert tuple(a * b for a, b in zip(one.stride, two.stride, strict=True)) == dense.stride
