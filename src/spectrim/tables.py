"""What tables are made of; nothing here imports torch.

`Row` is one method in the table of its contract, which contract tests and docs read. `SUFFIXES` lists the formats of other runtimes.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from spectrim.errors import SettingError

Example = TypeVar("Example")

Format = Literal["pt2", "onnx", "executorch", "openvino", "litert"]

SUFFIXES: dict[str, Format] = {".pt2": "pt2", ".onnx": "onnx", ".pte": "executorch", ".xml": "openvino", ".tflite": "litert"}
"""The formats that `export` writes, by the suffixes of their files."""


@dataclass(frozen=True)
class Row(Generic[Example]):
    """One method: its class, an example of it, its method card and the laws it obeys beyond those of its contract.

    Args:
        method: the class, a frozen dataclass.
        example: a value of the class; in a table of methods that need data, a function of the data that makes one.
        card: name of the page in ``docs/methods`` that describes the method, without folder and suffix.
        laws: names from the ``LAWS`` beside the table. Each is tested on every row that has it.
        label: tells rows of one class apart; the name of the class when omitted.

    Raises:
        SettingError: for a row without a card.

    Examples:
        >>> from spectrim.budget.rules import Energy
        >>> Row(Energy, example=Energy(0.9), card="svd-training", laws={"fraction"}).label
        'Energy'
    """

    method: type[Any]
    example: Example
    card: str
    laws: Collection[str] = frozenset()
    label: str = ""

    def __post_init__(self) -> None:
        if not self.card:
            hint = "write the card first: what the method does, its settings, its sources, its known limitations"
            raise SettingError(
                f"Row of {self.method.__name__}", "card", got=self.card, rule="the name of a page in docs/methods", hint=hint
            )
        object.__setattr__(self, "laws", frozenset(self.laws))
        object.__setattr__(self, "label", self.label or self.method.__name__)
