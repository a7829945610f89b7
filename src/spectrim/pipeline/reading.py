"""YAML, read with bounds on what it may expand to."""

import reprlib
from pathlib import Path
from typing import Any

import yaml

from spectrim.errors import RecipeError, UsageError

BYTES = 1 << 20
"""Largest recipe, in bytes."""

NODES = 20_000
"""Most values of a recipe, with those that aliases repeat."""

DIGITS = 400
"""Most digits of a number: reading one takes time with the square of them."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
_SHORT.maxdict = _SHORT.maxlist = 6


def shown(value: Any) -> str:
    """Return a value for an error message, cut short where it is long or deep.

    Examples:
        >>> shown({"class_path": 3}), len(shown([["x" * 1000] * 1000] * 1000)) < 5000
        ("{'class_path': 3}", True)
    """
    return _SHORT.repr(value)


def parsed_yaml(text: str, key: str) -> Any:
    """Return what a YAML text holds, as plain data.

    Args:
        text: of a file or of a value.
        key: what an error names.

    Raises:
        RecipeError: it is not YAML, or its aliases expand to more than `NODES` values.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _expanded(root, key, {}, set())
        return yaml.safe_load(text)
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise RecipeError(key, f"got {shown(text)}, which is not YAML: {' '.join(str(error).split())[:300]}") from error
    except RecursionError as error:
        raise RecipeError(key, "is not YAML that can be read: it is nested too deep") from error


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds; see `parsed_yaml`."""
    if path.stat().st_size > BYTES:
        raise UsageError(str(path), f"is too large for a recipe ({path.stat().st_size:,} bytes)", allowed=f"{BYTES:,} bytes at most")
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise UsageError(str(path), f"is not YAML: {error}") from error
    return parsed_yaml(text, str(path))


def _check_keys(node: yaml.MappingNode, key: str) -> None:
    """Raise for a key that stands twice in a mapping, of which YAML would take the last one."""
    seen = set[tuple[str, str]]()
    for name, _ in node.value:
        if isinstance(name, yaml.ScalarNode) and (name.tag, name.value) in seen:
            raise RecipeError(key, f"holds {name.value!r} twice, again in line {name.start_mark.line + 1}", allowed="each key once")
        if isinstance(name, yaml.ScalarNode):
            seen.add((name.tag, name.value))


def _expanded(node: Any, key: str, known: dict[int, int], above: set[int]) -> int:
    """Return the number of values of a node, with those of its aliases as often as they stand there."""
    if id(node) in above:
        raise RecipeError(key, "holds an alias of a value that contains it", allowed="values without a cycle")
    if id(node) in known:
        return known[id(node)]
    above.add(id(node))
    if isinstance(node, yaml.ScalarNode) and len(node.value) > DIGITS and node.tag.endswith((":int", ":float")):
        raise RecipeError(key, f"holds a number of {len(node.value):,} digits", allowed=f"{DIGITS} digits at most")
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, key)
    count = 1
    for part in parts:
        count += sum(_expanded(one, key, known, above) for one in (part if isinstance(part, tuple) else (part,)))
        if count > NODES:
            raise RecipeError(key, "expands to too many values by its aliases", allowed=f"{NODES:,} at most")
    above.discard(id(node))
    known[id(node)] = count
    return count
