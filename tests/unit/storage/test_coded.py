"""Coded files: bit-exact, near the entropy, refused when damaged or hostile."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import spectrim as sp
from spectrim.cli import main
from spectrim.errors import FormatError, SettingError
from spectrim.protocols import Coder
from spectrim.storage.coded import container
from spectrim.storage.coded.bits import Reader, Writer, pack_fixed, unpack_fixed
from spectrim.storage.coded.container import FRAME, MAGIC, coded_file, digest
from spectrim.storage.coded.frequencies import frequencies, read, rounded, write
from spectrim.storage.coded.levels import found
from spectrim.storage.coded.rans import TOTAL, Rans
from spectrim.storage.coded.tokens import joined, split
from spectrim.storage.pack import coded, pack, unpack, unpack_file
from spectrim.surgery.batchnorm import fold_batchnorms


def entropy_bytes(numbers: np.ndarray) -> float:
    counts = np.unique(numbers, return_counts=True)[1].astype(float)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def on_levels(shape: tuple[int, ...], step: float, sigma: float = 1.5, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * sigma).round() + 0
    return (drawn * torch.tensor(step)).to(dtype)


def round_trip(tensors: dict[str, Tensor], tmp_path: Path) -> int:
    packed = pack(tensors, tmp_path / "a.spz")
    back = unpack(tmp_path / "a.spz")
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype is tensor.dtype
        assert torch.equal(back[name], tensor), name
    assert packed.coded_bytes == (tmp_path / "a.spz").stat().st_size
    assert packed.data_bytes + packed.index_bytes <= packed.coded_bytes
    return packed.coded_bytes


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3000), st.integers(1, 4), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_the_coder_inverts(count: int, contexts: int, symbols: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.geometric(0.1, (contexts, symbols)) - 1
    counts[:, 0] += 1
    table = np.stack([frequencies(rounded(row)) for row in counts])
    of = rng.integers(0, contexts, count)
    drawn = np.array([rng.choice(symbols, p=table[context] / TOTAL) for context in of[:200]])
    args = torch.from_numpy(of[: len(drawn)]), torch.from_numpy(table)
    assert Rans().decode(Rans().encode(torch.from_numpy(drawn), *args), *args).tolist() == drawn.tolist()
    assert isinstance(Rans(), Coder)


def test_the_coder_takes_what_the_tables_say() -> None:
    table = np.array([[TOTAL - 1, 1], [TOTAL // 4, TOTAL - TOTAL // 4]])
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, 2, 200_000)
    symbols = (rng.random(200_000) > table[contexts, 0] / TOTAL).astype(np.int64)
    cost = -np.log2(table[contexts, symbols] / TOTAL).sum() / 8
    args = torch.from_numpy(contexts), torch.from_numpy(table)
    made = Rans(lanes=16).encode(torch.from_numpy(symbols), *args)
    assert cost < len(made) < 1.0002 * cost + 16 * 4
    with pytest.raises(ValueError, match="end"):
        Rans(lanes=16).decode(made[:-2], *args)
    with pytest.raises(SettingError, match="lanes must be a power of two"):
        Rans(lanes=3)


@given(st.lists(st.integers(0, 2**34), min_size=1, max_size=50))
def test_tokens_invert(values: list[int]) -> None:
    numbers = np.array(values, np.int64)
    assert joined(*split(numbers)).tolist() == values


@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=80))
def test_tables_invert_and_are_near_the_counts(counts: list[int]) -> None:
    weights = rounded(np.array(counts))
    out = Writer()
    write(weights, out)
    assert read(len(counts), Reader(out.result())).tolist() == weights.tolist()
    made = frequencies(weights)
    assert (made > 0).tolist() == [count > 0 for count in counts]
    assert made.sum() == (TOTAL if any(counts) else 0)


@given(st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(0, 1), max_size=9)), max_size=5), st.lists(st.integers(-500, 500)))
def test_bits_invert(fixed: list[tuple[int, list[int]]], numbers: list[int]) -> None:
    arrays = [np.array(values, np.int64) for _, values in fixed]
    widths = [width for width, _ in fixed]
    back = unpack_fixed(pack_fixed(arrays, widths), [len(array) for array in arrays], widths)
    assert [array.tolist() for array in back] == [array.tolist() for array in arrays]
    out = Writer()
    for number in numbers:
        out.signed(number, 2)
    source = Reader(out.result())
    assert [source.signed(2) for _ in numbers] == numbers


SHAPES = [(), (0, 3), (1,), (7,), (300,), (40, 30), (16, 8, 3, 3), (4, 5, 6), (2, 3, 1, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_shape_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for place, shape in enumerate(SHAPES):
        plain = torch.randn(shape, generator=generator).to(dtype)
        levels = on_levels(shape, 0.0123, dtype=dtype)
        keep = torch.rand(shape, generator=generator) < 0.03
        tensors |= {f"plain{place}": plain, f"levels{place}": levels, f"sparse{place}": plain * keep + 0, f"both{place}": levels * keep + 0}
        tensors[f"table{place}"] = torch.tensor([-0.7, 0.1, 3.0, 9.5]).to(dtype)[torch.randint(4, shape, generator=generator)]
        tensors[f"large{place}"] = on_levels(shape, 0.01, sigma=3000.0).to(dtype)
        rows = torch.rand(shape[:1] + (1,) * (len(shape) - 1), generator=generator) if shape else torch.ones(())
        tensors[f"rows{place}"] = (on_levels(shape, 1.0, 20.0) * rows).to(dtype)
    tensors["ones"] = torch.ones(50, dtype=dtype)
    tensors["odd"] = torch.tensor([float("nan"), float("inf"), 1.0] * 30).nan_to_num(0.5).to(dtype)
    round_trip(tensors, tmp_path)


def test_other_dtypes_and_values_come_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    kinds = {"i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool}
    tensors = {
        name: torch.randint(0, 2 if name == "bool" else 100, (30, 9), generator=generator).to(dtype) for name, dtype in kinds.items()
    }
    tensors["infinite"] = torch.tensor([float("inf"), 1.0, -2.0] * 40)
    round_trip(tensors, tmp_path)
    special = torch.tensor([float("nan"), -0.0, 1.0])
    pack({"special": special}, tmp_path / "b.spz")
    back = unpack(tmp_path / "b.spz")["special"]
    assert torch.equal(back.nan_to_num(7.0), special.nan_to_num(7.0))
    assert not back[1].signbit()
    with pytest.raises(SettingError, match="pack: c must be of a dtype among F32"):
        pack({"c": torch.zeros(3, dtype=torch.complex64)}, tmp_path / "c.spz")


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0, 40.0])
@pytest.mark.parametrize("shape", [(10,), (64, 64), (32, 16, 3, 3), (1000, 30)], ids=str)
def test_a_file_is_near_the_entropy_of_its_symbols(shape: tuple[int, ...], sigma: float, tmp_path: Path) -> None:
    tensors = {f"layer{seed}.weight": on_levels(shape, 0.01, sigma, seed) for seed in range(4)}
    entropy = sum(entropy_bytes(tensor.numpy()) for tensor in tensors.values())
    assert round_trip(tensors, tmp_path) <= 1.03 * entropy + 100 * len(tensors)


def test_scales_of_rows_and_columns_save_bytes(tmp_path: Path) -> None:
    weight = (
        torch.randn(256, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 256)[:, None] * torch.logspace(-1, 1, 128)
    )
    weight = weight.round() * 0.5 + 0
    assert round_trip({"w": weight}, tmp_path) < 0.8 * entropy_bytes(weight.numpy())


def test_few_weights_are_stored_by_their_gaps_or_in_the_code(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(500, 800, generator=generator) < 0.01
    weight = torch.randint(1, 3, keep.shape, generator=generator) * keep * 0.25
    made, packed = coded({"w": weight})
    count = int(keep.sum())
    share = count / keep.numel()
    bound = -keep.numel() * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    assert packed.index_bytes < 1.03 * bound
    assert packed.data_bytes <= 1.02 * count * 2 / 8  # a bit for the value, a bit for the sign
    assert len(made) < packed.index_bytes + packed.data_bytes + 250
    clustered = weight * (torch.arange(500)[:, None] < 50)  # zeros in whole rows: scales of the rows hold most positions
    assert coded({"w": clustered})[1].index_bytes < 0.12 * bound


def test_levels_are_found() -> None:
    step = torch.tensor(0.0371)
    levels = found(torch.tensor([4.0, -6.0, 0.0, 18.0, 10.0]) * step)
    assert levels is not None
    assert levels.steps is not None
    assert levels.numbers.tolist() in ([4, -6, 0, 18, 10], [2, -3, 0, 9, 5])
    assert found(torch.randn(100)) is None
    table = found(torch.tensor([0.3001, 1.7003, -0.2, 0.3001] * 10))
    assert table is not None
    assert table.table is not None
    assert table.table.tolist() == pytest.approx([-0.2, 0.3001, 1.7003])


def test_a_network_comes_back_in_its_class_with_folded_norms_and_pairs(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 40), nn.Linear(40, 5)
        )

    torch.manual_seed(0)
    model = make().eval()
    fold_batchnorms(model)
    merged = sp.merge(sp.prune(sp.factorize(model, where="4"), {"4": 6})).eval()
    x = torch.randn(2, 3, 6, 6)
    pack(merged, tmp_path / "m.spz")
    back = unpack(tmp_path / "m.spz", make().train())
    assert torch.equal(back(x), merged(x))
    assert {name: tuple(t.shape) for name, t in unpack(tmp_path / "m.spz").items()} == {
        n: tuple(t.shape) for n, t in merged.state_dict().items()
    }
    with pytest.raises(FormatError, match="another architecture"):
        unpack(tmp_path / "m.spz", nn.Sequential(nn.Linear(3, 3)))
    sp.save(merged, tmp_path / "saved")
    pack(tmp_path / "saved", tmp_path / "n.spz")
    assert torch.equal(unpack(tmp_path / "n.spz", make().eval())(x), merged(x))


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    pack(model, tmp_path / "t.spz")
    back = unpack(tmp_path / "t.spz")
    assert back["1.weight"] is back["0.weight"]
    plain = pack(dict(model.state_dict()), tmp_path / "dict.spz")
    assert unpack(tmp_path / "dict.spz")["1.weight"] is not None
    assert set(plain.tensors) == {"0.weight", "0.bias", "1.bias"}
    unpack_file(tmp_path / "t.spz", tmp_path / "t.safetensors")
    state = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_tensors_without_numbers_or_sparse_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"w: is on the meta device"):
        pack({"w": torch.zeros(3, device="meta")}, tmp_path / "a.spz")
    with pytest.raises(FormatError, match=r"w: is a sparse tensor .*call to_dense"):
        pack({"w": torch.eye(3).to_sparse()}, tmp_path / "a.spz")


@pytest.mark.parametrize("at", [0, 5, 10, 30, 200, -1])
def test_damaged_files_are_refused(at: int, tmp_path: Path) -> None:
    pack({"w": on_levels((40, 40), 0.1)}, path := tmp_path / "a.spz")
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(FormatError, match=r"a\.spz: (is truncated or was altered|is not a coded file)"):
        unpack(path)
    path.write_bytes(bytes(data[:at]))
    with pytest.raises(FormatError, match=r"a\.spz: "):
        unpack(path)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        unpack(tmp_path / "none.spz")
    with pytest.raises(FormatError, match="cannot be read"):
        unpack(tmp_path)


def forged(data: bytes, path: Path, rng: np.random.Generator, header: dict[str, object] | None = None) -> None:
    """Write a file with other bytes in its groups, or another header, and a digest that matches."""
    import hashlib

    _, length, _ = FRAME.unpack_from(data)
    text, body = data[FRAME.size : FRAME.size + length], bytearray(data[FRAME.size + length :])
    if header is None:
        for place in rng.integers(0, len(body), 3):
            body[place] = rng.integers(0, 256)
    else:
        text = zlib.compress(json.dumps(json.loads(zlib.decompress(text)) | header).encode())
    rest = text + bytes(body)
    path.write_bytes(FRAME.pack(MAGIC, len(text), hashlib.sha256(rest).digest()[:16]) + rest)


def test_hostile_files_give_one_clear_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keep = torch.rand(60, 60, generator=torch.Generator().manual_seed(0)) < 0.02
    tensors = {
        "w": on_levels((30, 20, 3), 0.1, 9.0), "s": on_levels((60, 60), 0.1) * keep + 0, "r": torch.randn(70, 3), "b": torch.ones(6),
        "t": torch.tensor([0.3, 1.7, -0.2])[torch.randint(0, 3, (40,))], "m": torch.randn(60, 60) * keep + 0, "i": torch.arange(90),
    }  # fmt: skip
    data = coded_file(tensors, {})[0]
    path = tmp_path / "h.spz"
    for _ in range(25):
        forged(data, path, rng)
        try:
            unpack(path)
        except FormatError as error:
            assert "h.spz: " in str(error)  # noqa: PT017
    good = {"tensors": [[name, list(t.shape), *(["I64"] if t.dtype is torch.int64 else [])] for name, t in tensors.items()]}
    huge = [["w", [2**39, 2**39]], *good["tensors"][1:]]
    twice = [good["tensors"][1], *good["tensors"][1:]]
    headers: list[dict[str, object]] = [
        {"tensors": huge}, {"tensors": twice}, {"tensors": "w"}, {"tensors": [[3, [2]]]}, {"tensors": [["w", [-1]]]}, {"tensors": 7},
        {"groups": []}, {"groups": [[7, -1]]}, {"groups": [["a", "b"]]}, {"digest": "0"}, {"plan": 3}, {"plan": {"aliases": {"x": "y"}}},
        {"plan": {"merged": {"w": [{"kind": "Linear", "in_features": 10**9, "out_features": 10**9}]}}}, {"bytes": None},
        {"tensors": [["w", [30, 20, 3], "Q9"], *good["tensors"][1:]]},
    ]  # fmt: skip
    for header in headers:
        forged(data, path, rng, header)
        with pytest.raises(FormatError, match=r"h\.spz: "):
            unpack(path)


def test_files_do_not_expand_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"z": torch.zeros(2**18)}
    pack(tensors, tmp_path / "z.spz")
    monkeypatch.setattr(container, "ROOM", 1000)
    with pytest.raises(SettingError, match="at most 4096 times as large"):
        coded_file(tensors, {})
    with pytest.raises(FormatError, match="more than 4096 times its size"):
        unpack(tmp_path / "z.spz")


def test_the_digest_is_of_every_byte() -> None:
    assert digest({"a": torch.tensor([1.0])}) != digest({"a": torch.tensor([2.0])})


@pytest.mark.parametrize("place", ["", "5-merge"])
def test_the_command_line_packs_a_folder_and_unpacks_a_file(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(30, 20)
    sp.save(model, tmp_path / "run" / place)
    if place:
        (tmp_path / "run" / "recipe.yaml").touch()
    main(["pack", str(tmp_path / "run"), "--json"])
    packed = json.loads(capsys.readouterr().out)
    assert packed["coded_bytes"] == (tmp_path / "run" / "model.spz").stat().st_size
    main(["unpack", str(tmp_path / "run" / "model.spz"), "--out", str(tmp_path / "out.safetensors")])
    assert "times smaller" in capsys.readouterr().out
    tensors = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(SystemExit):
        main(["unpack", str(tmp_path / "out.safetensors")])
    assert "is not a coded file of spectrim" in capsys.readouterr().err
