"""The page: complete, self-contained, and safe whatever a server has answered."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from bench.load.record import Manifest, RequestRecord, write_run
from bench.report.build import build_report
from bench.report.drawing.plot import Line
from bench.report.drawing.svg import NARROW, WIDE, draw
from bench.report.page import render
from bench.report.runs import Run, load_runs
from tests.bench.example import sample_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=y>\"'&\x00\x1b]\ud800"
SECTIONS = ["summary", "load", "latency", "phases", "documents", "time", "requests"]


class _Page(HTMLParser):
    """What a browser would see of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def ids(self, tag: str) -> list[str]:
        return [attrs["id"] or "" for name, attrs in self.tags if name == tag and "id" in attrs]


def _manifest(**changes: object) -> Manifest:
    manifest, _ = sample_run(0, 2.0, 1.0)
    changes = {"valid": True, "invalid_reasons": [], **changes}
    return msgspec.structs.replace(manifest, **changes)


def test_every_section_is_there(simulated: list[Run]) -> None:
    page = _Page(render(build_report(simulated)))
    assert page.ids("section") == SECTIONS
    for words in ("SLO attainment against rate", "Goodput per accelerator", "interactivity"):
        assert words in page.text
    for words in ("TTFT: the tail", "TTFT against prompt length", "Where the time to the second"):
        assert words in page.text
    for words in ("Requests around the slowest one", "Requests in each pool", "n too small"):
        assert words in page.text


def test_nothing_is_loaded(simulated: list[Run]) -> None:
    text = render(build_report(simulated))
    page = _Page(text)
    loading = {"src", "srcset", "data", "poster", "action", "background", "xlink:href"}
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "img", "base", "form", "use"}
        assert not loading & attributes.keys(), (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|https?://", text)


def test_every_drawing_is_valid_xml_at_both_widths(simulated: list[Run]) -> None:
    plots = build_report(simulated).plots
    assert len({plot.key for plot in plots}) == len(plots) >= 20
    for plot in plots:
        for width in (WIDE, NARROW):
            text = ElementTree.tostring(draw(plot, width), encoding="unicode")
            root = ElementTree.fromstring(text)
            assert root.tag == "svg"
            assert root.get("aria-label") == plot.title
            assert "nan" not in text.lower().replace("tenant", "")
            assert all(inside(element, width) for element in root.iter("text")), plot.key


def inside(element: ElementTree.Element, width: int) -> bool:
    return 0.0 <= float(element.get("x", "0")) <= width


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    manifest, records = sample_run(0, 4.0, 6.0)
    names = {"disaggregated": HOSTILE[:-1], "colocated": "b"}
    clean = HOSTILE[:-1]
    hostile = [
        msgspec.structs.replace(
            record,
            target=names[record.target],
            kind=clean,
            session=clean,
            request_id=clean,
            error_code=clean,
            outcome="http_error" if record.index % 5 == 0 else record.outcome,
        )
        for record in records
    ]
    targets = [{"name": name, "url": clean, "model": clean} for name in names.values()]
    changed = msgspec.structs.replace(
        manifest,
        targets=targets,
        command=clean,
        workload={clean: clean},
        environment={"cpu": clean},
        invalid_reasons=[clean],
    )
    write_run(tmp_path / "run", changed, hostile)
    text = render(build_report(load_runs([tmp_path])))
    page = _Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [attrs for tag, attrs in page.tags if tag == "img" or "onerror" in attrs]
    assert "\x00" not in text
    assert "\x1b" not in text


def test_lone_surrogates_do_not_break_the_file(tmp_path: Path) -> None:
    run = Run(tmp_path, _manifest(command=HOSTILE), sample_run(0, 4.0, 4.0)[1])
    (tmp_path / "report.html").write_text(render(build_report([run])), encoding="utf-8")


def _all_failed(records: list[RequestRecord]) -> Iterator[RequestRecord]:
    for record in records:
        yield RequestRecord(
            record.target,
            record.index,
            record.session,
            record.turn,
            record.kind,
            record.intended_s,
            record.sent_s,
            num_prompt_tokens=record.num_prompt_tokens,
            outcome="refused",
        )


@pytest.mark.parametrize("case", ["empty", "failed", "one", "unsent", "no slo", "foreign"])
def test_small_and_broken_runs_have_a_page(case: str, tmp_path: Path) -> None:
    _, records = sample_run(0, 4.0, 6.0)
    slo = None if case == "no slo" else _manifest().slo
    chosen = {
        "empty": [],
        "failed": list(_all_failed(records)),
        "one": records[:1],
        "unsent": [msgspec.structs.replace(r, outcome="unsent") for r in _all_failed(records)],
        "no slo": records,
        "foreign": [msgspec.structs.replace(r, timeline=None, path="") for r in records],
    }[case]
    report = build_report([Run(tmp_path, _manifest(slo=slo), chosen)])
    page = _Page(render(report))
    assert "summary" in page.ids("section")
    for plot in report.plots:
        for width in (WIDE, NARROW):
            ElementTree.fromstring(ElementTree.tostring(draw(plot, width)))
    if case == "empty":
        assert "no request was recorded" in page.text
    if case == "no slo":
        assert "SLO attainment against rate" not in page.text
    if case == "foreign":
        assert "told no time lines" in page.text
    if case == "failed":
        assert "refused" in page.text


def test_a_page_stays_small_however_many_requests_there_are() -> None:
    small = sample_run(0, 4.0, 20.0)
    large = sample_run(0, 40.0, 60.0)
    sizes = [len(render(build_report([Run(Path("run"), *run)]))) for run in (small, large)]
    assert len(large[1]) > 20 * len(small[1])
    assert sizes[1] < 1_200_000
    assert sizes[1] < 4 * sizes[0]


def test_a_deadline_far_above_every_request_is_told_instead_of_drawn(simulated: list[Run]) -> None:
    far = {"default": {"ttft_s": 900, "target": 0.9}}
    run = Run(Path("run"), _manifest(slo=far), simulated[0].records)
    plots = [p for p in build_report([run]).plots if p.key.startswith("ttft-length")]
    assert len(plots) == 2
    for plot in plots:
        assert all(layer.name != "deadline" for layer in plot.layers if isinstance(layer, Line))
        assert "The deadline lies above the drawing" in plot.note
