"""Write ``docs/supported-layers.md`` from the table of layer kinds: ``python docs/supported_layers.py``."""

from pathlib import Path

import torch
from torch import nn

import spectrim as sp
from spectrim.layers import KINDS, kind_of
from spectrim.plain.quaternion import QConv1d, QConv2d, QConv3d, QLinear
from spectrim.surgery.select import refusal

PAGE = Path(__file__).with_name("supported-layers.md")
HEAD = """# Supported layers

This page is written by `python docs/supported_layers.py` from the code; a test compares the two. Every example
was factorized, cut to rank 2 and merged. A merged layer stays an instance of its original class: [how layers are exchanged](exchange.md).

"""
EXAMPLES: list[tuple[str, nn.Module]] = [
    ("", nn.Linear(16, 24)),
    ("", nn.Conv1d(8, 12, 3)),
    ("stride, padding, dilation, padding modes", nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, padding_mode="reflect")),
    ("2 groups", nn.Conv2d(8, 12, 3, groups=2)),
    ("1x1", nn.Conv2d(8, 12, 1)),
    ("taps along one axis", nn.Conv2d(8, 12, (64, 1))),
    ("", nn.Conv3d(8, 12, 3)),
    ("each image by itself", nn.Conv3d(8, 12, (1, 3, 3))),
    ("", nn.ConvTranspose1d(8, 12, 3)),
    ("", nn.ConvTranspose2d(8, 12, 3, stride=2, output_padding=1)),
    ("", nn.ConvTranspose3d(8, 12, 3)),
    ("", nn.Embedding(50, 16)),
    ("2 layers, both directions", nn.LSTM(32, 16, num_layers=2, bidirectional=True)),
    ("large state", nn.LSTM(16, 768)),
    ("", nn.GRU(32, 16)),
    ("packed projection", nn.MultiheadAttention(16, 4)),
    ("separate projections", nn.MultiheadAttention(16, 4, kdim=8, vdim=12)),
    ("`spectrim.plain.quaternion`", QLinear(32, 32)),
    ("", QConv1d(16, 32, 3)),
    ("stride, padding, dilation", QConv2d(16, 32, 3, stride=2, padding=2, dilation=2)),
    ("", QConv3d(16, 32, 3)),
]
SKIPPED: list[tuple[str, nn.Module]] = [
    ("depthwise", nn.Conv2d(8, 8, 3, groups=8)),
    ("one output", nn.Linear(16, 1)),
    ("max_norm", nn.Embedding(50, 16, max_norm=1.0)),
    ("sparse", nn.Embedding(50, 16, sparse=True)),
    ("", nn.RNN(16, 16)),
    ("", nn.EmbeddingBag(50, 16)),
    ("", nn.Bilinear(8, 8, 8)),
    ("", nn.BatchNorm2d(8)),
    ("parametrized", torch.nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))),
    ("lazy", nn.LazyLinear(8)),
]


def described(module: nn.Module) -> str:
    """Return what `merge` wrote, in short."""
    if isinstance(module, nn.Sequential):
        return " → ".join(f"`{type(part).__name__}`" for part in module)
    return f"`{type(module).__name__}`" + (" (plain inference module)" if type(module).__name__.startswith("Plain") else "")


def rows() -> list[str]:
    """Return the lines of both tables."""
    lines = ["| layer | case | weights | schemes | merges to |", "|---|---|---|---|---|"]
    for case, layer in EXAMPLES:
        kind = kind_of(layer)
        assert kind is not None
        schemes = kind.schemes(layer)
        merged = [described(sp.merge(sp.factorize(layer, scheme, sp.match("*"), rank=2))) for scheme in schemes]
        written = "; ".join(dict.fromkeys(merged))
        weights = ", ".join(f"`{name}`" for name in dict.fromkeys(name.split("_l")[0] for name in kind.weights(layer)))
        lines.append(f"| `{type(layer).__name__}` | {case} | {weights} | {', '.join(schemes)} | {written} |")
    lines.append("| `Conv1D` of transformers | GPT-2 | `weight` | channel | `Linear` → `Linear` |")
    lines.append("| `FalconLinear` of transformers | Falcon | `weight` | channel | `Linear` → `Linear` |")
    lines.append("| sub-classes with a forward that reads `weight` | [products](exchange.md) | `weight` | channel | the same class |")
    lines.append("| modules of experts in 3-D parameters | [products](exchange.md) | each stack | channel | the same class |")
    lines += ["", "## Left dense, and why", "", "| layer | case | reason |", "|---|---|---|"]
    lines += [f"| `{type(layer).__name__.removeprefix('Parametrized')}` | {case} | {refusal(layer)} |" for case, layer in SKIPPED]
    return lines


def render() -> str:
    """Return the page."""
    covered = {kind_of(layer) for _, layer in EXAMPLES}
    missing = [kind.__name__ for kind in KINDS if kind not in covered and kind.__name__ not in ("FactorizedConv1D", "FactorizedReader")]
    assert not missing, f"no example for {missing}"
    note = "\nSchemes of a convolution: `channel` is the taps, then a 1x1; `input` a 1x1, then the taps; `spatial` the taps of the first\n"
    note += (
        "axis with more than one, then those of the others. Listed are those that differ; stride, padding and dilation follow the taps.\n"
    )
    note += "\nQuaternion layers take the scheme `quaternion`, whatever is asked for: [quaternion SVD](methods/quaternion-svd.md).\n"
    note += "\nThe projections of a recurrent or attention layer are cut one by one; where none pays, the dense fused layer is written.\n"
    return HEAD + "\n".join(rows()) + "\n" + note


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
