"""Loss and accuracy of a file in its own runtime."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spectrim.metrics.evaluate import evaluate
from spectrim.runtimes.readers import open_exported


def evaluate_exported(
    path: str | Path, data: Iterable[Any], loss: Callable[[Any, Any], Tensor], *, threads: int | None = None
) -> dict[str, float]:
    """Compute loss and accuracy of a file in its own runtime, as `evaluate` does for a model.

    Args:
        path: ONNX, int8 or float, or another format that `run_exported` reads.
        data: batches ``(inputs, target)``, see `evaluate`.
        loss: called as ``loss(output, target)``, gives the mean over the targets.
        threads: CPU threads of the runtime; its own choice when omitted.

    Raises:
        FormatError: the file is missing or cannot be read.
        SettingError: `data` does not hold such batches.
    """
    return evaluate(_Runtime(open_exported(path, threads)), data, loss)


class _Runtime(nn.Module):
    """A file in its own runtime, called like a model."""

    def __init__(self, run: Callable[[Any], list[Tensor]]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output, or a tuple of them."""
        outputs = self.run(kwargs or args)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
