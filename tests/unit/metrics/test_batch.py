"""Where the examples of a batch lie: found by agreement, tried in the network, stated, or refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.metrics.batch import candidates, stated, take
from spectrim.metrics.calls import call_model
from spectrim.metrics.inputs import batch_size_of, first_examples, one_example

B, T, E, H = 4, 7, 6, 8


class Recurrent(nn.Module):
    """A tagger or, with `last`, a classifier."""

    def __init__(self, batch_first: bool, last: bool) -> None:
        super().__init__()
        self.rnn, self.out, self.last = nn.LSTM(E, H, batch_first=batch_first), nn.Linear(H, 3), last

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Tensor:
        y, _ = self.rnn(x, state)
        return self.out((y[:, -1] if self.rnn.batch_first else y[-1]) if self.last else y)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(E, 2, H, batch_first=True), nn.Linear(E, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out(self.layer(x, mask).mean(1))


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(E, H), nn.Linear(H, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.out(h.index_add(0, edges[1], h[edges[0]]))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, H, 3, padding=1), nn.Linear(H, 3)

    def forward(self, images: list[Tensor]) -> Tensor:
        return torch.cat([self.out(self.conv(image[None]).relu().mean((2, 3))) for image in images])


def labels(*shape: int) -> Tensor:
    return torch.randint(3, shape)


def shapes(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return tuple(inputs.shape)
    return {key: shapes(value) for key, value in inputs.items()} if isinstance(inputs, Mapping) else [shapes(value) for value in inputs]


CASES = {
    "vectors": (nn.Linear(E, 3), torch.randn(B, E), labels(B), (1, E)),
    "time first": (Recurrent(False, True), torch.randn(T, B, E), labels(B), (T, 1, E)),
    "time first, a label each": (Recurrent(False, False), torch.randn(T, B, E), labels(T, B), (T, 1, E)),
    "batch first, a label each": (Recurrent(True, False), torch.randn(B, T, E), labels(B, T), (1, T, E)),
    "as long as wide": (Recurrent(False, True), torch.randn(B, B, E), labels(B), (B, 1, E)),
    "hidden state": (
        Recurrent(True, True),
        (torch.randn(B, T, E), (torch.randn(1, B, H), torch.randn(1, B, H))),
        labels(B),
        [(1, T, E), [(1, 1, H), (1, 1, H)]],
    ),
    "shared mask": (Masked(), (torch.randn(B, T, E), torch.zeros(T, T)), labels(B), [(1, T, E), (T, T)]),
    "shared mask as large as the batch": (
        Masked(),
        (torch.randn(B, B, E), torch.ones(B, B).triu(1).bool()),
        labels(B),
        [(1, B, E), (B, B)],
    ),
    "dict": (Masked(), {"x": torch.randn(B, T, E), "mask": torch.zeros(T, T)}, labels(B), {"x": (1, T, E), "mask": (T, T)}),
    "list of images": (Pictures(), [torch.randn(3, 8 + i, 8) for i in range(B)], labels(B), [[(3, 8, 8)]]),
    "three colors, three images": (Pictures(), ([torch.randn(3, 8, 8)] * 3,), labels(3), [[(3, 8, 8)]]),
}


@pytest.mark.parametrize("case", CASES)
def test_only_the_batch_axis_is_cut(case: str) -> None:
    model, inputs, target, expected = CASES[case]
    model.eval()
    one = one_example([(inputs, target)], model)
    assert shapes(one) == expected
    with torch.no_grad():
        whole, single = call_model(model, inputs), call_model(model, one)
    if target.dim() == 1:
        torch.testing.assert_close(single, whole[:1])
    assert batch_size_of(inputs, target=target, model=model) == (target.numel() if target.dim() == 1 else B)


@pytest.mark.parametrize("case", CASES)
def test_a_budget_holds_for_the_whole_batch(case: str) -> None:
    model, inputs, target, _ = CASES[case]
    low = sp.merge(sp.factorize(model, where="*", rank=1))
    example, batch = one_example([(inputs, target)], model), batch_size_of(inputs, target=target, model=model)
    one, whole = (
        [sp.measure(m, x, latency=False, batch_size=n).macs or 0 for m in (low, model)] for x, n in ((example, 1), (inputs, batch))
    )
    if "images" not in case:  # which differ in size
        assert one == whole


def test_what_cannot_be_cut_is_refused_with_the_shapes_and_the_models_error() -> None:
    batch = ((torch.randn(B, E), torch.tensor([[1, 2, 3], [0, 3, 1]])), labels(B))
    with pytest.raises(
        SettingError, match=r"compress: example_inputs .*inputs\[0\] \(1, 6\).*inputs\[0\] \(4, 6\).*IndexError.*batch_dims"
    ):
        sp.compress(Graph(), [batch], nn.CrossEntropyLoss(), 0.6, progress=False)
    made = sp.compress(Graph(), [batch], nn.CrossEntropyLoss(), 0.6, example_inputs=batch[0], progress=False)
    assert made.measured["final"].macs <= 0.6 * made.measured["dense"].macs


def test_a_cut_that_changes_the_output_is_refused() -> None:
    class Mixing(nn.Linear):
        def forward(self, x: Tensor, others: Tensor) -> Tensor:
            return super().forward(x - x.mean(0) + others.sum())

    with pytest.raises(SettingError, match="computes something else"):
        one_example([((torch.randn(B, E), torch.randn(9, 2)), labels(B))], Mixing(E, 3))


def test_sizes_that_tell_nothing_are_refused() -> None:
    with pytest.raises(SettingError, match=r"compress: data must be batches whose sizes determine.*\(5, 6\).*\(9, 2\).*target \(3,\)"):
        one_example([((torch.zeros(5, 6), torch.zeros(9, 2)), torch.zeros(3))], owner="compress")
    with pytest.raises(SettingError, match=r"cannot be derived from inputs\[0\] \(5, 6\), inputs\[1\] \(9, 2\)"):
        batch_size_of((torch.zeros(5, 6), torch.zeros(9, 2)))
    assert batch_size_of((torch.zeros(5, 6), torch.zeros(9, 2)), target=torch.zeros(1)) == 1  # a graph


def test_axes_that_the_caller_states() -> None:
    x, h = torch.randn(T, B, E), torch.randn(2, B, H)
    for dims in (1, [1, 1], {0: 1, 1: 1}, (-2, 1)):
        layout = stated((x, h), dims, "compress")
        assert layout.size == B
        assert shapes(take((x, h), layout, 2)) == [(T, 1, E), (2, 1, H)]
        assert torch.equal(take((x, h), layout, 2)[0], x[:, 2:3])
    assert shapes(take({"x": x, "h": h}, stated({"x": x, "h": h}, {"x": 0}, "compress"))) == {"x": (1, B, E), "h": (2, B, H)}
    assert len(first_examples([(x, None)] * 5, 2 * B, dims=1)) == 2
    for dims, rule in ((3, "axes that the inputs have"), ((0, 1), "axes of one length"), ({"y": 0}, "by argument")):
        with pytest.raises(SettingError, match=f"compress: batch_dims must be {rule}"):
            stated((x, h), dims, "compress")


def test_packed_and_nested_sequences() -> None:
    packed = pack_padded_sequence(torch.randn(T, B, E), [7, 5, 4, 2])
    one = one_example([(packed, labels(B))])
    assert pad_packed_sequence(one)[0].shape == (T, 1, E)
    nested = torch.nested.nested_tensor([torch.randn(n, E) for n in (3, 5)], layout=torch.jagged)
    assert one_example([(nested, labels(2))]).unbind()[0].shape == (3, E)


def test_candidates_come_in_the_order_of_likelihood() -> None:
    assert [layout.size for layout in candidates(torch.zeros(T, B, E), torch.zeros(B))] == [B]
    assert [layout.size for layout in candidates(torch.zeros(T, B, E))] == [T, B]
    assert [layout.size for layout in candidates(torch.zeros(B, 3, 8, 8))] == [B]


@dataclasses.dataclass
class Two:
    kind: Any
    size: Any


def two(form: str, kind: Tensor, size: Tensor) -> Any:
    return {"tuple": (kind, size), "dict": {"kind": kind, "size": size}, "dataclass": Two(kind, size)}[form]


def parts(value: Any) -> tuple[Tensor, Tensor]:
    if isinstance(value, Two):
        return value.kind, value.size
    return tuple(value.values()) if isinstance(value, dict) else value


class Tasks(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.body, self.kind, self.size = form, nn.Linear(E, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Any:
        h = self.body(x).relu()
        return two(self.form, self.kind(h), self.size(h))


@pytest.mark.parametrize("form", ["tuple", "dict", "dataclass"])
def test_several_tasks_go_through_every_verb(form: str) -> None:
    def loss(output: Any, target: Any) -> Tensor:
        (kind, size), (wanted, length) = parts(output), parts(target)
        return F.cross_entropy(kind, wanted) + F.mse_loss(size.squeeze(1), length)

    data = [(torch.randn(n, E), two(form, labels(n), torch.randn(n))) for n in (8, 4)]
    model = Tasks(form)
    each = [float(loss(model(x), target).detach()) for x, target in data]
    assert sp.evaluate(model, data, loss) == {"loss": pytest.approx((8 * each[0] + 4 * each[1]) / 12, rel=1e-6)}
    made = sp.compress(model, data, loss, 0.7, epochs=1, examples=12, progress=False)
    assert made.measured["final"].macs <= 0.7 * made.measured["dense"].macs
    assert "no teacher" in made.stages()
    assert sp.plan(model, data[0][0], data, loss, budgets=[0.7]).budgets[0].ranks is not None or form == "dataclass"


def test_tensors_of_inference_mode_train() -> None:
    with torch.inference_mode():
        data = [(torch.randn(B, E), labels(B))]
    model = nn.Sequential(nn.Linear(E, 16), nn.ReLU(), nn.Linear(16, 3))
    assert sp.compress(model, data, nn.CrossEntropyLoss(), 0.8, epochs=1, progress=False).history.epochs
