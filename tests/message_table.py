"""Writes the table of messages into docs/architecture.md: who builds each, and who takes it.

    python -m tests.message_table [--write docs/architecture.md]

It is read from the source: a function that builds a message is a sender, a function that matches it
(``case``, ``isinstance``) is a receiver. A test compares the document with it.
"""

import argparse
import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- messages: (?P<name>[a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)
MODULES = {"control": "protocol/messages.py", "handoff": "protocol/handoff.py"}
BASES = ("_Message", "_OfRequest")  # of messages, in these modules
FOLDERS = ("coordinator", "engine", "prefill", "decode", "store", "kvtransfer")
LEFT_OUT = ("faulty.py",)  # it changes messages in tests of faults, and is no end of any


def messages(module: str) -> list[str]:
    """The messages of a module of the protocol, in the order of the code."""
    tree = ast.parse((ROOT / module).read_text())
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id in BASES for base in node.bases)
    ]


def ends() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Senders and receivers of each name, as ``file:function``."""
    senders: dict[str, list[str]] = defaultdict(list)
    receivers: dict[str, list[str]] = defaultdict(list)
    answers = _answers()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name in LEFT_OUT:
                continue
            tree = ast.parse(path.read_text())
            imported = _imported(tree)  # other classes may have a message's name
            for function, node in _nodes(tree, ""):
                place = f"{path.relative_to(ROOT)}:{function}"
                for name in _built(node):
                    if name in imported:
                        senders[name].append(place)
                    elif name in answers:
                        senders[answers[name]].append(place)
                for name in _matched(node):
                    if name in imported:
                        receivers[name].append(place)
    return senders, receivers


def _imported(tree: ast.Module) -> set[str]:
    """The names that a file has from the protocol."""
    return {
        name.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("protocol.")
        for name in node.names
    }


def _answers() -> dict[str, str]:
    """Methods of messages that build another message, such as the answer to a request."""
    known = {name for module in MODULES.values() for name in messages(module)}
    return {
        function: name
        for module in MODULES.values()
        for function, node in _nodes(ast.parse((ROOT / module).read_text()), "")
        for name in _built(node)
        if function and name in known
    }


def _nodes(tree: ast.AST, function: str) -> Iterator[tuple[str, ast.AST]]:
    """Every node with the name of the function that it stands in."""
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        inside = node.name if is_function else function  # type: ignore[attr-defined]
        yield inside, node
        yield from _nodes(node, inside)


def _built(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call):
        called = node.func
        if isinstance(called, ast.Attribute):  # Message.of(...), or message.refused(...)
            yield called.attr
            called = called.value
        if isinstance(called, ast.Name):
            yield called.id


def _matched(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.MatchClass) and isinstance(node.cls, ast.Name):
        yield node.cls.id
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    if is_call and node.func.id == "isinstance":
        yield from (name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name))


def table(name: str) -> str:
    """One module's messages as a Markdown table."""
    senders, receivers = ends()
    lines = ["| message | built by | taken by |", "| --- | --- | --- |"]
    for message in messages(MODULES[name]):
        cells = (_cell(places.get(message, [])) for places in (senders, receivers))
        lines.append(f"| `{message}` | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(places: list[str]) -> str:
    return ", ".join(f"`{place}`" for place in dict.fromkeys(places))


def rewritten(text: str) -> str:
    """A document with every table written anew."""
    return PLACE.sub(lambda m: f"{m[1]}{table(m['name'])}{m[3]}", text)


def main() -> None:
    """Print the tables, or write them into a document."""
    parser = argparse.ArgumentParser(prog="tests.message_table", description=main.__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.write:
        arguments.write.write_text(rewritten(arguments.write.read_text()))
        return
    for name in MODULES:
        print(table(name))


if __name__ == "__main__":
    main()
