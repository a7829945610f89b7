"""`torch.export` of the plain modules: the exported program computes the same, for any batch size."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from spectrim.plain.attention import PlainAttention
from spectrim.plain.recurrent import PlainRecurrent


def pair(weight, rank=2):
    return torch.randn(weight.shape[0], rank), torch.randn(rank, weight.shape[1])


# torch says this of any nn.LSTM and nn.GRU: their list of weights is not a buffer
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights.* were assigned during export")
@pytest.mark.parametrize("chosen", [(), ("ih",), ("ih", "hh")], ids="+".join)
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_recurrent(mode, chosen):
    weights = getattr(nn, mode)(5, 7, num_layers=2, bidirectional=True).state_dict()
    weights = {name: pair(w) if name.split("_")[1] in chosen and w.dim() == 2 else w for name, w in weights.items()}
    module = PlainRecurrent(mode, 5, 7, num_layers=2, bidirectional=True, batch_first=True, weights=weights).eval()
    program = export(module, (torch.randn(3, 4, 5),), dynamic_shapes=({0: Dim("batch", min=2, max=64)},))
    for batch in (3, 6):
        x = torch.randn(batch, 4, 5)
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 4}], ids=["packed", "separate"])
def test_attention(sizes, need_weights):
    weights = nn.MultiheadAttention(6, 2, **sizes).state_dict()
    weights = {name: pair(w) if w.dim() == 2 else w for name, w in weights.items()}
    module = PlainAttention(6, 2, batch_first=True, weights=weights, **sizes).eval()
    call = {"need_weights": need_weights, "key_padding_mask": torch.tensor([[False, False, True]]).expand(3, 3)}

    def inputs(batch):
        return tuple(torch.randn(batch, 3, f) for f in (6, module.kdim, module.vdim))

    batch = Dim("batch", min=2, max=64)
    shapes = {name: {0: batch} for name in ("query", "key", "value", "key_padding_mask")} | {"need_weights": None}
    program = export(module, inputs(3), call, dynamic_shapes=shapes)
    for size in (3, 5):
        x, call["key_padding_mask"] = inputs(size), torch.tensor([[False, False, True]]).expand(size, 3)
        torch.testing.assert_close(program.module()(*x, **call), module(*x, **call))


def test_inside_an_encoder():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2).eval()
    for layer in encoder.layers:
        weights = layer.self_attn.state_dict()
        weights = {name: pair(w) if w.dim() == 2 else w for name, w in weights.items()}
        layer.self_attn = PlainAttention(6, 2, batch_first=True, weights=weights).eval()
    x = torch.randn(3, 4, 6)
    program = export(encoder, (x,))
    torch.testing.assert_close(program.module()(x), encoder(x))
