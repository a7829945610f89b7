"""What a folder that `run` or `compress` wrote holds, and where: its manifest."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spectrim.errors import FormatError
from spectrim.files import check_digest, digest_of, read_json, write_json
from spectrim.metrics.measurement import Measurement
from spectrim.metrics.verdict import Verdict
from spectrim.surgery.coverage import Coverage, LayerCoverage

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
RESULT = "result.json"
FORMAT = 1
NETWORKS = ("dense", "factorized", "final")
HINT = "the same command writes it again"

PLACES = {
    "run": {"dense": "1-dense", "factorized": "4-finetune", "final": "5-merge"},
    "compress": {"dense": "1-dense", "factorized": "compress/low", "final": "compress/final"},
    "sweep": {"dense": "1-dense"},
}
"""Where the networks lie in the folders of each command."""


@dataclass(frozen=True)
class Contents:
    """What a folder holds.

    Attributes:
        folder: it is of.
        kind: the command that wrote it: ``run``, ``compress`` or ``sweep`` (`compress` with several budgets, each in a folder inside).
        networks: folders of the ``dense``, the ``factorized`` and the ``final`` network, inside `folder`.
        coverage: each layer: factorized, or why not.
        finished: whether everything is there.
    """

    folder: Path
    kind: str
    networks: dict[str, str] = field(default_factory=dict)
    coverage: Coverage | None = None
    finished: bool = False

    def network(self, name: str) -> Path:
        """Return the folder of a network.

        Args:
            name: ``dense``, ``factorized`` or ``final``.

        Raises:
            FormatError: it is not there.
        """
        place = self.folder / self.networks.get(name, name)
        if name not in self.networks or not place.is_dir():
            inside = sorted(path.parent.name for path in self.folder.glob(f"*/{MANIFEST}"))
            hint = f"pass one of the folders in it: {', '.join(inside)}" if inside else "run the same command to its end"
            raise FormatError(self.folder, f"holds no {name} network", hint=hint)
        return place

    def measured(self, name: str) -> Measurement | None:
        """Return the measurement of a network from when the folder was finished; None without one.

        Raises:
            FormatError: the result is damaged.
        """
        path = self.folder / RESULT
        if not self.finished or not path.is_file():
            return None
        entry = read_json(path, HINT).get(name)
        if entry is None:
            return None
        try:
            return Measurement.from_dict(entry)
        except (FormatError, TypeError, AttributeError) as error:
            raise FormatError(path, f"is damaged ({error})", hint=HINT) from error

    def verdict(self) -> str:
        """Return the verdict in words from when the folder was finished; empty without one.

        Raises:
            FormatError: the result is damaged.
        """
        path = self.folder / RESULT
        entry = read_json(path, HINT).get("verdict") if self.finished and path.is_file() else None
        if entry is None:
            return ""
        try:
            return str(Verdict.from_dict(entry))
        except (TypeError, AttributeError) as error:
            raise FormatError(path, f"is damaged ({error})", hint=HINT) from error


def finish(folder: Path, kind: str, result: Mapping[str, Any], coverage: Coverage | None = None) -> None:
    """Write the result of a command that has ended, and then the manifest.

    Args:
        folder: of the command.
        kind: see `Contents`.
        result: plain data; measured networks by name among them.
        coverage: of the factorized network.
    """
    write_json(folder / RESULT, result)
    lines = None if coverage is None else [asdict(line) for line in coverage]
    values = {"format": FORMAT, "kind": kind, "finished": True, "networks": PLACES[kind], "coverage": lines}
    recipe = folder / RECIPE
    write_json(folder / MANIFEST, values | {"recipe": digest_of(recipe) if recipe.is_file() else None})


def contents(folder: Path) -> Contents:
    """Return what a folder holds, by its manifest, or where there is none by what lies in it.

    Raises:
        FormatError: it is no folder of `run` or `compress`, or its manifest is damaged.
    """
    if (folder / MANIFEST).exists():
        return _read(folder)
    kind = "compress" if (folder / "compress").is_dir() else "run"
    if not (folder / RECIPE).is_file():
        hint = "pass a recipe, or what spectrim run or spectrim compress wrote"
        raise FormatError(folder, f"is not the folder of a run: it has no {RECIPE}", hint=hint)
    return Contents(folder, kind, {name: place for name, place in PLACES[kind].items() if (folder / place).is_dir()})


def _read(folder: Path) -> Contents:
    path = folder / MANIFEST
    values = read_json(path, HINT)
    try:
        if values["format"] != FORMAT:
            raise FormatError(path, f"has format {values['format']!r}, this version reads {FORMAT}")
        networks = {name: str(place) for name, place in values["networks"].items() if name in NETWORKS}
        if any(Path(place).is_absolute() or ".." in Path(place).parts for place in networks.values()):
            raise FormatError(path, "names a folder outside", hint="do not use this folder")
        check_digest(folder / RECIPE, values.get("recipe"), f"copy it elsewhere to use it as a recipe; {HINT}")
        lines = values["coverage"]
        listed = None if lines is None else Coverage(map(_line, lines))
        if listed is not None:
            str(listed)
        return Contents(folder, str(values["kind"]), networks, listed, bool(values["finished"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(path, f"is damaged ({error!r})", hint=HINT) from error


def _line(entry: Mapping[str, Any]) -> LayerCoverage:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    return LayerCoverage(**values)
