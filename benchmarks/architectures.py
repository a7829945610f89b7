"""Architectures of transformers, as tiny networks with random weights: factorized, cut, merged, saved, exported.

.venv/bin/python benchmarks/architectures.py [--only NAME ...] [--again]     # writes benchmarks/results/architectures/NAME.json
.venv/bin/python benchmarks/architectures.py --render | --check              # docs/architectures.md from these files
"""

import argparse
import json
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.files import write_text

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "architectures"
PAGE = HERE.parent / "docs" / "architectures.md"
BUDGET = 0.5
VOCABULARY, LENGTH, BATCH = 99, 11, 2

Made = tuple[nn.Module, dict[str, Tensor]]

TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def ids() -> Tensor:
    return torch.randint(5, VOCABULARY, (BATCH, LENGTH))


def tokens() -> dict[str, Tensor]:
    return {"input_ids": ids(), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32)}


def of(model: str, config: str, inputs: Callable[[], dict[str, Tensor]], **settings: Any) -> Callable[[], Made]:
    """Return what builds a model of transformers from its config, with random weights, and one batch of inputs.

    Args:
        model: name of the model's class.
        config: name of the config's class.
        inputs: makes keyword arguments.
        settings: of the config.
    """

    def make() -> Made:
        import transformers

        network = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return network.eval(), inputs()

    return make


GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
SPEECH = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "mask_time_prob": 0.0}
SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
TRANSLATION = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
TRANSLATION |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")} | {
    f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SOUND = {key: value for key, value in TRANSLATION.items() if key != "max_position_embeddings"}
SOUND |= {
    "num_mel_bins": 16,
    "max_source_positions": 30,
    "max_target_positions": 30,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def two_sides() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids()}


def sound() -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, 16, 60), "decoder_input_ids": ids()}


def clip() -> Made:
    from transformers import CLIPConfig, CLIPModel

    text = {key: value for key, value in TEXT.items() if key != "vocab_size"} | {"vocab_size": VOCABULARY}
    network = CLIPModel(CLIPConfig(text_config=text, vision_config={**IMAGE, "patch_size": 8}, projection_dim=16))
    return network.eval(), tokens() | pixels()


ARCHITECTURES: dict[str, Callable[[], Made]] = {
    "bert": of("BertForMaskedLM", "BertConfig", tokens, **TEXT),
    "roberta": of("RobertaForSequenceClassification", "RobertaConfig", tokens, **TEXT, num_labels=5),
    "distilbert": of(
        "DistilBertForMaskedLM", "DistilBertConfig", tokens, vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64,
        max_position_embeddings=64,
    ),
    "albert": of("AlbertForMaskedLM", "AlbertConfig", tokens, **TEXT, embedding_size=16),
    "deberta": of("DebertaModel", "DebertaConfig", tokens, **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta_v2": of("DebertaV2ForTokenClassification", "DebertaV2Config", tokens, **TEXT, num_labels=5),
    "electra": of("ElectraForPreTraining", "ElectraConfig", tokens, **TEXT, embedding_size=16),
    "modernbert": of("ModernBertForMaskedLM", "ModernBertConfig", tokens, **TEXT, cls_token_id=1, sep_token_id=2),
    "gpt2": of("GPT2LMHeadModel", "GPT2Config", tokens, **GPT2),
    "gpt_neox": of("GPTNeoXForCausalLM", "GPTNeoXConfig", tokens, **TEXT),
    "gptj": of("GPTJForCausalLM", "GPTJConfig", tokens, **GPT2, rotary_dim=4),
    "llama": of("LlamaForCausalLM", "LlamaConfig", tokens, **GROUPED),
    "mistral": of("MistralForCausalLM", "MistralConfig", tokens, **GROUPED),
    "qwen2": of("Qwen2ForCausalLM", "Qwen2Config", tokens, **GROUPED, tie_word_embeddings=True),
    "qwen3": of("Qwen3ForCausalLM", "Qwen3Config", tokens, **GROUPED, head_dim=8),
    "gemma": of("GemmaForCausalLM", "GemmaConfig", tokens, **GROUPED, head_dim=8),
    "phi": of("PhiForCausalLM", "PhiConfig", tokens, **GROUPED),
    "opt": of(
        "OPTForCausalLM", "OPTConfig", tokens, vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "bloom": of("BloomForCausalLM", "BloomConfig", tokens, vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "falcon": of("FalconForCausalLM", "FalconConfig", tokens, **TEXT),
    "mamba": of("MambaForCausalLM", "MambaConfig", tokens, vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8),
    "mixtral": of("MixtralForCausalLM", "MixtralConfig", tokens, **GROUPED, num_local_experts=4),
    "t5": of(
        "T5ForConditionalGeneration", "T5Config", two_sides, vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    ),
    "bart": of("BartForConditionalGeneration", "BartConfig", two_sides, **TRANSLATION, **SPECIAL, forced_eos_token_id=2),
    "whisper": of("WhisperForConditionalGeneration", "WhisperConfig", sound, **SOUND, **SPECIAL),
    "wav2vec2": of("Wav2Vec2ForCTC", "Wav2Vec2Config", lambda: {"input_values": torch.randn(BATCH, 400)}, **TEXT, **SPEECH),
    "vit": of("ViTForImageClassification", "ViTConfig", pixels, **IMAGE, patch_size=8, num_labels=5),
    "swin": of(
        "SwinForImageClassification", "SwinConfig", pixels, image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2],
        window_size=4, num_labels=5,
    ),
    "convnext": of("ConvNextModel", "ConvNextConfig", pixels, hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1], image_size=32),
    "resnet": of(
        "ResNetForImageClassification", "ResNetConfig", pixels, embedding_size=16, hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1],
        layer_type="basic", num_labels=5,
    ),
    "segformer": of(
        "SegformerForSemanticSegmentation", "SegformerConfig", pixels, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 2],
        hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=32, num_labels=5,
    ),
    "clip": clip,
}  # fmt: skip


def build(name: str, seed: int = 0) -> Made:
    """Return one architecture with random weights, in eval mode, and one batch of keyword arguments; the global generator is not moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = ARCHITECTURES[name]()
        for module in model.modules():  # the configs' own spread of 0.02 leaves networks this narrow with almost no output
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.dim() > 1:
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        return model, inputs


def answer(output: Any) -> Tensor:
    """Return what a model is asked for: its logits, or else the first tensor of its output."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else next(leaf for leaf in tree_leaves(tuple(output.values())) if isinstance(leaf, Tensor))


@torch.no_grad()
def run(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return answer(model(**inputs))


def smallest(error: SettingError) -> float:
    """Return the smallest fraction that ranks can reach, as the error of `allocate` says it."""
    return float(str(error).split("at least ")[1].split()[0])


def ranks_for(low: nn.Module, inputs: Mapping[str, Tensor], budget: float = BUDGET) -> tuple[float, dict[str, int]]:
    """Return the ranks for a budget of multiply-accumulates, or for the smallest that is reachable, and that budget."""
    try:
        return budget, sp.allocate(low, sp.Budget(macs=budget), inputs)
    except SettingError as error:
        reachable = smallest(error)
        return reachable, sp.allocate(low, sp.Budget(macs=reachable), inputs)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def reloaded(model: nn.Module, name: str) -> nn.Module:
    """Save a model and load it into one that is freshly built from the config, with other weights."""
    fresh, _ = build(name, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        sp.save(model, folder)
        return sp.load(folder, fresh)


class Answer(nn.Module):
    """A model that returns the one tensor that is compared."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return answer(self.model(**inputs))


def onnx_difference(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Export with torch's dynamo exporter, run in ONNX Runtime; return the largest difference."""
    import onnxruntime

    program = torch.onnx.export(Answer(model).eval(), (), kwargs=dict(inputs), dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {entry.name for entry in session.get_inputs()}
    (output,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items() if name in given})
    return difference(torch.from_numpy(output), run(model, inputs))


def onnx_parity(merged: Any, dense: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the largest difference to ONNX Runtime; where the exporter fails, with attention step by step, or else the operator."""
    for model in (merged, dense):
        if getattr(model.config, "use_cache", False):
            model.config.use_cache = False  # a cache is no tensor to compare
    attention = merged.config._attn_implementation
    try:
        return {"difference": onnx_difference(merged, inputs), "attention": attention}
    except Exception as error:  # whatever the exporter or the runtime raises: that is what the table says
        found = {"failed": type(error).__name__, "operator": operator_of(error), "attention": attention}
    try:
        onnx_difference(dense, inputs)
        found["dense"] = "passes"
    except Exception:
        found["dense"] = "fails too"
    try:
        merged.set_attn_implementation("eager")
        return {"difference": onnx_difference(merged, inputs), "attention": "eager", "otherwise": found}
    except Exception:
        return found


def operator_of(error: BaseException) -> str | None:
    """Return the operator that an error of the exporter names, or None."""
    named = re.search(r"torch\.ops\.([\w.]+)", str(error))
    return named[1] if named else None


def examine(name: str) -> dict[str, Any]:
    """Return everything that the table says about one architecture."""
    dense, inputs = build(name)
    low = sp.factorize(dense)
    budget, ranks = ranks_for(low, inputs)
    cut = sp.prune(low, ranks)
    merged = sp.merge(cut)
    outputs = {key: run(model, inputs) for key, model in (("dense", dense), ("low", low), ("cut", cut), ("merged", merged))}
    macs = {key: sp.measure(model, inputs, latency=False).macs for key, model in (("dense", dense), ("merged", merged))}
    lines = sp.coverage(low)
    result: dict[str, Any] = {
        "model": type(dense).__name__,
        "params": sum(parameter.numel() for parameter in dense.parameters()),
        "factorized": [line.name for line in lines if line.factorized],
        "skipped": {line.name: line.reason for line in lines if not line.factorized},
        "budget": BUDGET,
        "reachable": budget,
        "macs": macs,
        "factorize_difference": difference(outputs["low"], outputs["dense"]),
        "cut_error": float((outputs["cut"] - outputs["dense"]).norm() / outputs["dense"].norm()),
        "merge_difference": difference(outputs["merged"], outputs["cut"]),
        "reload_difference": {
            key: difference(run(reloaded(model, name), inputs), outputs[key]) for key, model in (("cut", cut), ("merged", merged))
        },
        "scale": float(outputs["dense"].abs().max()),
    }
    packages = ("spectrim", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    versions = {package: version(package) for package in packages} | {"python": platform.python_version()}
    return result | {"onnx": onnx_parity(merged, dense, inputs), "versions": versions}


HEAD = """# Architectures

This page is written by `python benchmarks/architectures.py --render` from the files in `benchmarks/results/architectures`, which
`python benchmarks/architectures.py` wrote. Each network is tiny ({layers}), built by `transformers` from its config, with random weights.
It is factorized with the defaults, cut to `Budget(macs={budget})` or to the smallest feasible budget, and merged.

- **layers**: number of factorized layers, and of layers that stay dense; the reasons are below.
- **MACs**: of one example, dense and after the cut, and the fraction that remains. A fraction above {budget} is the smallest feasible one.
- **output error**: of the cut network, relative to the norm of the dense one's output. Nothing was trained, and random weights have no
  small singular values to cut, so the loss of these networks does not predict that of trained ones.
- **factorized**, **merged**: largest difference to the output of the dense, or of the cut, network: rounding in float32.
- **reloaded**: largest difference after `save` and `load` into a new network built from the config, for the cut and the merged one.
- **ONNX**: largest difference between the merged network and ONNX Runtime, from torch's dynamo exporter; or the operator at which it fails.
  *Eager attention* is used if the exporter fails on fused attention, as it then does for the dense network.

"""


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def row(name: str, result: Mapping[str, Any]) -> str:
    before, after, onnx = result["macs"]["dense"], result["macs"]["merged"], result["onnx"]
    if "difference" in onnx:
        parity = number(onnx["difference"]) + (" (eager attention)" if "otherwise" in onnx else "")
    else:
        parity = f"fails at `{onnx['operator']}`; the dense network {onnx['dense']}"
    cells = [
        f"{name} (`{result['model']}`)", f"{len(result['factorized'])} + {len(result['skipped'])}", f"{before:,} → {after:,}",
        f"{after / before:.3f}", f"{result['cut_error']:.2f}", number(result["factorize_difference"]), number(result["merge_difference"]),
        number(max(result["reload_difference"].values())), parity,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def reasons(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one line for each reason why layers stayed dense: how many, in how many networks."""
    found: dict[str, list[str]] = {}
    for name, result in results.items():
        for reason in result["skipped"].values():
            kind = "it has vectors only" if "vectors only" in reason else re.sub("'.*'", "another layer", reason)
            found.setdefault(kind, []).append(name)
    ordered = sorted(found.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    return [f"| {reason} | {len(names)} | {shown(dict.fromkeys(names))} |" for reason, names in ordered]


def shown(names: Mapping[str, None]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} of them"


def render() -> str:
    """Return the page."""
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ARCHITECTURES if (RESULTS / f"{name}.json").exists()}
    missing = [name for name in ARCHITECTURES if name not in results]
    table = ["| architecture | layers | MACs | left | output error | factorized | merged | reloaded | ONNX |", "|---|" + "---:|" * 8]
    table += [row(name, result) for name, result in results.items()]
    versions = sorted({", ".join(f"{k} {v}" for k, v in result["versions"].items()) for result in results.values()})
    sizes = f"{min(r['params'] for r in results.values()):,} to "
    sizes += f"{max(r['params'] for r in results.values()):,} parameters"
    lines = [HEAD.format(layers=sizes, budget=BUDGET).rstrip(), "", *table, ""]
    if missing:
        lines += [f"Missing: {', '.join(missing)}.", ""]
    lines += ["## Layers that stay dense", "", "| reason | layers | networks |", "|---|---:|---|", *reasons(results), ""]
    return "\n".join([*lines, *(f"Made with {entry}." for entry in versions), ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*ARCHITECTURES], default=[*ARCHITECTURES], metavar="NAME")
    parser.add_argument("--again", action="store_true", help="also those whose file is there")
    parser.add_argument("--render", action="store_true", help="write docs/architectures.md")
    parser.add_argument("--check", action="store_true", help="compare docs/architectures.md with the files")
    options = parser.parse_args()
    if options.check:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == render()
        print("" if current else "docs/architectures.md: run python benchmarks/architectures.py --render", file=sys.stderr)
        return 0 if current else 1
    if options.render:
        write_text(PAGE, render())
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the exporter, about itself
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        path = RESULTS / f"{name}.json"
        if options.again or not path.exists():
            write_text(path, json.dumps(examine(name), indent=1) + "\n")
            print(path.name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
