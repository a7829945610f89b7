"""Which layer is the head: by the order of calls, by names and sizes; layers of buffers; wrapped models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import spectrim as sp
from spectrim.errors import LayerError, SettingError
from spectrim.surgery.head import call_order, head_of
from spectrim.surgery.select import HEAD, decide


class Boxes(nn.Module):
    """The classifier is called last, and registered first; with a regression layer behind it in the list of modules."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(16, 9))
        self.body, self.boxes, self.name = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16)), nn.Linear(16, 12), name

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).relu()
        boxes = self.boxes(h)
        return self.get_submodule(self.name)(h), boxes


@pytest.mark.parametrize("name", ["head", "decide"])
def test_the_head_is_the_last_layer_called(name: str) -> None:
    model, x = Boxes(name), torch.randn(4, 6)
    assert call_order(model, x) == ["body.0", "body.2", "boxes", name]
    assert head_of(model, call_order(model, x)) == name
    assert [line.name for line in sp.coverage(model, inputs=x) if line.reason == HEAD] == [name]
    low = sp.factorize(model, example_inputs=x)
    assert [layer for layer, _ in sp.layers.named_factors(low)] == ["body.0", "body.2", "boxes"]
    data = [(x, torch.randint(9, (4,)))]
    made = sp.compress(model, data, lambda output, target: F.cross_entropy(output[0], target), 0.7, progress=False)
    assert name not in made.ranks
    assert name not in [weight.name for weight in sp.plan(model, x, budgets=[0.7]).weights]
    assert [line.name for line in made.coverage if line.reason == HEAD] == [name]


class Aided(nn.Module):
    """Another head is called behind the one whose output counts."""

    def __init__(self, given: Callable[[Tensor, Tensor], Any], name: str = "aux") -> None:
        super().__init__()
        self.given, self.name = given, name
        self.body, self.first = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16)), nn.Linear(16, 9)
        self.add_module(name, nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Any:
        h = self.body(x).relu()
        return self.given(self.first(h), self.get_submodule(self.name)(h))


@pytest.mark.parametrize(
    ("given", "name", "head"),
    [
        (lambda y, aux: (y, aux), "aux", "first"),
        (lambda y, aux: y.log_softmax(-1), "aux", "first"),
        (lambda y, aux: (y, aux.detach()), "aux", "first"),
        (lambda y, aux: {"aux": aux, "logits": y}, "aux", "first"),
        (lambda y, aux: {"out": y * 2, "aux": aux}, "aux", "first"),
        (lambda y, aux: (y, aux), "scores", "first"),
        (lambda y, aux: (y, aux), "score", "score"),  # boxes first, then the classifier by its name
        (lambda y, aux: y * aux.mean(-1, keepdim=True).sigmoid(), "gate", "gate"),
        (lambda y, aux: (y.argmax(-1), aux.argmax(-1)), "aux", "aux"),  # no graph: by the order of calls
    ],
)
def test_a_head_is_one_that_the_output_depends_on(given: Any, name: str, head: str) -> None:
    model, x = Aided(given, name), torch.randn(3, 6)
    model.body.requires_grad_(False)
    model.first.requires_grad_(False)
    flags, mode = [p.requires_grad for p in model.parameters()], model.training
    assert head_of(model, call_order(model, x)) == head
    assert [line.name for line in sp.coverage(sp.factorize(model, example_inputs=x), inputs=x) if line.reason == HEAD] == [head]
    assert ([p.requires_grad for p in model.parameters()], model.training) == (flags, mode)
    with torch.inference_mode():
        assert head_of(model, call_order(model, x)) == name


def test_a_head_of_a_model_that_differentiates_inside_or_through_a_checkpoint_is_the_last_one_called() -> None:
    class Force(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                return torch.autograd.grad(super().forward(x).sum(), x)[0]

    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x.requires_grad_(True), use_reentrant=True)

    for kind in (Force, Checkpointed):
        assert call_order(kind(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(2, 6)) == ["0", "2"]


class Registered(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (lambda: Boxes("head"), "head"),
        (lambda: Registered(classifier=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), body=nn.Linear(5, 8)), "classifier.1"),
        (lambda: Registered(fc=nn.Linear(8, 3), body=nn.Linear(5, 8), more=nn.Linear(8, 8)), "fc"),
        (lambda: Registered(one=nn.Linear(5, 8), two=nn.Linear(8, 8), three=nn.Linear(8, 3)), "three"),
        (lambda: Registered(encode=nn.Linear(5, 3), decode=nn.Linear(3, 5)), "decode"),
        (lambda: Registered(one=nn.Linear(5, 8), two=nn.Conv2d(8, 8, 3)), None),
        (lambda: Registered(blocks=nn.ModuleList([Registered(cls=nn.Linear(8, 8)) for _ in range(2)])), None),
    ],
)
def test_without_a_forward_pass_names_and_sizes_decide(model: Callable[[], nn.Module], head: str | None) -> None:
    made = model()
    assert head_of(made) == head
    assert [name for name, reason in decide(made).items() if reason == HEAD] == ([] if head is None else [head])
    low = sp.factorize(made)
    assert head_of(low) == head


def test_the_last_layer_of_a_list_is_a_head_and_the_end_of_a_block_is_not() -> None:
    class Stack(nn.Module):
        def __init__(self, blocks: bool) -> None:
            super().__init__()
            make = (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))) if blocks else lambda: nn.Linear(4, 4)
            self.layers = nn.ModuleList([make() for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    x = torch.zeros(2, 4)
    assert head_of(Stack(False), call_order(Stack(False), x)) == "layers.2"
    assert head_of(Stack(True), call_order(Stack(True), x)) is None


class Stored(nn.Module):
    """A linear layer as quantizers keep it: in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(9, (6, 6), dtype=torch.int8))
        self.register_buffer("scales", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        codes: Any = self.codes
        return x @ (codes.float() * self.scales[:, None]).T


def test_layers_whose_weights_are_buffers_are_listed() -> None:
    lines = {line.name: line.reason for line in sp.coverage(nn.Sequential(Stored(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)))}
    assert list(lines) == ["0", "1", "2", "3"]
    assert lines["0"] == "its tensors are buffers (codes), which are not trained; factorize before quantizing"


def test_names_are_no_markup() -> None:
    model = nn.ModuleDict({"[/a]": nn.Linear(6, 6), "[red]": nn.Linear(6, 6), ":smile:": nn.Linear(6, 6)})
    for lines in (sp.coverage(model), sp.coverage(sp.factorize(model))):
        assert all(name in str(lines) for name in model)


def test_a_side_of_a_million_takes_no_square_of_it() -> None:
    model, x = nn.Sequential(nn.Linear(1_000_000, 2), nn.ReLU(), nn.Linear(2, 3)), torch.randn(2, 1_000_000)
    assert list(sp.compress(model, [(x, torch.tensor([0, 1]))], nn.CrossEntropyLoss(), 0.6, progress=False).ranks) == ["0"]


def test_a_convolution_that_pads_and_calls_conv2d_is_refused_with_the_way_out() -> None:
    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)

    (line,) = sp.coverage(nn.Sequential(Same(4, 4, 3)))
    assert line.reason == "can be factorized" or "nn.ZeroPad2d before it" in line.reason


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_wrapped_models_are_those_inside(wrap: Callable[[nn.Module], nn.Module], tmp_path: Any) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    bare, wrapped = sp.factorize(model, rank=2), sp.factorize(wrap(model), rank=2)
    assert list(bare.state_dict()) == list(wrapped.state_dict())
    assert sp.coverage(model) == sp.coverage(wrap(model))
    assert sp.measure(model, x, latency=False) == sp.measure(wrap(model), x, latency=False)
    sp.save(wrap(sp.merge(wrap(bare))), tmp_path)
    assert torch.equal(sp.load(tmp_path, wrap(model))(x), sp.merge(bare)(x))
    assert sp.allocate(wrap(bare), 0.9, x) == sp.allocate(bare, 0.9, x)
    cut = sp.prune(wrap(bare), {"0": 1}, calibration=sp.calibrate(wrap(bare), [x]))
    assert torch.equal(sp.correct(wrap(cut), wrap(model), [x])(x), sp.correct(cut, model, [x])(x))
    made = sp.compress(wrap(model), [(x, torch.randint(3, (4,)))], nn.CrossEntropyLoss(), 0.9, progress=False)
    assert list(made.ranks) == ["0"]


def test_a_compiled_part_of_a_model_says_what_to_do() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(6, 6), backend="eager"), nn.Linear(6, 3))
    with pytest.raises(LayerError, match=r"layer '0': is wrapped by torch\.compile.*compress first"):
        sp.factorize(model)


def test_a_name_of_no_layer_is_refused_with_those_that_are_near() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(6, 6), "head": nn.Linear(6, 2)})
    with pytest.raises(SettingError, match=r"factorize: where must be .*got 'encodr'; close to it: 'encoder'"):
        sp.factorize(model, where=["head", "encodr"])
