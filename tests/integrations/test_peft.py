"""LoRA adapters of peft before and after compression."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import LayerError
from spectrim.integrations.adapters import adapter_targets
from spectrim.layers import named_factors
from spectrim.plain.chain import PlainPair
from spectrim.surgery.select import ADAPTED

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers by an old name

IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    return transformers.LlamaForCausalLM(config).double().eval()


def adapted(model: nn.Module, targets: Any, **more: Any) -> Any:
    """Put adapters on a copy, with an effect."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=targets, **more)).eval()
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def test_adapted_layers_are_refused_with_the_reason_and_the_others_are_not() -> None:
    model = adapted(llama(), ["q_proj", "v_proj"], modules_to_save=["lm_head"])
    reasons = {line.name.removeprefix("base_model.model."): line.reason for line in sp.coverage(model)}
    refused = {name for name, reason in reasons.items() if reason == ADAPTED}
    inside = [f"model.layers.0.self_attn.{side}.{part}" for side in ("q_proj", "v_proj") for part in ("base_layer", "lora_A.default")]
    heads = ("lm_head.original_module", "lm_head.modules_to_save.default")
    assert refused == {*inside, *(name.replace("_A", "_B") for name in inside), *heads}
    low = sp.factorize(model)
    assert {name.rpartition(".")[2] for name, _ in named_factors(low)} == {
        "embed_tokens", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    torch.testing.assert_close(logits(low), logits(model))
    with pytest.raises(LayerError, match=r"nothing to factorize.*merge_and_unload"):
        sp.factorize(model, where=sp.match("*q_proj*"))


def test_merged_adapters_go_through_the_verbs() -> None:
    model = adapted(llama(), ["q_proj", "v_proj"])
    expected = logits(model)
    low = sp.factorize(model.merge_and_unload())
    torch.testing.assert_close(logits(low), expected)
    cut = sp.prune(low, sp.budget.Fixed(3))
    assert {factors.rank for _, factors in named_factors(cut)} == {3}
    torch.testing.assert_close(logits(sp.merge(cut)), logits(cut))


@pytest.mark.parametrize("targets", [["q_proj.0", "q_proj.1", "down_proj.1"], None], ids=["named", "all"])
def test_adapters_go_onto_a_merged_network_and_into_its_two_layers(targets: Any) -> None:
    small = sp.merge(sp.factorize(llama(), rank=2))
    model = adapted(small, targets or adapter_targets(small))
    assert not torch.allclose(logits(model), logits(small))
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, PlainPair)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    expected, shapes = logits(model), {name: p.shape for name, p in small.named_parameters()}
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert {name: p.shape for name, p in merged.named_parameters()} == shapes


def test_targets_are_the_layers_that_are_called_once() -> None:
    small = sp.merge(sp.factorize(llama(), rank=2, where=sp.match("*.0.self_attn.q_proj")))
    names = adapter_targets(small)
    assert {"model.layers.0.self_attn.q_proj.0", "model.layers.0.self_attn.q_proj.1", "model.layers.0.self_attn.k_proj"} <= set(names)
    assert "model.layers.0.self_attn.q_proj" not in names
    assert "lm_head" not in names


def test_an_adapter_around_a_pair_works_and_merging_it_is_an_error_that_loses_nothing() -> None:
    small = sp.merge(sp.factorize(llama(), rank=2))
    model = adapted(small, ["q_proj"])
    expected = logits(model)
    assert not torch.allclose(expected, logits(small))
    with pytest.raises(RuntimeError, match="PlainPair: its weight is composed of the weights of its layers"):
        model.merge_and_unload()
    torch.testing.assert_close(logits(model), expected)


def test_merging_adapters_into_a_factorized_network_is_an_error_and_loses_nothing() -> None:
    low = sp.factorize(llama(), rank=2)
    model = adapted(low, ["q_proj"])
    expected = logits(model)
    assert not torch.allclose(expected, logits(low))
    with pytest.raises(RuntimeError, match=r"FactorizedLinear: its weight is composed of the factors U, S and Vh"):
        model.merge_and_unload()
    torch.testing.assert_close(logits(model), expected)


def test_a_model_with_adapters_is_not_saved(tmp_path: Any) -> None:
    from spectrim.integrations.pretrained import save_pretrained

    model = adapted(sp.merge(sp.factorize(llama(), rank=2)), ["q_proj.1"])
    for wrapped in (model, model.base_model.model):
        with pytest.raises(LayerError, match="merge_and_unload"):
            save_pretrained(wrapped, tmp_path / "small")
    save_pretrained(model.merge_and_unload(), tmp_path / "small")
