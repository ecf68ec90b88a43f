"""``baton ingest``, ``jobs``, ``ask``, ``trace`` and ``top`` against a fake server."""

import io
import json
import os
import pty
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from baton_client import BatonConnectionError, Document
from baton_client.types import TokenCounts
from launcher.__main__ import build_parser, main
from launcher.cli.job_commands import run
from launcher.cli.job_views import IngestView
from launcher.cli.live_view import watch
from tests.coordinator.client.fake_server import FakeServer, running
from tests.coordinator.client.fake_state import PATH, State


@pytest.fixture(scope="module")
def running_server() -> Iterator[FakeServer]:
    with running() as server:
        yield server


@pytest.fixture
def server(running_server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """As if it had just begun, and named by the environment."""
    running_server.state = State()
    monkeypatch.setenv("BATON_URL", running_server.url)
    monkeypatch.delenv("BATON_API_KEY", raising=False)
    return running_server


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "report.txt"
    path.write_text("one two three four")
    return path


def _quickly(*arguments: str) -> int:
    return run(build_parser().parse_args(arguments), poll_s=0.001)


def test_ingest_without_waiting(
    server: FakeServer, document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--name", "a name", "--pin", "hard", "--ttl", "2h", "--no-wait"]
    assert main(["ingest", str(document), *flags]) == 0
    told = capsys.readouterr()
    (document_id,) = server.state.documents
    assert (told.out, told.err) == (f"{document_id}\n", "")
    (seen,) = server.state.seen
    assert seen.file == ("report.txt", b"one two three four")
    assert seen.body == {"display_name": "a name", "pin": '{"mode":"hard","ttl":"2h"}'}


def test_ingest_waits_and_tells(
    server: FakeServer, document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _quickly("ingest", str(document)) == 0
    told = capsys.readouterr()
    (document_id,) = server.state.documents
    assert told.out == f"{document_id}\n"
    *lines, last = told.err.splitlines()
    assert [line.split()[1] for line in lines] == [
        "tokenizing", "prefilling", "prefilling", "storing", "ready"
    ]  # fmt: skip
    assert lines[2].endswith("prefilling 2/4 tokens, 1000 tok/s, 0s left, ring of 2")
    assert last.startswith("ready after ")
    assert "4 tokens, 0 computed, 0 found" in last


def test_a_document_that_fails(
    server: FakeServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    server.state.fails = True
    assert _quickly("ingest", "-") == 1
    told = capsys.readouterr()
    (document_id,) = server.state.documents
    assert told.out == ""
    assert told.err.splitlines()[-1] == f"error: {document_id} is failed: no text in it"
    server.state.is_stuck = True
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"another")))
    assert _quickly("ingest", "-", "--timeout", "0.01") == 1
    assert "not done after" in capsys.readouterr().err


def test_the_bar_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    with IngestView(Console(file=file, force_terminal=True, width=100)) as view:
        tokens = TokenCounts(total=1000, done=500)
        view.show(
            Document("doc_1", "prefilling", tokens=tokens, rate_tok_s=5.0, eta_s=100.0, ring_size=2)
        )
    assert "500/1000 tokens, 5 tok/s, 1m40s left, ring of 2" in file.getvalue()


def test_jobs(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs"]) == 0
    assert capsys.readouterr().out == "no documents and no batches\n"
    document_id = server.state.make_document("a [name]", 100, {"mode": "soft"})
    other_id = server.state.make_document("b", 100, {})
    server.state.documents[other_id].update(status="failed", error={"message": "too bad"})
    server.state.batches["batch_1"] = {
        "id": "batch_1", "status": "in_progress", "endpoint": "/v1/completions",
        "request_counts": {"total": 9, "completed": 4, "failed": 1},
    }  # fmt: skip
    assert main(["jobs"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.split()]
    assert [document_id, "queued", "100", "0%", "soft", "a", "[name]"] in rows
    assert [other_id, "failed", "100", "0%", "b:", "too", "bad"] in rows
    assert ["batch_1", "in_progress", "9", "4", "1", "/v1/completions"] in rows
    for job_id in (other_id, "batch_1"):
        assert main(["jobs", "retry", job_id]) == 0
        assert capsys.readouterr().out.split()[0] == job_id
    assert [one.path for one in server.state.seen[-2:]] == [
        f"/v1/documents/{other_id}/resume", "/v1/batches/batch_1/retry"
    ]  # fmt: skip
    server.state.offers_batches = False
    assert main(["jobs", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [found["id"] for found in data["documents"]] == [other_id, document_id]
    assert data["batches"] == []


def test_ask(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    document_id = server.state.make_document(None, 4, {})
    flags = ["--document", document_id, "--session", "s", "--max-tokens", "7"]
    assert main(["ask", "evicted", *flags]) == 0
    told = capsys.readouterr()
    assert told.out == f"{document_id} asked: evicted \n"
    (line,) = told.err.splitlines()
    assert line.startswith("7 prompt tokens (3 cached, 4 computed), 4 answered, ")
    assert "2 cached tokens missed: evicted, first token " in line
    assert line.endswith(f"; {PATH}; baton trace answer-1")
    body = server.state.seen[0].body
    assert (body["session_id"], body["max_tokens"]) == ("s", 7)


@pytest.mark.usefixtures("server")
def test_trace_and_top(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "answer-1"]) == 0
    shown = capsys.readouterr().out
    assert PATH in shown
    assert "prefill on the ring" in shown
    assert "470 ms" in shown
    assert "moved 5 MB by tcp in 2 segments" in shown
    assert main(["top", "--once"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()]
    assert ["prefill0", "ready", "2", "1", "1234", "0", "0", "0"] in rows
    blocks = next(row for row in rows if row[-5:] == ["100", "60", "10", "5", "25"])
    assert blocks[1].count("█") == 13  # 40 of 100, of 30
    assert len([row for row in rows if row[0].startswith(("prefill0/", "decode0/"))]) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ingest", "/no/such/file"], ["/no/such/file: No such file"]),
        (["ingest", "."], ["."]),
        (["ask", "why?", "--document", "doc_none"], ["no such document (404 document_not_found)"]),
        (["trace", "unknown"], ["no such request"]),
        (["trace", ""], ["not an id"]),
        (["jobs", "--url", "http://127.0.0.1:9"], ["no server at http://127.0.0.1:9", "BATON_URL"]),
        (["jobs", "retry"], ["retry", "ID"]),
        (["top", "--url", "nonsense"], ["nonsense", "http://"]),
        (["top", "--url", "http://127.0.0.1:9"], ["no server"]),
    ],
)
@pytest.mark.usefixtures("server")
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_keys(
    server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.state.api_key = "secret"
    assert main(["jobs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: no such API key (401 invalid_api_key): set BATON_API_KEY"
    monkeypatch.setenv("BATON_API_KEY", "secret")
    assert main(["jobs"]) == 0


@pytest.mark.usefixtures("server")
def test_an_answer_that_breaks_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "fail"]) == 2
    told = capsys.readouterr()
    assert told.out == "you \n"
    assert told.err == "error: the pool is gone (503 worker_lost)\n"


def test_a_view_bears_a_server_that_is_away() -> None:
    num_drawn = 0

    def draw() -> str:
        nonlocal num_drawn
        num_drawn += 1
        if num_drawn in (2, 3):
            raise BatonConnectionError("away")
        if num_drawn == 5:
            raise KeyboardInterrupt
        return f"picture {num_drawn}"

    file = io.StringIO()
    watch(Console(file=file), draw, 0.0)
    assert file.getvalue().splitlines() == [
        "picture 1", "picture 1", "as it was: away", "picture 1", "as it was: away", "picture 4"
    ]  # fmt: skip


def test_q_ends_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    file = io.StringIO()
    num_drawn = 0

    def draw() -> str:
        nonlocal num_drawn
        num_drawn += 1
        if num_drawn == 3:
            os.write(ours, b"xyq")
        return f"picture {num_drawn}"

    with open(theirs) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        before = termios.tcgetattr(terminal)
        watch(
            Console(file=file, force_terminal=True, width=80, height=24, highlight=False),
            draw,
            0.01,
        )
        assert termios.tcgetattr(terminal) == before
    os.close(ours)
    assert "picture 3" in file.getvalue()
