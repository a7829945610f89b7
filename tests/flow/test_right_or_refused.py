"""Uses that ended in a wrong result or in an error from deep inside: each is right now, or refused with a reason."""

import copy
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import spectrim as sp
from spectrim.errors import ExportError, LayerError, SettingError, WriteError
from spectrim.locks import locked
from spectrim.runtimes import run_exported

LOSS = nn.CrossEntropyLoss()
DATA = [(torch.randn(32, 16), torch.randint(4, (32,))) for _ in range(3)]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


class Recurrent(nn.Module):
    """A recurrent layer and a head, on padded or packed sequences."""

    def __init__(self, packs: bool = False) -> None:
        super().__init__()
        self.rnn, self.head, self.packs = nn.LSTM(6, 64, batch_first=True), nn.Linear(64, 3), packs

    def forward(self, x: Any, lengths: Tensor | None = None) -> Tensor:
        x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False) if self.packs and lengths is not None else x
        return self.head(self.rnn(x)[1][0][-1])


# Values that overflow


@pytest.mark.parametrize("name", ["0", "2"])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_weights_whose_singular_values_overflow_are_refused_by_the_layers_name(name: str, method: Any) -> None:
    model = net()
    with torch.no_grad():
        model.get_submodule(name).weight.fill_(3e38)
    with pytest.raises(LayerError, match=f"layer '{name}': its singular values are not finite in torch.float32"):
        sp.factorize(model, rank=2, method=method)
    assert sp.factorize(model.double(), rank=2)[int(name)].S.isfinite().all()


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_network_that_gives_nan_is_not_exported(suffix: str, tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model[2].bias[3] = float("nan")
    with pytest.raises(ExportError, match=r"'2'.*NaN or infinite"):
        sp.export(model, DATA[0][0], tmp_path / f"net{suffix}")
    with torch.no_grad():
        model[2].bias[3] = 0.0
        model[0].weight.fill_(1e38)
    with pytest.raises(ExportError, match="NaN or infinite"):
        sp.export(model, DATA[0][0].abs() * 1e3, tmp_path / f"net{suffix}")
    assert not list(tmp_path.iterdir())


def test_some_infinite_outputs_are_compared_as_they_are(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).masked_fill(torch.tensor([True, False, False, False]), float("-inf"))

    assert sp.export(Masked(), DATA[0][0], tmp_path / "masked.pt2").difference == 0


# Packed sequences, tracing


def test_exports_of_packed_sequences_say_what_to_give(tmp_path: Path) -> None:
    x, lengths = torch.randn(3, 5, 6), torch.tensor([5, 3, 2])
    for model in (Recurrent(), sp.factorize(Recurrent(), rank=4, where="rnn")):
        with pytest.raises(SettingError, match="export: inputs must be padded tensors"):
            sp.export(model, pack_padded_sequence(x, lengths, batch_first=True), tmp_path / "net.pt2")
        with pytest.raises(SettingError, match="export: inputs must be padded tensors"):
            sp.export(model, {"x": pack_padded_sequence(x, lengths, batch_first=True)}, tmp_path / "net.onnx")
    for model in (Recurrent(packs=True), sp.factorize(Recurrent(packs=True), rank=4, where="rnn")):
        with pytest.raises(ExportError, match="layer 'rnn' gets a packed sequence"):
            sp.export(model, (x, lengths), tmp_path / "net.pt2")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("settings", [{}, {"batch_first": True, "bidirectional": True}, {"num_layers": 2}])
def test_merged_recurrent_layers_are_traced_by_jit_and_fx(kind: Any, settings: dict[str, Any]) -> None:
    merged = sp.merge(sp.factorize(nn.Sequential(kind(6, 64, **settings)), rank=4, where="0"))
    x, longer = torch.randn(5, 3, 6), torch.randn(9, 3, 6)
    if settings.get("batch_first"):
        x, longer = x.transpose(0, 1), longer.transpose(0, 1)
    graph = torch.fx.symbolic_trace(merged)
    for given in (x, longer):
        assert torch.equal(graph(given)[0], merged(given)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about TorchScript
        traced = torch.jit.trace(merged, x)
        assert torch.allclose(traced(x)[0], merged(x)[0], atol=1e-6)
        with pytest.raises(RuntimeError):  # a loop as long as the example: never a wrong result
            traced(longer)


# Frozen networks, inference mode


@pytest.mark.parametrize("cut", ["auto", "plain", "whitened", "sensitive", "mixed"])
def test_a_frozen_network_is_compressed_without_epochs(cut: Any, tmp_path: Path) -> None:
    made = sp.compress(
        net().requires_grad_(False), DATA, LOSS, 0.6, cut=cut, folder=tmp_path, tuning=sp.Tuning(optimizer=torch.optim.Adam), progress=False
    )
    assert made.measured["final"].macs <= 0.6 * made.measured["dense"].macs
    assert not any(parameter.requires_grad for parameter in made.model.parameters())


def test_a_frozen_network_is_not_trained() -> None:
    with pytest.raises(SettingError, match="compress: model must be one to train"):
        sp.compress(net().requires_grad_(False), DATA, LOSS, 0.6, epochs=1, progress=False)


@pytest.mark.parametrize("inside", [True, False])
def test_verbs_give_trainable_networks_in_inference_mode_and_of_inference_tensors(inside: bool) -> None:
    with torch.inference_mode():
        model = net()
    assert model[0].weight.is_inference()
    with torch.inference_mode(inside):
        low = sp.factorize(model, where=["0", "2"])
        sp.fit(low, DATA, LOSS, torch.optim.Adam(low.parameters()), 1, progress=False)
        found = sp.calibrate(low, DATA, LOSS)
        cut = sp.correct(sp.prune(low, sp.budget.Fixed(4), calibration=found), low, DATA)
        made = sp.compress(model, DATA, LOSS, 0.6, epochs=1, progress=False)
        sp.plan(model, DATA[0][0], DATA, LOSS, budgets=[0.6])
        merged = sp.merge(cut)
    for network in (low, cut, merged, made.model):
        assert not any(tensor.is_inference() for tensor in network.parameters())
    LOSS(merged(DATA[0][0]), DATA[0][1]).backward()


# Experts


def test_experts_whose_forward_looks_for_its_parameters_stay_dense_with_the_reason() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(4, 48, 16)), nn.Parameter(torch.randn(4, 16, 48))

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.parameters():
                x = torch.einsum("bi,eoi->bo", x, weight)
            return x

    lines = {line.name: line for line in sp.coverage(nn.Sequential(nn.Linear(16, 16), Experts(), nn.Linear(16, 4)))}
    assert not lines["1"].factorized
    assert "stacked (up, down): its forward looks for its parameters (parameters)" in lines["1"].reason


# Writers, files


def _compress(folder: Path) -> None:
    sp.compress(net(), DATA, LOSS, 0.6, folder=folder, progress=False)


def test_a_second_compress_in_one_folder_is_refused(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def hold() -> None:
        with locked(tmp_path):
            ready.set()
            done.wait(60)

    other = context.Process(target=hold)
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(WriteError, match="is being written by process"):
            _compress(tmp_path)
    finally:
        done.set()
        other.join()
    assert not (tmp_path / "settings.json").exists()
    _compress(tmp_path)
    assert not list(tmp_path.rglob("*.lock"))


def test_a_changed_number_in_an_onnx_file_is_noticed(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model, x = net(), DATA[0][0]
    path = sp.export(model, x, tmp_path / "net.onnx").path
    torch.testing.assert_close(run_exported(path, x), model(x).detach())
    proto = onnx.load(str(path))
    weight = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(proto, str(path))
    with pytest.raises(sp.errors.FormatError, match="does not match its digest"):
        run_exported(path, x)
    with pytest.raises(sp.errors.FormatError, match="does not match its digest"):
        sp.quantize(path, [x], tmp_path / "int8.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, str(path))
    assert not torch.allclose(run_exported(path, x), model(x).detach()), "without a digest it is read as it is"


# Batch axes


class TimeFirst(nn.Module):
    """Time first, a class for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean(0)


def test_evaluate_and_measure_take_the_batch_axis() -> None:
    model, data = TimeFirst(), [(torch.randn(5, count, 6), torch.randn(count, 8)) for count in (7, 3)]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(-1).mean()

    expected = sum(loss(model(x), y).item() * x.size(1) for x, y in data) / 10
    assert sp.evaluate(model, data, loss, batch_dims=1)["loss"] == pytest.approx(expected)
    measured = sp.measure(model, data[0][0], data=data, loss=loss, latency=False, batch_dims=1)
    assert measured.macs == 5 * 6 * 8
    assert measured.loss == pytest.approx(expected)
    assert sp.measure(model, data[0][0], latency=False, batch_dims=1, batch_size=7).macs == measured.macs
    with pytest.raises(SettingError, match="measure: batch_size must be the length"):
        sp.measure(model, data[0][0], latency=False, batch_dims=1, batch_size=5)


def test_nothing_of_a_model_changes_in_inference_mode() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        sp.compress(model, DATA, LOSS, 0.6, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
