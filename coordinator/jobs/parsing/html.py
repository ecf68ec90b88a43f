"""The text of a page, as its reader sees it: a line for each block, and for each row of a table.

The page is read as a stream of tags, without a tree: its cost grows with its size, however deeply
it is nested. Characters are decoded by the HTML standard's rules, the browser's own guess left out:
a byte order mark, the upload's charset, the page's, wherever it says it, and at last windows-1252.
What is raised, lowered or drawn is kept apart, since 10 to the power of 6 is not 106, and of a
formula its TeX is taken, if it is there.
"""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

import webencodings

from coordinator.jobs.parsing.formats import Unreadable

MAX_TABLES = 50  # within each other
MAX_COLUMNS, MAX_ROWS = 1000, 65534  # that a cell spans, by the HTML standard
MAX_REPEATED_CHARS = 200  # of a cell that belongs to several rows
MAX_EXPANSION, FREE_CHARS = 4, 1 << 20
_BLOCK_NAMES = """
    address article aside blockquote body caption dd details div dl dt fieldset figcaption figure
    footer form h1 h2 h3 h4 h5 h6 header hr html legend li main nav ol option p pre section
    summary table tbody tfoot thead title ul
"""
_BLOCKS = frozenset(_BLOCK_NAMES.split())
_UNSEEN_NAMES = "script style template noscript iframe object svg annotation-xml"
_UNSEEN = frozenset(_UNSEEN_NAMES.split())
# What begins here is no part of the number before it; what stands between the two.
_JOINTS = {"sup": "^", "sub": "_", "mn": " "}
_NUMBER = re.compile("[+\\-\u2212\u2013]?[0-9]")
_IN_LINE = frozenset({*_JOINTS, "math", "annotation", "span"})
_DRAWN_AGAIN = "katex-html"  # the class of a formula's second drawing
_ROW_GROUPS, _CELLS = ("thead", "tbody", "tfoot"), ("td", "th")
_TABLE_PARTS = frozenset({*_ROW_GROUPS, *_CELLS, "tr"})
_SPACES = re.compile(r"[ \t\r\f\v\n]+")
_NO_TAGS = re.compile(
    rb"<!--.*?(?:-->|$)|<(script|style|title|textarea)\b.*?(?:</\1|$)", re.DOTALL | re.IGNORECASE
)
_META = re.compile(rb"<meta[\s/][^>]{0,250}?charset\s*=\s*[\"']?\s*([^\s\"'/>;]+)", re.IGNORECASE)
_XML = re.compile(rb"^\s*<\?xml\s[^>]*?encoding\s*=\s*[\"']([^\"']+)", re.IGNORECASE)
# Labels by which pages use more characters than Python's codecs of these names have.
_WIDER = {"gbk": "gb18030", "euc-jp": "euc_jisx0213"}
_MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xfe\xff": "utf-16be", b"\xff\xfe": "utf-16le"}


def read_html(data: bytes, charset: str = "") -> str:
    """The text of a page.

    Args:
        data: the page.
        charset: that was declared with the upload; "" if none was.

    Raises:
        Unreadable: it is nested or expands too much.
    """
    page = decode_html(data, charset)
    reader = _Reader(FREE_CHARS + MAX_EXPANSION * len(page))
    reader.feed(page)
    reader.close()
    return reader.text()


def decode_html(data: bytes, charset: str) -> str:
    """The page's characters."""
    for mark, label in _MARKS.items():
        if data.startswith(mark):
            return _decoded(data[len(mark) :], label)
    label = charset or _declared(data)
    if label:
        return _decoded(data, label)
    try:
        return data.decode("utf-8")  # what is valid by chance is as good as never another
    except UnicodeDecodeError:
        return _decoded(data, "windows-1252")


def _declared(data: bytes) -> str:
    # Not in the first 1024 bytes only: browsers begin anew where they come upon it later.
    found = _META.search(_NO_TAGS.sub(b"", data)) or _XML.search(data)
    label = found[1].decode("ascii", "replace") if found else ""
    encoding = webencodings.lookup(label) if label else None
    if encoding is None:
        return ""
    # A page that could be read so far is not in UTF-16, whatever it says.
    return "utf-8" if encoding.name.startswith("utf-16") else label


def _decoded(data: bytes, label: str) -> str:
    encoding = webencodings.lookup(label)
    if encoding is None:
        raise Unreadable(f"the charset {label[:40]!r} is not known")
    try:
        text: str = encoding.codec_info.decode(data, "strict")[0]
    except UnicodeDecodeError:
        wider = _WIDER.get(encoding.name)
        return data.decode(wider, "replace") if wider else _replacing(encoding, data)
    return text


def _replacing(encoding: webencodings.Encoding, data: bytes) -> str:
    text: str = encoding.codec_info.decode(data, "replace")[0]
    return text


@dataclass
class _Flow:
    """Lines of text that follow one another: the page's, or a cell's."""

    lines: list[tuple[str, bool]] = field(default_factory=list)  # and whether they are verbatim
    line: list[str] = field(default_factory=list)
    has_table: bool = False

    def end_line(self, *, is_verbatim: bool) -> None:
        text = "".join(self.line)
        self.lines.append((text.rstrip() if is_verbatim else text.strip(), is_verbatim))
        self.line = []

    def add(self, piece: str) -> None:
        text = _SPACES.sub(" ", piece)
        starts_apart = not self.line or self.line[-1].endswith((" ", "\n"))
        self.line.append(text.lstrip() if starts_apart else text)


@dataclass
class _Table:
    """A table whose end has not come."""

    row: list[str] | None = None
    cell: _Flow | None = None
    spans: tuple[int, int] = (1, 1)  # columns and rows of the cell
    below: dict[int, tuple[int, str]] = field(default_factory=dict)  # column: rows left, text


class _Reader(HTMLParser):
    def __init__(self, max_chars: int) -> None:
        super().__init__(convert_charrefs=True)
        self._page = _Flow()
        self._tables: list[_Table] = []
        self._hidden, self._num_hidden = "", 0
        self._num_verbatim = 0
        self._begins_verbatim = False
        self._joint = ""
        self._formula = self._page, 0
        self._max_chars = max_chars
        self._num_chars = 0

    @property
    def _flow(self) -> _Flow:
        for table in reversed(self._tables):
            if table.cell is not None:
                return table.cell
        return self._page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._hidden:
            self._num_hidden += tag == self._hidden
        elif tag in _UNSEEN:
            self._hidden, self._num_hidden = tag, 1
        elif tag in _IN_LINE:
            self._begin_in_line(tag, dict(attrs))
        elif tag == "br":
            self._end_line()
        elif tag == "table":
            self._begin_table()
        elif tag in _TABLE_PARTS and self._tables:
            self._begin_table_part(tag, dict(attrs))
        elif tag in _BLOCKS:
            self._end_line()
            if tag == "pre":
                self._num_verbatim += 1
                self._begins_verbatim = True

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("br", "hr") or not (self._hidden or tag in _UNSEEN):
            self.handle_starttag(tag, attrs)  # in HTML the slash says nothing

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            self._num_hidden -= tag == self._hidden
            if not self._num_hidden:
                self._hidden = ""
        elif tag == "table" and self._tables:
            self._end_table()
        elif tag in _TABLE_PARTS and self._tables:
            self._end_table_part(tag)
        elif tag in _JOINTS:
            self._joint = " "
        elif tag in _BLOCKS:
            self._end_line()
            if tag == "pre" and self._num_verbatim:
                self._num_verbatim -= 1
            elif tag == "caption":
                self._end_line()

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        self._count(len(data))
        line, joint, self._joint = self._flow.line, self._joint, ""
        if joint and line and line[-1][-1:].isdigit() and _NUMBER.match(data):
            line.append(joint)
        if not self._num_verbatim:
            self._flow.add(data)
            return
        if self._begins_verbatim and data.startswith("\n"):
            data = data[1:]
        self._begins_verbatim = False
        first, *others = data.split("\n")
        line.append(first)
        for other in others:
            self._end_line()
            self._flow.line.append(other)

    def _begin_in_line(self, tag: str, attributes: dict[str, str | None]) -> None:
        if tag in _JOINTS:
            self._joint = _JOINTS[tag]
        elif tag == "math":
            self._formula = self._flow, len(self._flow.line)
            if source := attributes.get("alttext"):
                self.handle_data(source)
                self._hidden, self._num_hidden = tag, 1
        elif tag == "span":
            if _DRAWN_AGAIN in (attributes.get("class") or "").split():
                self._hidden, self._num_hidden = tag, 1
        elif attributes.get("encoding") != "application/x-tex":
            self._hidden, self._num_hidden = tag, 1
        else:  # it stands behind the drawing, and takes its place
            flow, start = self._formula
            if flow is self._flow:
                del flow.line[start:]

    def _end_line(self) -> None:
        self._flow.end_line(is_verbatim=self._num_verbatim > 0)

    def _count(self, num_chars: int) -> None:
        self._num_chars += num_chars
        if self._num_chars > self._max_chars:
            raise Unreadable(f"its tables make more than {self._max_chars} characters of it")

    # -- tables ------------------------------------------------------------------------------------

    def _begin_table(self) -> None:
        if len(self._tables) >= MAX_TABLES:
            raise Unreadable(f"more than {MAX_TABLES} tables lie within each other")
        self._end_line()
        self._flow.has_table = True
        self._tables.append(_Table())

    def _end_table(self) -> None:
        self._end_cell()
        self._end_row()
        self._tables.pop()
        self._end_line()

    def _begin_table_part(self, tag: str, attributes: dict[str, str | None]) -> None:
        if tag in _ROW_GROUPS:
            self._end_table_part(tag)
            return
        self._end_cell()
        if tag == "tr" or self._tables[-1].row is None:
            self._end_row()
            self._tables[-1].row = []
        if tag != "tr":
            self._begin_cell(attributes)

    def _end_table_part(self, tag: str) -> None:
        self._end_cell()
        if tag not in _CELLS:
            self._end_row()
        if tag in _ROW_GROUPS:  # no cell reaches down out of its group
            self._tables[-1].below.clear()

    def _begin_cell(self, attributes: dict[str, str | None]) -> None:
        table = self._tables[-1]
        self._add_from_above(table)
        num_rows = _span(attributes.get("rowspan"), MAX_ROWS)
        table.spans = max(1, _span(attributes.get("colspan"), MAX_COLUMNS)), num_rows or MAX_ROWS
        table.cell = _Flow()

    def _add_from_above(self, table: _Table) -> None:
        """Cells of earlier rows that reach down into this one."""
        assert table.row is not None, "a cell lies in a row"
        while (column := len(table.row)) in table.below:
            left, text = table.below.pop(column)
            self._count(len(text) + 3)
            table.row.append(text)
            if left > 1:
                table.below[column] = (left - 1, text)

    def _end_cell(self) -> None:
        table = self._tables[-1]
        cell = table.cell
        if cell is None:
            return
        cell.end_line(is_verbatim=False)
        table.cell = None
        assert table.row is not None, "a cell lies in a row"
        if cell.has_table:  # it is there for the page's looks: its lines stay lines
            self._end_row()
            table.row = []
            self._flow.lines += cell.lines
            return
        text = " ".join(line for line, _ in cell.lines if line)
        num_columns, num_rows = table.spans
        self._count(3 * num_columns)
        for column in range(num_columns):
            if num_rows > 1:
                below = text if column == 0 and len(text) <= MAX_REPEATED_CHARS else ""
                table.below[len(table.row)] = (num_rows - 1, below)
            table.row.append(text if column == 0 else "")

    def _end_row(self) -> None:
        table = self._tables[-1]
        if table.row is None:
            return
        self._add_from_above(table)
        if any(table.row):
            self._flow.line.append(" | ".join(table.row))
            self._flow.end_line(is_verbatim=False)
        table.row = None

    def text(self) -> str:
        """The whole text; between blocks there is at most one empty line."""
        while self._tables:
            self._end_table()
        self._end_line()
        lines: list[str] = []
        for line, is_verbatim in self._page.lines:
            if line or is_verbatim or (lines and lines[-1]):
                lines.append(line)
        return "\n".join(lines).strip("\n")


def _span(given: str | None, most: int) -> int:
    """How far a cell spans; 0 of rows is to the end of their group."""
    found = re.match(r"\s*\+?([0-9]{1,8})", given or "")
    return min(most, int(found[1])) if found else 1
