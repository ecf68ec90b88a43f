"""Draws the state tables of the code into docs/protocol.md, so that the document cannot rot.

    python -m tests.state_tables [--write docs/protocol.md]

Each table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; a test compares them.
"""

import argparse
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import coordinator.jobs.batches.states
import coordinator.jobs.documents.states
import coordinator.request
import decode.states
import kvcache.blocks
import kvtransfer.handoff.states
import prefill.states
import store.states

PLACE = re.compile(r"(<!-- table: (?P<name>[a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Ways = list[tuple[str, str, str]]  # (state, event, next state)


TABLES: dict[str, Mapping[tuple[Any, Any], Enum]] = {
    "request": coordinator.request.TABLE,
    "source": kvtransfer.handoff.states.SOURCE_TABLE,
    "target": kvtransfer.handoff.states.TARGET_TABLE,
    "batch": coordinator.jobs.batches.states.TABLE,
    "offload": store.states.OFFLOAD,
    "onboarding": store.states.ONBOARDING,
    "prefill": prefill.states.TABLE,
    "decode": decode.states.TABLE,
    "document": coordinator.jobs.documents.states.TABLE,
}


def tables() -> dict[str, Ways]:
    """Every table as its ways, in the order of the code."""
    ways = {name: _ways(table) for name, table in TABLES.items()}
    ways["block"] = [  # of which the counters say which state follows
        (state.value, event.value, after.value)
        for (state, event), following in kvcache.blocks.TABLE.items()
        for after in sorted(following)
    ]
    return ways


def _ways(table: Mapping[Any, Enum]) -> Ways:
    return [(s.value, event.value, after.value) for (s, event), after in table.items()]


def drawing(ways: Ways) -> str:
    """A Mermaid state diagram; events between the same two states share an arrow."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for state, event, after in ways:
        arrows.setdefault((state, after), []).append(event)
    lines = [f"    {a} --> {b}: {', '.join(events)}" for (a, b), events in arrows.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```", ""])


def redrawn(text: str) -> str:
    """A document with every table drawn anew."""
    known = tables()
    return PLACE.sub(lambda m: f"{m[1]}{drawing(known[m['name']])}{m[3]}", text)


def main() -> None:
    """Print the tables, or write them into a document."""
    parser = argparse.ArgumentParser(prog="tests.state_tables", description=main.__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.write:
        arguments.write.write_text(redrawn(arguments.write.read_text()))
        return
    for name, ways in tables().items():
        print(f"{name}\n{drawing(ways)}")


if __name__ == "__main__":
    main()
