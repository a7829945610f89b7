"""The folds of a convolution side by side: energy lost at half the multiply-accumulates, and accuracy without training.

.venv/bin/python benchmarks/folds.py            # writes benchmarks/results/folds/folds.json, four minutes of one core
.venv/bin/python benchmarks/folds.py --check    # are the spectra still what the file says? a few seconds
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as sp
from micro.harness import environment
from spectrim import linalg, zoo
from spectrim.files import write_text
from spectrim.layers import named_layers
from spectrim.layers.conv import FactorizedConv
from spectrim.linalg.fold import folds
from spectrim.surgery.factorize import AUTO_ENERGY, pick_scheme

RESULT = Path(__file__).resolve().parent / "results" / "folds" / "folds.json"
HALF, EXAMPLES, SEED = 0.5, 512, 0
SIDE, SAMPLE_RATE = 32, 16_000
NETWORKS = {"resnet8": lambda: zoo.mlperftiny_resnet8(pretrained=True), "resnet20": lambda: zoo.resnet20(pretrained="akamaster")}


def filterbank(out: int = 16, in_: int = 128, taps: int = 64) -> Tensor:
    """Return a kernel ``(out, in, taps)`` of the kind that audio decoders have: each input drives one band-pass filter of the output.

    ``K[o, i, t] = cos(pi o (i + 1/2) / in) g_i(t)``, with ``g_i`` the gammatone filter ``t^3 exp(-2 pi 1.019 b_i t) cos(2 pi f_i t)`` of
    unit energy at 16 kHz, ``f_i`` equally spaced from 50 Hz to 7.6 kHz on the ERB scale, ``b_i = 24.7 + f_i / 9.265`` its bandwidth
    (Glasberg and Moore, Hearing Research 47, 1990). Neighbouring filters overlap, and the 16 outputs weight the filters by cosines.
    """
    ends = [21.4 * math.log10(1 + 0.00437 * frequency) for frequency in (50.0, 7600.0)]
    frequency = (10 ** (torch.linspace(*ends, in_, dtype=torch.float64) / 21.4) - 1) / 0.00437
    time_s = torch.arange(1, taps + 1, dtype=torch.float64) / SAMPLE_RATE
    decay = 2 * math.pi * 1.019 * (24.7 + frequency / 9.265)
    filters = time_s**3 * torch.exp(-decay[:, None] * time_s) * torch.cos(2 * math.pi * frequency[:, None] * time_s)
    filters = filters / filters.norm(dim=1, keepdim=True)
    inputs = torch.arange(in_, dtype=torch.float64) + 0.5
    mix = torch.cos(math.pi * torch.arange(out, dtype=torch.float64)[:, None] * inputs / in_)
    return mix[:, :, None] * filters


def lost(layer: Any, fold: Any, shape: Any, share: float = HALF) -> tuple[int, float]:
    """Return the rank at a share of the layer's multiply-accumulates, and the share of the spectral energy that is lost there."""
    dense, one = (FactorizedConv.work(layer, "weight", fold, rank, shape) for rank in (None, 1))
    matrix = FactorizedConv.fold(layer, "weight", layer.weight.detach().double(), fold)
    tail = linalg.tail_energy(linalg.pooled_spectrum(torch.linalg.svdvals(matrix)))
    rank = min(int(share * dense / one), len(tail) - 1)
    return rank, float(tail[rank] / tail[0])


def spectra(model: nn.Module) -> dict[str, Any]:
    """Return for each convolution what it loses in each fold at half its multiply-accumulates, and which fold ``auto`` takes."""
    shapes: dict[str, Any] = {}
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: shapes.update({name: args[0].shape})) for name, layer in layers.items()
    ]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, SIDE, SIDE))
    for handle in handles:
        handle.remove()
    found = {}
    for name, layer in layers.items():
        losses = {fold: lost(layer, fold, shapes[name]) for fold in folds(layer.kernel_size)}
        found[name] = {
            "kernel": list(layer.weight.shape),
            "stride": layer.stride[0],
            "auto": pick_scheme(layer, "auto"),
            "auto_before": _before(layer),
            "rank": {fold: rank for fold, (rank, _) in losses.items()},
            "lost_energy": {fold: share for fold, (_, share) in losses.items()},
        }
    return found


def summary(layers: dict[str, Any]) -> dict[str, Any]:
    """Count the folds that ``auto`` takes, and average what is lost over the layers that have all three."""
    three = [line for line in layers.values() if len(line["lost_energy"]) == 3]
    mean = {fold: sum(line["lost_energy"][fold] for line in three) / len(three) for fold in ("channel", "spatial", "input")}
    least = Counter(min(line["lost_energy"], key=line["lost_energy"].__getitem__) for line in three)
    counts = {key: dict(Counter(line[key] for line in layers.values())) for key in ("auto", "auto_before")}
    return counts | {"layers_with_three_folds": len(three), "mean_lost_energy": mean, "fold_that_loses_least": dict(least)}


@contextmanager
def without_input_fold() -> Iterator[None]:
    """Offer the channel and the spatial fold only, as before there was a third."""
    schemes = FactorizedConv.schemes
    FactorizedConv.schemes = classmethod(lambda cls, module: tuple(f for f in folds(module.kernel_size) if f != "input"))  # type: ignore
    try:
        yield
    finally:
        FactorizedConv.schemes = schemes  # type: ignore[method-assign]


def _before(layer: nn.Module) -> str:
    with without_input_fold():
        return pick_scheme(layer, "auto")


def audio(kernel: Tensor) -> dict[str, Any]:
    """Return what one kernel loses in each fold at half its multiply-accumulates."""
    layer = nn.Conv1d(kernel.shape[1], kernel.shape[0], kernel.shape[2], bias=False, device="meta")
    layer.weight = nn.Parameter(kernel)
    losses = {fold: lost(layer, fold, None) for fold in folds(layer.kernel_size)}
    ranks, shares = ({fold: pair[index] for fold, pair in losses.items()} for index in (0, 1))
    return {"kernel": list(kernel.shape), "auto": pick_scheme(layer, "auto"), "rank": ranks, "lost_energy": shares}


def accuracies() -> dict[str, Any]:
    """Compress ResNet-8 to half its multiply-accumulates without training; accuracy and loss on the validation split."""
    splits, found = zoo.cifar10(batch_size=128, normalize="raw", augment=False, seed=SEED), {}
    loss, dense = nn.CrossEntropyLoss(), NETWORKS["resnet8"]()
    known = [batch for batch, _ in zip(splits.train, range(EXAMPLES // 128), strict=False)]
    found["dense"] = sp.evaluate(dense, splits.val, loss)
    for cut in ("plain", "whitened"):
        for scheme in ("auto_before", "auto", "channel", "spatial", "input"):
            start = time.perf_counter()
            made = _compressed(dense, known, loss, scheme, cut)
            scores = sp.evaluate(made.model, splits.val, loss)
            taken = Counter(layer.scheme for _, layer in named_layers(made.low) if hasattr(layer, "kernel_size"))
            found[f"{cut}, {scheme}"] = scores | {"macs": made.measured["final"].macs, "folds": dict(taken)}
            print(f"{cut:9} {scheme:12} {scores['accuracy']:.4f} {scores['loss']:.4f} {time.perf_counter() - start:.0f} s", flush=True)
    return found


def _compressed(dense: nn.Module, known: Any, loss: Any, scheme: str, cut: Any) -> Any:
    made: Any = sp.compress
    settings = {"epochs": 0, "cut": cut, "examples": EXAMPLES, "progress": False}
    if scheme == "auto_before":
        with without_input_fold():
            return made(dense, known, loss, sp.Budget(macs=HALF), **settings)
    return made(dense, known, loss, sp.Budget(macs=HALF), scheme=scheme, **settings)


def main() -> None:
    """Measure and write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the spectra with the file; evaluate nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    layers = {name: spectra(make()) for name, make in NETWORKS.items()}
    measured = {
        "settings": {"share_of_macs": HALF, "auto_energy": AUTO_ENERGY, "examples": EXAMPLES, "seed": SEED, "split": "validation"},
        "audio_kernel": audio(filterbank()),
        "noise_of_that_shape": audio(torch.randn(16, 128, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))),
        "networks": {name: summary(found) for name, found in layers.items()},
        "layers": layers,
    }
    if given.check:
        sys.exit(_differences(measured, json.loads(RESULT.read_text(encoding="utf-8"))))
    start = time.perf_counter()
    measured["resnet8_at_half_the_macs"] = accuracies()
    measured["wall_s"] = round(time.perf_counter() - start, 1)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULT, json.dumps({"environment": environment()} | measured, indent=1) + "\n")


def _differences(now: Any, then: Any, path: str = "") -> int:
    """Print what differs by more than rounding; return 1 if anything does."""
    if isinstance(now, dict):
        return max((_differences(now[key], then.get(key), f"{path}/{key}") for key in now), default=0)
    same = math.isclose(now, then, rel_tol=1e-6) if isinstance(now, float) and then is not None else now == then
    if not same:
        print(f"{path}: {now}, the file says {then}")
    return int(not same)


if __name__ == "__main__":
    main()
