"""Counts by ==, against sums worked out by hand from the sizes; evaluation against numbers worked out by hand."""

import itertools
import json
import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from spectrim import factorize
from spectrim.errors import FormatError, SettingError, SpectrimError
from spectrim.metrics.calls import call_model
from spectrim.metrics.clock import Latency, compare_latency, latency
from spectrim.metrics.evaluate import evaluate
from spectrim.metrics.inputs import batch_size_of
from spectrim.metrics.macs import count_macs
from spectrim.metrics.measurement import Measurement, compare_table, measure
from spectrim.plain.recurrent import PlainRecurrent

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
B, T, E, H, S = 3, 5, 8, 6, 4  # batch, time, features, hidden, source length


def x(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


class Call(nn.Module):
    """Any function of the inputs as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def mac_cases():
    """Yield name, module, inputs for a batch, and the multiply-accumulates for one example."""
    yield "linear", nn.Linear(E, H), x(B, E), E * H
    yield "linear without bias", nn.Linear(E, H, bias=False), x(B, E), E * H
    yield "linear on time", nn.Linear(E, H), x(B, T, E), T * E * H
    yield "linear pair", nn.Sequential(nn.Linear(E, 2, bias=False), nn.Linear(2, H)), x(B, E), 2 * (E + H)
    yield "bilinear", nn.Bilinear(E, S, H), (x(B, E), x(B, S)), H * E * S + H * S
    yield "embedding", nn.Embedding(20, E), torch.zeros(B, T, dtype=torch.long), 0
    yield "embedding bag", nn.EmbeddingBag(20, E), torch.zeros(B, T, dtype=torch.long), 0
    yield "norms", nn.Sequential(nn.LayerNorm(E), nn.ReLU(), nn.Dropout()), x(B, E), 0

    yield "conv1d", nn.Conv1d(E, H, 3, stride=2, padding=1), x(B, E, 9), H * E * 3 * 5
    yield "conv1d same, dilated", nn.Conv1d(E, H, 3, dilation=2, padding="same"), x(B, E, 9), H * E * 3 * 9
    yield "conv2d", nn.Conv2d(E, H, (3, 1), bias=False), x(B, E, 7, 5), H * E * 3 * 5 * 5
    yield "conv2d in groups", nn.Conv2d(E, 4, 3, groups=2, padding=1, padding_mode="reflect"), x(B, E, 7, 5), 4 * E // 2 * 9 * 35
    yield "conv3d", nn.Conv3d(2, 3, 2), x(B, 2, 4, 4, 4), 3 * 2 * 8 * 27
    yield "conv1d transposed", nn.ConvTranspose1d(E, H, 3, stride=2), x(B, E, 9), E * H * 3 * 9  # each input meets each tap
    yield "conv2d transposed", nn.ConvTranspose2d(E, 4, 3, groups=2), x(B, E, 4, 5), E * 4 // 2 * 9 * 20
    yield "conv3d transposed", nn.ConvTranspose3d(2, 3, 2), x(B, 2, 4, 4, 4), 3 * 2 * 8 * 64

    yield "einsum", Call(lambda a, b: torch.einsum("bij,bkj->bik", a, b)), (x(B, T, E), x(B, S, E)), T * S * E
    yield "baddbmm", Call(lambda a, b: torch.baddbmm(a, a, b)), (x(B, T, T), x(B, T, T)), T**3


VECTOR_CASES = {
    "mv": (lambda a, v: a @ v, (x(T, E), x(E)), T * E),
    "addmv": (torch.addmv, (x(T), x(T, E), x(E)), T * E),
    "dot": (torch.dot, (x(E), x(E)), E),
    "vdot": (torch.vdot, (x(E), x(E)), E),
    "addr": (torch.addr, (x(E, T), x(E), x(T)), E * T),
    "addbmm": (torch.addbmm, (x(T, S), x(B, T, E), x(B, E, S)), B * T * E * S),
}


@DTYPES
@pytest.mark.parametrize(("module", "inputs", "expected"), [pytest.param(*case, id=name) for name, *case in mac_cases()])
def test_macs_of_layers(module, inputs, expected, dtype):
    cast = tuple(part.to(dtype) if part.is_floating_point() else part for part in (inputs if isinstance(inputs, tuple) else (inputs,)))
    assert count_macs(module.to(dtype), cast) == expected


@pytest.mark.parametrize("case", VECTOR_CASES)
def test_macs_of_vectors(case):
    function, inputs, expected = VECTOR_CASES[case]
    assert count_macs(Call(function), inputs, batch_size=1) == expected


def test_macs_of_distances():
    assert count_macs(Call(torch.cdist), (x(B, T, E), x(B, S, E))) == T * S * E
    assert count_macs(Call(torch.cdist), (x(B, 30, E), x(B, 40, E))) == 30 * 40 * E  # where torch uses a matrix product inside


def test_macs_of_convolutions_and_linear_unbatched():
    assert count_macs(nn.Conv2d(E, H, 3), x(E, 7, 5), batch_size=1) == H * E * 9 * 15
    assert count_macs(nn.Conv1d(E, H, 3), x(E, 7), batch_size=1) == H * E * 3 * 5
    assert count_macs(nn.Linear(E, H), x(E), batch_size=1) == E * H
    assert count_macs(nn.Linear(E, H, bias=False), x(E), batch_size=1) == E * H


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FIRST, SECOND = H * (E + H), H * (2 * H + H)  # per gate: a layer on the input, a layer on both directions


@DTYPES
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", GATES)
def test_macs_of_recurrent_layers(kind, grad, dtype):
    """Also what runs when gradients are required of the parameters must not matter."""
    g = GATES[kind]
    one = getattr(nn, kind)(E, H, batch_first=True).to(dtype).requires_grad_(grad)
    two = getattr(nn, kind)(E, H, 2, bidirectional=True, bias=False).to(dtype).requires_grad_(grad)
    assert count_macs(one, x(B, T, E, dtype=dtype)) == T * g * FIRST
    assert count_macs(one, x(T, E, dtype=dtype), batch_size=1) == T * g * FIRST
    assert count_macs(two, x(T, B, E, dtype=dtype), batch_size=B) == T * g * 2 * (FIRST + SECOND)
    packed = pack_padded_sequence(x(T, B, E, dtype=dtype), [5, 4, 2], enforce_sorted=False)
    assert count_macs(two, packed) == math.floor(11 / 3 * g * 2 * (FIRST + SECOND) + 0.5)
    assert count_macs(two, packed, batch_size=1) == 11 * g * 2 * (FIRST + SECOND)
    cell = getattr(nn, f"{kind}Cell")(E, H).to(dtype)
    assert count_macs(cell, x(B, E, dtype=dtype)) == g * FIRST
    assert count_macs(cell, x(E, dtype=dtype), batch_size=1) == g * FIRST


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch says so in fp32
@DTYPES
def test_macs_of_projected_lstm(dtype):
    lstm = nn.LSTM(E, H, proj_size=2, batch_first=True).to(dtype)
    assert count_macs(lstm, x(B, T, E, dtype=dtype)) == T * (4 * H * (E + 2) + 2 * H)


@pytest.mark.parametrize("hidden", ["fused", "loop"])
@DTYPES
def test_macs_of_low_rank_recurrent_layers(hidden, dtype):
    """Whether torch's kernel runs or the loop in Python, what is multiplied is the same sum."""
    rank = 2
    weights = {name: weight.to(dtype) for name, weight in nn.GRU(E, H).state_dict().items()}
    weights["weight_ih_l0"] = (x(3 * H, rank, dtype=dtype), x(rank, E, dtype=dtype))
    if hidden == "loop":
        weights["weight_hh_l0"] = (x(3 * H, rank, dtype=dtype), x(rank, H, dtype=dtype))
    expected = T * (rank * (E + 3 * H) + (rank * (H + 3 * H) if hidden == "loop" else 3 * H * H))
    assert count_macs(PlainRecurrent("GRU", E, H, weights=weights), x(T, B, E, dtype=dtype), batch_size=B) == expected


ATTENDS = T * E * T + T * T * E  # scores, and their product with the values


@DTYPES
@pytest.mark.parametrize("heads", [2, 1])  # an odd number of heads keeps torch from its fast path
def test_macs_of_attention(heads, dtype):
    mha = nn.MultiheadAttention(E, heads, batch_first=True).to(dtype)
    q, memory = x(B, T, E, dtype=dtype), x(B, S, E, dtype=dtype)
    everything = T * E * 3 * E + ATTENDS + T * E * E
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    for how in ({}, {"need_weights": False}, {"attn_mask": mask}, {"attn_mask": mask, "is_causal": True, "need_weights": False}):
        assert count_macs(mha, {"query": q, "key": q, "value": q, **how}) == everything
    assert count_macs(mha, (q[0], q[0], q[0]), batch_size=1) == everything
    crossed = 2 * T * E * E + 2 * S * E * E + 2 * T * S * E
    assert count_macs(mha, (q, memory, memory)) == crossed
    assert count_macs(mha, {"query": q, "key": memory, "value": memory, "need_weights": False}) == crossed


@DTYPES
def test_macs_of_scaled_dot_product_attention(dtype):
    q, k = x(B, 4, T, 2, dtype=dtype), x(B, 4, S, 2, dtype=dtype)
    sdpa = F.scaled_dot_product_attention
    assert count_macs(Call(sdpa), (q, k, k)) == 2 * 4 * T * S * 2
    assert count_macs(Call(sdpa), {"query": q, "key": k, "value": k, "attn_mask": torch.zeros(T, S, dtype=dtype)}) == 2 * 4 * T * S * 2
    assert count_macs(Call(sdpa), {"query": q, "key": q, "value": q, "is_causal": True}) == 2 * 4 * T * T * 2  # the mask saves nothing
    assert count_macs(Call(sdpa), {"query": q, "key": k[:, :2], "value": k[:, :2], "enable_gqa": True}) == 2 * 4 * T * S * 2
    assert count_macs(Call(sdpa), (q, k, k[..., :1])) == 4 * T * S * (2 + 1)
    assert count_macs(Call(sdpa), (q[0], k[0], k[0]), batch_size=1) == 2 * 4 * T * S * 2


FEED = 2 * E * 16


@DTYPES
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("heads", [2, 1])
def test_macs_of_transformer_layers(heads, norm_first, dtype):
    encoder = nn.TransformerEncoderLayer(E, heads, 16, batch_first=True, norm_first=norm_first).to(dtype)
    decoder = nn.TransformerDecoderLayer(E, heads, 16, batch_first=True, norm_first=norm_first).to(dtype)
    q, memory = x(B, T, E, dtype=dtype), x(B, S, E, dtype=dtype)
    itself = T * E * 4 * E + ATTENDS
    assert count_macs(encoder, q) == itself + T * FEED
    assert count_macs(encoder, q[0], batch_size=1) == itself + T * FEED
    assert count_macs(decoder, (q, memory)) == itself + 2 * T * E * E + 2 * S * E * E + 2 * T * S * E + T * FEED


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@DTYPES
def test_macs_of_nested_tensors_count_what_is_there(dtype):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 16, batch_first=True).to(dtype), 2)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    lengths = [5, 3]
    expected = sum(2 * (t * E * 4 * E + 2 * t * t * E + t * FEED) for t in lengths)
    assert count_macs(encoder, {"src": x(2, T, E, dtype=dtype), "src_key_padding_mask": padding}, batch_size=1) == expected
    mha = nn.MultiheadAttention(E, 2, batch_first=True).to(dtype)
    nested = torch.nested.nested_tensor([x(5, E, dtype=dtype), x(3, E, dtype=dtype)])
    assert count_macs(mha, (nested, nested, nested), batch_size=1) == sum(t * E * 4 * E + 2 * t * t * E for t in lengths)


def test_macs_of_grouped_products():
    """Called by hand: experts, each with its own rows."""
    from spectrim.metrics.macs import _grouped

    a, b = x(6, E), x(2, E, H)
    assert _grouped(None, a, b) == 6 * E * H
    assert _grouped(None, x(2, 6, E), b) == 2 * 6 * E * H
    assert _grouped(None, x(T, 6), x(6, H)) == T * 6 * H
    assert _grouped(None, x(2, T, E), x(E, 6)) == T * E * 6


def test_macs_of_recurrent_kernels_on_accelerators():
    """Their formula sums the matrices in the list of weights; called by hand, for there is no such kernel here."""
    from spectrim.metrics.macs import _recurrent

    lstm = nn.LSTM(E, H, 2, bidirectional=True)
    assert _recurrent(None, x(T, B, E), list(lstm.parameters()), 4, None) == T * B * 4 * 2 * (FIRST + SECOND)


def test_macs_of_integer_products():
    a, b = torch.zeros(32, 16, dtype=torch.int8), torch.zeros(16, 8, dtype=torch.int8)
    assert count_macs(Call(torch._int_mm), (a, b)) == 16 * 8


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*torch.ao")  # torch announces the end of this API
def test_macs_of_quantized_layers():
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(E, H), nn.LSTM(H, H)), {nn.Linear, nn.LSTM})
    assert count_macs(dynamic[0], x(B, E)) == E * H
    with pytest.raises(SpectrimError, match=r"runs aten.quantized_lstm, whose cost cannot be derived from its arguments"):
        count_macs(dynamic[1], x(T, B, H), batch_size=B)


def test_macs_of_a_compiled_model_are_those_of_the_original():
    compiled = torch.compile(nn.Linear(E, H), backend="eager")
    assert count_macs(compiled, x(B, E)) == E * H


def test_batch_size_is_said_or_read():
    model = nn.Linear(E, H)
    assert count_macs(model, [x(B, E)]) == count_macs(model, {"input": x(B, E)}) == count_macs(model, x(1, E)) == E * H
    assert count_macs(model, x(T, B, E), batch_size=B) == T * E * H
    for inputs, size in ((torch.tensor(1.0), None), (x(B, E), 0), ((), None)):
        with pytest.raises(SettingError, match=r"batch_size must be an integer of at least 1, got (None|0)"):
            count_macs(model, inputs, batch_size=size)
    with pytest.raises(SettingError, match="inputs must be a tensor, a tuple of arguments or a dict"):
        count_macs(model, "text")
    packed = pack_padded_sequence(x(T, B, E), [5, 4, 2])
    assert batch_size_of(packed) == batch_size_of({"a": None, "b": packed}) == batch_size_of([None, x(B, T)]) == B


def test_call_model():
    for inputs in ((torch.tensor(3), torch.tensor(1)), [torch.tensor(3), torch.tensor(1)], {"b": torch.tensor(1), "a": torch.tensor(3)}):
        assert call_model(lambda a, b: a - b, inputs) == 2
    packed = pack_padded_sequence(x(T, B, E), [5, 4, 2])
    assert call_model(lambda sequence: sequence, packed) is packed


def mixed():
    """A network with a frozen batch norm: flags that differ."""
    model = nn.Sequential(nn.Linear(E, H), nn.BatchNorm1d(H), nn.Dropout(0.5), nn.Linear(H, 2)).train()
    model[1].eval()
    return model


def flags(model):
    return [module.training for module in model.modules()]


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def test_nothing_is_left_behind():
    model = mixed()
    before, state = flags(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, data = x(B, E), [(x(B, E), torch.zeros(B, dtype=torch.long))]
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    first = evaluate(model, data, F.cross_entropy)
    assert evaluate(model, data, F.cross_entropy) == first  # eval mode: no dropout, no batch statistics
    count_macs(model, inputs)
    latency(model, inputs, threads=threads + 1, repeats=1, min_time=0.001)
    broken = nn.Sequential(mixed(), Broken())
    broken_before = flags(broken)
    for call in (lambda: count_macs(broken, inputs), lambda: latency(broken, inputs), lambda: evaluate(broken, data, F.cross_entropy)):
        with pytest.raises(RuntimeError, match="broken"):
            call()
    assert flags(broken) == broken_before
    assert flags(model) == before
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, grad)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(parameter.grad is None for parameter in model.parameters())


# evaluate


def test_evaluate_by_hand():
    """Absolute errors 1, 2 and 3 in one batch, 10 in another: (1 + 2 + 3 + 10) / 4, not the mean of the batch means 2 and 10."""
    data = [(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)), (torch.tensor([10.0]), torch.zeros(1))]
    assert evaluate(nn.Identity(), data, F.l1_loss) == {"loss": 4.0}


def test_evaluate_accuracy_by_hand():
    """With equal scores the cross-entropy of two classes is log 2; the first class wins ties."""
    data = [(torch.zeros(3, 2), torch.tensor([0, 1, 1])), (torch.zeros(1, 2), torch.tensor([0]))]
    result = evaluate(nn.Identity(), iter(data), nn.CrossEntropyLoss())
    assert result == {"loss": pytest.approx(math.log(2), abs=1e-7), "accuracy": 0.5}  # fp32 loss
    for target in (torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool)):  # soft targets, yes or no
        output = torch.zeros(3, 2) if target.dim() == 2 else torch.zeros(3)
        assert set(evaluate(nn.Identity(), [(output, target)], lambda o, t: (o - t.float()).square().mean())) == {"loss"}
    tokens = [(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long))]
    result = evaluate(nn.Identity(), tokens, lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()))
    assert result == {"loss": pytest.approx(math.log(3), abs=1e-7)}  # fp32 loss


@pytest.mark.parametrize("wrap", [lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {"a": a, "b": b}])
def test_evaluate_takes_arguments_in_three_ways(wrap):
    model = Call(lambda a, b: a - b)
    assert evaluate(model, [(wrap(torch.ones(4), torch.full((4,), 3.0)), torch.zeros(4))], F.l1_loss) == {"loss": 2.0}


def test_evaluate_passes_on_outputs_of_any_kind():
    lstm = nn.LSTM(E, 2, batch_first=True)
    data = [(x(B, T, E), torch.zeros(B, T, 2))]
    result = evaluate(lstm, data, lambda output, target: F.mse_loss(output[0], target))
    assert result["loss"] == pytest.approx(lstm(data[0][0])[0].square().mean().item(), rel=1e-6)  # fp32


def test_evaluate_says_what_is_wrong():
    data = iter([(torch.zeros(1), torch.zeros(1))])
    evaluate(nn.Identity(), data, F.l1_loss)
    with pytest.raises(ValueError, match=r"at least one batch, got 'no targets from \w+'; a generator can be read only once"):
        evaluate(nn.Identity(), data, F.l1_loss)
    for batch in (torch.zeros(2), (torch.zeros(2),), (torch.zeros(2), None)):
        with pytest.raises(SettingError, match=r"evaluate: (data|loss) must be .*\(\w+, target\)"):
            evaluate(nn.Identity(), [batch], F.l1_loss)


# latency


class Sleep(nn.Module):
    def __init__(self, seconds, log=None):
        super().__init__()
        self.seconds, self.log = seconds, [] if log is None else log

    def forward(self, x):
        self.log.append(self.seconds)
        time.sleep(self.seconds)
        return x


def test_latency_of_a_known_delay():
    result = latency(Sleep(0.01), x(B, E), threads=2, repeats=3, min_time=0.03)
    assert isinstance(result, Latency)
    assert (result.batch, result.threads) == (B, 2)
    assert result.median_s >= 0.01  # a sleep is never shorter; how much longer depends on the machine's other work
    assert result.runs >= 3
    assert result.iqr_s >= 0
    assert latency(nn.Identity(), x(T, B, E), repeats=1, min_time=0.001, batch_size=B).batch == B


def test_models_take_turns():
    log = []
    result = compare_latency({"slow": Sleep(0.01, log), "fast": Sleep(0, log)}, x(B, E), repeats=3, min_time=0.001)
    assert list(result) == ["slow", "fast"]
    assert result["slow"].median_s >= 0.01  # a sleep is never shorter: no machine is too busy for this
    turns = [log[0], *(after for before, after in itertools.pairwise(log) if before != after)]
    assert turns == [0.01, 0] * 3


def test_one_model_under_two_names():
    model = mixed()
    before = flags(model)
    compare_latency({"a": model, "b": model}, x(B, E), repeats=1, min_time=0.001)
    assert flags(model) == before


@pytest.mark.parametrize(("name", "value"), [("threads", 0), ("repeats", 0), ("min_time", -1.0)])
def test_latency_settings(name, value):
    with pytest.raises(SettingError, match=f"latency: {name} must be"):
        latency(nn.Identity(), x(B, E), **{name: value})


# Measurement


def test_measure_all():
    model = mixed()
    data = [(torch.zeros(4, E), torch.tensor([0, 0, 1, 1]))]
    m = measure(model, x(B, E), data=data, loss=F.cross_entropy, threads=2)
    assert m.params == E * H + H + 2 * H + 2 * H + 2
    assert m.macs == E * H + 2 * H
    assert m.size_bytes == 4 * (m.params + 2 * H) + 8  # running mean and variance, and the int64 count of batches
    assert m.accuracy == 0.5
    assert m.loss > 0
    assert (m.batch, m.threads, m.ranks) == (B, 2, {})
    assert m.latency_s > 0
    assert Measurement.from_dict(json.loads(json.dumps(m.to_dict()))) == m


def test_measure_what_is_asked():
    m = measure(nn.Linear(E, H))
    assert m == Measurement(params=54, macs=None, size_bytes=216)
    assert measure(nn.Linear(E, H), x(B, E), latency=False) == Measurement(params=54, macs=48, size_bytes=216)
    with pytest.raises(SettingError, match="data and loss must be given together or not at all, got 'data alone'"):
        measure(nn.Linear(E, H), data=[])


def test_measure_ranks():
    low = factorize(nn.Sequential(nn.Linear(E, H), nn.LSTM(H, 5)))
    ranks = measure(low).ranks
    assert {type(rank) for rank in ranks.values()} == {int}
    assert all(rank in (5, 6) for rank in ranks.values())
    assert {name.split(".")[0] for name in ranks} == {"0", "1"}


def test_shared_tensors_count_once():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    assert measure(model).params == 80
    model[1].weight = model[0].weight
    assert (measure(model).params, measure(model).size_bytes) == (40, 160)
    model[1].weight = nn.Parameter(model[0].weight.detach())  # another parameter on the same memory
    assert (measure(model).params, measure(model).size_bytes) == (40, 160)
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    assert measure(model).params == 80


def test_size_is_that_of_the_state_dict():
    model = nn.Linear(4, 4).to(torch.bfloat16)
    model.register_buffer("kept", torch.zeros(3, dtype=torch.float64))
    model.register_buffer("not kept", torch.zeros(100), persistent=False)
    assert measure(model).size_bytes == 2 * 20 + 24
    flat = torch.zeros(20)  # as cuDNN does it: views of one piece of memory
    model = nn.Linear(4, 4)
    model.weight, model.bias = nn.Parameter(flat[:16].view(4, 4)), nn.Parameter(flat[16:])
    assert (measure(model).params, measure(model).size_bytes) == (20, 80)


def test_measure_without_data():
    """A model on the meta device has costs, but no numbers."""
    model = nn.LSTM(E, H, device="meta")
    assert measure(model, x(T, B, E), batch_size=B, latency=False).macs == T * 4 * FIRST


def test_from_dict_says_what_is_wrong():
    with pytest.raises(FormatError, match=r"unknown fields \['rank'\], missing fields \['macs', 'size_bytes'\]"):
        Measurement.from_dict({"params": 1, "rank": 3})


def test_summary():
    m = Measurement(1_234_567, 89_012_345, 4_938_268, {"a": 3, "b": 8}, 0.9173, 0.25, 0.001234, 0.00001, 1, 2)
    assert m.summary().splitlines() == [
        "| accuracy    |                     91.73 % |",
        "| loss        |                      0.2500 |",
        "| parameters  |                   1,234,567 |",
        "| MACs        |                  89,012,345 |",
        "| size        |       4,938,268 B (4.7 MiB) |",
        "| ranks       | 3 to 8, mean 5.5, 2 weights |",
        "| latency     |                    1.234 ms |",
        "| latency IQR |                    0.010 ms |",
        "| timed with  |          batch 1, 2 threads |",
    ]


def test_compare_table():
    dense = Measurement(1000, 1200, 4000, accuracy=0.5, loss=1.0, latency_s=0.003, latency_iqr_s=0.0, batch=1, threads=1)
    low = Measurement(500, 300, 2000, {"a": 2}, accuracy=0.25, loss=2.0, latency_s=0.002, latency_iqr_s=0.0, batch=1, threads=1)
    other = Measurement(500, None, 1000, latency_s=0.001, latency_iqr_s=0.0, batch=8, threads=1)
    lines = compare_table({"dense": dense, "low-rank": low, "[b]other": other}).splitlines()
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line)}
    assert rows[""] == ["dense", "low-rank", "[b]other"]
    assert rows["accuracy"] == ["50.00 %", "25.00 %", "-"]
    assert rows["ranks"] == ["-", "2 to 2, mean 2.0, 1 weight", "-"]
    assert rows["compression"] == ["1.00x", "2.00x", "4.00x"]
    assert rows["MAC reduction"] == ["1.00x", "4.00x", "-"]
    assert rows["speedup"] == ["1.00x", "1.50x", "-"]  # another batch: no comparison
    assert len({len(line) for line in lines}) == 1
    assert compare_table({}) == ""


def test_a_parameter_that_a_model_hands_to_a_layer_is_no_obstacle() -> None:
    class Hands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.mix = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 5, bias=False)
            self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.mix(self.positions)

    model = Hands()
    assert count_macs(model, torch.randn(1, 4)) == 4 * 6 * 5 + 4 * 5
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {"positions": True, "frozen": False, "mix.weight": True}
