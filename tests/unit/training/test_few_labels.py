"""Lessons for few labels: same-class distances, and auto-encoding of inputs or outputs."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as sp
from spectrim.errors import SettingError
from spectrim.protocols import Lesson, Seen
from spectrim.training.autoencoding import Autoencoding
from spectrim.training.class_invariance import ClassInvariance, same_class_share


def by_pairs(features: Tensor, target: Tensor) -> float:
    """Return the share by loops over pairs."""
    same, every = [], []
    for i in range(len(features)):
        for j in range(i):
            distance = float((features[i] - features[j]).square().sum())
            every.append(distance)
            same += [distance] if target[i] == target[j] else []
    return sum(same) / len(same) / (sum(every) / len(every)) if same else 0.0


@pytest.mark.parametrize("shape", [(12, 5), (9, 2, 3)])
def test_the_share_is_that_over_all_pairs_whatever_the_scale_and_place(shape: tuple[int, ...]) -> None:
    features, target = torch.randn(shape).double(), torch.arange(shape[0]) % 4
    share = same_class_share(features, target)
    assert share.item() == pytest.approx(by_pairs(features, target))
    assert same_class_share(7 * features - 3, target).item() == pytest.approx(share.item())
    assert same_class_share(target[:, None].double(), target).item() == pytest.approx(0, abs=1e-12)
    assert same_class_share(features[:4], torch.arange(4)).item() == 0
    assert same_class_share(torch.ones(4, 2), torch.zeros(4, dtype=torch.long)).item() == 0


def test_its_gradient_is_that_of_finite_differences() -> None:
    features, target = torch.randn(6, 3).double().requires_grad_(), torch.tensor([0, 0, 1, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda x: same_class_share(x, target), (features,))


def blobs(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    target = torch.arange(120) % 3
    return list(zip((torch.randn(120, 6) + target[:, None]).split(30), target.split(30), strict=True))


def test_training_with_it_brings_classes_together() -> None:
    shares = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        lesson = ClassInvariance(["1"], weight)
        assert isinstance(lesson, Lesson)
        sp.fit(model, blobs(), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 1e-2), 10, lessons=[lesson], progress=False)
        x, y = (torch.cat(part) for part in zip(*blobs(), strict=True))
        shares[weight] = same_class_share(model[:2](x).detach(), y).item()
    assert shares[1.0] < 0.8 * shares[0.0]


def test_the_loss_is_mixed_by_a_share_that_fades() -> None:
    encoder, decoder, examples = nn.Linear(3, 2), nn.Linear(2, 3), torch.randn(1, 3)  # one example: no choice
    lesson = Autoencoding(encoder, decoder, examples, weight=0.8, slope=0.5, batch=4)
    assert isinstance(lesson, Lesson)
    error = (decoder(encoder(examples)) - examples).square().mean().item()
    for done in (0.0, 0.5, 0.9):
        seen = Seen(torch.tensor(2.0), None, None, None, {}, done)
        share = 0.8 * math.exp(-done / 0.5)
        assert lesson.share(done) == pytest.approx(share)
        assert lesson(seen).item() == pytest.approx((1 - share) * 2 + share * error, rel=1e-5)


def test_corrupted_entries_are_zero_before_encoding_and_whole_in_the_target() -> None:
    class Kept(nn.Module):
        def forward(self, x: Any) -> Any:
            self.seen = x
            return x

    encoder = Kept()
    lesson = Autoencoding(encoder, nn.Identity(), torch.ones(5, 1000), weight=1.0, batch=8, corruption=0.25)
    error = lesson(Seen(torch.tensor(0.0), None, None, None, {}, 0.0)).item()
    zeros = float((encoder.seen == 0).double().mean())
    assert zeros == pytest.approx(0.25, abs=0.03)  # 8000 draws
    assert error == pytest.approx(zeros, rel=1e-5)


def test_outputs_alone_help_where_pairs_are_few() -> None:
    """Outputs on a line in 20 dimensions: pairs alone do not tell the line, outputs do."""
    errors = {}
    for weight in (0.0, 0.7):
        torch.manual_seed(0)
        direction, mix = torch.randn(20), torch.randn(5)
        inputs = torch.randn(400, 5)
        outputs = (inputs @ mix)[:, None] * direction
        model, encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 20)), nn.Linear(20, 8)
        noisy = outputs[:10] + 2.0 * torch.randn(10, 20)
        optimizer = torch.optim.Adam([*model.parameters(), *encoder.parameters()], 1e-2)
        lessons = [Autoencoding(encoder, model[1:], outputs, weight, slope=1.0)]
        sp.fit(model, [(inputs[:10], noisy)], nn.MSELoss(), optimizer, 150, lessons=lessons, progress=False)
        with torch.no_grad():
            errors[weight] = nn.functional.mse_loss(model(inputs[200:]), outputs[200:]).item()
    assert errors[0.7] < errors[0.0]


def test_a_factorized_network_shares_its_layers() -> None:
    model = sp.factorize(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), where=sp.match("*"))
    decoder = nn.Linear(8, 6)
    lesson = Autoencoding(model[:2], decoder, torch.randn(20, 6), batch=5)
    lesson(Seen(torch.tensor(0.0), None, None, None, {}, 0.0)).backward()
    assert all(parameter.grad is not None for parameter in model[0].factors.parameters())


def test_settings_outside_their_range_are_refused() -> None:
    parts = (nn.Linear(2, 2), nn.Linear(2, 2))
    for wrong, message in (
        ({"weight": 1.5}, "weight must be a fraction"),
        ({"slope": 0.0}, "slope must be"),
        ({"batch": 0}, "batch must be"),
        ({"corruption": 1.0}, "corruption must be"),
    ):
        with pytest.raises(SettingError, match=message):
            Autoencoding(*parts, torch.ones(3, 2), **wrong)
    with pytest.raises(SettingError, match="examples must be"):
        Autoencoding(*parts, torch.ones(3, dtype=torch.long))
    with pytest.raises(SettingError, match="layers must be a list"):
        ClassInvariance("1")
    with pytest.raises(SettingError, match="weight must be"):
        ClassInvariance(["1"], -1.0)
    seen = Seen(torch.tensor(0.0), None, None, torch.randn(3), {"1": torch.randn(3, 2)}, 0.0)
    with pytest.raises(SettingError, match="targets must be classes"):
        ClassInvariance(["1"])(seen)
