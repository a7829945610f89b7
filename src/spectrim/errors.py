"""Error classes that write their message: the layer, the rule, the value given, what to try."""


class SpectrimError(ValueError):
    """Base of every error that spectrim raises for bad input; a `ValueError`."""


class RankError(SpectrimError):
    """A rank outside ``[1, full]``, or above the number of singular values that a cut layer still holds.

    Examples:
        >>> print(RankError("layer3.0.conv1", got=80, out=64, in_=576))
        layer 'layer3.0.conv1' (64 x 576): rank must be in [1, 64], got 80
    """

    def __init__(self, layer: str, *, got: object, out: int, in_: int, held: int | tuple[int, ...] | None = None) -> None:
        full = min(out, in_)
        least = f"[1, {full}]" if held in (None, full) else f"[1, {held}] ({held} of {full} singular values are left)"
        if isinstance(held, tuple):
            least = f"a number of at least 1, or one for each axis up to {held}"
            super().__init__(f"layer '{layer}' ({out} x {in_}): size must be {least}, got {got!r}")
            return
        super().__init__(f"layer '{layer}' ({out} x {in_}): rank must be in {least}, got {got!r}")


class SettingError(SpectrimError):
    """A setting outside its allowed range.

    Examples:
        >>> print(SettingError("Energy", "keep", got=90, rule="a fraction in (0, 1]", hint="for 90 % write keep=0.9"))
        Energy: keep must be a fraction in (0, 1], got 90; for 90 % write keep=0.9
    """

    def __init__(self, owner: str, field: str, *, got: object, rule: str, hint: str = "") -> None:
        self.field, self.got, self.rule = field, got, rule
        super().__init__(f"{owner}: {field} must be {rule}, got {got!r}" + (f"; {hint}" if hint else ""))


class LayerError(SpectrimError):
    """A layer that does not support an operation.

    Attributes:
        layer: its name.

    Examples:
        >>> print(LayerError("head", "is not a factorized layer", hint="call factorize(model) first"))
        layer 'head': is not a factorized layer; call factorize(model) first
    """

    def __init__(self, layer: str, problem: str, *, hint: str = "") -> None:
        self.layer = layer
        super().__init__(f"layer '{layer}': {problem}" + (f"; {hint}" if hint else ""))


class BackwardError(LayerError):
    """A loss cannot be differentiated in eval mode."""


class FormatError(SpectrimError):
    """A file or folder that is truncated, altered, foreign or missing."""

    def __init__(self, path: object, problem: str, *, hint: str = "") -> None:
        super().__init__(f"{path}: {problem}" + (f"; {hint}" if hint else ""))


class WriteError(SpectrimError, OSError):
    """A file or folder that cannot be written: the path, the cause, what to try; an `OSError`, too.

    Examples:
        >>> print(WriteError("runs/a", "cannot be written: No space left on device", hint="free some space"))
        runs/a: cannot be written: No space left on device; free some space
    """

    def __init__(self, path: object, problem: str, *, hint: str = "", errno: int | None = None) -> None:
        super().__init__(f"{path}: {problem}" + (f"; {hint}" if hint else ""))
        self.errno = errno


class UsageError(SpectrimError):
    """A call of the command line that cannot run: the command or option, what is wrong with it, what is allowed.

    Examples:
        >>> print(UsageError("--macs", "got '1.5'", allowed="fractions kept, in (0, 1]"))
        --macs: got '1.5'; allowed: fractions kept, in (0, 1]
    """

    def __init__(self, what: str, problem: str, *, allowed: str = "") -> None:
        super().__init__(f"{what}: {problem}" + (f"; allowed: {allowed}" if allowed else ""))


class RecipeError(UsageError):
    """A recipe that cannot run: the key, the value given, what is allowed."""

    def __init__(self, key: str, problem: str, *, allowed: str = "") -> None:
        super().__init__(f"recipe key '{key}'", problem, allowed=allowed)


class ExportError(SpectrimError):
    """A model that cannot be written in a format, or whose file computes something else: operator, layer, reason, what to try.

    Attributes:
        format: that was asked for.
        problem: in words.
        operator: that failed; empty where unknown.
        layer: it belongs to, as `named_modules` calls it; empty where unknown.
        hint: what to try.

    Examples:
        >>> print(ExportError("onnx", "has no ONNX form", operator="aten.linalg_eig.default", layer="head", hint="compute it outside"))
        export to onnx: operator aten.linalg_eig.default in layer 'head': has no ONNX form; compute it outside
    """

    def __init__(self, format: str, problem: str, *, operator: str = "", layer: str = "", hint: str = "") -> None:
        self.format, self.problem, self.operator, self.layer, self.hint = format, problem, operator, layer, hint
        where = " in ".join(part for part in (operator and f"operator {operator}", layer and f"layer '{layer}'") if part)
        super().__init__(f"export to {format}: {where and where + ': '}{problem}" + (f"; {hint}" if hint else ""))


class DivergedError(RuntimeError):
    """Training produced values that are not finite: which, the step, the layer with the largest gradient, the last good checkpoint."""

    def __init__(
        self, what: str, *, epoch: int, step: int, layer: str, grad_norm: float, checkpoint: object | None, half: bool = False
    ) -> None:
        where = f"last good checkpoint: {checkpoint}" if checkpoint else "no checkpoint was written (pass checkpoint=FOLDER)"
        advice = "a lower learning rate, Tuning(clip=1.0) or weaker penalties"
        if half:
            advice = "float32 or bfloat16 parameters, since float16 ones under- and overflow in an optimizer (mixed precision does not)"
        super().__init__(
            f"{what} at step {step} (epoch {epoch}); the largest gradient before it was in "
            f"'{layer}' (norm {grad_norm:.3g}); {where}; try {advice}"
        )
