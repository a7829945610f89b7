import gzip
import math
import re
import struct
import sys

import numpy as np
import pytest
import torch

from spectrim import zoo
from spectrim.errors import FormatError, SettingError

DATA = zoo.data_folder()


def needs(path):
    return pytest.mark.skipif(not (DATA / path).is_file(), reason=f"needs {DATA / path} (unpack the shared data)")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRIM_DATA", str(tmp_path))
    return tmp_path


# Images


def test_digits_are_split_by_class_and_complete():
    pytest.importorskip("sklearn", reason="needs the demo extra")
    splits = zoo.digits()
    assert [split.examples for split in splits] == [1078, 360, 359]
    everything = torch.cat([split.inputs for split in splits])
    assert everything.shape == (1797, 1, 8, 8)
    assert (everything.min(), everything.max(), everything.dtype) == (0.0, 1.0, torch.float32)
    counts = torch.stack([split.targets.bincount() for split in splits])
    shares = counts / counts.sum(0)
    # Rounding of classes of about 180 images: half an image in 174 at most.
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.2, 0.2])[:, None].expand_as(shares), atol=0.006, rtol=0)
    other = zoo.digits(seed=1)
    assert torch.equal(splits.test.inputs, other.test.inputs)
    assert not torch.equal(next(iter(splits.train))[1], next(iter(other.train))[1])


def test_digits_without_sklearn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=re.escape("pip install scikit-learn")):
        zoo.digits()


@needs("cifar-10-batches-bin/test_batch.bin")
def test_cifar10_is_split_without_overlap():
    train, val, test = zoo.cifar10()
    assert [split.examples for split in (train, val, test)] == [45_000, 5_000, 10_000]
    assert train.inputs.dtype == torch.uint8
    assert (train.targets.bincount() + val.targets.bincount()).tolist() == [5_000] * 10
    assert test.targets.bincount().tolist() == [1_000] * 10
    assert test.targets[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]  # the published order: cat, ship, ship, airplane, frog, ...
    assert train.augment is not None
    assert val.augment is None
    assert test.augment is None
    inputs, targets = next(iter(train))
    assert (inputs.shape, inputs.dtype, targets.dtype) == ((128, 3, 32, 32), torch.float32, torch.int64)
    again = zoo.cifar10(seed=5, augment=False)
    assert torch.equal(again.val.inputs, val.inputs)
    assert again.train.augment is None


@needs("cifar-10-batches-bin/test_batch.bin")
def test_cifar10_limit_and_normalisation():
    limited = zoo.cifar10(limit=100, normalize="raw", val=7, batch_size=50)
    assert [split.examples for split in limited] == [100, 7, 100]
    raw = torch.cat([inputs for inputs, _ in limited.test])
    assert torch.equal(raw, limited.test.inputs.float())
    normalized = torch.cat([inputs for inputs, _ in zoo.cifar10(limit=100, val=0).test])
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(normalized, (raw / 255 - mean) / std)


@needs("cifar-10-batches-bin/test_batch.bin")
def test_cifar10_refuses_bad_arguments():
    with pytest.raises(SettingError, match=re.escape("cifar10: val must be a number of images in [0, 49999], got 50000")):
        zoo.cifar10(val=50_000)
    with pytest.raises(SettingError, match="limit must be None or an integer >= 1, got 0"):
        zoo.cifar10(limit=0)


def test_missing_and_truncated_cifar10(folder):
    with pytest.raises(FormatError, match=r"data_batch_1\.bin: no such file; expected the CIFAR-10 binary version .* SPECTRIM_DATA"):
        zoo.cifar10()
    (folder / "cifar-10-batches-bin").mkdir()
    (folder / "cifar-10-batches-bin/data_batch_1.bin").write_bytes(bytes(3073 * 9_999))
    with pytest.raises(FormatError, match=r"data_batch_1\.bin: 30,726,927 bytes, expected 30,730,000; truncated"):
        zoo.cifar10()


@needs("FashionMNIST/raw/t10k-labels-idx1-ubyte.gz")
def test_fashion_mnist_is_complete():
    splits = zoo.fashion_mnist()
    assert [split.examples for split in splits] == [55_000, 5_000, 10_000]
    assert splits.test.targets.bincount().tolist() == [1_000] * 10
    everything = torch.cat([splits.train.inputs, splits.val.inputs]).float() / 255
    assert (round(float(everything.mean()), 4), round(float(everything.std()), 4)) == (0.2860, 0.3530)


@needs("MNIST/raw/t10k-labels-idx1-ubyte.gz")
def test_mnist_is_complete():
    splits = zoo.mnist(augment=True)
    assert [split.examples for split in splits] == [55_000, 5_000, 10_000]
    assert splits.test.targets[:5].tolist() == [7, 2, 1, 0, 4]
    assert splits.train.augment == zoo.CropFlip(2, flip=False)
    everything = torch.cat([splits.train.inputs, splits.val.inputs]).float() / 255
    assert (round(float(everything.mean()), 4), round(float(everything.std()), 4)) == (0.1307, 0.3081)


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder, packed):
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 6), ("t10k", 4)):
        for name, array in (
            (f"{prefix}-images-idx3-ubyte", rng.integers(256, size=(count, 5, 4))),
            (f"{prefix}-labels-idx1-ubyte", np.arange(count)),
        ):
            file = raw / (f"{name}.gz" if packed else name)
            file.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return raw


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_by_hand(folder, packed):
    write_mnist(folder, packed)
    train, val, test = zoo.mnist(val=2, batch_size=3)
    assert sorted(torch.cat([train.targets, val.targets]).tolist()) == list(range(6))
    first = np.random.default_rng(0).integers(256, size=(6, 5, 4))
    for label, image in zip(train.targets.tolist(), train.inputs, strict=True):
        assert np.array_equal(image[0], first[label])
    assert test.inputs.shape == (4, 1, 5, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda data: gzip.compress(data)[:-20], "cannot be unpacked"),
        ("train-images-idx3-ubyte.gz", lambda data: b"no gzip", "cannot be unpacked"),
        ("train-images-idx3-ubyte", lambda data: data[:-1], r"do not match the header's shape \(6, 5, 4\); truncated"),
        ("train-images-idx3-ubyte", lambda data: data[:9], "do not match the header's shape"),
        ("train-images-idx3-ubyte", lambda data: b"", "starts with "),
        (
            "train-images-idx3-ubyte",
            lambda data: idx(np.arange(6)),
            "starts with 00000801, an idx file of bytes in 3 dimensions starts with 00000803",
        ),
        ("train-labels-idx1-ubyte", lambda data: idx(np.arange(5)), "6 train images but 5 labels"),
        ("train-labels-idx1-ubyte", lambda data: idx(np.arange(5, 11)), r"holds the label 10, expected 0\.\.9"),
        ("t10k-images-idx3-ubyte", None, r"t10k-images-idx3-ubyte\.gz: no such file; expected the idx file of unsigned bytes"),
    ],
)
def test_damaged_idx_files(folder, name, content, message):
    raw = write_mnist(folder, packed=name.endswith(".gz"))
    if content is None:
        (raw / name).unlink()
    else:
        data = (raw / name).read_bytes()
        (raw / name).write_bytes(content(gzip.decompress(data) if name.endswith(".gz") else data))
    with pytest.raises(FormatError, match=message):
        zoo.mnist(val=2)


# Text


def test_word_windows_by_hand(folder):
    (folder / "train.txt").write_text("a b c\nd e\nf a <unk> b c\n")  # 13 ids with the line ends
    (folder / "val.txt").write_text("b zebra a\n")
    numbers = zoo.vocabulary("train.txt")
    assert list(numbers) == ["a", "b", "c", "<eos>", "d", "e", "f", "<unk>"]
    train, val, test = zoo.words("train.txt", "val.txt", "val.txt", batch_size=2, length=2)
    stream = [0, 1, 2, 3, 4, 5, 3, 6, 0, 7, 1, 2, 3]
    first, second = stream[:6], stream[6:12]
    expected = [([first[i : i + 2], second[i : i + 2]], [first[i + 1 : i + 3], second[i + 1 : i + 3]]) for i in (0, 2)]
    assert [(inputs.tolist(), targets.tolist()) for inputs, targets in train] == expected
    assert [(inputs.tolist(), targets.tolist()) for inputs, targets in val] == [([[1, 7]], [[7, 0]])]
    assert torch.equal(val.inputs, test.inputs)


def test_unknown_words_have_a_number_even_if_the_training_text_has_none(folder):
    (folder / "train.txt").write_text("a b\n")
    assert zoo.vocabulary("train.txt") == {"a": 0, "b": 1, "<eos>": 2, "<unk>": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"train\.txt: no such file; expected the plain text in UTF-8"),
        (b"", "holds no words"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a b", r"3 tokens are too few for 20 stream\(s\) of one window of 35 and a target"),
    ],
)
def test_bad_word_files(folder, content, message):
    if content is not None:
        (folder / "train.txt").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        zoo.words("train.txt", "train.txt", "train.txt")


@pytest.mark.parametrize("option", ["batch_size", "length", "limit"])
@pytest.mark.parametrize("reader", [zoo.ptb, zoo.characters, zoo.stories])
def test_text_readers_refuse_bad_arguments(reader, option):
    with pytest.raises(SettingError, match=f"{option} must be an integer >= 1, got 0"):
        reader(**{option: 0})


@needs("text/ptb/ptb.train.txt")
def test_ptb_has_the_published_counts():
    train, val, test = zoo.ptb(batch_size=20, length=35)
    assert len(zoo.vocabulary("text/ptb/ptb.train.txt")) == 10_000
    # 929,589 / 73,760 / 82,430 words with their line ends (Mikolov)
    assert train.inputs.shape == ((929_589 // 20 - 1) // 35 * 20, 35)
    assert val.inputs.shape == ((73_760 - 1) // 35, 35)
    assert test.inputs.shape == ((82_430 - 1) // 35, 35)
    batches = iter(train)
    (first, targets), (second, _) = next(batches), next(batches)
    assert torch.equal(first[:, 1:], targets[:, :-1])
    assert torch.equal(targets[:, -1], second[:, 0])  # the next batch goes on where this one's targets end
    assert [split.examples for split in zoo.ptb(limit=3)] == [3, 3, 3]
    assert not torch.equal(next(iter(zoo.ptb(shuffle=True).train))[0], first)


@needs("text/wikitext2/valid.txt")
def test_wikitext_reads_with_the_same_function():
    train, val, _ = zoo.words("text/wikitext2/valid.txt", "text/wikitext2/test.txt", "text/wikitext2/test.txt", batch_size=10)
    size = len(zoo.vocabulary("text/wikitext2/valid.txt"))
    assert int(train.targets.max()) < size
    assert int(val.targets.max()) < size
    assert val.inputs.shape == ((245_569 - 1) // 35, 35)  # published count of the test split


def test_character_windows_by_hand(folder):
    (folder / "letters.txt").write_text("cab" * 20)
    train, val, test = zoo.characters("letters.txt", batch_size=4, length=2)
    assert (train.inputs.shape, val.inputs.shape, test.inputs.shape) == ((26, 2), (1, 2), (1, 2))
    assert train.inputs[:2].tolist() == [[2, 0], [1, 2]]
    assert train.targets[:2].tolist() == [[0, 1], [2, 0]]
    assert val.inputs.tolist() == [[2, 0]]
    with pytest.raises(FormatError, match="too few"):
        zoo.characters("letters.txt", length=5)


@needs("text/tinyshakespeare.txt")
def test_tiny_shakespeare_has_65_characters():
    splits = zoo.characters()
    assert int(splits.train.inputs.max()) + 1 == 65
    assert sum(split.examples for split in splits) == sum((size - 1) // 128 for size in (1_003_854, 55_770, 55_770))


@needs("stories260K/tinystories_tok512_uint16.npy")
def test_stories_are_split_between_stories():
    texts = zoo.story_tokens()
    assert len(texts) == 2_316
    assert all(int(story[0]) == 1 and int((story == 1).sum()) == 1 for story in texts)
    train, val, test = zoo.stories(batch_size=16, length=256)
    first = torch.cat(texts[:2])
    assert torch.equal(test.inputs[:2].flatten(), first[:512])
    assert torch.equal(test.targets[:2].flatten(), first[1:513])
    lengths = [sum(map(len, part)) for part in (texts[462:], texts[231:462], texts[:231])]
    assert [split.examples for split in (train, val, test)] == [math.ceil((size - 1) // 256) for size in lengths]
    assert [split.examples for split in zoo.stories(limit=5)] == [5, 5, 5]


@pytest.mark.parametrize(
    "content",
    [
        np.array([1, 2, 600], np.uint16),
        np.array([2, 1], np.uint16),
        np.array([1, 2]),
        np.array([[1, 2]], np.uint16),
        np.array([], np.uint16),
    ],
)
def test_bad_token_files(folder, content):
    (folder / "stories260K").mkdir()
    file = folder / "stories260K/tinystories_tok512_uint16.npy"
    with pytest.raises(FormatError, match="no such file; expected the NumPy array of uint16 token ids"):
        zoo.story_tokens()
    np.save(file, content)
    with pytest.raises(FormatError, match="expected uint16 ids below 512"):
        zoo.story_tokens()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(FormatError, match=r"is not a whole \.npy file"):
        zoo.story_tokens()
