"""Both clients against a server that breaks where it is told to."""

import time
from pathlib import Path

import pytest

from baton_client import (
    BatonAPIError,
    BatonConnectionError,
    Client,
    InvalidCall,
    JobFailed,
    Retry,
    ServerEvent,
    ServerNotFound,
    WaitTimeout,
)
from tests.coordinator.client.conftest import Connect
from tests.coordinator.client.fake_server import FakeServer
from tests.coordinator.client.fake_state import PATH, Fault

TEXT = "one two three four"
WORDS = ["queued", "tokenizing", "prefilling", "prefilling", "storing", "ready"]


def test_a_document_is_ingested_and_asked(client: Client, server: FakeServer) -> None:
    document = client.documents.create(text=TEXT, name="n", pin="soft", ttl="2h")
    assert (document.status, document.pin.mode) == ("queued", "soft")
    seen: list[str] = []
    ready = client.documents.wait(document.id, 10.0, lambda found: seen.append(found.status))
    assert seen == WORDS[1:]
    assert (ready.is_usable, ready.fraction_done, ready.display_name) == (True, 1.0, "n")
    counts: list[tuple[int, int]] = []
    with client.ask(
        "and?",
        document_id=document.id,
        session_id="s",
        max_tokens=9,
        on_prefill=lambda *given: counts.append(given),
    ) as answer:
        pieces = list(answer)
    assert pieces == [f"{document.id} ", "asked: ", "and? "]
    outcome = answer.outcome
    assert outcome.usage is not None
    assert (outcome.usage.cached_tokens, outcome.path, outcome.request_id) == (3, PATH, "r1")
    assert outcome.first_token_s is not None
    assert 0 < outcome.first_token_s <= outcome.total_s
    assert counts == [(3, 7)]
    sent = server.state.seen[-1].body
    assert (sent["session_id"], sent["max_tokens"], sent["stream"]) == ("s", 9, True)


def test_a_file_is_uploaded_as_it_is(client: Client, server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "a report.txt"
    path.write_text(TEXT)
    by_path = client.documents.create(file=path, pin="hard", ttl=60.0, metadata={"k": "v"})
    with path.open("rb") as file:
        by_handle = client.documents.create(file=file)
    by_bytes = client.documents.create(file=TEXT.encode(), filename="b.md")
    assert [d.display_name for d in (by_path, by_handle, by_bytes)] == [
        path.name,
        path.name,
        "b.md",
    ]
    assert {d.tokens.total for d in (by_path, by_handle, by_bytes)} == {4}
    assert by_path.pin.mode == "hard"
    first = server.state.seen[0]
    assert first.file == (path.name, TEXT.encode())
    assert first.body == {"metadata": '{"k":"v"}', "pin": '{"mode":"hard","ttl":60.0}'}


def test_the_other_calls_of_documents(client: Client, server: FakeServer) -> None:
    document = client.documents.create(token_ids=[1, 2], idempotency_key="k")
    assert client.documents.create(token_ids=[1, 2], idempotency_key="k").id == document.id
    assert client.documents.cancel(document.id).status == "cancelled"
    with pytest.raises(JobFailed, match="is cancelled"):
        client.documents.wait(document.id)
    assert client.documents.resume(document.id).is_pending
    client.documents.wait(document.id)
    with pytest.raises(BatonAPIError, match="the document is ready") as caught:
        client.documents.cancel(document.id)
    assert (caught.value.code, caught.value.status) == ("not_cancellable", 409)
    assert client.documents.rewarm(document.id).is_pending
    updated = client.documents.update(document.id, pin="none", metadata={"k": "v"})
    assert (updated.pin.mode, updated.metadata) == ("none", {"k": "v"})
    assert [found.id for found in client.documents.list(limit=5, after="x").data] == [document.id]
    assert server.state.seen[-1].query == {"limit": "5", "after": "x"}
    assert client.documents.delete(document.id).deleted
    with pytest.raises(BatonAPIError, match="no such document"):
        client.documents.get(document.id)


def test_events_come_once_over_broken_connections(client: Client, server: FakeServer) -> None:
    document = client.documents.create(text=TEXT)
    server.state.cuts.extend([0, 1, 0, 2])
    events = list(client.documents.events(document.id, timeout_s=10.0))
    assert [event.sequence_number for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.status for event in events if event.type == "state"] == [
        "queued", "tokenizing", "prefilling", "storing", "ready"
    ]  # fmt: skip
    progress = events[3]
    assert progress.tokens is not None
    assert (progress.tokens.done, progress.ring_size, progress.data["eta_s"]) == (2, 2, 0.5)
    asked = [seen.query["starting_after"] for seen in server.state.seen if "events" in seen.path]
    assert asked == ["0", "0", "1", "1", "3"]
    rest = client.documents.events(document.id, starting_after=4)
    assert [event.sequence_number for event in rest] == [5, 6]


def test_a_wait_outlives_a_server_that_is_away(client: Client, server: FakeServer) -> None:
    document = client.documents.create(text=TEXT)

    def fail_often(_: object) -> None:
        if len(server.state.seen) < 5:
            server.state.faults.extend([Fault(), Fault(503), Fault(), Fault(502), Fault()])

    assert client.documents.wait(document.id, 10.0, fail_often).status == "ready"
    assert len(server.state.seen) > 8


def test_waits_have_budgets(client: Client, server: FakeServer) -> None:
    server.state.is_stuck = True
    document = client.documents.create(text=TEXT)
    with pytest.raises(WaitTimeout, match=f"{document.id}: not done after 0 s"):
        client.documents.wait(document.id, timeout_s=0.05)
    with pytest.raises(TimeoutError):
        list(client.documents.events(document.id, timeout_s=0.05))
    server.state.is_stuck, server.state.fails = False, True
    with pytest.raises(JobFailed, match="is failed: no text in it") as caught:
        client.documents.wait(document.id)
    assert caught.value.job.error.code == "unprocessable_document"


def test_reads_and_keyed_writes_are_tried_again(client: Client, server: FakeServer) -> None:
    faults, seen = server.state.faults, server.state.seen
    faults.extend([Fault(503), Fault()])
    assert client.cluster().ready
    faults.extend([Fault(), Fault(429, retry_after="0")])
    document = client.documents.create(text=TEXT)
    keys = {request.headers["idempotency-key"] for request in seen[3:]}
    assert (len(seen), len(keys), len(server.state.documents)) == (6, 1, 1)
    faults.extend([Fault(503)] * 3)
    with pytest.raises(BatonAPIError, match="not now") as caught:
        client.documents.get(document.id)
    assert (caught.value.request_id, caught.value.retry_after) == ("r1", 1.0)
    assert len(seen) == 9


def test_what_would_be_computed_twice_is_sent_once(client: Client, server: FakeServer) -> None:
    for fault, error in ((Fault(503), BatonAPIError), (Fault(), BatonConnectionError)):
        for call in (
            lambda: client.chat([{"role": "user", "content": "a"}]),
            lambda: client.complete("a"),
            lambda: client.ask("a").read(),
            lambda: client.files.create(b"{}"),
            lambda: client.documents.delete("doc_1"),
        ):
            server.state.seen.clear()
            server.state.faults.append(fault)
            with pytest.raises(error):
                call()
            assert len(server.state.seen) == 1


def test_a_long_pause_is_not_slept_when_the_budget_does_not_allow_it(
    server: FakeServer, connect: Connect
) -> None:
    server.state.faults.extend([Fault(503, retry_after="60")] * 3)
    started = time.monotonic()
    client = connect(server.url, timeout_s=1.0, retry=Retry(max_delay_s=90.0))
    with client, pytest.raises(BatonAPIError):
        client.cluster()
    assert time.monotonic() - started < 1.0


def test_answers_whole_and_streamed(client: Client) -> None:
    messages = [{"role": "user", "content": "hi"}]
    chat = client.chat(messages, temperature=0)
    assert (chat.text, chat.path, chat.request_id) == ("you asked: hi ", PATH, "r1")
    with client.chat_stream(messages) as stream:
        assert "".join(chunk.text for chunk in stream) == chat.text
    assert stream.outcome.finish_reason == "stop"
    completion = client.complete("a", max_tokens=4)
    assert (completion.text, completion.finish_reason) == ("a and so on", "length")
    with client.complete_stream("a") as pieces:
        assert "".join(piece.text for piece in pieces) == completion.text
    assert pieces.outcome.usage == completion.usage
    with client.chat_stream(messages, request_id="mine") as stream:
        assert stream.read() == chat.text
    assert client.ask("evicted").read().startswith("you")


def test_events_unread(client: Client) -> None:
    body = {"prompt": "a", "stream": True}
    before = time.monotonic()
    with client.events("/v1/completions", body) as events:
        found = list(events)
    assert (events.request_id, events.path) == ("r1", PATH)
    times = [at for at, _ in found]
    assert before < times[0] and times == sorted(times)
    datas = [event.data for _, event in found if isinstance(event, ServerEvent)]
    assert len(found) == len(datas) + 1, "a comment"
    assert all(data.startswith(b"{") for data in datas)


def test_half_an_answer_is_an_error(client: Client) -> None:
    for question, error in (("fail", BatonAPIError), ("break", BatonConnectionError)):
        taken: list[str] = []
        with client.ask(question) as answer, pytest.raises(error):
            taken.extend(answer)
        assert taken == ["you "]
        assert answer.outcome.usage is None
    answer = client.ask("evicted")
    answer.read()
    miss = answer.outcome.cache_miss
    assert miss is not None
    assert (miss.reason, miss.missed_tokens) == ("evicted", 2)


def test_files_and_batches(client: Client) -> None:
    lines = b'{"custom_id":"a"}\n{"custom_id":"b"}\n'
    file = client.files.create(lines, filename="in.jsonl")
    assert (file.filename, file.bytes, file.purpose) == ("in.jsonl", len(lines), "batch")
    assert client.files.content(file.id) == lines
    batch = client.batches.create(file.id, metadata={"k": "v"})
    seen: list[str] = []
    done = client.batches.wait(batch.id, 10.0, lambda found: seen.append(found.status))
    assert seen == ["in_progress", "finalizing", "completed"]
    assert done.output_file_id is not None
    assert done.request_counts is not None
    assert done.request_counts.completed == 2
    assert client.files.content(done.output_file_id) == lines
    assert [found.id for found in client.batches.list().data] == [batch.id]
    other = client.batches.create(file.id)
    assert client.batches.cancel(other.id).status == "cancelled"
    with pytest.raises(JobFailed, match="is cancelled"):
        client.batches.wait(other.id)
    assert client.files.delete(file.id).deleted
    assert len(client.files.list().data) == 1
    with pytest.raises(BatonAPIError, match="no such file"):
        client.files.get(file.id)


def test_the_cluster_and_a_time_line(client: Client) -> None:
    cluster = client.cluster()
    assert [pool.pool_id for pool in cluster.pools] == ["prefill0", "decode0"]
    assert cluster.pools[1].blocks[0].cached == 25
    (sequence,) = client.timeline("r1").requests
    assert (sequence.events["finished"], sequence.path) == (1.0, PATH)
    assert sequence.transfer is not None
    assert sequence.transfer.num_bytes == 5_000_000


def test_keys(server: FakeServer, connect: Connect) -> None:
    server.state.api_key = "secret"
    with connect(server.url, api_key="secret") as client:
        assert client.cluster().ready
    for key in (None, "wrong"):
        with connect(server.url, api_key=key) as client, pytest.raises(BatonAPIError) as caught:
            client.cluster()
        assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    with pytest.raises(InvalidCall, match="API key"):
        connect(server.url, api_key="two\nlines")


def test_no_server_and_no_url(connect: Connect) -> None:
    with connect("http://127.0.0.1:9", retry=Retry(max_attempts=1)) as client:
        with pytest.raises(ServerNotFound, match="no server at http://127"):
            client.documents.wait("doc_1")
        with pytest.raises(BatonConnectionError):
            list(client.documents.events("doc_1"))
        with pytest.raises(InvalidCall):
            client.documents.get("")
    for url in ("", "127.0.0.1:8000", "ftp://host", "http://"):
        with pytest.raises(InvalidCall):
            connect(url)
