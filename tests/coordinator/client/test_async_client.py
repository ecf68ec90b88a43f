"""The asynchronous client: the same calls, on an event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator.client import (
    AsyncClient,
    BatonAPIError,
    BatonConnectionError,
    JobFailed,
    Retry,
    WaitTimeout,
)
from tests.coordinator.client.conftest import QUICK
from tests.coordinator.client.fake_server import FakeServer
from tests.coordinator.client.fake_state import PATH, Fault


@asynccontextmanager
async def _client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, timeout_s=10.0, poll_s=0.001, retry=QUICK) as client:
        yield client


def test_a_document_from_upload_to_answer(server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one two three")

    async def scenario() -> None:
        async with _client(server) as client:
            server.state.faults.extend([Fault(), Fault(503)])
            document = await client.documents.create(file=path, pin="soft", ttl="1h")
            assert len(server.state.documents) == 1
            server.state.cuts.extend([0, 1, 2])
            events = [event async for event in client.documents.events(document.id)]
            assert [event.sequence_number for event in events] == [1, 2, 3, 4, 5, 6]
            seen: list[str] = []
            await client.documents.wait(document.id, 10.0, lambda found: seen.append(found.status))
            assert seen == ["ready"]
            async with await client.ask("and?", document_id=document.id) as answer:
                assert await answer.read() == f"{document.id} asked: and? "
            assert answer.outcome.path == PATH
            assert (await client.documents.list()).data[0].id == document.id
            assert (await client.documents.update(document.id, pin="none")).pin.mode == "none"
            assert (await client.documents.rewarm(document.id)).is_pending
            assert (await client.documents.cancel(document.id)).status == "cancelled"
            assert (await client.documents.resume(document.id)).is_pending
            assert (await client.documents.delete(document.id)).deleted

    asyncio.run(scenario())


def test_failures_and_budgets(server: FakeServer) -> None:
    async def scenario() -> None:
        async with _client(server) as client:
            document = await client.documents.create(text="one two")
            server.state.faults.extend([Fault(), Fault(503)])
            server.state.is_stuck = True
            with pytest.raises(WaitTimeout):
                await client.documents.wait(document.id, timeout_s=0.05)
            with pytest.raises(WaitTimeout):
                async for _ in client.documents.events(document.id, timeout_s=0.05):
                    pass
            server.state.is_stuck, server.state.fails = False, True
            with pytest.raises(JobFailed, match="no text in it"):
                await client.documents.wait(document.id)
            with pytest.raises(BatonAPIError, match="no such document"):
                await client.ask("a", document_id="doc_none")
            for question, error in (("fail", BatonAPIError), ("break", BatonConnectionError)):
                async with await client.ask(question) as answer:
                    with pytest.raises(error):
                        await answer.read()
            server.state.seen.clear()
            server.state.faults.append(Fault(503))
            with pytest.raises(BatonAPIError):
                await client.complete("a")
            assert len(server.state.seen) == 1
        async with AsyncClient("http://127.0.0.1:9", retry=Retry(max_attempts=1)) as nobody:
            with pytest.raises(BatonConnectionError, match="no server"):
                await nobody.cluster()

    asyncio.run(scenario())


def test_everything_else(server: FakeServer) -> None:
    async def scenario() -> None:
        async with _client(server) as client:
            messages = [{"role": "user", "content": "hi"}]
            text = (await client.chat(messages)).text
            async with await client.chat_stream(messages) as stream:
                assert "".join([chunk.text async for chunk in stream]) == text
            completed = await client.complete("a")
            async with await client.complete_stream("a") as pieces:
                assert "".join([piece.text async for piece in pieces]) == completed.text
            file = await client.files.create(b"{}\n", filename="in.jsonl")
            assert (await client.files.get(file.id)).bytes == 3
            batch = await client.batches.create(file.id)
            done = await client.batches.wait(batch.id)
            assert done.output_file_id is not None
            assert await client.files.content(done.output_file_id) == b"{}\n"
            assert len((await client.files.list()).data) == 2
            assert (await client.files.delete(file.id)).deleted
            assert (await client.batches.list()).data[0].id == batch.id
            assert (await client.batches.get(batch.id)).status == "completed"
            assert (await client.batches.cancel(batch.id)).status == "cancelled"
            assert (await client.cluster()).ready
            assert (await client.timeline("r1")).requests[0].path == PATH

    asyncio.run(scenario())
