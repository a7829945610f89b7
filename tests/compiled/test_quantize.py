"""int8 files: what they compute, what they report, and that nothing is left behind when they cannot be written."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import spectrim as sp
from spectrim.errors import ExportError, FormatError, LayerError, SettingError
from spectrim.metrics.evaluate import evaluate

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from spectrim.runtimes import (  # noqa: E402
    Int8,
    evaluate_exported,
    run_exported,
    sensitivity,
)
from spectrim.runtimes.equalize import equalize_pairs  # noqa: E402
from spectrim.runtimes.export import export  # noqa: E402
from spectrim.runtimes.int8 import quantize  # noqa: E402
from spectrim.runtimes.int8_file import KEPT  # noqa: E402
from spectrim.runtimes.onnx_digest import unseal  # noqa: E402


def names(text):
    return dict.fromkeys(text.split(), "int8")


@pytest.fixture(scope="module")
def convolutional():
    """A trained-looking network with BatchNorm, a residual sum and one low-rank layer of each kind, merged; and its data."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(16)
            self.block = nn.Conv2d(16, 16, 3, padding=1)
            self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
            self.hidden = nn.Linear(16, 32)
            self.head = nn.Linear(32, 10)

        def forward(self, images):
            x = torch.relu(self.norm(self.stem(images)))
            x = torch.relu(self.grouped(torch.relu(self.block(x))) + x)
            return self.head(torch.relu(self.hidden(x.mean((2, 3)))))

    model = Net()
    for _ in range(3):
        model(3 * torch.randn(16, 3, 12, 12))
    low = sp.factorize(model.eval(), "spatial", rank={"block": 4, "grouped": 3, "hidden": 5}, where=sp.match("block", "grouped", "hidden"))
    data = [(3 * torch.randn(8, 3, 12, 12), torch.randint(10, (8,))) for _ in range(4)]
    return sp.merge(low).eval(), data


@pytest.fixture(scope="module")
def source(convolutional, tmp_path_factory):
    """The same network as a float file, so that it is traced once."""
    model, data = convolutional
    return export(model, data[0][0], tmp_path_factory.mktemp("float") / "float.onnx").path


@pytest.fixture(scope="module")
def written(convolutional, tmp_path_factory):
    model, data = convolutional
    return quantize(model, data, tmp_path_factory.mktemp("int8") / "net.onnx")


def test_every_layer_of_a_convolutional_network_becomes_int8(written):
    assert written.method == "static"
    assert written.layers == names("stem block.0 block.1 grouped.0 grouped.1 hidden.0 hidden.1 head")
    assert written.operators["QLinearConv"] == 5  # as ONNX Runtime runs it
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "BatchNormalization"} & set(written.operators)


def test_the_file_differs_from_float_by_what_is_reported(convolutional, written):
    model, data = convolutional
    worst, squares, power = 0.0, 0.0, 0.0
    for inputs, _ in data:
        with torch.no_grad():
            expected = model(inputs)
        difference = run_exported(written.path, inputs) - expected
        worst = max(worst, float(difference.abs().max() / expected.abs().max()))
        squares, power = squares + float(difference.square().sum()), power + float(expected.square().sum())
    assert worst == pytest.approx(written.difference, rel=1e-3)  # torch's float32 and ONNX Runtime's differ in rounding
    assert (squares / power) ** 0.5 == pytest.approx(written.error, rel=1e-3)  # as above
    assert 0 < written.error < 0.1  # 7 bits and nine layers: about 2 ** -7 each


def test_sizes_and_summary(written):
    assert written.size_bytes == written.path.stat().st_size
    assert "8 of 8" in written.summary()
    assert not any(node.metadata_props for node in onnx.load(written.path).graph.node)  # no paths of source files
    assert sorted(path.name for path in written.path.parent.iterdir()) == ["net.onnx"]


def test_weights_are_in_the_range_of_their_bits(convolutional, source, written, tmp_path):
    _, data = convolutional
    wide = quantize(source, data, tmp_path / "8.onnx", Int8(weight_bits=8))

    def largest(path):
        tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if len(t.dims) > 1]
        assert {t.dtype for t in tensors} == {np.dtype(np.int8)}
        return max(int(np.abs(t.astype(int)).max()) for t in tensors)

    assert largest(written.path) == 64
    assert largest(wide.path) == 127


def test_kept_layers_stay_in_float_and_by_a_pairs_name_both(convolutional, source, tmp_path):
    _, data = convolutional
    made = quantize(source, data, tmp_path / "net.onnx", keep=sp.match("stem", "block"))
    assert {name for name, state in made.layers.items() if state == KEPT} == {"stem", "block.0", "block.1"}
    assert set(made.layers.values()) == {"int8", KEPT}
    assert f"float: stem | {KEPT}" in " ".join(made.summary().split())


def test_sensitivity_names_each_layer_and_a_single_one_does_less_than_all(convolutional, source, written):
    _, data = convolutional
    found = sensitivity(source, data)
    assert set(found) == set(written.layers)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert 0 < max(found.values()) < 2 * written.error  # the sum of independent errors is larger than each, but for luck


def test_evaluation_of_a_file_agrees_with_that_of_the_model(convolutional, source):
    model, data = convolutional
    found, expected = evaluate_exported(source, data, nn.CrossEntropyLoss(), threads=1), evaluate(model, data, nn.CrossEntropyLoss())
    assert found["accuracy"] == expected["accuracy"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)  # float32


def test_a_float_file_gives_the_same_int8_file_as_its_model(convolutional, source, written, tmp_path):
    _, data = convolutional
    made = quantize(source, data, tmp_path / "int8.onnx", Int8())
    assert made.layers == written.layers
    torch.testing.assert_close(run_exported(made.path, data[0][0]), run_exported(written.path, data[0][0]))


# Pairs


def test_equalized_pairs_compute_the_same_and_span_equal_ranges(convolutional, tmp_path):
    model, data = convolutional
    model = copy.deepcopy(model)
    with torch.no_grad():  # unequal channels
        for pair in (model.block, model.grouped, model.hidden):
            scale = torch.logspace(-2, 1, len(pair[0].weight))
            pair[0].weight.mul_(scale.view(-1, *[1] * (pair[0].weight.dim() - 1)))
    proto = onnx.load(export(model, data[0][0], tmp_path / "float.onnx").path)
    feeds = [{"images": inputs.numpy()} for inputs, _ in data]
    before = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert len(equalize_pairs(proto, feeds)) == 3
    after = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for feed in feeds:
        found, expected = (torch.tensor(session.run(None, feed)[0]) for session in (after, before))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fp32 sums over channels whose scales differ by 1000
    pairs = [
        node.input[0] for node in proto.graph.node if len(node.input) > 1 and node.input[1].endswith(("block.1.weight", "grouped.1.weight"))
    ]
    assert len(pairs) == 2
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in pairs)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    middles = [torch.cat([torch.tensor(session.run([name], feed)[0]) for feed in feeds]) for name in pairs]
    for middle in middles:
        ranges = middle.abs().amax((0, 2, 3))
        torch.testing.assert_close(ranges, ranges.max().expand_as(ranges))


def test_equalizing_lowers_the_error_where_channels_are_unequal(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 6, 3, bias=False), nn.Conv2d(6, 8, 1))).eval()
    with torch.no_grad():
        scale = torch.tensor([100.0, 30.0, 10.0, 3.0, 1.0, 0.3]).view(-1, 1, 1, 1)
        model[2][0].weight.mul_(scale)
        model[2][1].weight.div_(scale.view(1, -1, 1, 1))
    data = [torch.randn(8, 3, 8, 8)]
    source = export(model, data[0], tmp_path / "float.onnx").path
    with_, without = (quantize(source, data, tmp_path / "int8.onnx", Int8(equalize=flag)) for flag in (True, False))
    assert with_.equalized == ["2.1"]
    assert without.equalized == []
    assert with_.error < without.error / 4  # the smallest channel had one level in 300


# Linear, recurrent, attention


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.memory = nn.LSTM(16, 24, batch_first=True)
        self.pair = nn.Sequential(nn.Linear(24, 4, bias=False), nn.Linear(4, 16))
        self.gate = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 50)

    def forward(self, tokens):
        states, _ = self.memory(self.table(tokens))
        return self.head(self.gate(self.pair(states))[0])


# torch says these of any nn.LSTM and nn.GRU: their list of weights is not a buffer
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights.* were assigned during export")
def test_language_models_are_dynamic_and_a_gru_says_why_it_stays(tmp_path):
    model, data = Language().eval(), [torch.randint(50, (4, 6)) for _ in range(2)]
    made = quantize(model, data, tmp_path / "lm.onnx")
    assert made.method == "dynamic"
    assert {name: state == "int8" for name, state in made.layers.items()} == {
        "table": True, "memory": True, "pair.0": True, "pair.1": True, "gate": False, "head": True,
    }  # fmt: skip
    assert "GRU" in made.layers["gate"]
    assert made.operators["DynamicQuantizeLSTM"] == 1
    assert made.error < 0.1  # 7 bits, five layers


def test_dynamic_on_request_leaves_convolutions_with_the_reason(convolutional, source, tmp_path):
    _, data = convolutional
    made = quantize(source, data, tmp_path / "net.onnx", Int8(method="dynamic", ranges="minmax"))
    assert {name for name, state in made.layers.items() if state == "int8"} == {"hidden.0", "hidden.1", "head"}
    assert "Conv stays in float" in made.layers["stem"]


@pytest.mark.parametrize("ranges", ["percentile", "entropy"])
def test_other_ranges(ranges, convolutional, source, tmp_path, capfd):
    _, data = convolutional
    made = quantize(source, data, tmp_path / "net.onnx", Int8(ranges=ranges, examples=8))
    assert set(made.layers.values()) == {"int8"}
    assert made.error < 0.2  # entropy cuts off the largest values
    assert capfd.readouterr() == ("", "")


# Refusals


@pytest.mark.parametrize("knobs", [{"method": "both"}, {"ranges": "max"}, {"percentile": 0.99}, {"weight_bits": 4}, {"examples": 0}])
def test_settings_outside_their_range(knobs):
    with pytest.raises(SettingError, match=next(iter(knobs))):
        Int8(**knobs)


def test_refusals_leave_nothing_behind(tmp_path):
    model, data = nn.Sequential(nn.Linear(4, 4)).eval(), [torch.randn(2, 4)]
    with pytest.raises(SettingError, match=r"\.onnx"):
        quantize(model, data, tmp_path / "net.pt2")
    with pytest.raises(SettingError, match="at least one batch"):
        quantize(model, [], tmp_path / "net.onnx")
    with pytest.raises(FormatError, match="no such file"):
        quantize(tmp_path / "missing.onnx", data, tmp_path / "net.onnx")
    source = export(model, data[0], tmp_path / "float.onnx").path
    with pytest.raises(LayerError, match="layers are: 0"):
        quantize(source, data, tmp_path / "net.onnx", keep=sp.match("conv*"))
    with pytest.raises(ExportError, match="'0' kept in float"):
        quantize(source, data, tmp_path / "net.onnx", keep=sp.match("*"))
    with pytest.raises(ExportError, match="above the tolerance"):
        quantize(source, data, tmp_path / "net.onnx", tolerance=1e-9)
    with pytest.raises(ExportError, match="NaN"):
        quantize(source, [torch.full((2, 4), torch.nan)], tmp_path / "net.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(FormatError, match=r"broken\.onnx"):
        quantize(tmp_path / "broken.onnx", data, tmp_path / "net.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.onnx", "float.onnx"]


def test_half_precision_is_refused_by_layer(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).half().eval()
    with pytest.raises(ExportError, match=r"operator Conv in layer '0': its weights are in half precision"):
        quantize(model, [torch.randn(2, 3, 4, 4).half()], tmp_path / "net.onnx")


def test_the_input_model_stays_as_it_was(tmp_path):
    low = sp.factorize(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)), rank=3).train()
    before = copy.deepcopy(low.state_dict())
    made = quantize(low, [torch.randn(4, 12)], tmp_path / "low.onnx")
    assert made.layers == names("0.0 0.1 2")
    assert all(module.training for module in low.modules())
    torch.testing.assert_close(low.state_dict(), before, rtol=0, atol=0)


def test_weights_that_are_not_finite_are_refused_by_layer(convolutional, source, tmp_path):
    _, data = convolutional
    proto = onnx.load(source)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("head.weight"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tensor.dims, np.nan, np.float32), tensor.name))
    unseal(proto)  # changed on purpose
    onnx.save(proto, tmp_path / "bad.onnx")
    with pytest.raises(ExportError, match=r"operator Gemm in layer 'head': its weights hold NaN"):
        quantize(tmp_path / "bad.onnx", data, tmp_path / "net.onnx")


def test_a_failure_of_the_toolkit_names_operator_and_layer(convolutional, source, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise ValueError("cannot do node_hidden_unknown, nor the weight of node_linear_1")

    _, data = convolutional
    monkeypatch.setattr("onnxruntime.quantization.quantize_static", fail)
    with pytest.raises(ExportError, match=r"operator Gemm in layer '(hidden\.1|head)': ONNX Runtime's toolkit cannot"):
        quantize(source, data, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_command_line_writes_onnx_only(capsys):
    from spectrim.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["export", "none.yaml", "--int8", "--format", "pt2"])
    assert stopped.value.code == 2
    assert "--format onnx" in capsys.readouterr().err
