"""Many tasks in one network: nothing is forgotten, to the bit; counts follow the formula; one file holds all."""

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import FormatError, LayerError, RankError, SettingError
from spectrim.forms.tasks import TaskFactors, fresh
from spectrim.layers import named_factors
from spectrim.penalties import L1
from spectrim.storage.pack import pack, unpack
from spectrim.surgery import add_task, one_task, params_of_task, prune_task, select_task, selected_task, sharing, tasks_of


class Net(nn.Module):
    """A grouped and a plain convolution with norms, two linear layers and a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.BatchNorm2d(8)
        self.fc1, self.fc2, self.head = nn.Linear(8, 10), nn.Linear(10, 6), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu().mean((2, 3))
        out: Tensor = self.head(self.fc2(self.fc1(x).relu()).relu())
        return out


def low(scheme: str = "channel", rank: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return sp.factorize(Net(), scheme=scheme, rank=rank)  # type: ignore[arg-type]


def train(model: nn.Module, steps: int = 3, decay: float = 0.1, penalties: tuple[Any, ...] = ()) -> None:
    """Train with what spoils frozen weights most easily: momentum and weight decay, over all parameters, grads kept as zeros."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.02, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        loss = model.train()(torch.randn(16, 2, 6, 6)).logsumexp(1).square().mean() + sum(penalty(model) for penalty in penalties)
        loss.backward()
        optimizer.step()
    model.eval()


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what each task computes."""
    with torch.no_grad():
        return [select_task(model, task).eval()(x) for task in range(tasks_of(model))]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
@pytest.mark.parametrize("reuse", [True, False])
def test_nothing_is_forgotten_to_the_bit(x: Tensor, scheme: str, reuse: bool) -> None:
    model = low(scheme)
    train(model)
    known = [model(x).detach()]
    for task in range(1, 4):
        add_task(model, rank=1, reuse=reuse)
        assert (tasks_of(model), selected_task(model)) == (task + 1, task)
        train(model)
        known.append(model(x).detach())
        found = outputs(model, x)
        assert all(torch.equal(now, before) for now, before in zip(found, known, strict=True))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(known))


def test_the_optimizer_of_an_earlier_task_cannot_touch_it(x: Tensor) -> None:
    model = low()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    before = model.eval()(x).detach()
    add_task(model)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(select_task(model, 0)(x), before)


def test_what_a_forward_pass_changes_in_an_old_task_is_undone(x: Tensor) -> None:
    model = add_task(low())
    before = select_task(model, 0).eval()(x)
    model.train()(x)  # moves running statistics
    assert not torch.equal(model.eval()(x), before)
    assert torch.equal(select_task(model, 0)(x), before)


def test_a_new_task_starts_as_the_selected_one_but_for_its_columns_and_head(x: Tensor) -> None:
    model = low()
    train(model)
    features: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, args: features.append(args[0].detach()))  # type: ignore[union-attr, operator]
    model(x)
    head = model.head.weight.detach().clone()  # type: ignore[union-attr, operator]
    add_task(model, rank=0)(x)
    torch.testing.assert_close(features[1], features[0])
    assert not torch.equal(model.head.weight, head)  # type: ignore[union-attr]
    train(model)
    select_task(model, 0)
    add_task(model, rank=0).eval()(x)  # from task 0, not from the last one
    torch.testing.assert_close(features[-1], features[0])


def test_parameters_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    model = sp.factorize(nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)), rank=11)
    before = sum(p.numel() for p in model.parameters())
    for task in range(1, 4):
        add_task(model, rank=1)
        columns, selectors, biases, head = (784 + 256) + (256 + 256), 2 * (11 + task), 2 * 256, 256 * 10 + 10
        assert params_of_task(model, task) == columns + selectors + biases + head
        after = sum(p.numel() for p in model.parameters())
        assert after - before == params_of_task(model, task)
        before = after
    assert params_of_task(model, 0) == 11 * (784 + 256 + 256 + 256) + 2 * 11 + 512 + 2570
    assert params_of_task(select_task(model, 1), 3) == columns + selectors + biases + head


def test_a_convolution_counts_blocks_and_running_statistics() -> None:
    model = add_task(low("channel", rank=2), rank=1)
    conv1, conv2 = 8 + 2 * 9, 2 * (4 + 4 * 9)
    linear, selectors = (8 + 10) + (10 + 6), 3 + 2 * 3 + 3 + 3
    private = 2 * (4 * 8 + 1) + 8 + 10 + 6 + (6 * 3 + 3)
    assert params_of_task(model, 1) == conv1 + conv2 + linear + selectors + private


def test_new_columns_are_orthonormal_and_orthogonal_to_earlier_ones() -> None:
    model = low("channel", rank=2)
    for _ in range(2):
        add_task(model, rank=2)
    form = dict(named_factors(model))["fc1"]
    for side in form.sides():
        torch.testing.assert_close(side.mT @ side, torch.eye(6), atol=1e-5, rtol=0)
    assert fresh(torch.eye(4)[:, :3], 2).shape == (4, 2)  # more than fit beside each other


def test_only_new_columns_are_penalized_and_cut(x: Tensor) -> None:
    model = low(rank=4)
    train(model)
    before = model(x).detach()
    add_task(model, rank=3)
    for _, form in named_factors(model):
        assert [values.shape[-1] for values in form.values()] == [3]
    train(model, decay=0.0, penalties=(sp.Orthogonality(1.0),))
    with torch.no_grad():
        for _, form in named_factors(model):
            form.values()[0][..., 1:] = 1e-4  # a view of the selector
    task = model(x).detach()
    assert prune_task(model, keep=0.9999) == {"conv1": 1, "conv2": 1, "fc1": 1, "fc2": 1}
    torch.testing.assert_close(model(x), task, rtol=0.05, atol=0.01)  # what was cut is 1e-4 of what is left
    assert torch.equal(select_task(model, 0)(x), before)
    again = add_task(select_task(model, 1), rank=1)
    train(again)
    assert torch.equal(select_task(model, 0)(x), before)


def test_penalties_can_take_all_new_columns(x: Tensor) -> None:
    model = add_task(low(rank=4), rank=1)
    assert prune_task(model, keep=1e-9) == {"conv1": 0, "conv2": 0, "fc1": 0, "fc2": 0}
    assert L1(1.0)(model) == 0
    assert sp.Orthogonality(1.0)(model) == 0
    train(model, penalties=(L1(1.0), sp.Orthogonality(1.0), sp.Hoyer(0.1)))
    assert set(prune_task(add_task(model, rank=2, reuse=False), keep=1e-9).values()) == {1}


def test_one_task_is_a_plain_factorized_network_and_merges(x: Tensor) -> None:
    model = low(rank=2)
    train(model)
    for _ in range(2):
        train(add_task(model, rank=1))
    wanted = outputs(model, x)
    for task in range(3):
        alone = one_task(model, task).eval()
        assert torch.equal(alone(x), wanted[task])
        assert tasks_of(alone) == 1
        assert not [name for name in alone.state_dict() if "__task" in name]
        assert all(p.requires_grad for p in alone.parameters())
        for merged in (sp.merge(alone), sp.merge(select_task(model, task))):
            torch.testing.assert_close(merged(x), wanted[task], rtol=1e-4, atol=1e-5)
            assert not [p for p in merged.modules() if isinstance(p, TaskFactors)]
            assert not [name for name in merged.state_dict() if "__task" in name]
    assert selected_task(model) == 2
    sp.prune(one_task(model), {"fc1": 1})


def test_more_columns_than_the_full_rank_are_decomposed_for_one_task(x: Tensor) -> None:
    model = low("channel", rank=5)
    for _ in range(3):
        train(add_task(model, rank=3))
    form = dict(named_factors(model))["fc2"]
    assert form.rank == 14 > form.full_rank == 6
    alone = one_task(model).eval()
    assert dict(named_factors(alone))["fc2"].rank == 6
    torch.testing.assert_close(alone(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selected", [0, 2])
def test_save_and_load_hold_every_task(x: Tensor, tmp_path: Path, selected: int) -> None:
    model = low(rank=2)
    train(model)
    train(add_task(model, rank={"fc1": 0, "fc2": 2}))
    train(add_task(model, rank=1, reuse=False, outputs=5))
    wanted = outputs(model, x)
    assert [tuple(y.shape) for y in wanted] == [(5, 3), (5, 3), (5, 5)]
    select_task(model, selected)
    sp.save(model, tmp_path / "net")
    pack(model, tmp_path / "net.spz")
    for again in (sp.load(tmp_path / "net", Net()), unpack(tmp_path / "net.spz", Net())):
        assert (tasks_of(again), selected_task(again)) == (3, selected)
        assert {n: p.requires_grad for n, p in again.named_parameters()} == {n: p.requires_grad for n, p in model.named_parameters()}
        assert all(torch.equal(now, before) for now, before in zip(outputs(again, x), wanted, strict=True))
        train(add_task(again, rank=1))
        assert all(torch.equal(now, before) for now, before in zip(outputs(again, x), wanted, strict=False))
    with pytest.raises(FormatError, match="its plan does not fit the model"):
        sp.load(tmp_path / "net", Net(4))


def test_copies_and_checkpoints_of_weights_hold_every_task(x: Tensor) -> None:
    model = low()
    train(add_task(model))
    wanted = outputs(model, x)
    twin = copy.deepcopy(model)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    train(add_task(model))
    assert all(torch.equal(now, before) for now, before in zip(outputs(twin, x), wanted, strict=True))
    other = select_task(add_task(low()), 1)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert all(torch.equal(now, before) for now, before in zip(outputs(other, x), wanted, strict=True))


def test_fit_trains_the_last_task_alone(x: Tensor) -> None:
    model = low()
    before = model.eval()(x).detach()
    add_task(model, rank=1)
    data = [(torch.randn(8, 2, 6, 6), torch.randint(0, 3, (8,))) for _ in range(3)]
    shared = {name for name, p in model.named_parameters() if not p.requires_grad}
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalties = [sp.Orthogonality(0.1), L1(0.01)]
    sp.fit(model, data, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 0.01), 1, penalties=penalties, progress=False)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, held[name])}
    assert changed == set(held) - shared
    assert torch.equal(select_task(model, 0).eval()(x), before)


def test_a_run_with_tasks_resumes_with_the_same_bits(x: Tensor, tmp_path: Path) -> None:
    data = [(torch.randn(8, 2, 6, 6), torch.randint(0, 3, (8,))) for _ in range(2)]

    def fitted(epochs: int, checkpoint: Path | None) -> nn.Module:
        model = low()
        train(model)
        add_task(model, rank=1)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        sp.fit(model, data, nn.CrossEntropyLoss(), optimizer, epochs, checkpoint=checkpoint, progress=False)
        return model

    fitted(1, tmp_path)
    for now, before in zip(outputs(fitted(2, tmp_path), x), outputs(fitted(2, None), x), strict=True):
        assert torch.equal(now, before)


def test_what_else_reads_a_network_takes_the_selected_task(x: Tensor) -> None:
    model = add_task(low()).eval()
    assert sp.measure(model, x[:1]).params == sum(p.numel() for p in model.parameters())
    assert {line.name: line.rank for line in sp.coverage(model) if line.factorized} == {"conv1": 3, "conv2": 3, "fc1": 3, "fc2": 3}
    sp.same_function(model, one_task(model), x)


def test_an_optimizer_stays_valid_while_another_task_is_looked_at(x: Tensor) -> None:
    model = add_task(low())
    trained = [p for p in model.parameters() if p.requires_grad]
    select_task(model, 0)
    assert not [p for p in model.parameters() if p.requires_grad]
    select_task(model, 1)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in trained]


def test_sharing_says_what_tasks_do_with_each_tensor() -> None:
    torch.manual_seed(0)
    model = sp.factorize(Net(), scheme="tucker", where=["conv1", "conv2", "fc1"], rank=2)
    model.bn2.requires_grad_(False)  # type: ignore[operator, union-attr]
    foreseen = sharing(model)
    assert foreseen["conv1"] == foreseen["fc2.weight"] == foreseen["bn2.weight"] == "shared"
    assert foreseen["conv2"] == foreseen["fc1"] == "columns"  # a grouped convolution has no Tucker form
    private = ["fc1.bias", "fc2.bias", "head.weight", "head.bias", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn2.running_var"]
    assert [foreseen[name] for name in private] == ["private"] * len(private)
    assert sharing(add_task(model)) == foreseen
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        *(f"{layer}.factors.weight.{part}1" for layer in ("conv2", "fc1") for part in ("U", "S", "Vh")),
        *("conv2.bias", "fc1.bias", "fc2.bias", "head.weight", "head.bias", "bn1.weight", "bn1.bias"),
    }
    other = sp.factorize(Net(), where="fc1")
    assert sharing(other, private=["fc2", "head"])["fc2.weight"] == "private"


def test_tied_layers_stay_tied(x: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(self.b(self.a(x))))
            return out

    model, z = sp.factorize(Tied(), rank=2), torch.randn(3, 4)
    before = model(z).detach()
    add_task(model)
    assert model.a.bias is model.b.bias  # type: ignore[union-attr]
    assert dict(model.a.named_modules())["factors.weight"] is dict(model.b.named_modules())["factors.weight"]  # type: ignore[union-attr, operator]
    assert torch.equal(select_task(model, 0)(z), before)
    assert model.a.bias is model.b.bias  # type: ignore[union-attr]


def test_clear_refusals(x: Tensor) -> None:
    with pytest.raises(LayerError, match="has no factorized weight that takes columns; call factorize"):
        add_task(Net())
    with pytest.raises(SettingError, match=r"select_task: task must be an integer in \[0, 0\]: the model has one task, got 1; add_task"):
        select_task(low(), 1)
    with pytest.raises(SettingError, match=r"prune_task: model must be a network with tasks"):
        prune_task(low())
    model = low()
    for wrong, error, words in (
        ({"rank": 7}, RankError, "rank must be in"),
        ({"rank": 0, "reuse": False}, SettingError, "at least 1 with reuse=False"),
        ({"rank": {"fc9": 1}}, LayerError, "layer 'fc9': is no weight that takes columns"),
        ({"private": "fc1"}, LayerError, "layer 'fc1': is factorized: tasks add columns"),
        ({"private": "fc9"}, SettingError, "add_task: private must be names of layers, or globs over them, got 'fc9'"),
        ({"outputs": 0}, SettingError, "outputs must be an integer of at least 1"),
    ):
        with pytest.raises(error, match=words):
            add_task(model, **wrong)  # type: ignore[arg-type]
    assert tasks_of(model) == 1
    assert not any(isinstance(form, TaskFactors) for _, form in named_factors(model))
    add_task(model)
    with pytest.raises(SettingError, match="private must be omitted after the first call"):
        add_task(model, private="head")
    with pytest.raises(SettingError, match=r"prune_task: keep must be a fraction in \(0, 1\]"):
        prune_task(model, 2.0)
    for cut in (lambda: sp.prune(model, {"fc1": 1}), lambda: sp.prune(model, sp.Energy(0.5))):
        with pytest.raises(LayerError, match="layer 'TaskFactors': holds the columns of 2 tasks; one_task"):
            cut()


class Words(nn.Module):
    """An embedding, a layer with several weights, and a head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(9, 8), body, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        x = self.body(x)[0] if isinstance(self.body, nn.LSTM | nn.GRU) else self.body(x)
        out: Tensor = self.head(x.mean(1))
        return out


BODIES = {
    "lstm": lambda: nn.LSTM(8, 8, batch_first=True),
    "gru": lambda: nn.GRU(8, 8, batch_first=True, bidirectional=False),
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("body", BODIES)
def test_layers_with_several_weights_and_embeddings_take_columns(body: str) -> None:
    torch.manual_seed(0)
    model, words = sp.factorize(Words(BODIES[body]()), rank=3), torch.randint(0, 9, (4, 5))
    assert "words" in dict(named_factors(model))

    def trained() -> Tensor:
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        model.train()(words).square().sum().backward()
        optimizer.step()
        return outputs(model, words)[-1]  # without gradients, as torch has other kernels of a GRU with them

    before = trained()
    add_task(model, rank=1)
    after = trained()
    assert not torch.equal(after, before)
    assert torch.equal(outputs(model, words)[0], before)
    torch.testing.assert_close(sp.merge(select_task(model, 1)).eval()(words), after, rtol=1e-4, atol=1e-5)
