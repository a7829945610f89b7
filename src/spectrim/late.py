"""Calls something once another package is imported, without importing it."""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Finder(MetaPathFinder):
    """Finds one module as Python does, once, with a call after it has run."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        found = find_spec(fullname)
        if found is not None and found.loader is not None:
            run = found.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self.then()

            found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found


def when_imported(name: str, then: Callable[[], object]) -> None:
    """Call a function once a module has been imported: at once where it has been, never where nobody imports it.

    Args:
        name: of the module.
        then: called without arguments, once.

    Examples:
        >>> when_imported("json", lambda: print("there"))
        there
    """
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Finder(name, then))
