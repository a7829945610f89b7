"""`narrow`: within the budget, the same function but for what is left out, and clear refusals."""

import itertools

import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.budget.budget import BudgetError
from spectrim.budget.narrow import narrow
from spectrim.errors import FormatError, LayerError, SettingError
from spectrim.surgery.hidden_units import hidden_units
from spectrim.surgery.narrowed import narrowed


def mlp(*sizes):
    layers = [layer for one, two in itertools.pairwise(sizes) for layer in (nn.Linear(one, two), nn.GELU())]
    return nn.Sequential(*layers[:-1]).eval()


def batches(*shape, count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, *shape, generator=generator) for _ in range(count)]


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12), nn.ReLU(),
        nn.Conv2d(12, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("limit", ["macs", "params", "size"])
@pytest.mark.parametrize("share", [0.8, 0.35])
def test_keeps_the_limit_in_networks_whose_layers_are_in_two_groups(limit, share):
    for model, data in ((mlp(10, 30, 20, 6), batches(10)), (convolutions(), batches(3, 8, 8))):
        made = narrow(model, data, sp.Budget(**{limit: share}))
        before, after = (sp.measure(network, data[0][:1], latency=False) for network in (model, made.model))
        name = {"size": "size_bytes"}.get(limit, limit)
        kept = getattr(after, name) / getattr(before, name)
        assert share - 0.2 < kept <= share
        assert {type(one) for one in made.model} == {type(one) for one in model}
        assert made.model(data[0]).shape == model(data[0]).shape


def test_units_that_repeat_others_are_left_out_without_loss():
    torch.manual_seed(0)
    model = mlp(8, 24, 5)
    with torch.no_grad():
        model[0].weight[12:], model[0].bias[12:] = model[0].weight[:12], model[0].bias[:12]
    data = batches(8)
    made = narrow(model, data, sp.Budget(params=(8 * 12 + 12 + 12 * 5 + 5) / (8 * 24 + 24 + 24 * 5 + 5)))
    assert made.widths == {"2": 12}
    kept = [row for row in range(24) if any(torch.equal(model[0].weight[row], weight) for weight in made.model[0].weight)]
    assert {row % 12 for row in kept} == set(range(12))
    torch.testing.assert_close(made.model(data[0]), model(data[0]), rtol=1e-3, atol=1e-3)
    assert made.predicted["2"] < 1e-6


def test_the_refit_is_better_than_leaving_the_same_units_out_and_the_bias_takes_up_the_mean():
    torch.manual_seed(1)
    model, data = mlp(8, 40, 5), batches(8)
    made = narrow(model, data, 0.5)
    rows = [row for row in range(40) if any(torch.equal(model[0].weight[row], kept) for kept in made.model[0].weight)]
    plain = narrow(model, data, 0.5).model
    with torch.no_grad():
        plain[2].weight.copy_(model[2].weight[:, rows])
        plain[2].bias.copy_(model[2].bias)
    x = torch.cat(data)
    with torch.no_grad():
        made_outputs, plain_outputs, wanted = (network(x) for network in (made.model, plain, model))
    errors = [float((outputs - wanted).square().mean()) for outputs in (made_outputs, plain_outputs)]
    assert errors[0] < 0.5 * errors[1]
    assert float((made_outputs - wanted).mean(0).abs().max()) < 1e-3


def test_a_loss_whose_gradient_vanishes_is_as_good_as_none():
    torch.manual_seed(3)
    model, data = mlp(8, 40, 5), batches(8)
    with torch.no_grad():
        pairs = [(x, model(x)) for x in data]
    made = narrow(model, pairs, 0.5, nn.functional.mse_loss)
    free, x = narrow(model, data, 0.5), torch.cat(data)
    with torch.no_grad():
        errors = [float((network.model(x) - model(x)).square().mean()) for network in (made, free)]
    assert errors[0] <= 1.05 * errors[1]


def test_predicted_rises_are_those_of_the_relative_distance_of_a_last_layer():
    torch.manual_seed(2)
    model, data = mlp(8, 40, 5), batches(8, count=40)
    made = narrow(model, data, 0.7)
    x = torch.cat(data)
    with torch.no_grad():
        outputs, target = made.model(x), model(x)
    found = float((outputs - target).square().mean() / (target - target.mean()).square().mean())
    assert made.predicted["2"] == pytest.approx(found, rel=0.2)


def test_leaving_out_is_reading_zeros_in_every_kind_of_layer():
    model, x = convolutions(), batches(3, 8, 8)[0]
    made = narrow(model, [x], 0.5)
    assert made.model[0].out_channels == made.model[1].num_features == made.model[3].groups == made.model[5].in_channels == made.widths["5"]
    assert made.model[8].in_features == 36 * made.widths["8"]
    assert model[0].out_channels == 12
    assert [(one.reader, one.count) for one in hidden_units(made.model, x)] == [("5", made.widths["5"]), ("8", made.widths["8"])]


def test_code_that_knows_the_width_keeps_its_units_and_is_named():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x).relu().view(len(x), 16))).relu())

    made = narrow(Stubborn().eval(), batches(8), 0.8)
    assert set(made.refused) == {"b"}
    assert "needs them all" in made.refused["b"]
    assert set(made.widths) == {"c", "d"}
    assert "left alone: what `b` reads" in str(made)


def test_a_network_that_computes_something_else_is_never_returned(monkeypatch):
    """The tracer is deceived here: it takes softmax for an operation on each feature by itself."""
    from spectrim.surgery import features as room

    monkeypatch.setattr(room, "ALIKE", room.ALIKE | {"_softmax"})
    model = nn.Sequential(nn.Linear(8, 16), nn.Softmax(1), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    assert [one.reader for one in hidden_units(model, batches(8)[0])] == ["2", "4"]
    made = narrow(model, batches(8), 0.7)
    assert set(made.refused) == {"2"}
    assert "its output in the narrower differs" in made.refused["2"] or "differ" in made.refused["2"]


def test_refusals_name_what_to_do():
    data = batches(8)
    with pytest.raises(LayerError, match="no hidden units"):
        narrow(nn.Sequential(nn.Linear(8, 8), nn.Softmax(1), nn.Linear(8, 8)), data, 0.5)
    with pytest.raises(BudgetError, match="cannot be met by fewer hidden units: at least 0"):
        narrow(mlp(8, 16, 4), data, 0.01)
    with pytest.raises(SettingError, match="limits of macs, params, size, size_bytes"):
        narrow(mlp(8, 16, 4), data, sp.Budget(latency=0.5))
    with pytest.raises(SettingError, match="nothing"):
        narrow(mlp(8, 16, 4), data, 0.5, where="nothing")


def test_half_precision_frozen_weights_and_labels():
    torch.manual_seed(0)
    model = mlp(8, 16, 4).bfloat16()
    model[2].weight.requires_grad_(False)
    data = [(x.bfloat16(), torch.randint(4, (32,))) for x in batches(8)]
    made = narrow(model, data, 0.6, lambda output, target: nn.functional.cross_entropy(output.float(), target))
    assert made.model[0].weight.dtype == torch.bfloat16
    assert [value.requires_grad for value in made.model.parameters()] == [True, True, False, True]
    assert len(list(model[0].weight)) == 16


def test_a_narrower_network_is_saved_and_read_into_the_original(tmp_path):
    model, x = convolutions(), batches(3, 8, 8)[0]
    made = narrow(model, [x], 0.6).model
    back = sp.load(sp.save(made, tmp_path / "narrow"), convolutions())
    assert torch.equal(back(x), made(x))
    low = sp.prune(sp.factorize(made, where="8"), sp.Fixed(2))
    assert torch.equal(sp.load(sp.save(low, tmp_path / "low"), convolutions()).eval()(x), low.eval()(x))
    merged = sp.merge(low)
    assert torch.equal(sp.load(sp.save(merged, tmp_path / "merged"), convolutions()).eval()(x), merged.eval()(x))
    with pytest.raises(FormatError, match="of another architecture"):
        sp.load(tmp_path / "narrow", mlp(8, 16, 4))


@pytest.mark.parametrize("sizes", [{"0": [13, 3]}, {"0": [0, 3]}, {"7": [1, 1]}, {"0": "all"}, {"gone": [1, 1]}, {"0": [1.5, 3]}])
def test_sizes_that_the_original_cannot_have_are_refused(sizes):
    from spectrim.surgery.resized import resized

    with pytest.raises(LayerError):
        resized(convolutions(), sizes)


def test_nothing_left_out_is_the_same_network():
    model, x = convolutions(), batches(3, 8, 8)[0]
    made = narrowed(model, {})
    assert torch.equal(made(x), model(x))
    assert made is not model


def test_a_transformer_of_a_library_keeps_the_budget_and_its_file_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=2, n_positions=12)
    model, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.randint(40, (8, 12))
    made = narrow(model, [{"input_ids": tokens}], sp.Budget(params=0.8))
    count = [sum(parameter.numel() for parameter in network.parameters()) for network in (model, made.model)]
    assert 0.75 < count[1] / count[0] <= 0.8
    assert set(made.widths) == {"transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"}
    back = sp.load(sp.save(made.model, tmp_path), transformers.GPT2LMHeadModel(config))
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, made.model(tokens).logits)
    made.model.save_pretrained(tmp_path / "hub")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, made.model(tokens).logits)


def test_a_pair_that_was_merged_gets_a_smaller_rank_and_stays_a_pair():
    torch.manual_seed(0)
    model, data = mlp(16, 24, 8), batches(16)
    pair = sp.compress(model, data, sp.Budget(macs=0.6), where="0", progress=False).model
    made = narrow(pair, data, 0.8, where="0*")
    assert [type(one).__name__ for one in made.model] == [type(one).__name__ for one in pair]
    assert sp.measure(made.model, data[0][:1], latency=False).macs <= 0.8 * sp.measure(pair, data[0][:1], latency=False).macs
