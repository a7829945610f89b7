"""Uses that a hunt found wrong or without a helpful error: each is right now, or refused with a reason."""

import functools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import spectrim as sp
from spectrim.checks import check
from spectrim.errors import FormatError, LayerError, SettingError
from spectrim.surgery.head import call_order, head_of

LOSS = nn.CrossEntropyLoss()


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, 16), torch.randint(4, (16,))) for _ in range(count)]


class Tower(nn.Module):
    """Three layers; sub-classes use them otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


# References past the module tree


def test_a_weak_proxy_is_refused() -> None:
    model = Tower()
    model.__dict__["near"] = weakref.proxy(model.first)
    with pytest.raises(LayerError, match="its attribute 'near' is a function of layer 'first'"):
        sp.factorize(model)


@pytest.mark.parametrize("before", [True, False])
def test_a_hook_that_captured_a_layer_is_refused_and_a_method_follows(before: bool) -> None:
    model, x = Tower(), torch.randn(2, 16)
    captured = model.first
    if before:
        handle = model.second.register_forward_pre_hook(lambda module, args: (captured(args[0]),))
    else:
        handle = model.second.register_forward_hook(lambda module, args, output: output + captured(args[0]))
    with pytest.raises(LayerError, match="layer 'second': a forward hook is a function of layer 'first'"):
        sp.factorize(model)
    handle.remove()
    model.second.register_forward_hook(functools.partial(_add, model.first))
    low = sp.factorize(model)
    output = low(x)
    with torch.no_grad():
        model.first.weight.zero_()
    assert torch.equal(low(x), output)


def _add(layer: nn.Module, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + layer(args[0])  # type: ignore[no-any-return]


REGISTRY: dict[str, nn.Module] = {}


class Registered(Tower):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(REGISTRY["first"](x).relu()).relu())


def test_a_method_that_reads_a_layer_from_a_global_is_refused() -> None:
    model = Registered()
    REGISTRY["first"] = model.first
    with pytest.raises(LayerError, match="its method 'forward' is a function of layer 'first'"):
        sp.factorize(model)
    REGISTRY.clear()
    sp.factorize(model)


# The function


def test_code_that_fails_on_exchanged_layers_is_named() -> None:
    class Leaves(Tower):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.modules():
                if not list(layer.children()):
                    x = layer(x)
            return x

    with pytest.raises(LayerError, match=r"the factorized network fails in eval mode where the dense computes \(NotImplementedError"):
        sp.compress(Leaves(), batches(), LOSS, 0.7, progress=False)


# Frozen statistics


def test_norms_that_the_own_train_method_freezes_keep_their_statistics() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self[1].eval()
            return self

    model = Frozen(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    before = [norm.running_mean.clone() for norm in (model[1], model[3])]
    for flag in (True, False):
        for module in model.modules():
            module.training = flag
        sp.recalibrate(model, [(torch.randn(4, 3, 8, 8), None)])
        assert torch.equal(model[1].running_mean, before[0])
        assert all(module.training is flag for module in model.modules())
    assert not torch.equal(model[3].running_mean, before[1])


# Moments


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_moment(reentrant: bool) -> None:
    class Checkpointed(Tower):
        def forward(self, x: Tensor) -> Tensor:
            inner = checkpoint(lambda h: self.second(h).relu(), self.first(x).relu(), use_reentrant=reentrant)
            return self.head(inner)

    model, data = Checkpointed(), batches()
    plain = Tower()
    plain.load_state_dict(model.state_dict())
    found, wanted = (sp.calibrate(sp.factorize(network), data, LOSS) for network in (model, plain))
    for mine, its in ((found.inputs, wanted.inputs), (found.outputs, wanted.outputs), (found.slopes, wanted.slopes)):
        assert set(mine) == set(its) == {"first", "second"}
        for name in mine:
            torch.testing.assert_close(mine[name], its[name], rtol=1e-5, atol=1e-9)


def test_a_loss_that_cannot_be_differentiated_is_told() -> None:
    made = sp.compress(net(), batches(), lambda output, target: (output.argmax(-1) != target).float().mean(), 0.7, progress=False)
    assert any("the gradient of the loss vanishes" in note for note in made.notes)


# Heads


def test_a_head_that_is_read_is_the_head() -> None:
    class Reading(Tower):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.second(self.first(x).relu()).relu(), self.head.weight, self.head.bias)

    model = Reading()
    assert head_of(model, call_order(model, torch.randn(1, 16))) == "head"


# Arguments


@pytest.mark.parametrize(
    ("where", "hint"),
    [
        (lambda name: True, r"fails on layer '.*with TypeError"),
        (lambda name, module: module.kernel_size == 3, "fails on layer '0' .*with AttributeError"),
        (nn.Linear(2, 2), "give the layer's name"),
    ],
)
def test_selections_that_fail_say_on_which_layer(where: Any, hint: str) -> None:
    with pytest.raises(SettingError, match=f"factorize: where must be .*{hint}"):
        sp.factorize(net(), where=where)


def test_ranks_by_numbers_of_layers_and_rules_that_fail() -> None:
    low = sp.factorize(net())
    with pytest.raises(SettingError, match=r"prune: ranks must be a dict .layer name: rank."):
        check("prune", ranks={0: 3})
    with pytest.raises(LayerError, match="layer '0': its rank rule fails with ZeroDivisionError"):
        sp.prune(low, lambda spectrum: 1 // 0)


@pytest.mark.parametrize("verb", ["compress", "calibrate", "evaluate", "fit", "allocate", "save", "export"])
def test_models_without_values_are_refused(verb: str, tmp_path: Any) -> None:
    with torch.device("meta"):
        model = net()
    low = sp.factorize(model)
    calls: dict[str, Any] = {
        "compress": lambda: sp.compress(model, batches(), LOSS, 0.7, progress=False),
        "calibrate": lambda: sp.calibrate(low, batches()),
        "evaluate": lambda: sp.evaluate(model, batches(), LOSS),
        "fit": lambda: sp.fit(model, batches(), LOSS, torch.optim.SGD(model.parameters(), 0.1), 1, progress=False),
        "allocate": lambda: sp.allocate(low, sp.Budget(macs=0.5), torch.randn(1, 16)),
        "save": lambda: sp.save(low, tmp_path / "net"),
        "export": lambda: sp.export(model, torch.randn(1, 16), tmp_path / "net.pt2"),
    }
    with pytest.raises(SettingError, match=rf"{verb}: model must be a model with values.*has no values"):
        calls[verb]()


def test_batches_that_the_model_does_not_take_are_blamed_themselves() -> None:
    with pytest.raises(SettingError, match=r"data must be batches that the model takes.*on the first one it fails: RuntimeError"):
        sp.compress(net(), [(x.double(), target) for x, target in batches()], LOSS, 0.7, progress=False)


def test_data_longer_than_their_length_stop_a_schedule_with_a_reason() -> None:
    class Longer(list[Any]):
        def __len__(self) -> int:
            return 1

    with pytest.raises(SettingError, match="data must be as many batches as the schedule was made for"):
        sp.compress(net(), Longer(batches(4)), LOSS, 0.7, epochs=1, progress=False)


# Folders


def test_another_network_or_loss_of_the_same_weights_is_another_call(tmp_path: Any) -> None:
    model, data = net(), batches()
    call: dict[str, Any] = {"model": model, "data": data, "loss": LOSS, "budget": 0.8, "cut": "plain"}
    sp.compress(**call, folder=tmp_path, progress=False)
    other = net()
    other.load_state_dict(model.state_dict())
    other[1] = nn.GELU()
    for change, name in (({"model": other}, "network"), ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss")):
        with pytest.raises(FormatError, match=f"another .*{name}"):
            sp.compress(**(call | change), folder=tmp_path, progress=False)
