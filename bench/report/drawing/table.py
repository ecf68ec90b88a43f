"""A table as data: the page and the terminal show the same ones."""

from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "good", "bad", "dim"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A value, with what qualifies it below: an interval, or why it is refused."""

    text: str
    below: str = ""
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Table:
    """The first column names the row; the others are figures, set flush right."""

    key: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    tab: str = ""
    words: bool = False
    """Whether the other columns are words, set flush left."""

    @property
    def is_empty(self) -> bool:
        return not self.rows
