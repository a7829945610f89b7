"""Scripts of the benchmarks called in this process, which has imported torch."""

import os
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def own() -> dict[str, ModuleType]:
    """Take the modules of the benchmarks out of those that are imported; some in different folders share a name."""
    names = [name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(str(BENCHMARKS))]
    return {name: sys.modules.pop(name) for name in names}


def error_of(script: str, *arguments: str) -> str:
    """Call a script as ``python script arguments`` does; return why it failed, nothing where it succeeded."""
    path = BENCHMARKS / script
    before, code = own(), None
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        patch.setattr(os, "environ", os.environ.copy())
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as left:
            code = left.code
        finally:
            own()
            sys.modules.update(before)
    return f"{script} {' '.join(arguments)}: {code}" if code else ""
