"""Factorized convolutions in one, two and three dimensions, plain and transposed."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectrim import linalg
from spectrim.forms.form import Form
from spectrim.layers.exchanged import Share
from spectrim.layers.forwards import bare
from spectrim.layers.geometry import (
    CHANNELS_LAST,
    TRANSPOSED,
    Piece,
    chain,
    chain_macs,
    channels_of,
    convolve,
    groups_of,
    kernels_of_pair,
    length_of,
    memory_format_of,
    owners_of,
    whole,
)
from spectrim.layers.patches import Patches
from spectrim.layers.uses import Features, first_argument
from spectrim.linalg.fold import KERNELS, Fold, folds
from spectrim.plain.chain import PlainPair


class FactorizedConv(Patches):
    """A convolution whose folded kernel is ``U diag(S) Vh``; with groups, block by block at one common rank.

    Source: Yang et al., arXiv 2004.09031, section 3.1; transposed forms and groups follow from the same folding.
    """

    channels_last: bool = False

    @classmethod
    def adopt(cls, dense: Any, factors: Mapping[str, Form], scheme: Fold) -> Any:
        """Take over a dense convolution in place, the memory format of its kernel included."""
        channels_last = memory_format_of(dense.weight) is not torch.contiguous_format  # the format itself cannot be pickled
        layer = super().adopt(dense, factors, scheme)
        layer.__dict__["channels_last"] = channels_last
        return layer

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        """Refuse depthwise kernels: each block has a single input channel."""
        if module.groups > 1 and module.groups == module.in_channels:
            return "depthwise: each block has one input channel, so there is no rank to cut"
        return None

    @classmethod
    def schemes(cls, module: Any) -> tuple[Fold, ...]:
        """Those that differ: one for a kernel of one tap; without groups also ``tucker`` and ``cp``, and ``tt`` for two axes with taps."""
        found = folds(module.kernel_size)
        kernels = KERNELS[: len(found)] if module.groups == 1 and len(found) > 1 else ()  # along one axis a train is Tucker's
        return (*found, *kernels)

    @classmethod
    def fold(cls, module: Any, name: str, weight: Tensor, scheme: Fold) -> Tensor:
        """Fold the kernel, see `linalg.to_matrix`."""
        return linalg.to_matrix(weight, scheme, module.groups, module.transposed)

    @classmethod
    def unfold(cls, module: Any, name: str, matrix: Tensor, scheme: Fold) -> Tensor:
        """Unfold the kernel, see `linalg.from_matrix`."""
        out, in_ = module.out_channels, module.in_channels
        lead = (in_, out // module.groups) if module.transposed else (out, in_ // module.groups)
        return linalg.from_matrix(matrix, (*lead, *module.kernel_size), scheme, module.groups, module.transposed)

    @classmethod
    def work(cls, module: Any, name: str, scheme: Fold, size: Any, shape: Sequence[int] | None) -> float:
        """Multiply-accumulates of one convolution, or of those of a size, see `chain_macs`."""
        if size is None:
            return chain_macs(module, (0,) * len(module.kernel_size), (module.in_channels, module.out_channels), shape)
        return chain_macs(module, owners_of(module, scheme), channels_of(module, scheme, size), shape, groups_of(module, scheme, size))

    @classmethod
    def interpolated_kind(cls, module: Any, scheme: Fold) -> str | None:
        """Whole output channels can be kept where the fold has no taps on the output side, input channels where it has all of them."""
        return {"channel": "convolution", "input": "channels first"}.get(scheme)

    @classmethod
    def interpolated_work(cls, module: Any, scheme: Fold, rank: int, shape: Sequence[int] | None) -> float:
        """Multiply-accumulates of the convolution of kept channels and of the one of kernel size one for the others."""
        in_, out, kept = module.in_channels, module.out_channels, module.groups * rank
        channels = (in_, kept, out - kept) if scheme == "channel" else (in_ - kept, kept, out)
        return chain_macs(module, owners_of(module, scheme), channels, shape)

    def _pieces(self) -> tuple[Piece, ...]:
        """Return the geometry of the operations."""
        return chain(self, owners_of(self, self.scheme), length_of(self, self.scheme))

    def _kernels(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Reshape the form's chain to the kernels of the operations, in the memory format that the dense kernel had."""
        factors, pieces = self.factors_of("weight"), self._pieces()
        if self.scheme in KERNELS:
            return tuple([self._laid_out_as(*each) for each in zip(parts, pieces, self._groups(), strict=True)])
        right, left = parts
        return tuple([self.laid_out(kernel) for kernel in kernels_of_pair(self, right, left, factors.blocks, pieces)])

    def _groups(self) -> tuple[int, ...]:
        return groups_of(self, self.scheme, self.factors_of("weight").plain_size)

    def _laid_out_as(self, part: Tensor, piece: Piece, groups: int) -> Tensor:
        kernel = part.reshape(*part.shape[:2], *piece.settings["kernel_size"])
        return self.laid_out(kernel.transpose(0, 1) if piece.kind in TRANSPOSED and groups == 1 else kernel)

    def forward(self, input: Tensor, *output: Any, **options: Any) -> Tensor:
        """Convolve ``(batch, in, size...)`` or ``(in, size...)``; a transposed convolution takes ``output_size`` too, as torch's does."""
        module: Any = self
        wants_size = any(value is not None for value in (*output, *options.values()))
        if wants_size:
            dense: Any = super()
            return cast(Tensor, dense.forward(input, *output, **options))
        factors = self.factors_of("weight")
        rounds = factors.rounds and not module.transposed
        if not factors.splits or (not rounds and self.composes("weight", input.shape)):
            operation = partial(convolve, bias=module.bias, piece=whole(self), groups=module.groups)

            def dense_operation(weight: Tensor) -> Tensor:
                return factors.run(0, operation, input, weight) if rounds else operation(input, weight)

            return self.run_dense("weight", input.shape, dense_operation)
        pieces = self._pieces()
        kernels = self._kernels(*factors.chain())
        for index, (kernel, piece, groups) in enumerate(zip(kernels, pieces, self._groups(), strict=True)):
            bias = module.bias if index == len(pieces) - 1 else None
            operation = partial(convolve, bias=bias, piece=piece, groups=groups)
            input = factors.run(index, operation, input, kernel) if rounds else operation(input, kernel)
        return input

    def why_untimed(self, name: str, eager: bool) -> str:
        """A table times pairs of operations."""
        form = self.factors_of(name)
        return super().why_untimed(name, eager) if form.is_matrix else f"{form.called} is no pair of operations"

    def features_read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Features]:
        """The input's features are the weight's columns."""
        if args or kwargs:
            yield from self._features_at("columns", first_argument(args, kwargs))

    def features_written(self, output: Any) -> Iterator[Features]:
        """The output's features are the weight's rows."""
        yield from self._features_at("rows", output)

    def laid_out(self, weight: Tensor) -> Tensor:
        """Return a kernel in the memory format that the dense layer had."""
        return weight.contiguous(memory_format=CHANNELS_LAST[weight.dim()] if self.channels_last else torch.contiguous_format)

    def split(self, share: Share, paying: Collection[str]) -> nn.Module | None:
        """Convolutions through the ranks of the form, the bias in the last; or two that hold channels and mix the others."""
        if "weight" not in paying:
            return None
        if (written := self.interpolated(share)) is not None:
            return written
        module: Any = self
        factors: Any = self.factors_of("weight")
        kernels = self._kernels(*factors.written())
        channels, groups = channels_of(self, self.scheme, factors.plain_size), self._groups()
        made: list[Any] = []
        for index, piece in enumerate(self._pieces()):
            biased = index == len(kernels) - 1 and module.bias is not None
            common = {"groups": groups[index], "bias": biased, "padding_mode": piece.padding_mode}
            made.append(bare(piece.kind, channels[index], channels[index + 1], **piece.settings, **common))
            made[-1].weight = share(factors, f"operation {index}", kernels[index])
        if module.bias is not None:
            made[-1].bias = module.bias
        chained: nn.Module = reduce(lambda behind, before: PlainPair(before, behind), reversed(made))
        return chained


class FactorizedConv1d(FactorizedConv, nn.Conv1d):
    """Factorized `torch.nn.Conv1d`."""

    dense_kinds = (nn.Conv1d,)


class FactorizedConv2d(FactorizedConv, nn.Conv2d):
    """Factorized `torch.nn.Conv2d`."""

    dense_kinds = (nn.Conv2d,)


class FactorizedConv3d(FactorizedConv, nn.Conv3d):
    """Factorized `torch.nn.Conv3d`."""

    dense_kinds = (nn.Conv3d,)


class FactorizedConvTranspose1d(FactorizedConv, nn.ConvTranspose1d):
    """Factorized `torch.nn.ConvTranspose1d`."""

    dense_kinds = (nn.ConvTranspose1d,)


class FactorizedConvTranspose2d(FactorizedConv, nn.ConvTranspose2d):
    """Factorized `torch.nn.ConvTranspose2d`."""

    dense_kinds = (nn.ConvTranspose2d,)


class FactorizedConvTranspose3d(FactorizedConv, nn.ConvTranspose3d):
    """Factorized `torch.nn.ConvTranspose3d`."""

    dense_kinds = (nn.ConvTranspose3d,)
