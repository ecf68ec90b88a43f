"""The text layer of a PDF, read by PDFium, and whether it can be words at all."""

import re
from collections.abc import Sequence

import pypdfium2
from pypdfium2 import PdfiumError
from pypdfium2.raw import FPDF_ERR_PASSWORD

from coordinator.jobs.formats import Unreadable

MAX_PAGES = 20_000
MAX_PAGE_CHARS = 2_000_000
MANY_PAGES, MOST_REPEATS = 200, 20  # from so many on, no text may be on so many pages on average
FREE_CHARS, MAX_EXPANSION = 1 << 20, 200  # of all pages, for each byte of the file
LONG_WORD = 30  # letters; the longest words of European languages have some more
FEW_LETTERS = 200  # of which nothing is concluded
DOUBTFUL_SHARE, HOPELESS_SHARE = 0.05, 0.5
_END = b"%%EOF"
_UPDATE = re.compile(rb"\d\s+\d+\s+obj\b|\bstartxref\b|\bxref\b")
# Letters of scripts that put blanks between words.
_WORD = re.compile("[A-Za-z\u00c0-\u024f\u0370-\u03ff\u0400-\u052f]+")
_NO_CHARACTER = re.compile("[\ufffd\ue000-\uf8ff\x00-\x08\x0e-\x1f]")
_HYPHEN = re.compile("[\x02\ufffe](?:\r?\n)?")  # PDFium's mark where a word was broken


def read_pdf(data: bytes) -> tuple[str, list[str]]:
    """The text of all pages, and warnings about it.

    Raises:
        Unreadable: encrypted, damaged, without words, or far more than its size lets expect.
    """
    data = whole(data)
    try:
        document = pypdfium2.PdfDocument(data)
    except PdfiumError as error:
        if error.err_code == FPDF_ERR_PASSWORD:
            raise Unreadable("the PDF is encrypted: remove its password first") from error
        raise Unreadable(f"the PDF is damaged: {error}") from error
    try:
        pages = _pages(document, FREE_CHARS + MAX_EXPANSION * len(data))
    except PdfiumError as error:
        raise Unreadable(f"the PDF is damaged: {error}") from error
    finally:
        document.close()
    return "\n\n".join(pages), judged(pages)


def whole(data: bytes) -> bytes:
    """The file up to its end; what others have put behind that is no part of it.

    Raises:
        Unreadable: it has no end, or something behind it that was to be one.
    """
    end = data.rfind(_END)
    if end < 0:
        raise Unreadable("the PDF is truncated: its end-of-file marker is missing")
    if _UPDATE.search(data, end):
        raise Unreadable("the PDF is truncated: the update behind its end is not whole")
    return data[: end + len(_END)]


def _pages(document: pypdfium2.PdfDocument, max_chars: int) -> list[str]:
    count = len(document)
    if count > MAX_PAGES:
        raise Unreadable(f"the PDF has {count} pages, more than {MAX_PAGES}")
    pages: list[str] = []
    different: set[int] = set()
    num_chars = 0
    for number in range(count):
        text = _page_text(document, number)
        if not text:
            continue
        pages.append(text)
        different.add(hash(text))
        num_chars += len(text)
        if num_chars > max_chars:
            raise Unreadable(f"the PDF makes more than {max_chars} characters of its bytes")
        if len(pages) >= MANY_PAGES and len(pages) > MOST_REPEATS * len(different):
            raise Unreadable(
                f"the PDF says the same again and again: its first {len(pages)} pages have "
                f"{len(different)} different texts"
            )
    return pages


def _page_text(document: pypdfium2.PdfDocument, number: int) -> str:
    page = document[number]
    try:
        words = page.get_textpage()
        try:
            count = words.count_chars()
            if count > MAX_PAGE_CHARS:
                raise Unreadable(f"page {number + 1} has {count} characters")
            text: str = words.get_text_range()
        finally:
            words.close()
    finally:
        page.close()
    return _HYPHEN.sub("", text).replace("\r\n", "\n").strip()


def judged(pages: Sequence[str]) -> list[str]:
    """Warnings about a text that may not be what the pages show.

    Raises:
        Unreadable: it cannot be.
    """
    text = "\n".join(pages)
    words = _WORD.findall(text)
    num_letters = sum(map(len, words))
    num_long = sum(len(word) for word in words if len(word) > LONG_WORD)
    num_missing = len(_NO_CHARACTER.findall(text))
    warnings = []
    for num, of, what in (
        (num_long, num_letters, f"of its letters stand in words of more than {LONG_WORD} letters"),
        (num_missing, num_letters + num_missing, "of its characters have no meaning"),
    ):
        if of < FEW_LETTERS or num <= DOUBTFUL_SHARE * of:
            continue
        said = f"{num / of:.0%} {what}"
        if num > HOPELESS_SHARE * of:
            raise Unreadable(f"the PDF's text layer is not what its pages show: {said}")
        warnings.append(f"some of the text may not be what the pages show: {said}")
    return warnings
