"""From plain data to the sections of a recipe."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from spectrim.errors import RecipeError
from spectrim.pipeline.components import IMPORTED, Component, _guard
from spectrim.pipeline.reading import parsed_yaml, shown


def parsed(kind: Any, value: Any, key: str) -> Any:
    """Turn plain data into a value of one of the types that a recipe's fields have."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        kind = next(arg for arg in args if arg is not NoneType)
        return None if value is None else parsed(kind, value, key)
    if is_dataclass(kind):
        return _parsed_section(kind, value, key)
    if kind == Component and isinstance(value, str):
        return {"class_path": value}
    if origin is dict and isinstance(value, Mapping):
        return {str(name): entry if args[1] is Any else parsed(args[1], entry, f"{key}.{name}") for name, entry in value.items()}
    if origin is list and isinstance(value, list):
        return [parsed(args[0], entry, f"{key}.{index}") for index, entry in enumerate(value)]
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(parsed(args[0], entry, f"{key}.{index}") for index, entry in enumerate(value))
    if origin is Literal:
        value = "no" if value is False else value  # YAML reads a bare no as false
        if value in args:
            return value
    if kind in (int, str) and isinstance(value, kind) and not isinstance(value, bool):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)  # YAML reads 1e-3 as a string
    names = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
        list: "a list",
        tuple: "a list",
        dict: "a mapping",
    }
    allowed = ", ".join(map(str, args)) if origin is Literal else IMPORTED if kind == Component else names[origin or kind]
    raise RecipeError(key, f"got {shown(value)}", allowed=allowed)


def _parsed_section(kind: Any, value: Any, key: str) -> Any:
    known = {entry.name: entry for entry in fields(kind)}
    allowed = ", ".join(known)
    if not isinstance(value, Mapping):
        raise RecipeError(key or "(recipe)", f"got {shown(value)}", allowed=f"a mapping with {allowed}")
    dotted = {name: f"{key}.{name}".removeprefix(".") for name in (*value, *known)}
    for name in value:
        if name not in known:
            raise RecipeError(dotted[name], "unknown key", allowed=allowed)
    for name, entry in known.items():
        if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
            raise RecipeError(dotted[name], "is missing", allowed=IMPORTED)
    hints = get_type_hints(kind)
    arguments = {name: parsed(hints[name], entry, dotted[name]) for name, entry in value.items()}
    return _guard(key, partial(kind, **arguments))


def apply_change(raw: dict[str, Any], change: str) -> None:
    """Apply one ``key=value``."""
    key, equals, text = change.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(change, "is not a change", allowed="KEY=VALUE, for example train.0.epochs=3")
    value = parsed_yaml(text, key)
    node: Any = raw
    parts = key.split(".")
    for depth, part in enumerate(parts):
        path, last = ".".join(parts[: depth + 1]), depth + 1 == len(parts)
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise RecipeError(path, "no such entry", allowed=f"0 to {len(node) - 1}" if node else "nothing, the list is empty")
            place: Any = int(part)
        elif isinstance(node, dict):
            place = next((name for name in node if str(name) == part), part)
            node.setdefault(place, None)
        else:
            raise RecipeError(path, f"cannot be set inside {shown(node)}", allowed="a key of a mapping or a list")
        if last:
            node[place] = value
        elif isinstance(node[place], str):
            node[place] = {"class_path": node[place]}
        elif node[place] is None:
            node[place] = {}
        node = node[place]


def plain(value: Any) -> Any:
    """Return dataclasses as plain data for JSON and YAML."""
    return json.loads(json.dumps(asdict(value) if hasattr(value, "__dataclass_fields__") else value, default=lambda node: asdict(node)))
