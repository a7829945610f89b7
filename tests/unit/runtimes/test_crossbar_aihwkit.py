"""Crossbars beside another simulator, aihwkit-lightning: quantized products, converters, bands of tiles, and the effect of noise."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.runtimes.crossbar import Device, Mapping, on_crossbars

REASON = "needs aihwkit-lightning: pip install -c constraints.txt 'spectrim[analog]'"
configs = pytest.importorskip("aihwkit_lightning.simulator.configs", reason=REASON)
analog = pytest.importorskip("aihwkit_lightning.nn", reason=REASON)


def theirs(layer: nn.Module, bits: int, **changes: Any) -> Any:
    """Return a layer of theirs with weights of a sign and so many bits, one step for the tensor; `changes` are dotted settings."""
    config = configs.TorchInferenceRPUConfig()
    config.modifier.quantization_type, config.modifier.res = configs.WeightQuantizationType.DISCRETIZE, 2 * (2**bits - 1)
    for path, value in changes.items():
        *parts, last = path.split("__")
        part = config
        for name in parts:
            part = getattr(part, name)
        setattr(part, last, value)
    kind: Any = analog.AnalogLinear if isinstance(layer, nn.Linear) else analog.AnalogConv2d
    return kind.from_digital(layer, config).eval()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("layer", [nn.Linear(70, 30), nn.Conv2d(5, 8, 3, stride=2, padding=1)], ids=["linear", "conv"])
def test_an_ideal_device_computes_what_theirs_does(layer: nn.Module, bits: int) -> None:
    x = torch.randn(4, 70) if isinstance(layer, nn.Linear) else torch.randn(4, 5, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(on_crossbars(layer, Device(bits=2), Mapping(16, 16, bits))(x), theirs(layer, bits)(x))


def test_converters_round_as_theirs_do() -> None:
    torch.manual_seed(0)
    layer, dynamic = nn.Linear(64, 20, bias=False), {"pre_post__input_range__enable": True, "pre_post__input_range__dynamic": True}
    for x in torch.randn(5, 1, 64):  # theirs have a range for each vector
        with torch.no_grad():
            ours = on_crossbars(layer, Device(input_bits=5), Mapping(64, 20, 6))
            torch.testing.assert_close(ours(x), theirs(layer, 6, forward__inp_res=2 * (2**4 - 1), **dynamic)(x))
            exact, largest = theirs(layer, 6)(x), layer.weight.abs().max()
            bound = float(
                exact.abs().max() / (x.abs().max() * largest)
            )  # theirs clip at a given part of the range, ours at the largest sum
            ours = on_crossbars(layer, Device(output_bits=6), Mapping(64, 20, 6))
            there = theirs(layer, 6, forward__out_res=2 * (2**5 - 1), forward__out_bound=bound, **dynamic)
            torch.testing.assert_close(ours(x), there(x), rtol=1e-4, atol=1e-5)


def test_bands_of_tiles_add_up_as_theirs_do() -> None:
    """Theirs have a step for each band; where both bands have one largest weight, that is ours."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 20), torch.randn(3, 64)
    with torch.no_grad():
        layer.weight[0, 0] = layer.weight[0, 40] = 0.5
        ours = on_crossbars(layer, Device(output_bits=24), Mapping(32, 8, 4))(x)
        torch.testing.assert_close(ours, theirs(layer, 4, mapping__max_input_size=32)(x), rtol=1e-4, atol=1e-5)


def test_the_noise_of_cells_has_the_effect_of_theirs() -> None:
    """A pair has twice the variance of a cell: ``sqrt(2)`` times an error of a third of a step."""
    torch.manual_seed(0)
    layer, x, bits = nn.Linear(50, 3000, bias=False), torch.randn(1, 50), 4

    def spread(noisy: Any) -> Tensor:
        with torch.no_grad():
            return (noisy(x) - theirs(layer, bits)(x)).std()

    ours = spread(on_crossbars(layer, replace(Device(bits=bits), level_noise=1 / 3), Mapping(64, 64, bits)))
    normal = {"modifier__noise_type": configs.WeightNoiseInjectionType.ADD_NORMAL, "modifier__std_dev": 2**0.5 / 3 / (2**bits - 1)}
    there = spread(theirs(layer, bits, **normal).train())
    torch.testing.assert_close(ours, there, rtol=0.08, atol=0)  # each of 3,000 values: 1.3 % standard error
