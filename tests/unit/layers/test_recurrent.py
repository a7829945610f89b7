"""Recurrent layers that run two operations on their inputs: the same numbers and gradients as composed weights, for fewer operations."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import spectrim as sp
from spectrim.layers.recurrent import FactorizedRecurrent


def cut(kind: type[nn.RNNBase], rank: int = 2, **settings: Any) -> Any:
    dense = kind(10, 8, num_layers=3, **settings).double()
    return sp.factorize(dense, where=lambda name, module: True, rank=rank)


def run(layer: Any, x: Any, hx: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return every output and every gradient."""
    layer.zero_grad()
    output, state = layer(x, hx)
    states = list(state) if isinstance(state, tuple) else [state]
    data = output.data if isinstance(output, PackedSequence) else output
    sum((part.square() * torch.arange(1, part.shape[-1] + 1)).sum() for part in (data, *states)).backward()  # type: ignore[union-attr]
    return [data.detach(), *(s.detach() for s in states)], [p.grad.clone() for p in layer.parameters()]


CASES = {
    "padded": (nn.LSTM, {}, "padded", False),
    "batch first": (nn.LSTM, {"batch_first": True}, "padded", True),
    "projected": (nn.LSTM, {"proj_size": 3}, "padded", True),
    "no bias": (nn.LSTM, {"bias": False}, "padded", False),
    "unbatched": (nn.LSTM, {}, "unbatched", True),
    "packed": (nn.LSTM, {}, "packed", False),
    "packed with a state": (nn.LSTM, {}, "packed", True),
    "gru": (nn.GRU, {}, "padded", True),
    "gru packed": (nn.GRU, {"batch_first": True}, "packed", False),
}


@pytest.mark.parametrize("case", CASES)
def test_pairs_at_the_input_compute_what_composed_weights_compute(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings, form, stated = CASES[case]
    layer = cut(kind, **settings)
    x: Any = torch.randn(7, 10, dtype=torch.float64) if form == "unbatched" else torch.randn(5, 7, 10, dtype=torch.float64)
    batch = () if form == "unbatched" else (5 if settings.get("batch_first") else 7,)
    if form == "packed":
        lengths = torch.tensor([5, 2, 7, 1, 3]) if settings.get("batch_first") else torch.tensor([5, 3, 1, 4, 2, 5, 2])
        x = pack_padded_sequence(x, lengths, batch_first=settings.get("batch_first", False), enforce_sorted=False)
    h = torch.randn(3, *batch, settings.get("proj_size") or 8, dtype=torch.float64)
    c = torch.randn(3, *batch, 8, dtype=torch.float64)
    hx = None if not stated else (h, c) if kind is nn.LSTM else h
    assert len(layer._pairs(x)) == 3
    outputs, gradients = run(layer, x, hx)
    monkeypatch.setattr(FactorizedRecurrent, "_pairs", lambda self, input: [])
    expected, expected_gradients = run(layer, x, hx)
    for ours, theirs in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_pairs_only_where_they_cost_less() -> None:
    x = torch.randn(50, 7, 10, dtype=torch.float64)  # many rows for one composed weight
    assert cut(nn.LSTM, rank=8)._pairs(x) == []  # of 32 x 10
    assert cut(nn.LSTM, rank=2, bidirectional=True)._pairs(x) == []
    mixed = sp.prune(cut(nn.LSTM, rank=8), {"weight_ih_l1": 2})
    assert mixed._pairs(x) == ["weight_ih_l1"]
    expected = mixed.dense_kind(10, 8, num_layers=3).double()
    expected.load_state_dict({name: getattr(mixed, name).detach() for name in mixed._flat_weights_names})
    torch.testing.assert_close(mixed(x)[0], expected(x)[0], rtol=1e-9, atol=1e-11)


def test_dropout_between_layers_only_while_training() -> None:
    layer, x = cut(nn.LSTM, dropout=0.5), torch.randn(5, 7, 10, dtype=torch.float64)
    assert layer._pairs(x)
    torch.manual_seed(0)
    first, second = layer(x)[0], layer(x)[0]
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_in_half_precision_and_under_autocast() -> None:
    layer = sp.factorize(nn.LSTM(16, 16, num_layers=2), where=lambda name, module: True, rank=2)
    x = torch.randn(3, 2, 16)
    assert layer._pairs(x)
    half = sp.factorize(nn.LSTM(16, 16, num_layers=2).bfloat16(), where=lambda name, module: True, rank=2)
    assert half(x.bfloat16())[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)[0]
    torch.testing.assert_close(output.float(), layer(x)[0], rtol=0.05, atol=0.02)  # eight bits
