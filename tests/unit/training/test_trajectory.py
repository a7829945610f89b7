"""Samples of a trajectory: kept in memory and on disk, taken by a callback and a course, resumed; their basis; the gauge of factors."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small import batches, flat, network
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import FormatError, LayerError, SettingError, WriteError
from spectrim.layers import named_factors
from spectrim.training import Basis, Sampling, Trajectory
from spectrim.training.gauge import jumps


def fit(model: nn.Module, epochs: int = 4, **settings: object) -> sp.training.History:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return sp.fit(model, batches(), nn.MSELoss(), optimizer, epochs, progress=False, **settings)  # type: ignore[arg-type]


def walked(trajectory: Trajectory, steps: int = 5) -> list[Tensor]:
    """Record a random walk; return the vectors."""
    model, vectors = network(), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        trajectory.record(model)
        vectors.append(flat(model))
        for p in model.parameters():
            p.data += 0.01 * torch.randn(p.shape, generator=generator)
    return vectors


def test_the_basis_spans_the_differences_of_the_samples() -> None:
    trajectory = Trajectory()
    vectors = walked(trajectory)
    basis = trajectory.basis(4, dtype=torch.float64)
    P = basis.directions
    assert basis.defect < 1e-12
    assert trajectory.basis(4).defect < 1e-6
    for vector in vectors[1:]:
        moved = (vector - vectors[0]).double()
        torch.testing.assert_close(P.mT @ (P @ moved), moved, rtol=0, atol=1e-6)  # samples are float32
    assert basis.kept == pytest.approx(1)
    assert basis.layout[0] == ("0.weight", (16, 12))


def test_directions_are_in_the_order_of_their_variance_and_may_be_chosen_by_its_share() -> None:
    trajectory = Trajectory()
    walked(trajectory, 8)
    whole = trajectory.basis(7)
    assert whole.variances.tolist() == sorted(whole.variances.tolist(), reverse=True)
    shares = (whole.variances.cumsum(0) / whole.total).tolist()
    for size in range(1, 7):
        assert trajectory.basis(shares[size - 1] - 1e-9).size == size
        assert trajectory.basis(size).kept == pytest.approx(shares[size - 1])
        torch.testing.assert_close(trajectory.basis(size).directions, whole.directions[:size])


def test_some_of_the_samples() -> None:
    trajectory = Trajectory()
    vectors = walked(trajectory, 8)
    moved = (vectors[4] - vectors[2]).double()
    P = trajectory.basis(2, first=2, last=5, dtype=torch.float64).directions
    torch.testing.assert_close(P.mT @ (P @ moved), moved, rtol=0, atol=1e-6)
    with pytest.raises(SettingError, match="size must be from 1 to 2"):
        trajectory.basis(3, first=2, last=5)
    with pytest.raises(SettingError, match="samples must be at least 2, got 1"):
        trajectory.basis(1, first=7)
    with pytest.raises(SettingError, match="share of the variance"):
        trajectory.basis(1.0)


def test_the_first_sample_is_restored_bit_for_bit_and_buffers_stay() -> None:
    trajectory = Trajectory()
    vectors = walked(trajectory)
    model = network()
    for p in model.parameters():
        p.data.fill_(3)
    model[1].running_mean.fill_(7)  # type: ignore[operator, union-attr]
    trajectory.restore(model)
    assert torch.equal(flat(model), vectors[0])
    trajectory.restore(model, -1)
    torch.testing.assert_close(flat(model), vectors[-1])
    assert float(model[1].running_mean.mean()) == 7  # type: ignore[operator, union-attr, arg-type]
    with pytest.raises(SettingError, match="index must be of one of the 5 samples, got 5"):
        trajectory.restore(model, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_samples_on_disk_are_those_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    on_disk, in_memory = Trajectory(tmp_path, dtype), Trajectory(dtype=dtype)
    vectors = walked(on_disk)
    walked(in_memory)
    width = len(vectors[0])
    whole = 8 if dtype == torch.float64 else 4
    assert (tmp_path / "samples.bin").stat().st_size == width * (whole + 4 * dtype.itemsize)
    assert torch.equal(on_disk.basis(3).directions, in_memory.basis(3).directions)
    again = Trajectory(tmp_path, dtype).open(network())
    assert len(again) == 5
    assert torch.equal(again.basis(3).directions, in_memory.basis(3).directions)
    model = network()
    again.restore(model)
    assert torch.equal(flat(model), vectors[0])


def test_half_precision_keeps_small_moves_of_large_weights() -> None:
    """Samples are differences: bfloat16 rounds the way that was gone, not the weights."""
    model, trajectory = nn.Linear(100, 1, bias=False), Trajectory(dtype=torch.bfloat16)
    model.weight.data.fill_(1.0)
    direction = torch.linspace(1e-5, 1e-4, 100)
    for step in range(3):
        model.weight.data.copy_(1 + step * direction)
        trajectory.record(model)
    cosine = torch.cosine_similarity(trajectory.basis(1).directions[0], direction, dim=0)
    assert abs(float(cosine)) > 0.9999


def test_a_folder_that_is_damaged_or_of_another_network_is_refused(tmp_path: Path) -> None:
    walked(Trajectory(tmp_path))
    with pytest.raises(FormatError, match="another network, or in another dtype"):
        Trajectory(tmp_path).open(nn.Linear(3, 3))
    with pytest.raises(FormatError, match="another network, or in another dtype"):
        Trajectory(tmp_path, torch.bfloat16).open(network())
    data = bytearray((tmp_path / "samples.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "samples.bin").write_bytes(bytes(data))
    with pytest.raises(FormatError, match="sample 4 does not match its digest"):
        Trajectory(tmp_path).open(network())
    (tmp_path / "trajectory.json").write_text((tmp_path / "trajectory.json").read_text().replace("16", "17", 1))
    with pytest.raises(FormatError, match="does not match its digest"):
        Trajectory(tmp_path).open(network())


def test_half_a_sample_of_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    trajectory = Trajectory(tmp_path)
    walked(trajectory)
    with open(tmp_path / "samples.bin", "ab") as file:
        file.write(b"half a sample")
    again = Trajectory(tmp_path).open(network())
    model = network()
    again.record(model)
    assert len(Trajectory(tmp_path).open(model)) == 6
    assert json.loads((tmp_path / "trajectory.json").read_text())["notes"][5] == {"epoch": None, "jumped": []}


def test_two_writers_of_a_folder_are_refused(tmp_path: Path) -> None:
    first = Trajectory(tmp_path)
    walked(first)
    second = Trajectory(tmp_path).open(network())
    second.record(network())
    with pytest.raises(WriteError, match="another trajectory has written"):
        first.record(network())
    assert len(Trajectory(tmp_path).open(network())) == 6


def test_a_callback_takes_one_sample_an_epoch_and_a_resumed_run_replaces_them(tmp_path: Path) -> None:
    model, trajectory = network(), Trajectory(tmp_path / "samples")
    trajectory.record(model)
    fit(model, 3, callbacks=[trajectory], checkpoint=tmp_path / "run")
    assert len(trajectory) == 4
    trajectory(4, {}, network())  # an epoch whose checkpoint a kill has prevented
    resumed = Trajectory(tmp_path / "samples")
    fit(network(), 5, callbacks=[resumed], checkpoint=tmp_path / "run")
    straight = Trajectory()
    model = network()
    straight.record(model)
    fit(model, 5, callbacks=[straight])
    assert len(resumed) == len(straight) == 6
    assert torch.equal(resumed.basis(3).directions, straight.basis(3).directions)


def test_a_course_takes_samples_evenly_and_training_is_the_same() -> None:
    model, plain, trajectory = network(), network(), Trajectory()
    start = flat(model)
    fit(model, 2, courses=[Sampling(trajectory, 5, end=0.5)])
    fit(plain, 2)
    assert torch.equal(flat(model), flat(plain))
    assert len(trajectory) == 6
    assert torch.equal(trajectory._vector(0), start)
    late = Trajectory()
    fit(network(), 2, courses=[Sampling(late, 3, begin=0.5)])
    assert len(late) == 4
    torch.testing.assert_close(late._vector(3), flat(plain))


class Broken(list[tuple[Tensor, Tensor]]):
    """Batches of which the last one of an epoch does not come."""

    passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        for index, batch in enumerate(super().__iter__()):
            if self.passes == 3 and index == 5:
                raise ConnectionError("the disk is gone")
            yield batch


def test_a_killed_run_takes_the_samples_behind_its_checkpoint_again(tmp_path: Path) -> None:
    def run(data: list[tuple[Tensor, Tensor]], trajectory: Trajectory, folder: str) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        courses, checkpoint = [Sampling(trajectory, 12)], tmp_path / folder
        sp.fit(model, data, nn.MSELoss(), optimizer, 4, courses=courses, checkpoint=checkpoint, progress=False)

    killed, resumed, straight = Trajectory(tmp_path / "a"), Trajectory(tmp_path / "a"), Trajectory()
    with pytest.raises(ConnectionError):
        run(Broken(batches()), killed, "run")
    assert len(killed) == 9, "two of them behind the checkpoint"
    run(batches(), resumed, "run")
    run(batches(), straight, "other")
    assert len(resumed) == len(straight) == 13
    assert torch.equal(resumed.basis(5).directions, straight.basis(5).directions)


def test_a_course_whose_samples_are_lost_refuses() -> None:
    course = Sampling(Trajectory(), 3)
    memory = course.start(network(), None, 3)
    course.before(network(), None, 0, 3, memory)
    with pytest.raises(SettingError, match="trajectory must be the 1 taken so far, got '0 samples'; give it a folder"):
        Sampling(Trajectory(), 3).before(network(), None, 1, 3, memory)
    with pytest.raises(SettingError, match="at most the number of steps"):
        Sampling(Trajectory(), 4).start(network(), None, 3)


def test_frozen_parameters_are_not_sampled_and_tied_ones_once() -> None:
    model = network()
    model[0].requires_grad_(False)
    trajectory = Trajectory().open(model)
    assert [name for name, _ in trajectory.layout] == ["1.weight", "1.bias", "3.weight", "3.bias"]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert [name for name, _ in Trajectory().open(tied).layout] == ["0.weight", "0.bias", "1.bias"]


def test_samples_that_do_not_fit_are_refused() -> None:
    trajectory = Trajectory()
    walked(trajectory)
    with pytest.raises(LayerError, match=r"layer '0.weight': has shape \(16, 13\), in the trajectory \(16, 12\)"):
        trajectory.record(nn.Sequential(nn.Linear(13, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)))
    with pytest.raises(SettingError, match="parameters must be the 6 of the trajectory, got '2 of them'"):
        trajectory.record(nn.Linear(12, 16))
    broken = network()
    broken[3].bias.data[1] = torch.nan  # type: ignore[index, union-attr]
    with pytest.raises(LayerError, match=r"layer '3.bias': has values that are not finite"):
        trajectory.record(broken)
    with pytest.raises(SettingError, match="dtype must be"):
        Trajectory(dtype=torch.int8)
    with pytest.raises(SettingError, match="all frozen"):
        Trajectory().record(network().requires_grad_(False))


# Factors


@pytest.mark.parametrize("scheme", ["channel", "tucker", "cp", "tt"])
def test_training_keeps_the_places_of_components(scheme: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    low, trajectory = sp.factorize(dense, scheme=scheme), Trajectory()
    assert list(named_factors(low))
    data = [(torch.randn(4, 4, 6, 6), torch.randn(4, 8, 6, 6)) for _ in range(4)]
    optimizer = torch.optim.SGD(low.parameters(), 0.05, momentum=0.9)
    sp.fit(low, data, nn.MSELoss(), optimizer, 3, penalties=[sp.Orthogonality(1.0)], courses=[Sampling(trajectory, 12)], progress=False)
    assert len(trajectory) == 13
    assert trajectory.jumps == {}
    assert trajectory.basis(5).defect < 1e-6


def test_components_that_change_places_are_noticed_and_refused_across_the_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    low, trajectory = sp.factorize(nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 2))), Trajectory(tmp_path)
    (_, _), (name, second) = named_factors(low)
    for step in range(5):
        if step == 3:
            order = torch.tensor([1, 0, *range(2, 8)])
            second.U.data, second.S.data, second.Vh.data = second.U.data[:, order], second.S.data[order], second.Vh.data[order]
        for parameter in low.parameters():
            parameter.data += 1e-3 * torch.randn(parameter.shape)
        if step == 3:
            with pytest.warns(UserWarning, match=f"components of {name} changed places before sample 3"):
                trajectory.record(low)
        else:
            trajectory.record(low)
    for read in (trajectory, Trajectory(tmp_path).open(low)):
        assert read.jumps == {3: [name]}
        with pytest.raises(LayerError, match=rf"layer '{name}'.*before sample 3; basis\(size, first=3\)"):
            read.basis(2)
        assert read.basis(2, last=3).size == 2
        assert read.basis(1, first=3).size == 1


def test_a_change_of_sign_is_a_jump_and_a_small_turn_is_none() -> None:
    torch.manual_seed(0)
    low = sp.factorize(nn.Sequential(nn.Linear(12, 8)))
    ((name, form),) = named_factors(low)
    before = {id(p): p.detach().clone() for p in low.parameters()}
    form.U.data += 0.05 * torch.randn(form.U.shape)
    assert jumps(low, before) == []
    flipped = copy.deepcopy(before)
    flipped[id(form.U)][:, 2] *= -1
    flipped[id(form.Vh)][2] *= -1
    assert jumps(low, flipped) == [name]


def test_a_cut_between_samples_is_refused() -> None:
    low, trajectory = sp.factorize(network()), Trajectory()
    trajectory.record(low)
    with pytest.raises(LayerError, match="in the trajectory"):
        trajectory.record(sp.prune(low, {name: 2 for name, _ in named_factors(low)}))


# Bases of another origin


def test_a_basis_from_any_directions() -> None:
    model = network()
    width = len(flat(model))
    given = torch.randn(3, width)
    basis = Basis.of(model, given)
    assert basis.defect < 1e-6
    torch.testing.assert_close(given @ basis.directions.mT @ basis.directions, given, rtol=0, atol=1e-4)  # 3 sums of 292 products
    assert basis.digest != Basis.of(model, given.flip(0)).digest
    with pytest.raises(SettingError, match="linearly independent"):
        Basis.of(model, given[[0, 0]])
    with pytest.raises(SettingError, match="directions must be"):
        Basis.of(model, given[:, 1:])
