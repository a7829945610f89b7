"""Low-rank models of transformers as folders, and dict batches through the verbs."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import FormatError, LayerError, SettingError
from spectrim.layers import named_factors

transformers = pytest.importorskip("transformers")

from spectrim.integrations import pretrained  # noqa: E402
from spectrim.integrations.batches import model_loss, pairs  # noqa: E402
from spectrim.integrations.pretrained import from_pretrained, push_to_hub, save_pretrained  # noqa: E402

IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
SPECIAL = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32, **SPECIAL)).eval()


def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **SPECIAL)).eval()


def t5() -> Any:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, **SPECIAL)
    return transformers.T5ForConditionalGeneration(config).eval()


def bert() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **SPECIAL)).eval()


def call(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


@pytest.fixture
def merged() -> Any:
    return sp.merge(sp.factorize(gpt2(), rank=2))


@pytest.mark.parametrize("make", [gpt2, llama, t5, bert])
@pytest.mark.parametrize("form", [lambda low: low, sp.merge], ids=["factorized", "merged"])
def test_a_saved_model_comes_back_the_same(make: Callable[[], Any], form: Callable[[Any], Any], tmp_path: Path) -> None:
    model = form(sp.factorize(make(), rank=2))
    before = torch.get_rng_state()
    again: Any = from_pretrained(save_pretrained(model, tmp_path / "small"))
    assert torch.equal(torch.get_rng_state(), before)
    assert type(again) is type(model)
    assert not any(module.training for module in again.modules())
    assert torch.equal(call(again), call(model))
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]  # tied ones are named once
    if model.can_generate():
        assert torch.equal(again.generate(IDS, max_new_tokens=4), model.generate(IDS, max_new_tokens=4))
    assert "spectrim" not in again.config.to_dict()


def test_generation_settings_and_tokenizer_are_kept(merged: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    merged.generation_config.max_new_tokens = 3
    folder = save_pretrained(merged, tmp_path / "small", tokenizer=words)
    assert from_pretrained(folder).generation_config.max_new_tokens == 3
    assert transformers.AutoTokenizer.from_pretrained(folder)("b")["input_ids"] == [1]


def test_plain_transformers_refuses_the_folder(merged: Any, tmp_path: Path) -> None:
    folder = save_pretrained(merged, tmp_path / "small")
    for auto in (transformers.AutoModel, transformers.AutoModelForCausalLM):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            auto.from_pretrained(folder)


@pytest.mark.parametrize("form", [lambda low: low, sp.merge], ids=["factorized", "merged"])
def test_dtypes_come_back_mixed_ones_too(form: Callable[[Any], Any], tmp_path: Path) -> None:
    dense = t5().to(torch.bfloat16)
    dense.encoder.block[0].layer[1].DenseReluDense.wo.float()  # as transformers keeps it
    dense.encoder.final_layer_norm.float()
    model = form(sp.factorize(dense, where=sp.match("*wo", "*wi"), rank=2))
    folder = save_pretrained(model, tmp_path / "small")
    again = from_pretrained(folder)
    assert again.config.dtype == torch.bfloat16
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    assert [f.dtype for _, f in named_factors(again)] == [f.dtype for _, f in named_factors(model)]
    cast = from_pretrained(folder, dtype=torch.float64)
    assert {p.dtype for p in cast.parameters()} == {torch.float64} == {cast.config.dtype}
    for name, tensor in cast.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].double())


def test_casting_leaves_buffers_that_are_not_saved(tmp_path: Path) -> None:
    model = llama()
    half: Any = from_pretrained(save_pretrained(sp.factorize(model, rank=2), tmp_path / "small"), dtype=torch.bfloat16)
    assert torch.equal(half.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert {factors.dtype for _, factors in named_factors(half)} == {torch.bfloat16}
    assert {factors.U.dtype for _, factors in named_factors(half)} == {torch.float32}


def test_a_base_in_shards_works(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "base", max_shard_size="10KB")
    assert len([*(tmp_path / "base").glob("model-*.safetensors")]) > 1
    low = sp.factorize(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), rank=2)
    assert torch.equal(call(from_pretrained(save_pretrained(low, tmp_path / "small"))), call(low))


class Own(transformers.LlamaForCausalLM if hasattr(transformers, "LlamaForCausalLM") else nn.Module):  # type: ignore[misc]
    """A class that is not in transformers."""


def test_a_class_of_ones_own_is_passed(tmp_path: Path) -> None:
    dense = Own(llama().config).eval()
    model = sp.merge(sp.factorize(dense, rank=2))
    folder = save_pretrained(model, tmp_path / "small")
    assert "model=Own(...)" in (folder / "README.md").read_text()
    with pytest.raises(FormatError, match="names Own, which is not in transformers; pass model="):
        from_pretrained(folder)
    assert torch.equal(call(from_pretrained(folder, model=Own(dense.config))), call(model))


def test_the_card_says_what_was_cut_and_what_it_cost(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    made = sp.compress(gpt2(), pairs(batches()), model_loss, sp.Budget(macs=0.8), cut="plain", examples=2, progress=False)
    text = (save_pretrained(made.model, tmp_path / "small", base_model="someone/gpt", report=made) / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "spectrim", "base_model": "someone/gpt", "tags": ["low-rank", "spectrim", "gpt2"]}
    for entry in made.measured.values():
        assert f"{entry.macs:,}" in text
        assert f"{entry.params:,}" in text
        assert f"{entry.size_bytes:,} B" in text
    cut = [line for line in made.coverage if line.factorized]
    for line in cut:
        size = f"{line.shape[0]} x {line.shape[1]}"
        assert f"| {line.name} | {size} | {made.ranks[line.name]} of {min(line.shape)} | {line.reason} |" in text
    for line in made.coverage:
        assert line.factorized or line.reason.endswith("vectors only") or f"| {line.reason} | " in text
    bare = (save_pretrained(made.model, tmp_path / "bare", report=made.measured) / "README.md").read_text()
    written = [(line.name, str(made.ranks[line.name])) for line in cut if "two layers" in line.reason]
    assert written
    assert re.findall(r"^\| (\S+) \| [\dx ]+ \| (\d+) \| two layers \|$", bare, re.MULTILINE) == written
    assert "base_model" not in yaml.safe_load(bare.split("---")[1])


def test_a_failure_leaves_what_was_there(merged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    save_pretrained(merged, tmp_path / "old")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = sp.merge(sp.factorize(llama(), rank=2))
    for name in ("save", "model_card"):
        with monkeypatch.context() as patch:
            patch.setattr(pretrained, name, lambda *a, **k: fail())
            for folder in ("old", "new"):
                with pytest.raises(OSError, match="disk full"):
                    save_pretrained(other, tmp_path / folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert os.listdir(tmp_path) == ["old"]


def test_saving_again_replaces_the_model_and_keeps_other_files(merged: Any, tmp_path: Path) -> None:
    folder = save_pretrained(merged, tmp_path / "small")
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "small.123-0123abcd.tmp").mkdir()  # left by a killed process
    other = sp.merge(sp.factorize(llama(), rank=2))
    assert torch.equal(call(from_pretrained(save_pretrained(other, folder))), call(other))
    assert (folder / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["small"]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match=r"it has no config; spectrim.save"):
        save_pretrained(sp.factorize(nn.Linear(4, 4)), tmp_path / "small")
    quantized = sp.factorize(gpt2(), rank=2)
    quantized.config.quantization_config = {"quant_method": "x"}
    with pytest.raises(LayerError, match="quantized"):
        save_pretrained(quantized, tmp_path / "small")
    assert os.listdir(tmp_path) == []
    gpt2().save_pretrained(tmp_path / "dense")
    with pytest.raises(FormatError, match=r"holds weights that transformers would load in place of these: model\.safetensors"):
        save_pretrained(sp.factorize(gpt2(), rank=2), tmp_path / "dense")


def test_what_cannot_be_read_says_what_to_call(merged: Any, tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "dense")
    sp.save(merged, tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("dense", "holds plain weights and no plan of spectrim; call from_pretrained of transformers"),
        ("bare", "call spectrim.load"),
        ("empty", r"spectrim.json: is missing"),
    ]:
        with pytest.raises(FormatError, match=message):
            from_pretrained(tmp_path / name)
    folder = save_pretrained(merged, tmp_path / "small")
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config\.json: gives no model of transformers"):
        from_pretrained(folder)


def test_a_name_that_is_no_folder_is_downloaded(merged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = save_pretrained(merged, tmp_path / "small"), []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        if name == "someone/missing":
            raise ValueError("no such repository")
        return str(folder)

    monkeypatch.setattr(pretrained.huggingface_hub, "snapshot_download", download)
    assert torch.equal(call(from_pretrained("someone/small", revision="v1")), call(merged))
    assert asked == [("someone/small", "v1")]
    with pytest.raises(FormatError, match=r"someone/missing: is no folder here, and the Hub has none .*no such repository"):
        from_pretrained("someone/missing")


def test_push_to_hub_uploads_the_whole_folder(merged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, *, private: Any, exist_ok: bool) -> None:
            seen["repo"] = (repo_id, private, exist_ok)

        def upload_folder(self, *, repo_id: str, folder_path: str) -> str:
            seen["logits"] = call(from_pretrained(folder_path))
            seen["title"] = "# small\n" in (Path(folder_path) / "README.md").read_text()
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(pretrained.huggingface_hub, "HfApi", Api)
    assert push_to_hub(merged, "someone/small", private=True, token="t").endswith("someone/small/commit/1")
    assert (seen["token"], seen["repo"], seen["title"]) == ("t", ("someone/small", True, True), True)
    assert torch.equal(seen["logits"], call(merged))


# Dict batches


def batches(count: int = 4) -> Any:
    rows = [{"input_ids": IDS[i % 2], "attention_mask": torch.ones_like(IDS[0]), "labels": IDS[i % 2]} for i in range(count)]
    return torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0))


def test_dict_batches_go_through_the_verbs() -> None:
    low = sp.factorize(gpt2().train(False), rank=4)
    data = pairs(batches())
    inputs, target = next(iter(data))
    expected = float(low(**inputs).loss.detach())
    assert torch.equal(inputs["labels"], target)
    assert sp.evaluate(low, [(inputs, target)], model_loss) == {"loss": pytest.approx(expected, rel=1e-6)}  # summed in another order
    assert sp.calibrate(low, data, model_loss).examples == 4
    before = sp.evaluate(low, data, model_loss)["loss"]
    optimizer = torch.optim.Adam(low.parameters(), 1e-2)
    history = sp.fit(low, data, model_loss, optimizer, 2, penalties=[sp.Orthogonality(0.1)], eval_data=data, progress=False)
    assert history.last["eval_loss"] < before
    assert len(data) == 2


def test_pairs_pass_on_the_sampler_and_the_epoch() -> None:
    class Loader(list):  # type: ignore[type-arg]
        epochs: list[int] = []  # noqa: RUF012
        set_epoch = epochs.append

    model = bert()
    data = pairs(Loader([{"input_ids": IDS, "target": torch.tensor([0, 1])}]), label="target")
    sp.fit(model, data, lambda output, target: output.logits.sum(), torch.optim.SGD(model.parameters(), 0.0), 0, progress=False)
    data.set_epoch(3)
    assert Loader.epochs == [3]
    loader = batches()
    assert pairs(loader).sampler is loader.sampler


def test_batches_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(SettingError, match="batches that are dicts"):
        next(iter(pairs([(IDS, IDS)])))  # type: ignore[list-item]
    with pytest.raises(SettingError, match="a key of the batches: input_ids, got 'labels'"):
        next(iter(pairs([{"input_ids": IDS}])))
    with pytest.raises(SettingError, match="one that holds a loss"):
        model_loss(gpt2()(IDS), IDS)
