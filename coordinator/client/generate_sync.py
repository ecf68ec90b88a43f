"""Writes the blocking client from the asynchronous one, token by token.

    python coordinator/client/generate_sync.py [--check]

``async`` and ``await`` are dropped, every ``AsyncX`` becomes ``X``, and what ``REPLACED`` names
becomes its counterpart. ruff sorts the imports and formats. With ``--check`` nothing is written:
the exit code is 1 if a file is not what it should be.
"""

import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

FOLDER = Path(__file__).parent / "baton_client"
NAMES = ("connection", "client")
REPLACED = {
    "asyncio.sleep": "time.sleep",
    "asyncio.timeout": "contextlib.nullcontext",  # httpx's own time-outs end what blocks
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "aclose": "close",
    "aclosing": "closing",
    "aiter_bytes": "iter_bytes",
    "aread": "read",
    "async_connection": "sync_connection",
}
PATTERN = re.compile(
    rf"(?:{'|'.join(map(re.escape, REPLACED))})\b|a(?:sync|wait)\s+|Async(?=[A-Z])"
)
HEADER = '"""Generated from {name} by ../generate_sync.py: change that one, and run this."""\n'


def to_sync(source: str, name: str) -> str:
    """The blocking form of a module's source; ``name`` is its file's."""
    body = source.split('"""', 2)[2].replace("\nimport asyncio\n", "\n")
    lines = body.splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(io.StringIO(body).readline))
    for token in reversed(tokens):  # from the end, so that the places of those before stay right
        if token.type == tokenize.NAME:
            row, column = token.start
            line = lines[row - 1]
            if match := PATTERN.match(line, column):
                lines[row - 1] = line[:column] + REPLACED.get(match[0], "") + line[match.end() :]
    text = HEADER.format(name=name) + "".join(lines)
    for command in (("check", "--select=I", "--fix"), ("format",)):
        text = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "-q", f"--stdin-filename={FOLDER}/x.py", "-"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return text


def main() -> int:
    """Write the files, or look at them; returns the exit code."""
    stale = []
    for name in NAMES:
        source, target = FOLDER / f"async_{name}.py", FOLDER / f"sync_{name}.py"
        text = to_sync(source.read_text(), source.name)
        if "--check" not in sys.argv[1:]:
            target.write_text(text)
        elif target.read_text() != text:
            stale.append(target.name)
    if stale:
        sys.stderr.write(f"run python {__file__}: {', '.join(stale)} must be generated again\n")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
