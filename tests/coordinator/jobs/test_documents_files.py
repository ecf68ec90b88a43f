"""Uploaded files: what they are, what they say, and what happens to one that kills its reader."""

import asyncio
import hashlib
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from coordinator.config import JobLimits, Limits
from coordinator.jobs.parsing import parse
from coordinator.jobs.parsing.formats import HTML, MARKDOWN, PDF, PLAIN, identify, plain_name
from coordinator.jobs.parsing.html import decode_html
from coordinator.jobs.parsing.pdf import judged
from coordinator.jobs.parsing.process import ParserCrashed, extract
from coordinator.validation.document_bodies import DocumentBody, fields_of_form
from protocol.errors import RequestError
from tests.coordinator.jobs.world import Site, start_site

LIMITS = JobLimits(parse_timeout_s=20.0, parse_memory_bytes=1 << 30)


def pdf_of(
    *pages: str,
    times: int = 1,
    pack: Callable[[int, bytes], bytes] = lambda _number, content: content,
    trailer: bytes = b"",
) -> bytes:
    """A PDF with a line of text on each page, by hand; each page is listed so many ``times``."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    kids = []
    for text in pages:
        content = b"BT /F1 12 Tf 72 720 Td (" + text.encode("latin-1") + b") Tj ET"
        packed = pack(len(objects) + 2, zlib.compress(content))
        kids.append(b"%d 0 R" % (len(objects) + 1))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R"
            b" /Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica"
            b" >> >> >> >>" % (len(objects) + 2)
        )
        objects.append(
            b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(packed), packed)
        )
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (
        b" ".join(kids * times),
        len(kids) * times,
    )
    return pdf_of_objects(objects, trailer)


def pdf_of_objects(objects: list[bytes], trailer: bytes = b"") -> bytes:
    """A PDF of these objects, numbered from 1; the first is its catalogue."""
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    return data + (
        b"xref\n0 %d\n0000000000 65535 f \n%strailer << /Size %d /Root 1 0 R %s >>\n"
        b"startxref\n%d\n%%%%EOF\n" % (size, table, size, trailer, len(data))
    )


_PAD = bytes.fromhex("28bf4e5e4e758a4164004e56fffa01082e2e00b6d0683e802f0ca9fe6453697a")


def _rc4(key: bytes, data: bytes) -> bytes:
    state, j, out = list(range(256)), 0, bytearray()
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    i = j = 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def encrypted(text: str, password: str) -> bytes:
    """A PDF of one page under RC4 with 40 bits (ISO 32000-1, 7.6), by hand."""
    padded = (password.encode() + _PAD)[:32]
    owner = _rc4(hashlib.md5(padded).digest()[:5], padded)
    key = hashlib.md5(padded + owner + b"\xfc\xff\xff\xff" + b"id").digest()[:5]
    user = _rc4(key, _PAD)
    rules = b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>" % (
        owner.hex().encode(),
        user.hex().encode(),
    )

    def pack(number: int, content: bytes) -> bytes:
        return _rc4(hashlib.md5(key + bytes([number, 0, 0, 0, 0])).digest()[:10], content)

    return pdf_of(text, pack=pack, trailer=b"/Encrypt %s /ID [<6964> <6964>]" % rules)


@pytest.mark.parametrize(
    ("name", "head", "kind"),
    [
        ("a.txt", b"hello", PLAIN),
        ("", b"hello", PLAIN),
        ("a.py", b"import os", PLAIN),
        ("a.MD", b"# hello", MARKDOWN),
        ("a.htm", b"<p>", HTML),
        ("a.pdf", b"%PDF-1.7", PDF),
        ("a", b"\n%PDF-1.7", PDF),
        ("a.txt", b"\xff\xfeh\0i\0", PLAIN),
    ],
)
def test_what_a_file_is(name: str, head: bytes, kind: str) -> None:
    assert identify(name, head, len(head)) == kind


@pytest.mark.parametrize(
    ("name", "head", "says"),
    [
        ("a.txt", b"", "0 bytes"),
        ("a.pdf", b"", "0 bytes"),
        ("a.pdf", b"<html>", "no PDF"),
        ("a.txt", b"%PDF-1.7", "is a PDF"),
        ("a.html", b"%PDF-1.7", "is a PDF"),
        ("a.txt", b"PK\x03\x04....", "zip archive"),
        ("a.docx", b"PK\x03\x04....", "zip archive"),
        ("a.pdf", b"\x1f\x8b\x08", "gzip"),
        ("a.md", b"abc\0def", "no text"),
        ("a.png", b"\x89PNG\r\n", "image"),
        ("a.rtf", b"{\\rtf1\\ansi hello}", "rich-text"),
        ("a.txt", b"\n {\\rtf1\\ansi hello}", "rich-text"),
        ("a.ps", b"%!PS-Adobe-3.0", "PostScript"),
        ("a", b"\x7fELF", "program"),
        (
            "a.txt",
            b"From: a@b\r\nMIME-Version: 1.0\r\nContent-Type: multipart/related;\r\n\r\n--x",
            "an archived web page",
        ),
    ],
)
def test_what_a_file_is_not(name: str, head: bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        identify(name, head, len(head))
    assert (caught.value.code, caught.value.status) == ("unprocessable_document", 422)


def test_what_was_declared_takes_the_place_of_an_ending() -> None:
    assert identify("page", b"<p>", 3, "text/html") == HTML
    assert identify("", b"# a", 3, "text/markdown") == MARKDOWN
    assert identify("page.txt", b"<p>", 3, "text/html") == PLAIN
    assert identify("page.html", b"<p>", 3, "text/plain") == HTML
    assert identify("page", b"hello", 5, "application/octet-stream") == PLAIN
    assert identify("a.txt", b"Note: MIME-Version: 1.0 is a header\n\n", 30) == PLAIN
    with pytest.raises(RequestError, match="no PDF"):
        identify("page", b"hello", 5, "application/pdf")


def test_names_are_only_shown() -> None:
    assert plain_name("../../etc/passwd") == "passwd"
    assert plain_name("C:\\a\\b.pdf") == "b.pdf"
    assert plain_name("a\x00\x1b[31m\nb.txt") == "a[31mb.txt"
    assert len(plain_name("x" * 5000)) == 255


def test_text() -> None:
    assert parse.read_text("né\r\nb".encode()) == "né\nb"
    assert parse.read_text(b"\xef\xbb\xbfa") == "a"
    assert parse.read_text("né".encode("utf-16")) == "né"
    for bad in (b"\xff\xff\xff", b"a\xe9b", b"a\0b"):
        with pytest.raises(parse.Unreadable):
            parse.read_text(bad)


def test_html() -> None:
    page = b"""<!doctype html><html><head><title>A  title</title><style>p { }</style>
        <script>evil()</script></head><body><!-- no --><h1>One</h1>
        <p>Two   <b>three</b>, <i>four</i>.<br>Five</p><ul><li>a</li><li>b</li></ul>
        <pre>x = 1
  y = 2</pre><template>hidden</template></body></html>"""
    text = parse.read_html(page)
    lines = [line for line in text.split("\n") if line]
    assert lines == ["A title", "One", "Two three, four.", "Five", "a", "b", "x = 1", "  y = 2"]
    assert parse.read_html('<meta charset="latin-1"><p>n\xe9'.encode("latin-1")) == "né"
    deep = b"<div>" * 20_000 + b"deep"
    assert parse.read_html(deep).strip() == "deep"


@pytest.mark.parametrize(
    ("data", "charset"),
    [
        ("Le château était".encode("latin-1"), ""),
        ("Le château était".encode("latin-1"), "iso-8859-1"),
        ("Le château était".encode("latin-1"), "ISO-8859-1"),
        ("Le château était".encode(), ""),
        (b'<meta charset="utf-16">' + "Le château était".encode(), ""),  # by the standard
        (b"\xef\xbb\xbf" + "Le château était".encode(), "iso-8859-1"),
        (b'<!-- <meta charset="koi8-r"> -->' + "Le château était".encode("latin-1"), ""),
        (
            b'<meta http-equiv="Content-Type" content="text/html; charset=latin1">'
            + "Le château était".encode("latin-1"),
            "",
        ),
        (b'<meta charset="koi8-r">' + "Le château était".encode("latin-1"), "iso-8859-1"),
        ("Le château était".encode("utf-16"), ""),
        (
            b"<script>'<meta charset=koi8-r>'" + b"x" * 3000 + b"</script><meta charset=latin1>"
            b"<p>" + "Le château était".encode("latin-1"),
            "",
        ),
        (b"<meta/charset=latin1>" + "Le château était".encode("latin-1"), ""),
    ],
)
def test_the_charset_of_a_page(data: bytes, charset: str) -> None:
    assert parse.read_html(data, charset) == "Le château était"


def test_charsets_of_windows() -> None:
    assert parse.read_html(b"\x93quoted\x94 \x80 5", "iso-8859-1") == "“quoted” € 5"
    assert parse.read_html("Привет".encode("koi8-r"), "koi8-r") == "Привет"
    assert parse.read_text("né".encode("latin-1"), "latin1") == "né"
    for read in (parse.read_html, parse.read_text):
        with pytest.raises(parse.Unreadable, match="'nonsense' is not known"):
            read(b"a", "nonsense")


@pytest.mark.parametrize(
    ("label", "data", "text"),
    [
        ("shift_jis", "①髙橋".encode("cp932"), "①髙橋"),
        ("euc-kr", "똠방각하".encode("cp949"), "똠방각하"),
        ("gb2312", "镕 㐀".encode("gb18030"), "镕 㐀"),
        ("euc-jp", "①㈱".encode("euc_jisx0213"), "①㈱"),
        ("iso-8859-2", "zażółć".encode("iso-8859-2"), "zażółć"),
    ],
)
def test_charsets_of_browsers_have_more_characters(label: str, data: bytes, text: str) -> None:
    assert parse.read_html(data, label) == text
    assert parse.read_html(f"<meta charset={label}>".encode() + data) == text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("10<sup>6</sup> and 10<sup>-6</sup> m<sup>2</sup>", "10^6 and 10^-6 m2"),
        (
            "in 1999<sup><a href=x>3</a></sup>, the 21<sup>st</sup> century",
            "in 1999^3, the 21st century",
        ),
        ("log<sub>2</sub>8 of H<sub>2</sub>O, 5<sub>10</sub>", "log2 8 of H2O, 5_10"),
        ("<math><mfrac><mn>1</mn><mn>2</mn></mfrac></math>", "1 2"),
        ("is <math alttext='\\frac{1}{2}'><mn>1</mn><mn>2</mn></math>.", "is \\frac{1}{2}."),
        (
            "is <math><semantics><mrow><mn>1</mn><mn>2</mn></mrow><annotation "
            "encoding='application/x-tex'>\\frac12</annotation><annotation encoding='x'>y"
            "</annotation></semantics></math><span class='base katex-html'><span>2</span>1</span>.",
            "is \\frac12.",
        ),
    ],
)
def test_what_is_raised_lowered_or_drawn_is_no_other_number(page: str, text: str) -> None:
    assert parse.read_html(page.encode()) == text


def test_a_table_is_a_line_for_each_row() -> None:
    table = """<table><caption>Money</caption>
      <thead><tr><th>year<th>income<th>loss</thead>
      <tbody><tr><td>2023</td><td></td><td>7</td></tr>
      <tr><td>2024<td><p>5</p><p>(est.)</p><td/></tbody></table>after"""
    assert parse.read_html(table.encode()).splitlines() == [
        "Money", "", "year | income | loss", "2023 |  | 7", "2024 | 5 (est.) |", "", "after",
    ]  # fmt: skip


def test_cells_that_span() -> None:
    table = """<table><tr><th rowspan=2>year<th colspan=2>income<th>loss
      <tr><td>a<td>b<td>c<tr><td>1<td>2<td>3<td>4</table>"""
    assert parse.read_html(table.encode()).splitlines() == [
        "year | income |  | loss", "year | a | b | c", "1 | 2 | 3 | 4"
    ]  # fmt: skip
    groups = """<table><tbody><tr><td rowspan=0>a<td>1<tr><td>2<tr><td>3
      <tbody><tr><td rowspan=5>b<td>4<tfoot><tr><td>sum<td>10</table>"""
    assert parse.read_html(groups.encode()).splitlines() == [
        "a | 1", "a | 2", "a | 3", "b | 4", "sum | 10"
    ]  # fmt: skip
    long = "<table><tr><td rowspan=150>a<td>0" + "<tr><td>1" * 149 + "<tr><td>b<td>2</table>"
    assert parse.read_html(long.encode()).splitlines()[99:] == ["a | 1"] * 51 + ["b | 2"]


def test_a_table_that_is_there_for_the_looks() -> None:
    page = "<table><tr><td>menu<td><table><tr><td>a<td>b</table><p>text</table>"
    lines = [line for line in parse.read_html(page.encode()).splitlines() if line]
    assert lines == ["menu", "a | b", "text"]


def test_preformatted_text_keeps_its_blank_lines() -> None:
    page = b"<p>before<pre>\n\na\n\n\n\n  b\n</pre>after"
    assert parse.read_html(page) == "before\n\na\n\n\n\n  b\n\nafter"


def test_tables_that_grow() -> None:
    cell = "<td rowspan=60000>" + "x" * 200
    page = "<table>" + ("<tr>" + cell * 500) * 2 + "<tr><td>" * 300_000
    with pytest.raises(parse.Unreadable, match="its tables make more than"):
        parse.read_html(page.encode())
    with pytest.raises(parse.Unreadable, match="within each other"):
        parse.read_html(b"<table><tr><td>" * 60)


@pytest.mark.parametrize(
    "piece",
    [
        *("<div>", "<p>", "<b><p>", "</x>", "<td>", "<tr>", "<pre>", "<svg>", "&amp;", "<a b=c>"),
        *("<math>", "<tbody>", "1<sup>"),
    ],
)
def test_the_cost_of_a_page_grows_with_its_size(piece: str) -> None:
    check_cost(piece, parse.read_html)


@pytest.mark.parametrize("piece", ["<meta ", "<meta charset", "<script", "<script>", "<!-- ", "<"])
def test_the_cost_of_finding_a_charset_grows_with_a_page(piece: str) -> None:
    check_cost(piece, lambda page: decode_html(page, ""))


def check_cost(piece: str, read: Callable[[bytes], str]) -> None:
    def cost(times: int) -> float:
        page = (piece * times).encode()
        start = time.process_time()
        read(page)
        return time.process_time() - start

    small = min(cost(10_000) for _ in range(3))
    assert cost(80_000) < 8 * 4 * small + 0.05


def test_pdf() -> None:
    data = pdf_of("First page", "Second page")
    assert parse.read_pdf(data) == ("First page\n\nSecond page", [])
    for bad, says in (
        (data[: len(data) // 2], "truncated"),
        (b"%PDF-1.4 nothing %%EOF", "damaged"),
        (encrypted("First page", "secret"), "encrypted"),
    ):
        with pytest.raises(parse.Unreadable, match=says):
            parse.read_pdf(bad)
    assert parse.read_pdf(encrypted("First page", "")) == ("First page", [])


FONT = b"/Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >>"


def stream(content: bytes, more: bytes = b"") -> bytes:
    return b"<< %s /Length %d >>\nstream\n%s\nendstream" % (more, len(content), content)


def text_at(text: bytes) -> bytes:
    return b"BT /F1 12 Tf 2 5 Td (%s) Tj ET" % text


def form_of(catalogue: bytes = b"") -> bytes:
    """A form with one field whose looks are stored, one without, and a note on the page."""
    box = b"/Type /XObject /Subtype /Form /BBox [0 0 200 20] /Resources << %s >>" % FONT
    field = b"<< /Type /Annot /Subtype /Widget /FT /Tx /F 4 /DA (/F1 12 Tf) %s >>"
    return pdf_of_objects(
        [
            b"<< /Type /Catalog /Pages 2 0 R %s /AcroForm << /Fields [5 0 R 7 0 R] /DR << %s >> "
            b"/DA (/F1 12 Tf) /XFA [(a) 9 0 R] >> >>" % (catalogue, FONT),
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources "
            b"<< %s >> /Annots [5 0 R 7 0 R 8 0 R] >>" % FONT,
            stream(b"BT /F1 12 Tf 72 720 Td (Name of the payer:) Tj ET"),
            field % b"/T (name) /V (Jane Doe) /Rect [200 715 400 735] /AP << /N 6 0 R >>",
            stream(text_at(b"Jane Doe"), box),
            field % b"/T (sum) /V (1234) /Rect [200 615 400 635]",
            b"<< /Type /Annot /Subtype /FreeText /F 4 /Rect [200 515 400 535] /DA (/F1 12 Tf) "
            b"/Contents (Paid) /AP << /N 10 0 R >> >>",
            stream(b"<xdp/>"),
            stream(text_at(b"Paid"), box),
        ]
    )


def test_what_is_filled_into_a_form_is_part_of_its_page() -> None:
    text, warnings = parse.read_pdf(form_of())
    assert (text.split(), warnings) == (
        ["Name", "of", "the", "payer:", "Jane", "Doe", "1234", "Paid"],
        [],
    )
    with pytest.raises(parse.Unreadable, match="dynamic form"):
        parse.read_pdf(form_of(b"/NeedsRendering true"))


def scan_of(*stamps: bytes) -> bytes:
    """A page for each stamp, which lies on a picture."""
    image = b"/Type /XObject /Subtype /Image /Width 1 /Height 1 /ColorSpace /DeviceGray"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"",
        stream(b"\0", image + b" /BitsPerComponent 8"),
    ]
    for stamp in stamps:
        objects += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R /Resources "
            b"<< %s /XObject << /I 3 0 R >> >> >>" % (len(objects) + 2, FONT),
            stream(b"q 612 0 0 792 0 0 cm /I Do Q " + stamp),
        ]
    kids = b" ".join(b"%d 0 R" % number for number in range(4, len(objects) + 1, 2))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(stamps))
    return pdf_of_objects(objects)


def test_pages_that_are_pictures_are_told() -> None:
    letter = text_at(b"A long letter, which is text. " * 5)
    text, warnings = parse.read_pdf(scan_of(letter, b"", text_at(b"No. 7")))
    assert text.splitlines()[-1] == "No. 7"
    assert warnings == ["2 of its 3 pages are pictures or drawings: text in them is not read"]
    with pytest.raises(parse.Unreadable, match="no text in it: its 2 pages are pictures"):
        parse.read_pdf(scan_of(b"", b""))


def test_what_lies_behind_the_end_of_a_pdf() -> None:
    data = pdf_of("First page")
    for behind in (b"", b"\n\n", bytes(4096), b"</body></html>"):
        assert parse.read_pdf(data + behind)[0] == "First page"
    # It was to replace some of what is before it: the text would be an older one.
    with pytest.raises(parse.Unreadable, match="the update behind its end is not whole"):
        parse.read_pdf(data + b"7 0 obj\n<< /Type /Page")


def test_a_page_that_is_listed_again_and_again() -> None:
    with pytest.raises(parse.Unreadable, match="same again and again: its first 200 pages"):
        parse.read_pdf(pdf_of("One page", times=10_000))
    pages = [f"Page {number} of a form" for number in range(300)]
    assert parse.read_pdf(pdf_of(*pages))[0] == "\n\n".join(pages)
    with pytest.raises(parse.Unreadable, match="30000 pages"):
        parse.read_pdf(pdf_of("One page", times=30_000))


def test_text_that_cannot_be_words() -> None:
    words, run = "all of these are words " * 40, "Toretrievethesourcecodeofapackageyouneed" * 20
    assert judged([words]) == []
    (warning,) = judged([words, run[:120]])
    assert "words of more than 30 letters" in warning
    with pytest.raises(parse.Unreadable, match="not what its pages show: 100%"):
        judged([run])
    with pytest.raises(parse.Unreadable, match="no meaning"):
        judged(["\ufffd" * 1000])
    assert judged(["\u6f22\u5b57" * 1000]) == []  # no blanks between words


def run_extract(folder: Path, data: bytes, media_type: str, limits: JobLimits = LIMITS) -> str:
    """What the process makes of a file; nothing may be left of it."""
    source, text = folder / "d.source", folder / "d.text"
    source.write_bytes(data)
    try:
        asyncio.run(extract(source, text, media_type, limits))
        return text.read_text()
    finally:
        assert {path.name for path in folder.iterdir()} <= {"d.source", "d.text"}


def test_the_process(tmp_path: Path) -> None:
    assert run_extract(tmp_path, pdf_of("In a process"), PDF) == "In a process"
    assert run_extract(tmp_path, b"<p>one</p><p>two", HTML) == "one\n\ntwo"


@pytest.mark.parametrize(
    ("data", "media_type", "says"),
    [
        (b" \n ", PLAIN, "no text"),
        (b"\xff\xff", PLAIN, "not UTF-8"),
        (b"%PDF-1.4 \n", PDF, "truncated"),
        (b"x" * 2000, PLAIN, "more than 1000"),
    ],
)
def test_the_process_says_why(tmp_path: Path, data: bytes, media_type: str, says: str) -> None:
    limits = JobLimits(max_text_bytes=1000)
    with pytest.raises(RequestError, match=says) as caught:
        run_extract(tmp_path, data, media_type, limits)
    assert caught.value.code == "unprocessable_document"


def test_a_bomb_kills_the_process_only(tmp_path: Path) -> None:
    limits = JobLimits(parse_memory_bytes=100 << 20)
    with pytest.raises(ParserCrashed):
        run_extract(tmp_path, b"a" * (60 << 20), PLAIN, limits)


def test_a_process_that_does_not_end(tmp_path: Path) -> None:
    limits = JobLimits(parse_timeout_s=0.01)
    with pytest.raises(ParserCrashed, match="no end"):
        run_extract(tmp_path, b"<p>a" * 100_000, HTML, limits)


def test_the_process_is_confined() -> None:
    for attempt in (
        *("socket.socket()", "os.system('true')", "os.kill(os.getppid(), 0)", "os.remove('x')"),
        *("open('/tmp/x', 'w')", "os.open('/tmp/x', os.O_WRONLY)"),
    ):
        program = (
            "import os, socket; from coordinator.jobs.parsing import parse; "
            f"parse._confine(1 << 30, 5, 1000); {attempt}"
        )
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        assert b"does not do this" in ended.stderr, attempt


def post_file(site: Site, name: str, data: bytes, **fields: str) -> httpx.Response:
    return site.client.post("/v1/documents", files={"file": (name, data)}, data=fields)


def upload(site: Site, name: str, data: bytes, **fields: str) -> str:
    """A document of an uploaded file."""
    reply = post_file(site, name, data, **fields)
    assert reply.status_code == 202, reply.text
    document_id: str = reply.json()["id"]
    return document_id


def test_files_become_documents(site: Site) -> None:
    text = "A page of text. " * 30
    document_id = upload(site, "../a report.pdf", pdf_of(text))
    found = site.wait(document_id)
    assert found["source"] == {"type": "file", "media_type": "application/pdf"}
    assert found["display_name"] == "a report.pdf"
    assert found["tokens"]["total"] == len(f"user: {text.strip()}")
    answer = site.ask(document_id, "What?", return_token_ids=True)
    assert b"A page of text." in bytes(answer["choices"][0]["prompt_token_ids"])
    assert "cache_miss" not in answer
    names = {p.name for p in (site.running.jobs.folder / "documents").glob(f"{document_id}*")}
    assert names == {f"{document_id}.text", f"{document_id}.tokens"}


def test_a_file_that_cannot_be_read_fails(site: Site) -> None:
    document_id = upload(site, "a.pdf", encrypted("a", "b"))
    error = site.wait(document_id, "failed")["error"]
    assert (error["code"], error["status"]) == ("unprocessable_document", 422)
    assert "encrypted" in error["message"]


def test_a_file_that_kills_its_reader_is_quarantined(tmp_path: Path) -> None:
    with start_site(tmp_path, jobs={"parse_memory_bytes": 100 << 20}) as site:
        document_id = upload(site, "a.txt", b"a" * (60 << 20))
        found = site.wait(document_id, "failed")
        assert found["error"]["code"] == "quarantined"
        warnings = [e["code"] for e in site.events(document_id) if e["type"] == "warning"]
        assert warnings == ["parser_crashed"] * 2
        site.wait(site.ingest(text="Others go on.")["id"])


def test_uploads_take_the_same_fields(site: Site) -> None:
    fields = {"display_name": "mine", "pin": '{"mode": "soft"}', "metadata": '{"a": 1}'}
    document_id = upload(site, "a.md", b"# A title\n" * 50, priority="3", **fields)
    found = site.wait(document_id)
    assert (found["display_name"], found["metadata"], found["priority"]) == ("mine", {"a": 1}, 3)
    assert (found["pin"]["mode"], found["source"]["media_type"]) == ("soft", "text/markdown")
    once = {"idempotency_key": "upload"}
    first, again = (post_file(site, "b.txt", b"the same", **once) for _ in range(2))
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["id"] == again.json()["id"]
    for name, data in (("c.txt", b"the same"), ("b.txt", b"another")):
        assert post_file(site, name, data, **once).status_code == 409
    site.wait(first.json()["id"])


@pytest.mark.parametrize(
    ("name", "data", "fields", "status", "code"),
    [
        ("a.zip", b"PK\x03\x04" + bytes(100), {}, 422, "unprocessable_document"),
        ("a.pdf", b"not one", {}, 422, "unprocessable_document"),
        ("a.txt", b"", {}, 422, "unprocessable_document"),
        ("a.txt", b"a", {"pin": "{"}, 400, "invalid_value"),
        ("a.txt", b"a", {"priority": "high"}, 400, "invalid_type"),
        ("a.txt", b"a", {"source": "b"}, 400, "invalid_type"),
    ],
)
def test_bad_uploads(
    site: Site, name: str, data: bytes, fields: dict[str, str], status: int, code: str
) -> None:
    before = {path.name for path in (site.running.jobs.folder / "documents").iterdir()}
    reply = post_file(site, name, data, **fields)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert {p.name for p in (site.running.jobs.folder / "documents").iterdir()} == before


def test_a_file_that_was_uploaded_before(site: Site) -> None:
    text = b"Kept for later. " * 30
    form = {"file": ("kept.txt", text)}
    file_id = site.client.post("/v1/files", files=form, data={"purpose": "user_data"}).json()["id"]
    document_id = site.ingest(file_id=file_id)["id"]
    assert site.client.delete(f"/v1/files/{file_id}").status_code == 200
    found = site.wait(document_id)
    assert found["display_name"] == "kept.txt"
    assert found["tokens"]["total"] == len("user: ") + len(text)
    gone = site.post(source={"file_id": file_id}).json()["error"]
    assert (gone["code"], gone["param"]) == ("file_not_found", "source")
    both = site.post(source={"file_id": file_id, "text": "a"}).json()["error"]
    assert both["code"] == "invalid_value"


def test_what_was_declared_with_an_earlier_upload_counts(site: Site) -> None:
    page = "<p>zażółć gęślą jaźń, many times over. ".encode("iso-8859-2") * 20
    part = ("page", page, "text/html; charset=ISO-8859-2")
    kept = site.client.post("/v1/files", files={"file": part}, data={"purpose": "user_data"}).json()
    listed = site.client.get("/v1/files").json()["data"]
    assert kept["id"] in {file["id"] for file in listed}
    found = site.wait(site.ingest(file_id=kept["id"])["id"])
    at_once = site.client.post("/v1/documents", files={"file": part}).json()
    assert found["source"]["media_type"] == "text/html"
    for document_id in (found["id"], at_once["id"]):
        site.wait(document_id)
        text = (site.running.jobs.folder / "documents" / f"{document_id}.text").read_text()
        assert text.startswith("zażółć gęślą jaźń")
    once = {"idempotency_key": "charset"}
    replies = [
        site.client.post("/v1/documents", files={"file": ("p.html", page, kind)}, data=once)
        for kind in ("text/html; charset=iso-8859-2", "text/html; charset=windows-1250")
    ]
    assert [reply.status_code for reply in replies] == [202, 409]
    site.wait(replies[0].json()["id"])


def test_the_fields_of_a_form() -> None:
    form = {
        "pin": '{"mode": "soft", "ttl": "2h"}',
        "metadata": '{"a": "1"}',
        "priority": "-3",
        "deadline": "10m",
        "cp": "2",
        "display_name": "5",
    }
    body = DocumentBody.model_validate(fields_of_form(form, Limits()))
    assert body.pin is not None and body.pin.mode == "soft"
    assert (body.metadata, body.priority, body.deadline) == ({"a": "1"}, -3, "10m")
    assert (body.cp, body.display_name) == ("2", "5")
    assert fields_of_form({"deadline": "1795000000"}, Limits()) == {"deadline": 1795000000}


@pytest.mark.parametrize("field", ["metadata", "pin"])
@pytest.mark.parametrize(
    "value",
    [
        *("{", "", "null", "[]", "3", '{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1e999}'),
        *('{"a": 1, "a": 2}', '{"a": "\\ud800"}', "\ufeff{}", '{"a":' * 40 + "1" + "}" * 40),
        *('{"a": ' + "9" * 5000 + "}", '{"a": 1}{}'),
    ],
)
def test_a_field_that_is_json_is_as_strict_as_a_body(site: Site, field: str, value: str) -> None:
    reply = post_file(site, "a.txt", b"some text", **{field: value})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("priority", v) for v in ("1e3", "NaN", "9" * 14, "-" + "9" * 30, "\u0663", "0x1", " 1")],
        *[("deadline", v) for v in ("NaN", "inf", "1e999", "-1", "9" * 400 + "h", "nanh", "infd")],
        *[("cp", v) for v in ("NaN", "3", "\u0662", "2.0", "-2")],
    ],
)
def test_a_field_that_is_a_number_is_one(site: Site, field: str, value: str) -> None:
    reply = post_file(site, "a.txt", b"some text", **{field: value})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("field", "text"),
    [
        *[("deadline", v) for v in ("9" * 400, "1e308", "1" + "0" * 308, '"1e400s"')],
        *[("priority", v) for v in ("9" * 400, "1.5", "true")],
        *[("pin", f'{{"mode": "soft", "ttl": {v}}}') for v in ("9" * 400, "1e308", '"9e999d"')],
        *[("metadata", v) for v in (f'{{"a": {"9" * 4400}}}', "[1]")],
    ],
)
def test_a_number_that_is_too_large_for_its_kind(site: Site, field: str, text: str) -> None:
    body = b'{"source": {"text": "a"}, "%s": %s}' % (field.encode(), text.encode())
    reply = site.client.post(
        "/v1/documents", content=body, headers={"content-type": "application/json"}
    )
    assert reply.status_code in (202, 400), reply.text
    if reply.status_code == 202:  # it is kept, and can be shown
        assert site.client.get(f"/v1/documents/{reply.json()['id']}").status_code == 200
    assert site.client.get("/v1/documents").status_code == 200


@pytest.mark.parametrize("value", ["NaN", "inf", "-1", "1e999", "\u0663", "0x2", "", "1" * 5000])
def test_numbers_of_a_query_and_a_header(site: Site, value: str) -> None:
    document_id = site.post(source={"text": "of a query"}).json()["id"]
    site.wait(document_id)
    asked = [("/v1/documents", {"limit": value}), ("/v1/files", {"limit": value})]
    asked.append(("/v1/batches", {"limit": value}))
    for path, query in asked:
        assert site.client.get(path, params=query).status_code in (200, 400)
    events = f"/v1/documents/{document_id}/events"
    for options in ({"params": {"starting_after": value}}, {"headers": {"last-event-id": value}}):
        if value.isascii():
            with site.client.stream("GET", events, **options) as reply:
                assert reply.status_code in (200, 400)
