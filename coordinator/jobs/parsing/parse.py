"""Reads one untrusted file as text, in a process of its own that may die of it.

    python -P -m coordinator.jobs.parsing.parse KIND CHARSET MEMORY_BYTES CPU_S TEXT_BYTES

Standard input is the file, standard output a file that gets its text as UTF-8. Exit code 0: the
text is whole, and each line of standard error is a warning about it. 3: the file cannot be read,
and standard error says why in one line. 4: there is no room for the text. Anything else, also a
signal, is a crash, and its owner decides what that means; SIGXCPU says that it takes too long.
The process opens no other file for writing, no socket, and starts nothing.
"""

import logging
import os
import resource
import signal
import sys

import webencodings

from coordinator.jobs.parsing.formats import HTML, PDF, Unreadable
from coordinator.jobs.parsing.html import read_html
from coordinator.jobs.parsing.pdf import read_pdf
from coordinator.text.confinement import close_all_but, confine

UNREADABLE, UNWRITABLE = 3, 4


def read_text(data: bytes, charset: str = "") -> str:
    """Plain text or Markdown: UTF-8, UTF-16 that says so, or what was declared with the upload."""
    try:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            text = data.decode("utf-16")
        elif charset:
            encoding = webencodings.lookup(charset)
            if encoding is None:
                raise Unreadable(f"the charset {charset[:40]!r} is not known")
            text = encoding.codec_info.decode(data, "strict")[0].removeprefix("\ufeff")
        else:
            text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"the text is not {charset or 'UTF-8'} at byte {error.start}") from error
    if "\0" in text:
        raise Unreadable("the file is no text: it has zero characters")
    return text.replace("\r\n", "\n")


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    media_type, charset, *numbers = arguments
    memory_bytes, cpu_s, text_bytes = map(int, numbers)
    _confine(memory_bytes, cpu_s, text_bytes)
    logging.disable()  # standard error is for what is said of the text
    data = sys.stdin.buffer.read()
    try:
        warnings: list[str] = []
        if media_type == PDF:
            text, warnings = read_pdf(data)
        elif media_type == HTML:
            text = read_html(data, charset)
        else:
            text = read_text(data, charset)
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
    for warning in warnings:
        print(warning, file=sys.stderr)  # noqa: T201 - see the module's docstring
    return 0


def _confine(memory_bytes: int, cpu_s: int, text_bytes: int) -> None:
    close_all_but()
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (text_bytes, text_bytes))
    signal.alarm(2 * cpu_s + 5)  # whoever started it may have been killed, on any system
    confine(memory_bytes, may_write=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
