import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spectrim.errors import FormatError, SettingError
from spectrim.zoo import Batches, CropFlip, Normalize, data_folder
from spectrim.zoo.data import as_float, data_file


def images(count, side=8):
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make(**options):
    settings = {"batch_size": 8, "shuffle": True, "seed": 3, "augment": CropFlip(2), "transform": as_float, **options}
    return Batches(images(30), torch.arange(30), **settings)


def drain(batches):
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_same_seed_and_epoch_give_the_same_bytes():
    first, second = make(), make()
    epochs = [drain(first) for _ in range(3)]  # the passes count the epochs by themselves
    for epoch in (2, 0, 1):
        second.set_epoch(epoch)
        assert same(drain(second), epochs[epoch])
    assert not torch.equal(epochs[0][1], epochs[1][1])
    assert not torch.equal(drain(make(seed=4))[1], epochs[0][1])


def test_moved_batches_stay_on_their_device_and_keep_their_bytes():
    data = make(transform=Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    assert all(part.device.type == "meta" for batch in data.to("meta") for part in batch)
    assert data.inputs.device.type == "cpu"
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    here = drain(data)  # moved after a pass: the next one is the same in all
    for device in devices:
        moved = data.to(device)
        moved.set_epoch(0)
        inputs, targets = (part.cpu() for part in drain(moved))
        torch.testing.assert_close(inputs, here[0])
        assert torch.equal(targets, here[1])


def test_augmentation_is_new_in_each_epoch():
    batches = make(shuffle=False)
    (first, _), (second, _) = drain(batches), drain(batches)
    assert not torch.equal(first, second)


def test_interleaved_passes_do_not_disturb_each_other():
    batches = make()
    pairs = list(zip(batches, batches, strict=True))
    expected = make()
    assert same(drain([left for left, _ in pairs]), drain(expected))
    assert same(drain([right for _, right in pairs]), drain(expected))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = drain(make())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(drain(make()), first)


def test_each_example_once_in_an_epoch():
    batches = make()
    _, targets = drain(batches)
    assert sorted(targets.tolist()) == list(range(30))
    assert (len(batches), batches.examples) == (4, 30)
    assert [len(targets) for _, targets in batches] == [8, 8, 8, 6]


def test_drop_last_leaves_out_the_rest():
    batches = make(drop_last=True)
    assert (len(batches), batches.examples) == (3, 24)
    assert [len(targets) for _, targets in batches] == [8, 8, 8]


def test_without_shuffling_the_order_is_the_data_s():
    inputs, targets = drain(make(shuffle=False, augment=None, transform=None))
    assert torch.equal(inputs, images(30))
    assert targets.tolist() == list(range(30))


def test_batches_are_copies():
    batches = make(shuffle=False, augment=None, transform=None)
    for inputs, targets in batches:
        inputs.zero_()
        targets.zero_()
    assert torch.equal(batches.inputs, images(30))
    assert batches.targets.tolist() == list(range(30))


def test_no_examples_no_batches():
    empty = Batches(images(0), torch.arange(0), batch_size=8)
    assert (len(empty), empty.examples, list(empty)) == (0, 0, [])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Batches(torch.zeros(3), torch.zeros(2), 1), "targets must be as many as inputs (3), got 2"),
        (lambda: make(batch_size=0), "batch_size must be an integer >= 1, got 0"),
        (lambda: make(seed=-1), "seed must be an integer >= 0, got -1"),
        (lambda: make().set_epoch(-1), "epoch must be an integer >= 0, got -1"),
        (lambda: CropFlip(-1), "padding must be an integer >= 0, got -1"),
        (lambda: Normalize((0.5,), (0.0,)), "std must be as many positive numbers as mean (1), got (0.0,)"),
        (lambda: Normalize((0.5,), (1.0, 1.0)), "std must be as many positive numbers as mean (1)"),
    ],
)
def test_bad_arguments_name_the_rule(call, message):
    with pytest.raises(SettingError, match=re.escape(message)):
        call()


def test_crops_are_windows_of_the_padded_image_and_all_of_them_occur():
    side, padding = 5, 2
    image = torch.arange(1, 3 * side * side + 1, dtype=torch.uint8).view(3, side, side)  # no two pixels alike, none black
    padded = torch.zeros(3, side + 2 * padding, side + 2 * padding, dtype=torch.uint8)
    padded[:, padding:-padding, padding:-padding] = image
    windows = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = padded[:, top : top + side, left : left + side]
            windows[tuple(window.flatten().tolist())] = (top, left, False)
            windows[tuple(window.flip(-1).flatten().tolist())] = (top, left, True)
    out = CropFlip(padding)(image.expand(2000, -1, -1, -1), torch.Generator().manual_seed(0))
    kinds = [windows[tuple(crop.flatten().tolist())] for crop in out]  # a KeyError is a crop that cannot be
    assert out.dtype == torch.uint8
    assert len(set(kinds)) == 2 * (2 * padding + 1) ** 2
    # 2,000 fair draws: 1000 +- 22 flips; five deviations
    assert abs(sum(flipped for _, _, flipped in kinds) - 1000) < 112


def test_flip_and_padding_can_be_switched_off():
    batch = images(64)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(CropFlip(0, flip=False)(batch, generator), batch)
    flipped = CropFlip(0)(batch, generator)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, batch, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(flipped, batch, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert any(mirrored)
    assert any(kept)
    rows = CropFlip(2, flip=False)(torch.arange(64.0).view(1, 1, 8, 8).expand(50, -1, -1, -1) + 1, generator)
    assert all(((row[1:] - row[:-1] == 1) | (row[1:] == 0) | (row[:-1] == 0)).all() for row in rows.flatten(0, 2))


class CountOperations(TorchDispatchMode):
    """Counts the tensor operations that run inside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_augmentation_takes_as_many_operations_for_one_image_as_for_many():
    """Two milliseconds for 128 CIFAR images on one core; a loop over images would take ten times that."""
    counts = []
    for size in (1, 128):
        with CountOperations() as counter:
            CropFlip(4)(images(size, 32), torch.Generator())
        counts.append(counter.count)
    assert counts[0] == counts[1] > 0


def test_normalize_by_hand():
    batch = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    out = Normalize((0.5, 0.2, 0.0), (0.25, 1.0, 0.5))(batch)
    torch.testing.assert_close(out.flatten(), torch.tensor([-2.0, 0.0, 2.0]))


def test_data_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("SPECTRIM_DATA", raising=False)
    assert str(data_folder()) == "data"
    monkeypatch.setenv("SPECTRIM_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    (tmp_path / "a.txt").write_text("a")
    assert data_file("a.txt", "letter a") == tmp_path / "a.txt"
    with pytest.raises(FormatError, match=r"b\.txt: no such file; expected the letter b; put it there, or point SPECTRIM_DATA at"):
        data_file("b.txt", "letter b")
    with pytest.raises(FormatError, match="check the path"):
        data_file(tmp_path / "b.txt", "letter b")
