"""The plain modules against torch's own, in fp64: weights given as exact pairs, as dense matrices and mixed."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from spectrim.plain import parts as plain
from spectrim.plain.attention import PlainAttention
from spectrim.plain.recurrent import PlainRecurrent

TOL = {"atol": 1e-10, "rtol": 1e-10}
RANK = 2


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOL)


@torch.no_grad()
def low_rank(module, chosen):
    """Make the chosen matrices of `module` exact products; return all its weights with these as pairs."""
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for name, tensor in module.named_parameters():
        if tensor.dim() == 2 and any(part in name for part in chosen):
            left, right = (torch.randn(shape, dtype=tensor.dtype) * 0.5 for shape in ((tensor.shape[0], RANK), (RANK, tensor.shape[1])))
            tensor.copy_(left @ right)
            weights[name] = (left, right)
    return weights


def settings(rnn):
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
    return {name: getattr(rnn, name) for name in names}


def recurrent(mode, chosen, **options):
    torch.manual_seed(0)
    dense = getattr(nn, mode)(5, 7, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return dense, PlainRecurrent(mode, weights=low_rank(dense, chosen), **settings(dense))


def initial(rnn, batch):
    layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
    h = torch.randn(layers, *batch, rnn.proj_size or rnn.hidden_size, dtype=torch.float64)
    return (h, torch.randn(layers, *batch, rnn.hidden_size, dtype=torch.float64)) if rnn.mode == "LSTM" else h


KINDS = [("LSTM", 0), ("LSTM", 3), ("GRU", 0)]
OPTIONS = [
    {},
    {"num_layers": 3, "bidirectional": True},
    {"num_layers": 2, "bias": False},
    {"bidirectional": True, "bias": False},
]
CHOICES = [(), ("_ih_",), ("_hh_",), ("_hr_",), ("_ih_", "_hh_", "_hr_"), ("hh_l0", "ih_l1_reverse")]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chosen", CHOICES, ids="+".join)
@pytest.mark.parametrize(("mode", "proj_size"), KINDS)
def test_recurrent_equals_torch(mode, proj_size, chosen, options):
    dense, ours = recurrent(mode, chosen, **options, **({"proj_size": proj_size} if proj_size else {}))
    sequences = [torch.randn(length, 5, dtype=torch.float64) for length in (4, 6, 1, 6)]
    batched = torch.randn(6, 4, 5, dtype=torch.float64)
    for hx in (None, initial(dense, (4,))):
        close(ours(batched, hx), dense(batched, hx))
        for packed in (
            pack_sequence(sequences, enforce_sorted=False),
            pack_sequence(sorted(sequences, key=len, reverse=True)),
            pack_padded_sequence(batched, torch.tensor([6, 6, 6, 6])),
        ):
            output, state = ours(packed, hx)
            expected, expected_state = dense(packed, hx)
            assert isinstance(output, PackedSequence)
            for got, want in zip(output, expected, strict=True):
                close(got, want)
            close(state, expected_state)
        dense.batch_first = ours.batch_first = True
        close(ours(batched.transpose(0, 1), hx), dense(batched.transpose(0, 1), hx))
        dense.batch_first = ours.batch_first = False
    for hx in (None, initial(dense, ())):
        close(ours(sequences[0], hx), dense(sequences[0], hx))


@pytest.mark.parametrize(("mode", "proj_size"), KINDS)
def test_recurrent_gradients(mode, proj_size):
    """By the chain rule the gradient of a left factor is that of the dense weight times the right factor, and so on."""
    options = {"proj_size": proj_size} if proj_size else {}
    dense, ours = recurrent(mode, ("_ih_", "_hh_", "_hr_"), num_layers=2, bidirectional=True, **options)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for rnn, value in zip((dense, ours), inputs, strict=True):
        rnn(value)[0].square().sum().backward()
    close(inputs[1].grad, inputs[0].grad)
    for name in ("l0", "l1_reverse"):
        for weight, pair in (("weight_hh", ours.cells[name].hidden), ("weight_ih", ours.cells[name].input)):
            right, left = pair
            gradient = getattr(dense, f"{weight}_{name}").grad
            close(left.weight.grad, gradient @ right.weight.T)
            close(right.weight.grad, left.weight.T @ gradient)
            close(left.bias.grad, getattr(dense, f"{weight}_{name}".replace("weight", "bias")).grad)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_recurrent_dropout_between_layers_in_training_only(mode):
    dense, ours = recurrent(mode, ("_ih_", "_hh_"), num_layers=2, dropout=1.0)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    close(ours(x), dense(x))  # everything between the layers is dropped: no chance involved
    dense, ours = recurrent(mode, ("_ih_", "_hh_"), num_layers=2, dropout=0.4)
    torch.manual_seed(1)
    expected = dense(x)
    torch.manual_seed(1)
    close(ours(x), expected)  # torch draws the same mask for the same shape
    with pytest.raises(AssertionError):
        close(ours(x), expected)
    close(ours.eval()(x), dense.eval()(x))


def test_recurrent_runs_the_fused_kernel_where_the_hidden_projection_is_dense():
    _, ours = recurrent("LSTM", ("_ih_", "hh_l1"), num_layers=2, bidirectional=True)
    kernels = {name: module.input_size for name, module in ours.named_modules() if isinstance(module, nn.LSTM)}
    assert kernels == {"cells.l0.kernel": RANK, "cells.l0_reverse.kernel": RANK}
    assert sum(p.numel() for p in ours.parameters()) == 2 * ((28 + 5) * 2 + 28 * 7 + 56) + 2 * ((28 + 14) * 2 + (28 + 7) * 2 + 56)
    ours.flatten_parameters()


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_recurrent_holds_parameters_in_torch_layers_only_and_round_trips(mode):
    dense, ours = recurrent(mode, ("ih_l0", "hh_l1"), num_layers=2, bidirectional=True)
    owners = {type(module) for module in ours.modules() if list(module.parameters(recurse=False))}
    assert owners == {nn.Linear, getattr(nn, mode)}
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    expected = ours(x)
    again = PlainRecurrent(mode, weights={**low_rank(dense, ("ih_l0", "hh_l1"))}, **settings(dense))
    assert not torch.equal(again(x)[0], expected[0])
    again.load_state_dict(ours.state_dict())
    close(again(x), expected)
    close(copy.deepcopy(ours)(x), expected)
    assert repr(ours).startswith(f"PlainRecurrent(\n  {mode}, 5, 7, num_layers=2, bidirectional=True")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_recurrent_dtypes(mode, dtype):
    _, ours = recurrent(mode, ("_ih_", "hh_l0"), num_layers=2)
    ours = ours.to(dtype)
    x = torch.randn(4, 3, 5, dtype=dtype)
    output, state = ours(x)
    assert {output.dtype, *(part.dtype for part in (state if mode == "LSTM" else (state,)))} == {dtype}
    tolerance = 1e-5 if dtype == torch.float32 else 0.05  # 8 bits of mantissa through four steps and two layers
    torch.testing.assert_close(output.double(), ours.double()(x.double())[0], atol=tolerance, rtol=tolerance)


def test_building_draws_no_random_numbers():
    lstm, mha = nn.LSTM(3, 4), nn.MultiheadAttention(4, 2)
    before = torch.get_rng_state()
    PlainRecurrent("LSTM", 3, 4, weights=lstm.state_dict())
    PlainAttention(4, 2, weights=mha.state_dict())
    assert torch.equal(torch.get_rng_state(), before)


def test_recurrent_says_what_is_wrong():
    lstm = nn.LSTM(3, 4)
    weights = dict(lstm.state_dict())
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['weight_hh_l1'\]"):
        PlainRecurrent("LSTM", 3, 4, weights=weights | {"weight_hh_l1": weights["weight_hh_l0"]})
    with pytest.raises(ValueError, match=r"weight_ih_l0 must be \(16, 3\), got \(16, 4\)"):
        PlainRecurrent("LSTM", 3, 4, weights=weights | {"weight_ih_l0": torch.zeros(16, 4)})
    with pytest.raises(ValueError, match=r"weight_ih_l0 must be \(16, 3\), got the pair \(16, 2\), \(1, 3\)"):
        PlainRecurrent("LSTM", 3, 4, weights=weights | {"weight_ih_l0": (torch.zeros(16, 2), torch.zeros(1, 3))})
    with pytest.raises(ValueError, match="mode must be 'LSTM', or 'GRU' without proj_size"):
        PlainRecurrent("GRU", 3, 4, proj_size=2, weights={})
    ours = PlainRecurrent("LSTM", 3, 4, weights=weights)
    with pytest.raises(ValueError, match=r"initial state must be \[\(1, 2, 4\), \(1, 2, 4\)\], got \[\(1, 1, 4\), \(1, 1, 4\)\]"):
        ours(torch.zeros(5, 2, 3), (torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)))
    with pytest.raises(ValueError, match="2 or 3 dimensions, got 1"):
        ours(torch.zeros(3))


# attention

PROJECTIONS = [(), ("in_proj", "q_proj"), ("out_proj",), ("in_proj", "q_proj", "v_proj", "out_proj")]


def attention(chosen, embed=6, heads=3, **options):
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(embed, heads, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    names = {"add_bias_kv": dense.bias_k is not None, "bias": dense.in_proj_bias is not None}
    names |= {name: getattr(dense, name) for name in ("dropout", "add_zero_attn", "kdim", "vdim", "batch_first")}
    return dense, PlainAttention(embed, heads, weights=low_rank(dense, chosen), **names)


def masks(batch, heads, target, source):
    """Yield attn_mask and key_padding_mask, bool and float, that leave every query something to see."""
    hidden = torch.rand(target, source) < 0.4
    hidden[:, 0] = False
    padding = torch.zeros(batch, source, dtype=torch.bool)
    padding[0, -2:] = True
    each = hidden.repeat(batch * heads, 1, 1)
    each[0, :, 1] = True
    noise = torch.randn(target, source, dtype=torch.float64)
    yield None, None
    yield hidden, None
    yield each, padding
    yield None, padding
    yield noise, None
    yield noise.repeat(batch * heads, 1, 1), torch.randn(batch, source, dtype=torch.float64)


@pytest.mark.parametrize(
    "extra",
    [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False, "add_bias_kv": True, "add_zero_attn": True}],
    ids=str,
)
@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 4}], ids=["packed", "separate"])
@pytest.mark.parametrize("chosen", PROJECTIONS, ids="+".join)
def test_attention_equals_torch(chosen, sizes, extra):
    dense, ours = attention(chosen, **sizes, **extra)
    batch, target, source = 2, 4, 5
    query, key, value = (
        torch.randn(n, batch, f, dtype=torch.float64) for n, f in ((target, 6), (source, dense.kdim), (source, dense.vdim))
    )
    for attn, padding in masks(batch, 3, target, source):
        for how in ({}, {"average_attn_weights": False}, {"need_weights": False}):
            call = {"attn_mask": attn, "key_padding_mask": padding, **how}
            expected = dense(query, key, value, **call)
            close(ours(query, key, value, **call), expected)
            dense.batch_first = ours.batch_first = True
            arguments = [x.transpose(0, 1) for x in (query, key, value)]
            close(ours(*arguments, **call), dense(*arguments, **call))
            dense.batch_first = ours.batch_first = False
            single = {
                **call,
                "attn_mask": attn if attn is None or attn.dim() == 2 else attn[:3],
                "key_padding_mask": None if padding is None else padding[0],
            }
            arguments = [x[:, 0] for x in (query, key, value)]
            close(ours(*arguments, **single), dense(*arguments, **single))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("chosen", PROJECTIONS, ids="+".join)
def test_attention_to_itself_and_to_one_memory(chosen, heads, training):
    """Also against the fused path that torch takes in eval mode without gradients, for an even number of heads."""
    dense, ours = attention(chosen, heads=heads, batch_first=True)
    dense.train(training)
    ours.train(training)
    x, memory = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.set_grad_enabled(training):
        for how in ({}, {"need_weights": False}):
            close(ours(x, x, x, **how), dense(x, x, x, **how))
            close(ours(x, memory, memory, **how), dense(x, memory, memory, **how))
            close(ours(x, x, memory[:, :4], **how), dense(x, x, memory[:, :4], **how))
            close(ours(x, x, x, attn_mask=causal, is_causal=True, **how), dense(x, x, x, attn_mask=causal, is_causal=True, **how))
            close(ours(x, x, x, key_padding_mask=padding, **how)[0], dense(x, x, x, key_padding_mask=padding, **how)[0])
            call = {"attn_mask": causal.isinf(), "key_padding_mask": padding, "is_causal": True, **how}
            close(ours(x, x, x, **call)[0], dense(x, x, x, **call)[0])


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_dropout_in_training_only(need_weights):
    dense, ours = attention(("in_proj", "out_proj"), dropout=0.5)
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    torch.manual_seed(1)
    expected = dense(x, x, x, need_weights=need_weights)
    torch.manual_seed(1)
    close(ours(x, x, x, need_weights=need_weights), expected)
    close(ours.eval()(x, x, x, need_weights=need_weights), dense.eval()(x, x, x, need_weights=need_weights))


def test_attention_gradients():
    dense, ours = attention(("in_proj", "out_proj"), add_bias_kv=True)
    x, memory = torch.randn(4, 2, 6, dtype=torch.float64), torch.randn(5, 2, 6, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, value in zip((dense, ours), inputs, strict=True):
        (module(value, value, value)[0].square().sum() + module(value, memory, memory, need_weights=False)[0].square().sum()).backward()
    close(inputs[1].grad, inputs[0].grad)
    for gradient, (right, left) in ((dense.in_proj_weight.grad, ours.in_proj), (dense.out_proj.weight.grad, ours.out_proj)):
        close(left.weight.grad, gradient @ right.weight.T)
        close(right.weight.grad, left.weight.T @ gradient)
    close(ours.in_proj[1].bias.grad, dense.in_proj_bias.grad)
    close((ours.bias_k.grad, ours.bias_v.grad), (dense.bias_k.grad, dense.bias_v.grad))


@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 4}], ids=["packed", "separate"])
def test_attention_round_trips(sizes):
    dense, ours = attention(("proj",), add_bias_kv=True, **sizes)
    query, key, value = (torch.randn(4, 2, f, dtype=torch.float64) for f in (6, dense.kdim, dense.vdim))
    expected = ours(query, key, value)
    again = attention(("proj",), add_bias_kv=True, **sizes)[1]
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert again.load_state_dict(ours.state_dict()) == ([], [])
    close(again(query, key, value), expected)
    close(copy.deepcopy(ours)(query, key, value), expected)
    owners = {type(m) for m in ours.modules() if list(m.parameters(recurse=False))}
    assert owners == {nn.Linear, PlainAttention}  # PlainAttention for bias_k and bias_v
    assert set(ours.state_dict()) == {
        *("bias_k", "bias_v", "out_proj.0.weight", "out_proj.1.weight", "out_proj.1.bias"),
        *(f"{p}.{n}" for p in (("in_proj",) if not sizes else ("q_proj", "k_proj", "v_proj")) for n in ("0.weight", "1.weight", "1.bias")),
    }


def test_three_low_rank_projections_of_one_size():
    """Separate projections are allowed where torch would pack them."""
    dense, _ = attention(())
    parts = dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), dense.in_proj_weight.detach().chunk(3), strict=True))
    weights = parts | {name: tensor for name, tensor in dense.state_dict().items() if name != "in_proj_weight"}
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    close(PlainAttention(6, 3, weights=weights)(x, x, x), dense(x, x, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_dtypes(dtype):
    _, ours = attention(("in_proj", "out_proj"))
    x = torch.randn(4, 2, 6, dtype=dtype)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    ours = ours.to(dtype)
    expected = copy.deepcopy(ours).double()(x.double(), x.double(), x.double(), attn_mask=mask)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1  # 8 bits of mantissa through four products
    for how in (True, False):
        output = ours(x, x, x, attn_mask=mask, need_weights=how)[0]
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), expected[0], atol=tolerance, rtol=tolerance)


def encoder_layer(batch_first=True, **options):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first, dtype=torch.float64, **options)


def replaced(layer, names=("self_attn",)):
    """Return a copy whose attentions are plain and low-rank, and make those of `layer` the same function."""
    for name in names:
        weights = low_rank(getattr(layer, name), ("in_proj", "out_proj"))
        setattr(layer, f"new_{name}", PlainAttention(6, 2, batch_first=layer.self_attn.batch_first, weights=weights))
    ours = copy.deepcopy(layer)
    for name in names:
        setattr(ours, name, getattr(layer, f"new_{name}"))
        delattr(layer, f"new_{name}")
        delattr(ours, f"new_{name}")
    return ours


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_in_the_encoder_layer(training, grad, batch_first, norm_first):
    dense = encoder_layer(batch_first, norm_first=norm_first)
    ours = replaced(dense)
    x = torch.randn(3, 3, 6, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    padding = torch.tensor([[False] * 3, [False, False, True], [False] * 3])
    for module in (dense, ours):
        module.train(training)
    with torch.set_grad_enabled(grad):
        close(ours(x), dense(x))
        close(ours(x, src_mask=causal, is_causal=True), dense(x, src_mask=causal, is_causal=True))
        got, expected = ours(x, src_key_padding_mask=padding), dense(x, src_key_padding_mask=padding)
        seen = ~padding if batch_first else ~padding.T
        close(got[seen], expected[seen])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_in_the_decoder_layer(training, batch_first):
    torch.manual_seed(0)
    dense = nn.TransformerDecoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first, dtype=torch.float64)
    ours = replaced(dense, ("self_attn", "multihead_attn"))
    x, memory = torch.randn(3, 3, 6, dtype=torch.float64), torch.randn(3, 3, 6, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    for module in (dense, ours):
        module.train(training)
    with torch.set_grad_enabled(training):
        close(ours(x, memory, tgt_mask=causal, tgt_is_causal=True), dense(x, memory, tgt_mask=causal, tgt_is_causal=True))
        whole = nn.TransformerDecoder(ours, 2).train(training), nn.TransformerDecoder(dense, 2).train(training)
        close(whole[0](x, memory, tgt_mask=causal), whole[1](x, memory, tgt_mask=causal))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the dense encoder's; ours must not make one
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_in_an_encoder_that_would_use_nested_tensors(training, grad):
    """Replaced after the encoder was built, when it has already decided for nested tensors."""
    encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=True)
    assert encoder.use_nested_tensor
    ours = copy.deepcopy(encoder)
    for index, layer in enumerate(encoder.layers):
        ours.layers[index] = replaced(layer)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    padding = torch.tensor([[False] * 4, [False, False, True, True], [False, False, False, True]])
    for module in (encoder, ours):
        module.train(training)
    with torch.set_grad_enabled(grad):
        got, expected = ours(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding)
        close(got[~padding], expected[~padding])  # at padded positions torch's nested path writes zeros, the ordinary one does not
        close(ours(x), encoder(x))


def test_an_encoder_built_from_a_replaced_layer():
    layer = encoder_layer()
    ours = nn.TransformerEncoder(replaced(layer), 2, enable_nested_tensor=False).eval()
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        close(ours(x), dense(x))


def test_attention_says_what_is_wrong():
    weights = dict(nn.MultiheadAttention(6, 3).state_dict())
    with pytest.raises(ValueError, match="num_heads must be a divisor of embed_dim=6, got 4"):
        PlainAttention(6, 4, weights=weights)
    with pytest.raises(ValueError, match=r"missing \['bias_k', 'bias_v'\], unknown \[\]"):
        PlainAttention(6, 3, add_bias_kv=True, weights=weights)
    with pytest.raises(ValueError, match=r"in_proj_bias must be \(18,\), got the pair"):
        PlainAttention(6, 3, weights=weights | {"in_proj_bias": (torch.zeros(18, 2), torch.zeros(2))})
    ours = PlainAttention(6, 3, weights=weights)
    x = torch.zeros(4, 2, 6)
    with pytest.raises(ValueError, match=r"attn_mask must be \(4, 4\) or \(6, 4, 4\), got \(1, 4\)"):
        ours(x, x, x, attn_mask=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"key_padding_mask must be \(2, 4\), got \(4, 2\)"):
        ours(x, x, x, key_padding_mask=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="give the mask too"):
        ours(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="2 or 3 dimensions, got 1"):
        ours(x[0, 0], x[0, 0], x[0, 0])


def test_a_copy_of_the_folder_runs_a_merged_network_without_the_library(tmp_path):
    """It imports torch, the standard library and its own files; a network pickled with it needs nothing else."""
    folder = tmp_path / "shipped"
    shutil.copytree(Path(plain.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    program = """
import builtins, sys
own = builtins.__import__
def checked(name, *rest, **more):
    assert name.split(".")[0] != "spectrim", name
    return own(name, *rest, **more)
builtins.__import__ = checked
import torch
from shipped.chain import PlainPair
from shipped.recurrent import PlainRecurrent
from shipped.attention import PlainAttention
from shipped.encoder import PaddedEncoder
pair = PlainPair(torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 3))
assert pair(torch.zeros(1, 4)).shape == (1, 3)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
