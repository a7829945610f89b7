"""Factors are offloaded with their layer or not at all: alone, they would be multiplied on the meta device, which torch does in silence."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn

import spectrim as sp
from spectrim.errors import LayerError


@pytest.fixture
def low() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 8))
    return sp.factorize(model, rank=4, where=lambda *layer: True).eval()


def test_alone_is_refused(low: nn.Module) -> None:
    with pytest.raises(LayerError, match="preload_module_classes"):
        cpu_offload(low, torch.device("cpu"))


def test_on_disk_alone_is_refused(low: nn.Module, tmp_path) -> None:
    with pytest.raises(LayerError, match="preload_module_classes"):
        disk_offload(low, tmp_path, torch.device("cpu"))


def test_with_the_layer_or_merged_gives_the_same(low: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    expected, merged = low(x), sp.merge(low)
    assert torch.equal(cpu_offload(low, torch.device("cpu"), preload_module_classes=["Linear", "Conv2d"])(x), expected)
    torch.testing.assert_close(cpu_offload(merged, torch.device("cpu"))(x), expected)


def test_hooks_that_leave_weights_where_they_are_come_and_go(low: nn.Module) -> None:
    form = low[0].factors["weight"]
    assert not hasattr(form, "_hf_hook")
    add_hook_to_module(form, AlignDevicesHook(execution_device="cpu"))
    assert hasattr(form, "_hf_hook")
    remove_hook_from_submodules(low)
    assert not hasattr(form, "_hf_hook")
