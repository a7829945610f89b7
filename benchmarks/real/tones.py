"""Synthesised voices whose pitch is known, and how a network's pitch is compared with it."""

import math

import torch
from torch import Tensor

RATE = 16_000
HOP, WINDOW, BANDS = 160, 1024, 128
LOWEST, HIGHEST = 60.0, 800.0
"""Pitches in Hz, drawn evenly on a logarithmic scale: speech and singing."""

TOLERANCE = 50.0
"""Cents, half a semitone: a pitch that is nearer is right, the usual *raw pitch accuracy*."""


def voices(count: int, seed: int, seconds: float) -> tuple[Tensor, Tensor]:
    """Return sounds and their pitches: harmonics that fall off, a vibrato and a glide, and white noise.

    Args:
        count: how many.
        seed: of all that is drawn.
        seconds: of each.

    Returns:
        Samples ``(count, seconds * RATE)``, of variance 1 and a little noise, and the pitch in Hz at each sample.
    """
    g = torch.Generator().manual_seed(seed)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=g)

    time = torch.arange(round(seconds * RATE)) / RATE
    base = drawn(math.log2(LOWEST), math.log2(HIGHEST))
    bend = drawn(-0.5, 0.5) * time + drawn(0, 0.03) * torch.sin(2 * math.pi * (drawn(4, 7) * time + drawn(0, 1)))
    pitch = 2 ** (base + bend)
    turns = (pitch.double().cumsum(1) / RATE).remainder(1).float()
    sound, slope = torch.zeros_like(pitch), drawn(0.3, 2)
    for k in range(1, 31):
        loud = k**-slope * 10 ** (torch.randn(count, 1, generator=g) * 0.15)
        audible = k * pitch < 0.95 * RATE / 2
        sound += loud * audible * torch.sin(2 * math.pi * (k * turns + torch.rand(count, 1, generator=g)))
    sound = sound / sound.std(1, keepdim=True)
    noise = torch.randn(sound.shape, generator=g) * 10 ** (-drawn(10, 40) / 20)
    return sound + noise, pitch


def frames(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return single frames, of mean 0 and variance 1, and the pitch in the middle of each."""
    sound, pitch = voices(count, seed, WINDOW / RATE)
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True), pitch[:, WINDOW // 2]


def bands() -> Tensor:
    """Return triangles on Slaney's mel scale, each of area 1: (BANDS, WINDOW / 2 + 1)."""
    linear, knee, step = 200 / 3, 1000.0, math.log(6.4) / 27

    def hertz(mel: Tensor) -> Tensor:
        return torch.where(mel < knee / linear, mel * linear, knee * torch.exp(step * (mel - knee / linear)))

    top = knee / linear + math.log(RATE / 2 / knee) / step
    edges = hertz(torch.linspace(0, top, BANDS + 2, dtype=torch.float64))
    bins = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)).float()


def spectra(count: int, seed: int, steps: int = 64) -> tuple[Tensor, Tensor]:
    """Return log mel spectra ``(count, steps, BANDS)`` and the pitch in the middle of each step."""
    sound, pitch = voices(count, seed, (steps * HOP + WINDOW - HOP) / RATE)
    sound = 0.3 * sound / sound.abs().amax(1, keepdim=True)
    window = torch.hann_window(WINDOW)
    power = torch.stft(sound, WINDOW, HOP, window=window, center=False, return_complex=True).abs().square()
    mel = (bands() @ (power + 1e-9).sqrt()).clamp(min=1e-5).log().transpose(1, 2)
    middles = torch.arange(mel.shape[1]) * HOP + WINDOW // 2
    return mel, pitch[:, middles]


def cents(pitch: Tensor) -> Tensor:
    """Return a pitch in Hz as cents above 10 Hz."""
    return 1200 * torch.log2(pitch / 10)


def read(activations: Tensor, scale: Tensor) -> Tensor:
    """Return the pitch in cents that activations (..., 360) stand for: their mean around the largest, four to each side.

    Args:
        activations: >= 0.
        scale: cents of each activation.
    """
    best = activations.argmax(-1, keepdim=True)
    near = (best + torch.arange(-4, 5)).clamp(0, len(scale) - 1)
    weights = activations.gather(-1, near)
    return (weights * scale[near]).sum(-1) / weights.sum(-1).clamp(min=1e-12)


def accuracy(activations: Tensor, pitch: Tensor, scale: Tensor) -> float:
    """Return the share of pitches, in %, that are right within `TOLERANCE`."""
    return 100 * float(((read(activations, scale) - cents(pitch)).abs() <= TOLERANCE).double().mean())


CREPE_SCALE = 20.0 * torch.arange(360) + 1997.3794084376191
FCPE_SCALE = torch.linspace(float(cents(torch.tensor(32.7))), float(cents(torch.tensor(1975.5))), 360)
