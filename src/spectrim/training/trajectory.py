"""`Trajectory`: samples of a network's parameters while it trains, and the directions in which they moved."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from spectrim.checks import check, unwrapped
from spectrim.errors import LayerError, SettingError
from spectrim.linalg.principal import centered_gram, principal_axes, principal_directions
from spectrim.training.basis import Basis, Layout, check_shapes, layout_of, trained
from spectrim.training.gauge import jumps
from spectrim.training.samples import InMemory, OnDisk, Samples

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Trajectory:
    """Samples of all parameters that train, taken while a network trains, and a `Basis` of the directions in which they moved.

    A callback for ``fit(..., callbacks=[trajectory])``, one sample an epoch; `Sampling` takes more; in another loop call `record`. The
    first sample is kept whole, the others as differences to it. Buffers, such as the statistics of BatchNorm, are not part of it.

    Samples take ``samples x parameters`` numbers. Their Gram matrix is computed a range of parameters at a time, in float64.

    Of factors the sides and values are sampled as they are. That needs components that keep their places: training does, but a cut,
    `in_order` or a decomposition between two samples sorts them. Where a component took another one's place or changed its sign a
    warning names the weight, and `basis` refuses samples from both sides of it.

    Args:
        folder: keeps the samples in files there, mapped into memory when they are read; one that holds samples of the same parameters
            goes on. In memory when omitted: then a killed run has lost them.
        dtype: of the differences: float32, float64, bfloat16 or float16.

    Raises:
        FormatError: for a folder that is damaged or of another network, when the first sample is taken or `open` is called.
        SettingError: for another dtype.

    Examples:
        >>> model = nn.Linear(3, 1)
        >>> trajectory, optimizer = Trajectory(), torch.optim.SGD(model.parameters(), 0.1)
        >>> for _ in range(5):
        ...     trajectory.record(model)
        ...     model(torch.randn(8, 3)).square().mean().backward()
        ...     optimizer.step()
        >>> basis = trajectory.basis(2)
        >>> basis.size, basis.defect < 1e-6
        (2, True)

    Source: Li et al., "Low dimensional trajectory hypothesis is true: DNNs can be trained in tiny subspaces", TPAMI 2022.
    """

    def __init__(self, folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in DTYPES:
            raise SettingError("Trajectory", "dtype", got=dtype, rule="float32, float64, bfloat16 or float16")
        self.folder, self.dtype = None if folder is None else Path(folder), dtype
        self.layout: Layout = ()
        self._samples: Samples = InMemory(dtype)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def open(self, model: nn.Module) -> "Trajectory":
        """Begin, or go on with what the folder holds; the first `record` does so by itself.

        Args:
            model: whose parameters are sampled; it is left as it is.
        """
        check("Trajectory.open", model=model)
        self._open(trained(model, "Trajectory.open"))
        return self

    def _open(self, parameters: Mapping[str, nn.Parameter]) -> None:
        if self.layout:
            check_shapes(self.layout, list(parameters.values()), "Trajectory")
            return
        layout = layout_of(dict(parameters))
        if self.folder is not None:
            if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                hint = "keep samples in memory, or give each process its own folder and call record without a process group"
                raise SettingError("Trajectory", "folder", got=str(self.folder), rule="None with several processes", hint=hint)
            whole = torch.promote_types(_whole(parameters.values()), self.dtype)
            self._samples = OnDisk(self.folder, self.dtype, layout, sum(p.numel() for p in parameters.values()), whole)
        self.layout = layout

    @property
    def jumps(self) -> dict[int, list[str]]:
        """Samples before which components changed places, and the names of these weights."""
        return {index: note["jumped"] for index, note in enumerate(self._samples.notes) if note["jumped"]}

    @torch.no_grad()
    def record(self, model: nn.Module, *, epoch: int | None = None) -> None:
        """Take a sample.

        Args:
            model: dense or factorized; the same parameters train in every sample.
            epoch: number of finished epochs; a resumed run that comes back to it replaces its sample and all behind it.

        Raises:
            LayerError: for a parameter that is not finite, or was cut since the first sample.
            WriteError: the folder cannot be written.
        """
        check("Trajectory.record", model=model)
        parameters = trained(model, "Trajectory.record")
        self._open(parameters)
        for name, parameter in parameters.items():
            if not bool(torch.isfinite(parameter).all()):
                raise LayerError(name, "has values that are not finite", hint="see where training diverged, and begin before that")
        again = [index for index, note in enumerate(self._samples.notes) if epoch is not None and note["epoch"] == epoch]
        if again:
            self.keep(again[0])
        jumped = self._jumped(model, parameters) if len(self) else []
        whole = torch.promote_types(_whole(parameters.values()), self.dtype)
        vector = torch.cat([p.detach().reshape(-1).to("cpu", whole) for p in parameters.values()])
        self._samples.append(vector, {"epoch": epoch, "jumped": jumped})

    def __call__(self, epoch: int, metrics: dict[str, float], model: nn.Module) -> None:
        """Take a sample at the end of an epoch, see `EpochCallback`.

        Args:
            epoch: number of finished epochs.
            metrics: not used.
            model: is sampled.
        """
        self.record(model, epoch=epoch)

    def keep(self, count: int) -> None:
        """Forget all samples behind the first `count`."""
        self._samples.keep(count)

    @torch.no_grad()
    def restore(self, model: nn.Module, index: int = 0) -> None:
        """Write a sample into the parameters of a model; buffers stay as they are.

        Args:
            model: of the same parameters.
            index: of the sample, from -len to len - 1. The first one is exact, others are up to the rounding of their difference.
        """
        check("Trajectory.restore", model=model)
        parameters = trained(model, "Trajectory.restore")
        index = self._index(index)
        check_shapes(self.layout, list(parameters.values()), "Trajectory.restore")
        for parameter, values in zip(parameters.values(), self._split(self._vector(index)), strict=True):
            parameter.copy_(values)

    def basis(self, size: int | float, first: int = 0, last: int | None = None, dtype: torch.dtype = torch.float32) -> Basis:
        """Return the directions of largest variance of the samples around their mean.

        ``P = V^T (W - mean) / sqrt(lambda)`` for the eigenvectors ``V`` and values ``lambda`` of the small Gram matrix.

        Args:
            size: number of directions, from 1 to the number of samples less one; or the share of the variance that they keep at least, a
                float in (0, 1).
            first: index of the first sample to use.
            last: index behind the last one; all when omitted.
            dtype: of the directions.

        Raises:
            LayerError: where components of factors jumped within these samples.
            SettingError: for a size that the samples do not span.
        """
        used = range(len(self))[first:last]
        if len(used) < 2:
            raise SettingError("Trajectory.basis", "samples", got=len(used), rule="at least 2", hint="call record while training")
        self._refuse_jumps(used)
        width = sum(torch.Size(shape).numel() for _, shape in self.layout)

        def columns(start: int, end: int) -> Tensor:
            return torch.stack([self._samples.differences(index, start, end) for index in used])

        variances, axes = principal_axes(centered_gram(columns, len(used), width))
        size = _size(size, variances)
        directions = principal_directions(columns, axes[:, :size], variances[:size], width, dtype)
        return Basis(directions, variances[:size], self.layout, float(variances.sum()))

    def _vector(self, index: int) -> Tensor:
        first = self._samples.first()
        return first + self._samples.differences(index, 0, len(first)).to(first.dtype) if index else first

    def _split(self, vector: Tensor) -> list[Tensor]:
        sizes = [torch.Size(shape).numel() for _, shape in self.layout]
        return [part.view(shape) for part, (_, shape) in zip(torch.split(vector, sizes), self.layout, strict=True)]

    def _index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise SettingError("Trajectory", "index", got=index, rule=f"of one of the {len(self)} samples")
        return range(len(self))[index]

    def _jumped(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Compare factors with the sample before; warn, and return the names of those whose components changed places."""
        before = zip(parameters.values(), self._split(self._vector(len(self) - 1)), strict=True)
        found = jumps(unwrapped(model), {id(parameter): values for parameter, values in before})
        if found:
            what = f"Trajectory: components of {', '.join(found)[:200]} changed places before sample {len(self)}"
            warnings.warn(f"{what}; sort and cut factors before the first sample, and take a basis from samples of one side", stacklevel=4)
        return found

    def _refuse_jumps(self, used: range) -> None:
        """Raise a LayerError where components jumped within the samples."""
        within = {index: names for index, names in self.jumps.items() if used[0] < index <= used[-1]}
        if within:
            last = max(within)
            problem = f"has components that changed places before sample {last}"
            raise LayerError(within[last][0], problem, hint=f"basis(size, first={last}) takes the samples from there on")


def _whole(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    """Return the dtype in which the first sample is whole: float64 where a parameter is of it, else float32."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32


def _size(size: int | float, variances: Tensor) -> int:
    """Return a number of directions from a number or a share."""
    if isinstance(size, float):
        if not 0 < size < 1:
            raise SettingError("Trajectory.basis", "size", got=size, rule="an integer, or a share of the variance in (0, 1)")
        shares = variances.cumsum(0) / variances.sum()
        return min(len(variances), 1 + int((shares < size).sum()))
    if isinstance(size, bool) or not 1 <= size <= len(variances):
        rule = f"from 1 to {len(variances)}, the number of directions in which the samples differ"
        raise SettingError("Trajectory.basis", "size", got=size, rule=rule, hint="take more samples for a larger one")
    return size
