"""A state table without one of its ways, for the length of a test."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def remove_way() -> Iterator[Callable[[dict[Any, Any], Any], None]]:
    """Takes a key out of a table; afterwards the table is as it was, in the order it had."""
    changed: list[tuple[dict[Any, Any], dict[Any, Any]]] = []

    def remove(table: dict[Any, Any], key: Any) -> None:
        changed.append((table, dict(table)))
        del table[key]

    yield remove
    for table, before in reversed(changed):
        table.clear()
        table.update(before)
