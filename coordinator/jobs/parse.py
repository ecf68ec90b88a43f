"""Reads one untrusted file as text, in a process of its own that may die of it.

    python -P -m coordinator.jobs.parse MEDIA_TYPE MEMORY_BYTES CPU_S TEXT_BYTES < FILE > TEXT

Standard input is the file, standard output a file that gets its text as UTF-8. Exit code 0: the
text is whole. 3: the file cannot be read, and standard error says why in one line. 4: there is no
room for the text. Anything else, also a signal, is a crash, and its owner decides what that means.
The process opens no other file for writing, no socket, and starts nothing.
"""

import io
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from coordinator.jobs.formats import HTML, PDF

UNREADABLE, UNWRITABLE = 3, 4
_TAIL_BYTES = 2048
_BLOCK_NAMES = """
    address article aside blockquote body caption dd details div dl dt fieldset figcaption figure
    footer form h1 h2 h3 h4 h5 h6 header hr html legend li main nav ol option p pre section
    summary table tbody td tfoot th thead title tr ul
"""
_BLOCKS = frozenset(_BLOCK_NAMES.split())
_UNSEEN = frozenset({"script", "style", "template", "noscript", "iframe", "object", "svg"})
_DENIED_EVENTS = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system")
_SPACES = re.compile(r"[ \t\r\f\v\n]+")


class Unreadable(Exception):
    """The file's fault; the message says what is wrong with it."""


def read_text(data: bytes) -> str:
    """Plain text or Markdown: UTF-8, or UTF-16 that says so."""
    try:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            text = data.decode("utf-16")
        else:
            text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"the text is not UTF-8 at byte {error.start}") from error
    if "\0" in text:
        raise Unreadable("the file is no text: it has zero characters")
    return text.replace("\r\n", "\n")


def read_html(data: bytes) -> str:
    """What a reader of the page sees, a line for each block."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(data, "html.parser")
    lines: list[str] = []
    line: list[str] = []
    for piece, is_verbatim in _pieces(soup):
        if piece is None:
            lines.append("".join(line).strip() if not is_verbatim else "".join(line).rstrip())
            line = []
        elif is_verbatim:
            line.append(piece)
        elif text := _SPACES.sub(" ", piece):
            starts_apart = not line or line[-1].endswith((" ", "\n"))
            line.append(text.lstrip() if starts_apart else text)
    lines.append("".join(line).strip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _pieces(soup: Any) -> Iterator[tuple[str | None, bool]]:  # noqa: ANN401 - untyped tree
    """(text, whether it is verbatim) in order; None ends a line. Depth needs no stack of calls."""
    from bs4.element import CData, NavigableString, Tag

    todo: list[tuple[Any, bool]] = [(soup, False)]
    while todo:
        node, is_verbatim = todo.pop()
        if isinstance(node, Tag):
            if node.name in _UNSEEN:
                continue
            if node.name == "br":
                yield None, is_verbatim
                continue
            is_block = node.name in _BLOCKS
            inner = is_verbatim or node.name == "pre"
            if is_block:
                yield None, is_verbatim
                todo.append((None, inner))
            todo.extend((child, inner) for child in reversed(node.contents))
        elif node is None:
            yield None, is_verbatim
        elif type(node) in (NavigableString, CData):  # not comments and declarations
            yield str(node), is_verbatim


def read_pdf(data: bytes) -> str:
    """The text layer of every page."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError

    if b"%%EOF" not in data[-_TAIL_BYTES:]:
        raise Unreadable("the PDF is truncated: its end-of-file marker is missing")
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("the PDF is encrypted: remove its password first")
        pages = [page.extract_text() for page in reader.pages]
    except (DependencyError, FileNotDecryptedError) as error:
        raise Unreadable("the PDF is encrypted: remove its password first") from error
    except (PyPdfError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        # The library raises all of these of files that are not as the standard has them.
        raise Unreadable(f"the PDF is damaged: {error}") from error
    return "\n\n".join(page.strip() for page in pages if page.strip())


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    media_type, *numbers = arguments
    memory_bytes, cpu_s, text_bytes = map(int, numbers)
    _confine(memory_bytes, cpu_s, text_bytes)
    data = sys.stdin.buffer.read()
    try:
        if media_type == PDF:
            text = read_pdf(data)
        elif media_type == HTML:
            text = read_html(data)
        else:
            text = read_text(data)
        if not text.strip():
            raise Unreadable("there is no text in it")
        encoded = text.encode("utf-8", "replace")
        if len(encoded) > text_bytes:
            raise Unreadable(f"its text is {len(encoded)} bytes, more than {text_bytes}")
    except (Unreadable, RecursionError) as error:
        print(str(error)[:500].replace("\n", " "), file=sys.stderr)  # noqa: T201 - its one output
        return UNREADABLE
    try:
        rest = memoryview(encoded)
        while rest:
            rest = rest[os.write(sys.stdout.fileno(), rest) :]
    except OSError:
        return UNWRITABLE
    return 0


def _confine(memory_bytes: int, cpu_s: int, text_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_FSIZE, (text_bytes, text_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(2 * cpu_s + 5)  # whoever started it may have been killed
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(_DENIED_EVENTS):
        _deny(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _deny(f"{event} {arguments[1]}")


def _deny(what: str) -> NoReturn:
    raise PermissionError(f"a parser does not do this: {what}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
