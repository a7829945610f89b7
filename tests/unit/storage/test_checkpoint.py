"""Saving and loading: round trips of everything that can be saved, and refusal of everything that is not whole."""

import json
import os
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import spectrim as sp
from spectrim import zoo
from spectrim.errors import FormatError
from spectrim.layers import FactorizedLayer
from spectrim.plain.attention import PlainAttention
from spectrim.plain.chain import PlainPair
from spectrim.plain.recurrent import PlainRecurrent
from spectrim.storage import folder as checkpoint
from spectrim.storage.folder import PLAN, WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")  # torch's own

EVERYTHING = sp.match("*")


class Body(nn.Module):
    """One layer with a norm behind it, so that there is state beside the layer's."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.norm = layer, nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention | PlainAttention) else self.layer(x)
        y = y[0] if isinstance(y, tuple) else y
        return self.norm(y.flatten(0, -2)) if y.shape[-1] == self.norm.num_features else self.norm(y.transpose(1, -1).flatten(0, -2))


def images(*shape: int) -> Tensor:
    return torch.randn(2, *shape)


def tokens() -> Tensor:
    return torch.randint(0, 40, (2, 5))


KINDS: dict[str, tuple[Callable[[], nn.Module], int, Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 9), 9, lambda: torch.randn(4, 12)),
    "linear-no-bias": (lambda: nn.Linear(12, 9, bias=False), 9, lambda: torch.randn(4, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), 8, lambda: images(6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), 8, lambda: images(6, 9, 11)),
    "conv2d-same-reflect": (lambda: nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect", bias=False), 8, lambda: images(6, 7, 7)),
    "conv2d-groups": (lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1), 12, lambda: images(8, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), 6, lambda: images(4, 3, 4, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(6, 8, 3, stride=2, output_padding=1), 8, lambda: images(6, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(6, 8, (3, 4), (2, 3), (1, 2), (1, 2)), 8, lambda: images(6, 4, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 3, stride=2), 6, lambda: images(4, 2, 3, 2)),
    "embedding": (lambda: nn.Embedding(40, 12, padding_idx=3), 12, tokens),
    "lstm": (lambda: nn.LSTM(24, 8, 2, bidirectional=True, batch_first=True), 16, lambda: torch.randn(2, 5, 24)),
    "lstm-projected": (lambda: nn.LSTM(24, 8, proj_size=5), 5, lambda: torch.randn(2, 5, 24)),
    "gru": (lambda: nn.GRU(24, 8, bias=False), 8, lambda: torch.randn(2, 5, 24)),
    "attention": (lambda: nn.MultiheadAttention(24, 4, batch_first=True), 24, lambda: torch.randn(2, 5, 24)),
    "attention-separate": (lambda: nn.MultiheadAttention(24, 4, kdim=24, vdim=24, add_bias_kv=True), 24, lambda: torch.randn(2, 5, 24)),
    "attention-no-bias": (lambda: nn.MultiheadAttention(24, 4, bias=False, add_zero_attn=True), 24, lambda: torch.randn(2, 5, 24)),
}
BOTH_SCHEMES = ("conv2d", "conv2d-same-reflect", "conv2d-groups", "transposed2d")
CASES = [
    pytest.param(*KINDS[name], scheme, id=f"{name}-{scheme}")
    for name in KINDS
    for scheme in (("channel", "spatial", "input") if name in BOTH_SCHEMES else ("auto",))
]


def trained(model: nn.Module) -> nn.Module:
    """Give a model values that no constructor gives."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape).abs() + 0.1)
    return model


def ties(model: nn.Module) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def assert_same(a: nn.Module, b: nn.Module, x: Any = None) -> None:
    """Same modules, bits, ties, frozen parameters and outputs."""
    assert [(name, type(m), repr(m)) for name, m in a.named_modules()] == [(name, type(m), repr(m)) for name, m in b.named_modules()]
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert left[key].shape == right[key].shape, key
        assert torch.equal(left[key], right[key]), key
    assert ties(a) == ties(b)
    assert {n: p.requires_grad for n, p in a.named_parameters()} == {n: p.requires_grad for n, p in b.named_parameters()}
    if x is not None:
        with torch.no_grad():
            assert torch.equal(a.eval()(x), b.eval()(x))


def round_trip(model: nn.Module, dense: nn.Module, folder: Path, x: Any = None) -> nn.Module:
    assert sp.save(model, folder) == folder
    assert sorted(p.name for p in folder.iterdir()) == [WEIGHTS, PLAN]
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    state = torch.get_rng_state()
    again = sp.load(folder, dense)
    assert torch.equal(state, torch.get_rng_state()), "load drew random numbers"
    assert all(torch.equal(before[key], tensor) for key, tensor in dense.state_dict().items())
    assert_same(model, again, x)
    return again


@pytest.mark.parametrize(("make", "width", "call", "scheme"), CASES)
def test_every_kind_comes_back_factorized_cut_merged_and_dense(
    tmp_path: Path, make: Any, width: int, call: Any, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = call()
    dense, other = trained(Body(make(), width)), Body(make(), width)
    low = trained(sp.factorize(dense, scheme, EVERYTHING))
    cut = sp.prune(low, sp.budget.Fixed(2))
    merged = sp.merge(cut)
    assert isinstance(merged.layer, PlainPair | PlainRecurrent | PlainAttention), "this case should test a pair"
    for name, model in {"dense": dense, "low": low, "cut": cut, "merged": merged, "uncut": sp.merge(low)}.items():
        round_trip(model, other, tmp_path / name, x)


def test_recurrent_loops_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectrim.layers.recurrent.LOOP_MACS", 0.0)  # so that hidden projections of a small layer are split too
    for kind in (nn.LSTM, nn.GRU):
        dense = Body(kind(24, 24, 2, bidirectional=True), 48)
        merged = sp.merge(sp.factorize(dense, where=EVERYTHING, rank=2))
        assert isinstance(merged.layer.cells["l1_reverse"].hidden, PlainPair)
        monkeypatch.undo()  # a file must not depend on where the break-even lay when it was written
        round_trip(merged, Body(kind(24, 24, 2, bidirectional=True), 48), tmp_path / kind.__name__, torch.randn(3, 2, 24))
        monkeypatch.setattr("spectrim.layers.recurrent.LOOP_MACS", 0.0)


def test_conv1d_of_transformers_comes_back(tmp_path: Path) -> None:
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    dense, x = Body(Conv1D(24, 20), 24), torch.randn(3, 20)
    low = sp.factorize(dense, where=EVERYTHING, rank=3)
    for name, model in {"low": low, "merged": sp.merge(low)}.items():
        round_trip(model, Body(Conv1D(24, 20), 24), tmp_path / name, x)


def test_a_bare_layer_as_the_whole_model(tmp_path: Path) -> None:
    low = sp.factorize(nn.Linear(12, 9), where=EVERYTHING, rank=2)
    for name, model in {"low": low, "merged": sp.merge(low)}.items():
        round_trip(model, nn.Linear(12, 9), tmp_path / name, torch.randn(2, 12))


@pytest.mark.parametrize("form", ["low", "merged", "dense"])
def test_tied_weights_stay_tied(tmp_path: Path, form: str) -> None:
    def make() -> nn.Module:
        return zoo.LSTMLanguageModel(60, 24, 24, 1, 0.0, tied=True)

    low = sp.factorize(trained(make()), where=EVERYTHING, rank=3)
    model = {"low": low, "merged": sp.merge(low), "dense": make()}[form]
    assert ties(model), "the saved model should have ties"
    again = round_trip(model, make(), tmp_path, tokens())
    again.train()
    sum(p.square().sum() for p in again.parameters()).backward()
    torch.optim.SGD(again.parameters(), 0.1).step()
    for names in ties(model):
        moved = [again.get_parameter(name) for name in names]
        assert all(torch.equal(moved[0], other) for other in moved)


def test_shared_modules_stay_shared(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(24, 24)
            self.second = self.first
            self.head = nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).relu()))

    low = sp.factorize(Twice(), rank=3)
    for name, model in {"low": low, "merged": sp.merge(low)}.items():
        again = round_trip(model, Twice(), tmp_path / name, torch.randn(2, 24))
        assert again.first is again.second


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.Linear(24, 3))

    dense = make()
    dense[0].requires_grad_(False)
    dense[3].bias.requires_grad_(False)
    low = sp.factorize(dense, rank=3)
    for name, model in {"low": low, "merged": sp.merge(low), "dense": dense}.items():
        again = round_trip(model, make(), tmp_path / name)
        assert sum(not p.requires_grad for p in again.parameters()) >= 3, "the weight of layer 0, its bias and one of layer 3"
    sp.save(sp.factorize(make(), rank=3), tmp_path / "free")
    assert all(p.requires_grad for p in sp.load(tmp_path / "free", dense).parameters()), "the file decides, not the model given"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 3)).to(dtype)

    low = sp.factorize(make(), rank=2)
    for name, model in {"low": low, "merged": sp.merge(low), "dense": make()}.items():
        round_trip(model, make(), tmp_path / name, torch.randn(2, 6, 5, 5, dtype=dtype))
    with pytest.raises(FormatError, match=r"torch\.float32 in the model"):
        sp.load(tmp_path / "dense", make().float())


def test_odd_names_buffers_and_empty_tensors(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"ü n": nn.Linear(24, 24), "format": nn.Linear(24, 24), "__metadata__": nn.Linear(24, 24)})
            self.register_buffer("Größe", torch.arange(3))
            self.register_buffer("flag", torch.tensor(True))
            self.register_buffer("empty", torch.zeros(0, 4))
            self.register_buffer("turned", torch.randn(4, 6).T)
            self.register_buffer("transient", torch.randn(2), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts.values():
                x = part(x)
            return x

    low = sp.factorize(Odd(), where=EVERYTHING, rank=3)
    for name, model in {"low": low, "merged": sp.merge(low)}.items():
        round_trip(model, Odd(), tmp_path / name, torch.randn(2, 24))


def test_a_models_own_sequence_of_two_layers_is_not_taken_for_a_merged_one(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)), nn.Sequential(nn.Conv1d(1, 4, 3), nn.Conv1d(4, 2, 3)))

    low = sp.factorize(make(), where=sp.match("0.1"), rank=2)
    for name, model in {"dense": make(), "low": low, "merged": sp.merge(low)}.items():
        round_trip(model, make(), tmp_path / name)


def test_reference_networks(tmp_path: Path) -> None:
    low = sp.factorize(zoo.mlperftiny_resnet8(), rank=4)
    round_trip(sp.merge(low), zoo.mlperftiny_resnet8(), tmp_path / "resnet", torch.randn(1, 3, 32, 32))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 48, batch_first=True), 2, enable_nested_tensor=False)
    low = sp.factorize(encoder, where=EVERYTHING, rank=3)
    for name, model in {"low": low, "merged": sp.merge(low)}.items():
        round_trip(model, encoder, tmp_path / name, torch.randn(2, 5, 24))


def test_a_network_saved_in_eval_mode_is_loaded_in_it_else_the_mode_is_that_of_the_model_given(tmp_path: Path) -> None:
    low = sp.factorize(Body(nn.Linear(24, 9), 9), where=EVERYTHING, rank=2)
    sp.save(sp.merge(low), tmp_path)
    for mode in (True, False):
        again = sp.load(tmp_path, Body(nn.Linear(24, 9), 9).train(mode))
        assert {module.training for module in again.modules()} == {mode}
    sp.save(sp.merge(low).eval(), tmp_path)
    assert not any(module.training for module in sp.load(tmp_path, Body(nn.Linear(24, 9), 9).train()).modules())


# Files that are not whole


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return sp.save(sp.factorize(small(), rank=2), tmp_path / "good")


def assert_refused(folder: Path, file: str, model: nn.Module | None = None, match: str = ".") -> None:
    model = model or small()
    before, state = {key: tensor.clone() for key, tensor in model.state_dict().items()}, torch.get_rng_state()
    modules = list(model.modules())
    with pytest.raises(FormatError, match=match) as caught:
        sp.load(folder, model)
    assert str(caught.value).startswith(str(folder / file)), "the message names the file"
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert list(model.modules()) == modules
    assert torch.equal(state, torch.get_rng_state())


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such folder"):
        sp.load(tmp_path / "nothing", small())
    for file in (WEIGHTS, PLAN):
        folder = tmp_path / f"without {file}"
        shutil.copytree(saved, folder)
        (folder / file).unlink()
        assert_refused(folder, file, match="is missing")


@pytest.mark.parametrize("file", [WEIGHTS, PLAN])
def test_truncated_anywhere(saved: Path, file: str) -> None:
    whole = (saved / file).read_bytes()
    lengths = sorted({*range(0, 40), *random.Random(0).sample(range(len(whole)), 120), len(whole) - 2, len(whole) - 1})
    for length in lengths:
        (saved / file).write_bytes(whole[:length])
        assert_refused(saved, file)
    (saved / file).write_bytes(whole + b"\0")
    assert_refused(saved, file)
    (saved / file).write_bytes(whole)
    sp.load(saved, small())


@pytest.mark.parametrize("file", [WEIGHTS, PLAN])
def test_one_flipped_bit_anywhere(saved: Path, file: str) -> None:
    whole, draw = (saved / file).read_bytes(), random.Random(0)
    for place in range(0, len(whole), 3 if file == WEIGHTS else 1):
        bit = 1 << draw.randrange(8)
        (saved / file).write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        with pytest.raises(FormatError) as caught:
            checkpoint.read(saved)
        assert str(caught.value).startswith(str(saved / file)), (place, bit)


def test_upper_case_escapes_are_altered_too(tmp_path: Path) -> None:
    model = nn.ModuleDict({"é": nn.Linear(8, 6)})
    folder = sp.save(sp.factorize(model, where=EVERYTHING, rank=2), tmp_path)
    text = (folder / PLAN).read_text()
    assert "\\u00e9" in text
    (folder / PLAN).write_text(text.replace("\\u00e9", "\\u00E9"))  # the same JSON, other bytes
    assert_refused(folder, PLAN, model, match="altered")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "3", '"text"', "null", '{"a": 1}', '{"digest": 3}', "[" * 100_000, "\xff", '{"digest": "x", "a": NaN}']
)
def test_foreign_json(saved: Path, text: str) -> None:
    (saved / PLAN).write_bytes(text.encode("latin-1"))
    assert_refused(saved, PLAN)


def test_foreign_safetensors(saved: Path) -> None:
    tensors = {"weight": torch.zeros(2)}
    for metadata in (None, {"format": "pt"}, {"format": "pt", "spectrim": "{}", "digest": "0"}):
        save_file(tensors, saved / WEIGHTS, metadata=metadata)
        assert_refused(saved, WEIGHTS, match="not written by spectrim")
    (saved / WEIGHTS).write_bytes(b"\x80\x04not a pickle that anybody reads.")
    assert_refused(saved, WEIGHTS, match="not a safetensors file")
    torch.save(small().state_dict(), saved / WEIGHTS)
    assert_refused(saved, WEIGHTS, match="not a safetensors file")


@pytest.mark.parametrize(
    ("layer", "place", "value"),
    [
        (lambda: nn.Linear(24, 24), "in_features", 10**9),
        (lambda: nn.Linear(24, 24), "out_features", 40_000),
        (lambda: nn.Conv2d(24, 24, 3), "kernel_size", [3, 10**8]),
        (lambda: nn.Embedding(40, 24), "num_embeddings", 10**9),
        (lambda: nn.LSTM(24, 8), "num_layers", 10**9),
        (lambda: nn.LSTM(24, 8), "given", {"weight_ih_l0": [[10**6, 10**6]]}),
        (lambda: nn.MultiheadAttention(24, 4), "embed_dim", 10**7),
        (lambda: nn.Linear(24, 24), "in_features", "many"),
    ],
)
def test_a_plan_of_huge_layers_is_refused_before_anything_is_built(tmp_path: Path, layer: Any, place: str, value: Any) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(layer())

    folder = sp.save(sp.merge(sp.factorize(make(), where=EVERYTHING, rank=2)), tmp_path)
    plan, tensors = checkpoint.read(folder)
    plan["merged"]["0"][0][place] = value
    checkpoint.write(folder, plan, tensors)
    start = time.perf_counter()
    assert_refused(folder, PLAN, make(), match="not a plan" if value == "many" else r"larger than what is stored for it \(")
    assert time.perf_counter() - start < 1


def test_a_header_longer_than_its_file(saved: Path) -> None:
    content = (saved / WEIGHTS).read_bytes()
    for length in (len(content), 1 << 40, (1 << 64) - 1):
        (saved / WEIGHTS).write_bytes(length.to_bytes(8, "little") + content[8:])
        assert_refused(saved, WEIGHTS, match="is truncated or not a safetensors file")


def test_a_newer_format(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 2)
        sp.save(sp.factorize(small(), rank=2), saved)
    assert_refused(saved, WEIGHTS, match="has format 2, this version reads 1; install a newer spectrim")


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up after it."""


@pytest.mark.parametrize("moment", range(1, 6))
def test_a_save_killed_at_any_rename_leaves_one_whole_model(tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, newest = (sp.factorize(small(), rank=rank) for rank in (1, 2, 3))
    folder, calls, replace = sp.save(old, tmp_path / "model"), 0, os.replace

    def killed(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            shutil.copytree(folder, tmp_path / "left")  # what stands on the disk at that moment
            raise Killed
        replace(*args)

    monkeypatch.setattr("os.replace", killed)
    with suppress(Killed):
        sp.save(new, folder)
    monkeypatch.undo()
    if moment > 3:  # the note, the weights, the listing: there are no more
        assert_same(sp.load(folder, small()), new)
        return
    assert_same(sp.load(tmp_path / "left", small()), new if moment == 3 else old)
    sp.save(newest, tmp_path / "left")
    assert_same(sp.load(tmp_path / "left", small()), newest)
    assert sorted(path.name for path in (tmp_path / "left").iterdir()) == [WEIGHTS, PLAN]


def test_killed_twice_between_the_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second save that stops early finds the state of the first one, which it must not make unreadable."""
    folder, replace = sp.save(sp.factorize(small(), rank=1), tmp_path / "model"), os.replace
    second = sp.factorize(small(), rank=2)
    for calls_left, model in ((2, second), (1, sp.factorize(small(), rank=3)), (2, sp.factorize(small(), rank=4))):
        left = iter(range(calls_left))

        def stopping(*args: Any, left: Any = left) -> None:
            if next(left, None) is None:
                if not (tmp_path / "next").exists():
                    shutil.copytree(folder, tmp_path / "next")
                raise Killed
            replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", stopping)
            with pytest.raises(Killed):
                sp.save(model, folder)
        shutil.rmtree(folder)
        shutil.move(tmp_path / "next", folder)
        found = sp.load(folder, small())
        assert_same(found, model if calls_left == 2 else second)


def test_weights_and_plan_of_two_models_are_refused(tmp_path: Path) -> None:
    first, second = (sp.save(sp.factorize(small(), rank=2), tmp_path / name) for name in ("first", "second"))
    for file in (WEIGHTS, PLAN):
        mixed = Path(shutil.copytree(first, tmp_path / f"mixed-{file}"))
        shutil.copy(second / file, mixed / file)
        assert_refused(mixed, PLAN, match="plan of another model")


# Other architectures


def swapped(index: int, layer: nn.Module) -> nn.Module:
    model = small()
    model[index] = layer
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "other shape of a factorized layer": lambda: swapped(0, nn.Linear(9, 6)),
    "smaller than the rank": lambda: swapped(0, nn.Linear(1, 6)),
    "other shape of a dense layer": lambda: swapped(2, nn.Linear(6, 3)),
    "no bias": lambda: swapped(0, nn.Linear(8, 6, bias=False)),
    "other class of a factorized layer": lambda: swapped(0, nn.Conv1d(8, 6, 1)),
    "a layer less": lambda: small()[1:],
    "a layer more": lambda: nn.Sequential(*small(), nn.Linear(2, 2)),
    "no norm": lambda: swapped(1, nn.Identity()),
    "already factorized": lambda: sp.factorize(small(), rank=2),
    "other dtype": lambda: small().double(),
    "nothing": nn.Identity,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("form", ["low", "merged", "dense"])
def test_another_architecture(tmp_path: Path, make: Callable[[], nn.Module], form: str) -> None:
    low = sp.factorize(small(), rank=2)
    sp.save({"low": low, "merged": sp.merge(low), "dense": small()}[form], tmp_path)
    assert_refused(tmp_path, PLAN, make())


CONVOLUTION = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "groups": 1, "padding_mode": "zeros"}


@pytest.mark.parametrize("scheme", ["channel", "spatial", "input"])
@pytest.mark.parametrize(
    "change",
    [
        {"kernel_size": 5},
        {"stride": 1},
        {"padding": 0},
        {"padding": "valid", "stride": 1},
        {"dilation": 2},
        {"groups": 2},
        {"padding_mode": "circular"},
        {"bias": False},
    ],
    ids=str,
)
def test_a_merged_convolution_is_not_put_in_the_place_of_another(tmp_path: Path, scheme: str, change: dict[str, Any]) -> None:
    low = sp.factorize(nn.Sequential(nn.Conv2d(8, 8, **CONVOLUTION)), scheme, EVERYTHING, rank=2)
    sp.save(sp.merge(low), tmp_path)
    sp.load(tmp_path, nn.Sequential(nn.Conv2d(8, 8, **CONVOLUTION)))
    assert_refused(tmp_path, PLAN, nn.Sequential(nn.Conv2d(8, 8, **{**CONVOLUTION, **change})), match="layer '0' had")


@pytest.mark.parametrize(
    ("layer", "other"),
    [
        (lambda: nn.Linear(24, 24), lambda: nn.Linear(24, 20)),
        (lambda: nn.Linear(24, 24), lambda: nn.Embedding(24, 24)),
        (lambda: nn.Embedding(40, 24), lambda: nn.Embedding(41, 24)),
        (lambda: nn.Embedding(40, 24), lambda: nn.Linear(40, 24)),
        (lambda: nn.Conv2d(8, 8, 3), lambda: nn.ConvTranspose2d(8, 8, 3)),
        (lambda: nn.ConvTranspose2d(8, 8, 3), lambda: nn.Conv2d(8, 8, 3)),
        (lambda: nn.ConvTranspose2d(8, 8, 3), lambda: nn.ConvTranspose2d(8, 8, 3, output_padding=1, stride=2)),
        (lambda: nn.LSTM(24, 8), lambda: nn.GRU(24, 8)),
        (lambda: nn.LSTM(24, 8), lambda: nn.LSTM(24, 8, bidirectional=True)),
        (lambda: nn.LSTM(24, 8), lambda: nn.LSTM(24, 8, bias=False)),
        (lambda: nn.MultiheadAttention(24, 4), lambda: nn.MultiheadAttention(24, 6)),
        (lambda: nn.MultiheadAttention(24, 4), lambda: nn.MultiheadAttention(24, 4, bias=False)),
        (lambda: nn.MultiheadAttention(24, 4), lambda: nn.MultiheadAttention(24, 4, batch_first=True)),
        (lambda: nn.MultiheadAttention(24, 4), lambda: nn.Linear(24, 24)),
    ],
)
@pytest.mark.parametrize("scheme", ["channel", "input"])
def test_a_merged_layer_is_not_put_in_the_place_of_another(tmp_path: Path, layer: Any, other: Any, scheme: Any) -> None:
    sp.save(sp.merge(sp.factorize(nn.Sequential(layer()), scheme, EVERYTHING, rank=2)), tmp_path)
    sp.load(tmp_path, nn.Sequential(layer()))
    assert_refused(tmp_path, PLAN, nn.Sequential(other()), match="layer '0' had")


def test_ties_must_be_those_of_the_file(tmp_path: Path) -> None:
    def make(tied: bool) -> nn.Module:
        return zoo.LSTMLanguageModel(60, 24, 24, 1, 0.0, tied=tied)

    for form in ("dense", "low"):
        for tied in (True, False):
            model = make(tied) if form == "dense" else sp.factorize(make(tied), where=EVERYTHING, rank=2)
            sp.save(model, tmp_path / f"{form}-{tied}")
        assert_refused(tmp_path / f"{form}-True", PLAN, make(tied=False))
        assert_refused(tmp_path / f"{form}-False", PLAN, make(tied=True))


# Saving that fails


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("step", ["spectrim.storage.folder.save_file", "spectrim.files.whole.sync", "os.replace"])
def test_a_failed_save_leaves_the_old_model(saved: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(saved)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="no space"):
        sp.save(sp.factorize(small(), rank=1), saved)
    assert content(saved) == before


def test_a_state_that_is_no_tensor_is_refused_before_anything_is_written(saved: Path, tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

    before = content(saved)
    with pytest.raises(FormatError, match="_extra_state: is a dict, not a tensor"):
        sp.save(Extra(3, 3), saved)
    assert content(saved) == before
    with pytest.raises(FormatError):
        sp.save(Extra(3, 3), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_leftovers_of_a_killed_save_are_removed(saved: Path) -> None:
    for name in (f"{WEIGHTS}.123-0123abcd.tmp", f"{PLAN}.123-0123abcd.tmp"):
        (saved / name).write_bytes(b"half")
    (saved / "notes.tmp").write_text("mine")
    sp.load(saved, small())
    sp.save(small(), saved)
    assert sorted(content(saved)) == [WEIGHTS, "notes.tmp", PLAN]


def test_the_listing_says_what_was_saved(saved: Path) -> None:
    plan = json.loads((saved / PLAN).read_text())
    assert plan["factorized"] == {"0": {"kind": "Linear", "scheme": "channel", "writing": "pair"}}
    assert plan["ranks"] == {"0": 2}
    assert plan["model"] == "Sequential"
    assert set(plan["versions"]) == {"spectrim", "torch"}
    assert any(isinstance(m, FactorizedLayer) for m in sp.load(saved, small()).modules())


def test_a_folder_of_the_first_version_still_loads() -> None:
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 6), nn.Linear(6, 6)
    again = sp.load(Path(__file__).with_name("saved_by_0_1"), nn.Sequential(*layers))
    assert all(isinstance(again[index], PlainPair) for index in (0, 4))
    assert again[0].weight.shape == (8, 3, 3, 3)
    assert [name for name, tensor in again.state_dict().items() if name.endswith("weight") and not tensor.any()] == []


def test_a_model_with_folded_batchnorms_comes_back(tmp_path: Path) -> None:
    def make() -> nn.Module:
        convolutions = nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Identity()
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(18, 8, bias=False), nn.BatchNorm1d(8)).eval()

    dense = make()
    for norm in (dense[1], dense[3], dense[7]):
        nn.init.normal_(norm.running_mean)
    merged = sp.merge(sp.factorize(dense, where=sp.match("0", "6"), rank=2), fold_batchnorm=True)
    kinds = ["PlainPair", "Identity", "Conv2d", "Identity", "Identity", "Flatten", "PlainPair", "Identity"]
    assert [module._get_name() for module in merged] == kinds
    again = round_trip(merged, make(), tmp_path, torch.randn(4, 6, 5, 5))
    assert [layer.bias is not None for layer in (again[0], again[2], again[6])] == [True, True, True]
    with pytest.raises(FormatError, match="another architecture"):
        sp.load(tmp_path, nn.Sequential(nn.Conv2d(6, 8, 3, 2, bias=False), *make()[1:]))
