"""The text layer of a PDF, read by PDFium, and whether it can be words, and all of them.

What is filled into a form, and what is written onto a page, is drawn into the page first. A page
that shows something and says nothing is a picture: how many there are is a warning.
"""

import re
from collections.abc import Sequence

import pypdfium2
from pypdfium2 import PdfiumError, raw

from coordinator.jobs.parsing.formats import Unreadable

MAX_PAGES = 20_000
MAX_PAGE_CHARS = 2_000_000
MANY_PAGES, MOST_REPEATS = 200, 20  # from so many on, no text may be on so many pages on average
FREE_CHARS, MAX_EXPANSION = 1 << 20, 200  # of all pages, for each byte of the file
LONG_WORD = 30  # letters; the longest words of European languages have some more
FEW_LETTERS = 200  # of which nothing is concluded
DOUBTFUL_SHARE, HOPELESS_SHARE = 0.05, 0.5
FEW_CHARS = 100  # on a page: of a scan the stamp may be text, and nothing else
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
        if error.err_code == raw.FPDF_ERR_PASSWORD:
            raise Unreadable("the PDF is encrypted: remove its password first") from error
        raise Unreadable(f"the PDF is damaged: {error}") from error
    try:
        pages, num_pictures = _pages(document, FREE_CHARS + MAX_EXPANSION * len(data))
        warnings = _told(num_pictures, len(document), pages)
    except PdfiumError as error:
        raise Unreadable(f"the PDF is damaged: {error}") from error
    finally:
        document.close()
    return "\n\n".join(pages), [*warnings, *judged(pages)]


def _told(num_pictures: int, num_pages: int, pages: Sequence[str]) -> list[str]:
    if num_pictures and not pages:
        raise Unreadable(
            f"there is no text in it: its {num_pages} pages are pictures; recognise their text "
            f"first"
        )
    if not num_pictures:
        return []
    told = f"{num_pictures} of its {num_pages} pages are pictures or drawings"
    return [f"{told}: text in them is not read"]


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


def _pages(document: pypdfium2.PdfDocument, max_chars: int) -> tuple[list[str], int]:
    """The text of each page that has some, and how many pages are pictures."""
    if document.get_formtype() == raw.FORMTYPE_XFA_FULL:
        raise Unreadable(
            "the PDF is a dynamic form (XFA): its pages are a notice, not what is filled in; print "
            "it into a PDF first"
        )
    document.init_forms()
    count = len(document)
    if count > MAX_PAGES:
        raise Unreadable(f"the PDF has {count} pages, more than {MAX_PAGES}")
    pages: list[str] = []
    different: set[int] = set()
    num_chars = num_pictures = 0
    for number in range(count):
        text, is_picture = _read_page(document, number)
        num_pictures += is_picture
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
    return pages, num_pictures


def _read_page(document: pypdfium2.PdfDocument, number: int) -> tuple[str, bool]:
    """The text of a page, and whether it is a picture."""
    page = document[number]
    if raw.FPDFPage_GetAnnotCount(page):
        raw.FPDFPage_Flatten(page, raw.FLAT_NORMALDISPLAY)
        page.close()  # what has become part of it is seen when it is opened anew
        page = document[number]
    try:
        words = page.get_textpage()
        try:
            count = words.count_chars()
            if count > MAX_PAGE_CHARS:
                raise Unreadable(f"page {number + 1} has {count} characters")
            found: str = words.get_text_range()
        finally:
            words.close()
        text = _HYPHEN.sub("", found).replace("\r\n", "\n").strip()
        return text, _is_picture(page, text)
    finally:
        page.close()


def _is_picture(page: pypdfium2.PdfPage, text: str) -> bool:
    if not text:
        return bool(raw.FPDFPage_CountObjects(page) > 0)
    if len(text) > FEW_CHARS:
        return False
    width, height = page.get_size()
    for image in page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE], max_depth=3):
        left, bottom, right, top = image.get_bounds()
        if (right - left) * (top - bottom) > width * height / 2:
            return True
    return False


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
