"""`hidden_units` finds what one layer alone reads, behind operations on each feature by itself, and nothing else."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectrim.surgery.hidden_units import HiddenUnits, hidden_units


@dataclass
class Told:
    out: torch.Tensor
    hidden: torch.Tensor


class Net(nn.Module):
    """Layers `a` and `b`, and a function of them and the input."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def found(forward, x=None, **layers):
    return hidden_units(Net(forward, **layers), torch.randn(2, 8) if x is None else x)


PLAIN = [HiddenUnits("b", ("a",), (), 12)]

OPEN = {
    "activation": lambda net, x: net.b(F.gelu(net.a(x))),
    "in place": lambda net, x: net.b(net.a(x).relu_()),
    "nothing between": lambda net, x: net.b(net.a(x)),
    "scalars": lambda net, x: net.b((net.a(x) * 2 + 1).clamp(max=3.0).pow(2)),
    "of each row": lambda net, x: net.b(net.a(x) * x.sum(1, keepdim=True)),
    "of itself": lambda net, x: net.b((y := net.a(x)) * y.sigmoid()),
    "views": lambda net, x: net.b(net.a(x).view(2, 1, 12).transpose(0, 1).permute(1, 0, 2).reshape(2, 12)),
    "mean over positions": lambda net, x: net.b(net.a(x[:, None]).expand(2, 3, 12).clone().mean(1)),
    "a type and back": lambda net, x: net.b(net.a(x).double().float()),
    "detached": lambda net, x: net.b(net.a(x).detach().contiguous()),
    "dropout": lambda net, x: net.b(F.dropout(net.a(x), 0.5, net.training)),
    "a switch of its own": lambda net, x: net.b(torch.where(x[:, :1] > 0, net.a(x), x.new_zeros(()))),
}

CLOSED = {
    "softmax": lambda net, x: net.b(net.a(x).softmax(-1)),
    "layer norm": lambda net, x: net.b(F.layer_norm(net.a(x), (12,))),
    "a sum over features": lambda net, x: net.b(net.a(x) / net.a(x).norm()),
    "another reader": lambda net, x: net.b(y := net.a(x)) + y[:, :8],
    "read twice": lambda net, x: net.b(y := net.a(x)) + net.b(2 * y),
    "made twice": lambda net, x: net.b(net.a(x) * net.a(2 * x)),
    "the output": lambda net, x: (net.b(y := net.a(x)), y),
    "an object of the output": lambda net, x: Told(net.b(y := net.a(x)), y),
    "an attribute of the output": lambda net, x: SimpleNamespace(out=net.b(y := net.a(x)), hidden=y),
    "a number": lambda net, x: net.b(y := net.a(x)) * float(y[0, 0]),
    "a part": lambda net, x: net.b(F.pad(net.a(x)[:, :6], (0, 6))),
    "mirrored": lambda net, x: net.b(net.a(x).flip(1)),
    "heads": lambda net, x: net.b(net.a(x).view(2, 3, 4).relu().flatten(1)),
    "a vector of its own": lambda net, x: net.b(net.a(x) * net.scale),
    "a matrix of its own": lambda net, x: net.b(net.a(x) @ net.square),
    "a weight that code reads": lambda net, x: net.b(net.a(x)) * net.a.weight.norm(),
    "another layer's features": lambda net, x: net.b(net.a(x) + F.pad(x, (0, 4))),
    "no reader": lambda net, x: net.a(x).relu().sum(1),
}


@pytest.mark.parametrize("name", OPEN)
def test_features_that_stay_what_they_are_are_followed(name):
    assert found(OPEN[name]) == PLAIN


@pytest.mark.parametrize("name", CLOSED)
def test_features_that_anything_else_reads_are_left_alone(name):
    extra = {"scale": nn.Parameter(torch.rand(12)), "square": nn.Parameter(torch.eye(12))}
    assert found(CLOSED[name], **extra) == []


def test_gate_and_up_are_one_group_and_order_is_that_of_the_readers():
    net = Net(lambda net, x: net.b(F.silu(net.a(x)) * net.up(x)), up=nn.Linear(8, 12, bias=False))
    assert hidden_units(net, torch.randn(2, 8)) == [HiddenUnits("b", ("a", "up"), (), 12)]
    stack = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
    assert [(units.reader, units.makers) for units in hidden_units(stack, torch.randn(2, 8))] == [("2", ("0",)), ("4", ("2",))]


def test_channels_pass_batch_norm_pools_depthwise_convolutions_and_flatten():
    stack = nn.Sequential(
        nn.Conv2d(3, 10, 3, bias=False), nn.BatchNorm2d(10), nn.ReLU(inplace=True), nn.Conv2d(10, 10, 3, groups=10), nn.MaxPool2d(2),
        nn.Conv2d(10, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    assert hidden_units(stack, torch.randn(2, 3, 12, 12)) == [
        HiddenUnits("5", ("0",), ("1", "3"), 10),
        HiddenUnits("9", ("5",), (), 6, taps=4),
    ]


def test_unbatched_channels_and_other_groups_are_left_alone():
    stack = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3))
    assert len(hidden_units(stack, torch.randn(1, 4, 9))) == 1
    assert hidden_units(stack, torch.randn(4, 9)) == []
    grouped = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, groups=2))
    assert hidden_units(grouped, torch.randn(1, 4, 9)) == []
    multiplied = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Conv1d(8, 16, 3, groups=8), nn.Conv1d(16, 4, 1))
    assert hidden_units(multiplied, torch.randn(1, 4, 9)) == []


def test_layers_of_other_classes_tied_parametrized_and_shared_ones_are_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Other(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T.softmax(1)

    assert found(OPEN["activation"], a=Doubled(8, 12)) == PLAIN  # what it does around its weight is watched, too
    assert found(OPEN["activation"], a=Other(8, 12)) == []
    assert found(OPEN["activation"], b=nn.utils.parametrizations.weight_norm(nn.Linear(12, 8))) == []
    tied = Net(lambda net, x: net.c(net.b(net.a(x).relu())).relu(), c=nn.Linear(8, 12))
    tied.c.weight = tied.a.weight
    assert hidden_units(tied, torch.randn(2, 8)) == []


def test_residual_streams_have_several_readers_and_their_blocks_have_units():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(self.norm(x))))

    net = nn.Sequential(nn.Linear(5, 8), Block(), Block(), nn.Linear(8, 3))
    assert [(units.reader, units.count) for units in hidden_units(net, torch.randn(2, 5))] == [("1.down", 16), ("2.down", 16)]


def test_torchs_encoder_layer_is_looked_into_and_the_model_and_generators_stay_as_they_are():
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.5).train(), torch.randn(1, 5, 16)
    before, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    assert hidden_units(model, x) == [HiddenUnits("linear2", ("linear1",), (), 32)]
    assert model.training
    assert all(value.requires_grad for value in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "settings", "reader"),
    [
        ("Llama", {"num_key_value_heads": 1}, "model.layers.1.mlp.down_proj"),
        ("Bert", {}, "bert.encoder.layer.1.output.dense"),
        ("Qwen2", {"num_key_value_heads": 1}, "model.layers.1.mlp.down_proj"),
        ("GPT2", {"n_inner": 24}, "transformer.h.1.mlp.c_proj"),
    ],
)
def test_feed_forward_blocks_of_transformers(kind, settings, reader):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **settings
    )
    head = {"Bert": "ForMaskedLM", "GPT2": "LMHeadModel"}.get(kind, "ForCausalLM")
    model = getattr(transformers, f"{kind}{head}")(config)
    units = hidden_units(model, torch.randint(50, (1, 6)))
    assert [entry.count for entry in units] == [24, 24]
    assert units[-1].reader == reader
