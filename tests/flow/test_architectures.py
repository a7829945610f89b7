"""Every verb on architectures of transformers that nobody here wrote, built from their configs with random weights."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.layers import FactorizedLayer
from spectrim.plain.chain import PlainPair
from spectrim.plain.reader import PlainReader

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import architectures as zoo  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))
EVERYTHING = sp.match("*")
UNREACHABLE: dict[str, str] = {}
"""Networks whose ranks cannot reach half of the multiply-accumulates, and why."""


def ties(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def continuation(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    given = {name: tensor for name, tensor in inputs.items() if not name.startswith("decoder")}
    tokens: Tensor = model.generate(**given, max_new_tokens=4, do_sample=False)
    return tokens


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of transformers, about its own future
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_architecture(name: str) -> None:
    dense, inputs = zoo.build(name)
    expected = zoo.run(dense, inputs)
    assert expected.abs().max() > 0.1, "an output near zero is equal to anything"

    low = sp.factorize(dense)
    torch.testing.assert_close(zoo.run(low, inputs), expected, rtol=1e-4, atol=1e-5)  # float32, rounded anew in each of up to 40 layers
    lines = {line.name: line for line in sp.coverage(low)}
    holders = {key for key, module in dense.named_modules() if any(p is not None for p in module._parameters.values())}
    held = {key.split(".parametrizations")[0] for key in holders}
    assert {key if key in held else key.rpartition(".")[0] for key in lines} == held  # stacks of experts have lines of their own
    assert all(line.reason for line in lines.values())
    assert sum(line.factorized for line in lines.values()) >= 8

    reached, ranks = zoo.ranks_for(low, inputs)
    assert (reached == 0.5) == (name not in UNREACHABLE)
    assert name not in UNREACHABLE or any(line.reason.startswith(UNREACHABLE[name]) for line in lines.values())
    cut = sp.prune(low, ranks)
    merged = sp.merge(cut)
    macs = {model: sp.measure(model, inputs, latency=False).macs for model in (dense, merged)}
    assert macs[merged] <= reached * macs[dense]
    assert any(isinstance(module, PlainPair | PlainReader) for module in merged.modules())
    assert not any(isinstance(module, FactorizedLayer) for module in merged.modules())
    output = zoo.run(cut, inputs)
    assert not torch.allclose(output, expected, rtol=1e-3, atol=1e-3), "half of the network was cut"
    torch.testing.assert_close(zoo.run(merged, inputs), output, rtol=1e-4, atol=1e-5)  # the same
    for group in ties(dense):
        held = [merged.get_parameter(key) for key in group if not isinstance(merged.get_submodule(key.rpartition(".")[0]), PlainPair)]
        assert all(parameter is held[0] for parameter in held)

    for model in (cut, merged):
        assert torch.equal(zoo.run(zoo.reloaded(model, name), inputs), zoo.run(model, inputs))
    if getattr(dense, "can_generate", bool)():
        tokens = continuation(cut, inputs)
        assert tokens.shape[1] >= 4
        assert torch.equal(continuation(merged, inputs), tokens)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "qwen2", "t5"])
def test_a_head_and_its_embedding_share_their_factors(name: str) -> None:
    dense, inputs = zoo.build(name)
    tied = [group for group in ties(dense) if all(key.endswith(".weight") for key in group)]
    assert tied
    low = sp.factorize(dense, where=EVERYTHING)
    torch.testing.assert_close(zoo.run(low, inputs), zoo.run(dense, inputs), rtol=1e-4, atol=1e-5)  # as above
    cut = sp.prune(low, sp.budget.Fixed(7))
    merged = sp.merge(cut)
    torch.testing.assert_close(zoo.run(merged, inputs), zoo.run(cut, inputs), rtol=1e-4, atol=1e-5)  # as above
    for group in tied:
        layers: list[Any] = [low.get_submodule(key.removesuffix(".weight")) for key in group]
        assert all(layer.factors_of("weight") is layers[0].factors_of("weight") for layer in layers)
        pairs: list[Any] = [merged.get_submodule(key.removesuffix(".weight")) for key in group]
        larger = [pair[0].weight if isinstance(pair[0], nn.Embedding) else pair[1].weight for pair in pairs]
        assert all(weight is larger[0] for weight in larger)
    for model in (cut, merged):
        again = zoo.reloaded(model, name)
        assert ties(again) == ties(model)
        assert torch.equal(zoo.run(again, inputs), zoo.run(model, inputs))


def test_shared_layers_of_albert_are_factorized_once() -> None:
    dense, _ = zoo.build("albert")
    low = sp.factorize(dense)
    names = [name for name, _ in sp.layers.named_factors(low)]
    assert len([name for name in names if name.endswith("ffn")]) == 1
    assert dense.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["albert", "gpt2", "resnet"])
def test_plan_and_compress(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["spectrim.metrics.measurement"]
    monkeypatch.setattr(module, "compare_latency", partial(sp.compare_latency, repeats=1, min_time=0.001))  # how long is not the question
    dense, inputs = zoo.build(name)
    planned = sp.plan(dense, inputs, budgets=[0.9])
    assert planned.to_dict()["budgets"]
    target = zoo.run(dense, inputs)
    data = [(inputs, target)]

    def loss(output: Any, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(zoo.answer(output), target)

    made = sp.compress(dense, data, loss, sp.Budget(macs=0.9), example_inputs=inputs, progress=False)
    assert made.measured["final"].macs <= 0.9 * made.measured["dense"].macs
    assert made.scores["cut"]["loss"] > made.scores["dense"]["loss"]
    torch.testing.assert_close(zoo.run(made.model, inputs), zoo.run(made.low, inputs), rtol=1e-4, atol=1e-5)  # as above
