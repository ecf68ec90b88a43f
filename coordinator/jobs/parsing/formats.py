"""What an uploaded file is, before anything reads it. Pure.

The name's ending and the first bytes must agree: a file that is not what it is called is refused
with the reason. Where the name has no ending, what was declared with the file takes its place.
Archives are refused whatever they hold.
"""

import re
from pathlib import PurePosixPath

from protocol.errors import BatonError, RequestError

PLAIN, MARKDOWN, HTML, PDF = "text/plain", "text/markdown", "text/html", "application/pdf"
MEDIA_TYPES = (PLAIN, MARKDOWN, HTML, PDF)
HEAD_BYTES = 4096  # of a file, that tell what it is
MAX_NAME_CHARS = 255
_BY_ENDING = {
    ".md": MARKDOWN,
    ".markdown": MARKDOWN,
    ".html": HTML,
    ".htm": HTML,
    ".xhtml": HTML,
    ".pdf": PDF,
}
_FOREIGN = {  # first bytes, and what they begin
    b"PK\x03\x04": "a zip archive, or a document packed in one",
    b"PK\x05\x06": "an empty zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\xd0\xcf\x11\xe0": "an old office document",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x7fELF": "a program",
    b"MZ\x90": "a program",
    b"SQLite format 3": "a database",
    b"{\\rtf": "a rich-text document",
    b"%!PS": "a PostScript document",
    b"AT&TFORM": "a DjVu document",
    b"II*\0": "an image",
    b"MM\0*": "an image",
    b"RIFF": "an image, a sound or a film",
    b"\x89HDF": "a data file",
}
_EMPTY_LINE = re.compile(rb"\r?\n\r?\n")
_MIME_HEADERS = (  # which begin an e-mail, or a page that a browser has saved in one file
    re.compile(rb"[!-9;-~]+:"),
    re.compile(rb"^mime-version:", re.IGNORECASE | re.MULTILINE),
    re.compile(rb"^content-type:\s*multipart/", re.IGNORECASE | re.MULTILINE),
)
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")  # UTF-16: its text is full of zero bytes


class Unreadable(BatonError):
    """A file's own fault; the message says what is wrong with it."""


def unprocessable(reason: str) -> RequestError:
    """The document cannot be read as what it says it is."""
    return RequestError(reason, code="unprocessable_document", param="source", status=422)


def plain_name(name: str) -> str:
    """A caller's file name to show: its last part, without anything that is not to be printed."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(c for c in last if c.isprintable())[:MAX_NAME_CHARS]


def identify(file_name: str, head: bytes, size_bytes: int, declared: str = "") -> str:
    """The media type of a file.

    Args:
        file_name: as the caller calls it; may be empty.
        head: its first ``HEAD_BYTES``.
        size_bytes: all of it.
        declared: the media type that came with it; "" if none did.

    Raises:
        RequestError: ``unprocessable_document``: it is nothing that is read here.
    """
    if size_bytes == 0:
        raise unprocessable("the file is empty: 0 bytes")
    shown = file_name or "the file"
    ending = PurePosixPath(file_name).suffix.lower()
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, what in _FOREIGN.items():
        if head.startswith(start) or begin.startswith(start):
            raise unprocessable(f"{shown} is {what}: send text, Markdown, HTML or PDF")
    headers = _EMPTY_LINE.split(begin, 1)[0]
    first, *others = _MIME_HEADERS
    if first.match(headers) and all(header.search(headers) for header in others):
        raise unprocessable(f"{shown} is an e-mail or an archived web page: send what it holds")
    is_pdf = b"%PDF-" in head[:1024]
    by_name = _BY_ENDING.get(ending)
    if not ending and declared in (MARKDOWN, HTML, PDF):
        by_name = declared
    if is_pdf:
        if by_name not in (PDF, None) or ending == ".txt":
            raise unprocessable(f"{shown} is a PDF, whatever its name says: call it .pdf")
        return PDF
    if by_name == PDF:
        raise unprocessable(f"{shown} is no PDF: it does not begin as one")
    if b"\0" in head and not head.startswith(_WIDE_MARKS):
        raise unprocessable(f"{shown} is no text: it has zero bytes")
    return by_name or PLAIN
