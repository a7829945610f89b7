"""Approximations keep to their numbers, improve with them, and are what each decomposition says."""

import pytest
import torch

from spectrim.analysis.images import compress_image, numbers_per_rank
from spectrim.errors import SettingError


def picture() -> torch.Tensor:
    torch.manual_seed(3)
    x, y = torch.linspace(0, 3, 24), torch.linspace(0, 2, 16)[:, None]
    return torch.stack([torch.sin(x * y + phase) for phase in (0.0, 0.4, 0.9)]) * 0.4 + 0.5 + 0.01 * torch.randn(3, 16, 24)


@pytest.mark.parametrize("way", ["quaternion", "randomized", "channels", "stacked"])
def test_each_way_keeps_to_its_numbers_and_improves_with_them(way: str) -> None:
    image, found = picture(), []
    for numbers in (320, 640, 1300):
        made = compress_image(image, numbers, way)  # type: ignore[arg-type]
        assert made.numbers <= numbers < made.numbers + numbers_per_rank(16, 24, way)  # type: ignore[arg-type]
        assert made.image.shape == image.shape
        found.append(made.psnr(image))
    assert found == sorted(found)
    assert found[-1] > 20


def test_channels_are_truncated_one_by_one_and_full_rank_is_exact() -> None:
    image = picture()
    made = compress_image(image, 2 * numbers_per_rank(16, 24, "channels"), "channels")
    for channel, approximation in zip(image.double(), made.image, strict=True):
        values = torch.linalg.svdvals(channel)
        assert float((channel - approximation).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-9)
    for way in ("quaternion", "channels", "stacked"):
        torch.testing.assert_close(compress_image(image, 10**9, way).image, image.double())  # type: ignore[arg-type]


def test_a_grey_image_is_one_matrix_for_all() -> None:
    """Equal channels: the quaternion matrix is ``(i + j + k)`` times the grey one, so that equal ranks are equal images."""
    grey = picture()[0].expand(3, -1, -1)
    quaternion = compress_image(grey, 3 * numbers_per_rank(16, 24, "quaternion"))
    channels = compress_image(grey, 3 * numbers_per_rank(16, 24, "channels"), "channels")
    assert quaternion.rank == channels.rank == 3
    torch.testing.assert_close(quaternion.image, channels.image)


def test_what_is_no_color_image_is_refused() -> None:
    with pytest.raises(SettingError, match=r"image must be \(3, height, width\)"):
        compress_image(torch.zeros(1, 4, 4), 100)
    with pytest.raises(SettingError, match="at least 32"):
        compress_image(torch.zeros(3, 4, 4), 10)
