"""Merged networks through transformers' own `save_pretrained` and `AutoModel.from_pretrained`."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim as sp
from spectrim.errors import FormatError, LayerError

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
SPECIAL = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32, **SPECIAL)).eval()


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_key_value_heads=1, tie_word_embeddings=True, **SIZES, **SPECIAL)
    ).eval()


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3, **SIZES, **SPECIAL)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_its_own_save_pretrained_writes_what_auto_classes_load(make: Any, tmp_path: Path) -> None:
    dense = make()
    merged: Any = sp.merge(sp.factorize(dense, where=sp.match("*"), rank=2))
    merged.save_pretrained(tmp_path / "one")
    assert getattr(dense.config, "quantization_config", None) is None, "the dense network is as it was"
    auto = transformers.AutoModelForSequenceClassification if make is bert else transformers.AutoModelForCausalLM
    again, told = auto.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert torch.equal(logits(again), logits(merged))
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in merged.named_parameters()], "ties hold"
    again.save_pretrained(tmp_path / "two")
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "two")), logits(merged))


def test_a_base_model_and_another_head_load_what_they_have(tmp_path: Path) -> None:
    merged: Any = sp.merge(sp.factorize(bert(), rank=2))
    merged.save_pretrained(tmp_path / "one")
    for auto in (transformers.AutoModel, transformers.AutoModelForTokenClassification):
        again = auto.from_pretrained(tmp_path / "one")
        base = getattr(again, "bert", again)
        with torch.no_grad():
            assert torch.equal(base(IDS).last_hidden_state, merged.bert(IDS).last_hidden_state)
    transformers.AutoModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "base")
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(whole.bert(IDS).last_hidden_state, merged.bert(IDS).last_hidden_state)


def test_what_transformers_would_load_half_random_is_refused(tmp_path: Path) -> None:
    mixed: Any = sp.merge(sp.factorize(llama(), rank=2))
    mixed.model.norm.to(torch.float64)
    with pytest.raises(LayerError, match="several dtypes"):
        mixed.save_pretrained(tmp_path / "mixed")


def test_a_network_that_is_loaded_is_trained_and_factorized_again(tmp_path: Path) -> None:
    merged: Any = sp.merge(sp.factorize(llama(), rank=6))
    merged.save_pretrained(tmp_path / "one")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    settings = transformers.TrainingArguments(str(tmp_path / "run"), report_to="none", max_steps=1, save_strategy="no", use_cpu=True)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    before = again.get_input_embeddings().weight.detach().clone()
    transformers.Trainer(again, settings, train_dataset=rows).train()
    assert not torch.equal(again.get_input_embeddings().weight, before)
    low: Any = sp.factorize(again, where=sp.match("*"), rank=2)
    assert getattr(low, "hf_quantizer", None) is None, "checkpoints of a Trainer hold its factors"
    assert low.config.quantization_config.factorized
    sp.factorize(again, rank=2).save_pretrained(tmp_path / "low")  # type: ignore[operator]
    with pytest.raises(FormatError, match="is of a factorized network"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    assert again.config.quantization_config.quant_method == "spectrim"
    smaller: Any = sp.merge(low)
    with pytest.raises(LayerError, match="merged more than once"):
        smaller.save_pretrained(tmp_path / "two")


def test_half_precision_and_another_model_in_the_folder(tmp_path: Path) -> None:
    merged: Any = sp.merge(sp.factorize(llama(), rank=2)).to(torch.bfloat16)
    merged.save_pretrained(tmp_path / "one")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(merged))
    config = (tmp_path / "one" / "config.json").read_text(encoding="utf-8")
    (tmp_path / "one" / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'), encoding="utf-8")
    with pytest.raises(Exception, match="another architecture: the model has no layer"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")


def test_importing_spectrim_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, spectrim; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
