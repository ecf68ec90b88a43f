"""Document jobs without HTTP and without a cluster, for a test that kills the process.

    python -P documents_child.py FOLDER

A line of standard input is a document to make: ``{"key": ..., "text": ..., "is_file": ...}``. It is
answered when it is durable. ``{"finish": true}`` answers with all documents when all have ended.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from coordinator.config import CoordinatorConfig, ExpectedPool, JobLimits
from coordinator.jobs.context import Jobs, Surroundings
from coordinator.jobs.document import Document
from coordinator.jobs.document_table import Idempotency
from coordinator.jobs.documents import Documents, Source, new_id
from coordinator.jobs.ingestor import SimulatedIngestor
from coordinator.jobs.states import PENDING
from coordinator.tokenizing import Tokenization
from modeling.config import load_config

BLOCK_SIZE = 16
SALT = "salt"


def say(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


async def create(documents: Documents, folder: Path, asked: dict[str, Any]) -> None:
    """Make a document, and say so."""
    is_file = asked.get("is_file", False)
    source = Source(text=asked["text"])
    if is_file:
        path = folder / f"upload-{asked['key']}"
        path.write_text(asked["text"])
        source = Source(path=path, is_ours=True)
    document = Document(
        new_id(),
        "tenant",
        SALT,
        documents.table.clock(),
        "file" if is_file else "text",
        form="text",
        display_name=asked["key"],
    )
    idempotency = Idempotency(asked["key"], asked["text"].encode())
    made, is_new = await documents.create(document, source, idempotency)
    say(made=asked["key"], id=made.document_id, is_new=is_new)


async def finish(documents: Documents) -> None:
    """Say how everything has ended."""
    found, _ = await documents.page("tenant", None, 100_000, is_ascending=True)
    for document in found:
        while document.state in PENDING:
            document = await documents.wait("tenant", document.document_id, 60)
        events = await documents.table.events(document.document_id, 0, 10_000)
        say(
            id=document.document_id,
            key=document.display_name,
            status=document.status,
            attempt=document.attempt,
            error=None if document.error is None else document.error.message,
            events=[[e.sequence, e.kind, e.data.get("status")] for e in events],
        )
    say(finished=len(found))


async def serve(folder: Path) -> None:
    """Until standard input ends."""
    model = load_config("arithmetic")
    limits = JobLimits(
        max_documents=10**6,
        max_tenant_documents=10**6,
        max_events=10**6,
        max_crashes=10**6,
        segment_tokens=64,
        progress_interval_s=0.01,
        retry_s=0.01,
    )
    config = CoordinatorConfig(
        token="token",
        model="arithmetic",
        pools=(ExpectedPool("decode0", "decode", 1, 1),),
        block_size=BLOCK_SIZE,
        data_dir=str(folder),
        jobs=limits,
    )
    ingestor = SimulatedIngestor(BLOCK_SIZE, model.fingerprint, chunk_tokens=16, folder=folder)
    tokenization = Tokenization("arithmetic", 2)
    jobs = Jobs(
        Surroundings(config, model, tokenization, ingestor, lambda: 1 << 20, min_free_bytes=1)
    )
    await jobs.start()
    say(ready=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        asked = json.loads(line)
        if asked.get("finish"):
            await finish(jobs.documents)
        else:
            await create(jobs.documents, folder, asked)
    await jobs.close()
    tokenization.close()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
