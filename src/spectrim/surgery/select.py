"""Which layers are factorized, and why the others are not."""

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from spectrim.checks import WHERE, check
from spectrim.checks.messages import fail
from spectrim.errors import SettingError
from spectrim.forms.form import Form
from spectrim.layers import METHODS, is_factorized, kind_of
from spectrim.layers.reader import OWN_BASES, readable, why_not
from spectrim.protocols import LayerFilter, Where
from spectrim.surgery.exchange import HELD, held_elsewhere
from spectrim.surgery.head import head_of

HEAD = "the classifier head stays dense by default; name it in where= to include it"


OWN_FORWARD = "to factorize it, exchange it for the plain layer (with nn.ZeroPad2d before it, where it pads), or register a kind for it"


ADAPTED = "holds adapters of peft; call merge_and_unload() first"


def match(*patterns: str) -> LayerFilter:
    """Make a layer filter from globs over layer names; a pattern that starts with ``!`` excludes.

    Args:
        patterns: as for a shell: ``*`` matches anything, dots included. With exclusions alone, everything else is selected.

    Examples:
        >>> keep = match("layer*.conv*", "!layer1.*")
        >>> keep("layer2.0.conv1", nn.Identity()), keep("layer1.0.conv1", nn.Identity()), keep("fc", nn.Identity())
        (True, False, False)
    """
    check("match", patterns=patterns)
    include = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    exclude = [pattern[1:] for pattern in patterns if pattern.startswith("!")]

    def select(name: str, module: nn.Module) -> bool:
        return any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)

    return select


def layer_filter(where: Where | None, model: nn.Module | None = None, verb: str = "factorize") -> LayerFilter | None:
    """Return the predicate for the forms of ``where=``: a name, a glob, a list of these, or the predicate itself.

    A name selects that layer, or all layers in a module of that name; a glob, and a leading ``!``, count as in `match`.

    Args:
        where: in any of these forms; None stays None.
        model: gives the names; without it they are not checked.
        verb: that was called, for errors.

    Raises:
        SettingError: for a name or a glob that is in no layer's name.

    Examples:
        >>> keep = layer_filter(["encoder", "head"])
        >>> keep("encoder.0", nn.Identity()), keep("head", nn.Identity()), keep("decoder", nn.Identity())
        (True, True, False)
    """
    check(verb, where=where)
    if where is None:
        return None
    if not isinstance(where, str | Sequence | Set):
        return _guarded(where, verb)
    wanted = [where] if isinstance(where, str) else list(where)
    if model is not None:
        names = [name for name, _ in model.named_modules()]
        for pattern in wanted:
            if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in names):
                close = get_close_matches(pattern, names, 3, 0.4)
                hint = "close to it: " + ", ".join(map(repr, close)) if close else "coverage(model) lists the layers"
                raise SettingError(verb, "where", got=pattern, rule="names of layers, or globs over them", hint=hint)
    inside = [f"{'!' * pattern.startswith('!')}{pattern.removeprefix('!')}.*" for pattern in wanted if not pattern.endswith("*")]
    return match(*wanted, *inside)


def _guarded(where: LayerFilter, verb: str) -> LayerFilter:
    """Return a predicate whose failures name the layer on which it fails."""

    def select(name: str, module: nn.Module) -> bool:
        try:
            return bool(where(name, module))
        except Exception as error:  # whatever the caller's own code raises
            hint = f"it fails on layer '{name}' ({type(module).__name__}) with {type(error).__name__}: {error}"
            raise fail(verb, "where", where, WHERE, hint) from error

    return select


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters a module holds itself."""
    return {name: p for name, p in module._parameters.items() if p is not None}


def refusal(module: nn.Module) -> str | None:
    """Return why a dense module cannot be factorized, or None; its place in a model is ignored."""
    kind = type(module).__name__
    if "forward" in vars(module):
        return "its forward was replaced on this very layer"
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"under a parametrization ({names}); torch.nn.utils.parametrize.remove_parametrizations it first"
    if isinstance(module, LazyModuleMixin):
        return "lazy: its shape is not known yet; run the model once first"
    if is_quantized(module):
        return "quantized: factorize before quantizing"
    unusual = next((type(p).__name__ for p in own_parameters(module).values() if hasattr(type(p), "__tensor_flatten__")), None)
    if unusual:
        return f"its weight is a {unusual}: factorize before quantizing or sharding"
    found = kind_of(module)
    if found is None:
        base = next((k.__name__ for k in type(module).__mro__[1:] if kind_of_class(k)), None)
        if base:
            why = why_not(module) if isinstance(module, OWN_BASES) else None
            return f"{kind} is a {base} with another forward{f' ({why})' if why else ''}; {OWN_FORWARD}"
        if not own_parameters(module):
            return f"its tensors are buffers ({', '.join(own_matrices(module))}), which are not trained; factorize before quantizing"
        if all(p.dim() < 2 for p in own_parameters(module).values()):
            return f"{kind} has vectors only"
        if stacked := readable(module):
            return f"no factorized form for {kind}, whose matrices are stacked ({', '.join(stacked)}): {why_not(module)}"
        return f"no factorized form for {kind}"
    weights = [getattr(module, name) for name in found.weights(module)]
    if any(not isinstance(weight, nn.Parameter) for weight in weights):
        return "its weight is rewritten by a hook (weight norm, spectral norm or pruning); remove that first"
    if any(not weight.is_floating_point() for weight in weights):
        return f"weights of dtype {weights[0].dtype} are not real numbers"
    reason = found.refusal(module)
    if reason:
        return reason
    taken = sorted(found.taken_names(module))
    if taken:
        return f"has an attribute '{taken[0]}', a name that a factorized layer needs"
    folded = [
        found.fold(module, name, w.detach(), s).shape
        for name, w in zip(found.weights(module), weights, strict=True)
        for s in found.schemes(module)
    ]
    return "its matrix has rank 1 at most" if all(min(shape[-2:]) <= 1 for shape in folded) else None


def kind_of_class(kind: type) -> bool:
    """Whether a class is one of the dense kinds."""
    return any(kind in row.method.dense_kinds for row in METHODS)


def decide(
    model: nn.Module, where: Where | None = None, *, order: Sequence[str] | None = None, references: bool = False
) -> dict[str, str | None]:
    """Return for each parameterized layer, by its first name, None where it will be factorized, else the reason why not.

    Args:
        model: dense, or factorized in part (what is factorized already is left out).
        where: selects layers, see `layer_filter`; all but the classifier head when omitted.
        order: the layers in the order of their calls, see `call_order`: it says which one is the head.
        references: whether to look for weights that something outside the layers holds, too; that copies the model's objects, no tensors.
    """
    head = head_of(model, order) if where is None else None
    where = layer_filter(where)
    reasons: dict[str, str | None] = {}
    holders: dict[int, list[tuple[str, str]]] = defaultdict(list)
    inside: set[int] = set()  # modules that belong to a parametrization
    adapted = {id(part) for module in model.modules() if is_adapted(module) for part in module.modules()}
    for name, module in model.named_modules():
        parameters = own_parameters(module)
        for key, parameter in parameters.items():
            holders[id(parameter)].append((name, key))
        if parametrize.is_parametrized(module):
            inside.update(id(part) for part in cast(nn.Module, module.parametrizations).modules())
        if is_factorized(module) or isinstance(module, Form) or id(module) in inside or not (parameters or is_parameterised(module)):
            continue
        reason = ADAPTED if id(module) in adapted else refusal(module)
        if reason is None and name == head:
            reason = HEAD
        elif reason is None and where is not None and not where(name, module):
            reason = "not selected by where="
        reasons[name] = reason
    for name in held_elsewhere(model, [name for name, reason in reasons.items() if reason is None]) if references else ():
        reasons[name] = HELD
    settle_ties(model, reasons, holders)
    return reasons


def own_matrices(module: nn.Module) -> list[str]:
    """Return the buffers of a layer without children that could be weights: numbers with two axes at least."""
    buffers = {name: b for name, b in module._buffers.items() if b is not None and b.dim() > 1 and b.dtype is not torch.bool}
    return [] if module._modules else [name for name in buffers if name not in module._non_persistent_buffers_set]


def is_parameterised(module: nn.Module) -> bool:
    """Whether a module keeps weights in a way that `_parameters` does not show: parametrized, quantized or in buffers."""
    if own_matrices(module):
        return True
    packed = is_quantized(module) and any(hasattr(module, name) for name in ("weight", "get_weight"))
    return parametrize.is_parametrized(module) or packed


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a wrapper of peft around a layer: it reads and rewrites that layer's dense weight."""
    names = ("BaseTunerLayer", "AuxiliaryTrainingWrapper")
    return any(kind.__name__ in names and kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is one of torch's quantized layers."""
    return type(module).__module__.startswith("torch.ao.") and ".quantized" in type(module).__module__


def settle_ties(model: nn.Module, reasons: dict[str, str | None], holders: Mapping[int, list[tuple[str, str]]]) -> None:
    """Skip a layer whose weight is tied to one that stays dense or that folds it otherwise; repeated until nothing changes."""
    modules = dict(model.named_modules())

    def role(name: str, key: str) -> object:
        """What a holder does with the tensor: None unless it is a weight that will be factorized; else how it is folded."""
        kind = kind_of(modules[name]) if reasons.get(name, "") is None else None
        if kind is None or key not in kind.weights(modules[name]):
            return None
        matrix = kind.fold(modules[name], key, getattr(modules[name], key).detach(), "channel")
        return (tuple(matrix.shape), matrix.stride(), getattr(modules[name], "transposed", False), kind.schemes(modules[name]))

    changed = True
    while changed:
        changed = False
        for tied in (names for names in holders.values() if len(names) > 1):
            roles = {holder: role(*holder) for holder in tied}
            if len(set(roles.values())) == 1:
                continue
            dense = next((holder[0] for holder in tied if roles[holder] is None), tied[0][0])
            for name, _ in tied:
                if reasons.get(name, "") is None:
                    reasons[name] = f"its weight is tied to '{dense}', which " + (
                        "stays dense" if roles[(dense, _key(tied, dense))] is None else "folds it otherwise"
                    )
                    changed = True


def _key(tied: list[tuple[str, str]], name: str) -> str:
    return next(key for holder, key in tied if holder == name)
