"""Lives of the job engine, each a process of its own, which may be killed at any moment.

    python -P -m tests.campaign.jobs.life

A line of standard input begins a life: ``{"live": FOLDER, "failpoints": TEXT, "poison": KEY}``; the
document with that key, if there is one, ends each life that computes it. It is answered
``{"began": PID}``, and ``{"ended": CODE}`` when the life has ended. Until then the life itself
reads the lines, as many at a time as there are, and answers each when what it asks for is durable:

    {"document": KEY, "is_file": BOOL}   {"batch": SEED}   {"file": TEXT, "expires": BOOL}
    {"delete": DOCUMENT_ID, "ready": BOOL: when it is}   {"finish": true}   {"stop": true}

``finish`` is answered when nothing is left to be done. Everything is imported once: a life is a
fork. What it says at its death is in ``FOLDER/said``.
"""

import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from coordinator.config import BatchLimits, CoordinatorConfig, ExpectedPool, JobLimits, Limits
from coordinator.jobs.batches.batches import BatchRequest
from coordinator.jobs.batches.input import request_of
from coordinator.jobs.context import JobDependencies, Jobs
from coordinator.jobs.documents.document import Document, new_id
from coordinator.jobs.documents.documents import Documents, Source
from coordinator.jobs.documents.ingestor import IngestRequest, IngestResult
from coordinator.jobs.documents.states import DocumentState
from coordinator.jobs.engine.table import Idempotency
from coordinator.jobs.files.files import BATCH, StoredFile, new_file_id
from coordinator.text.tasks import Settings
from coordinator.text.tokenizing import load_tools
from coordinator.validation.bodies import Body
from modeling.checkpoint.config import load_config
from protocol.errors import RequestError
from protocol.process.crash_points import CrashPoints
from tests.campaign.jobs.asked import BLOCK_SIZE, SALT, SEGMENT_TOKENS, TENANT, answer_of, text_of
from tests.campaign.jobs.asked import linked_lines as lines_of
from tests.campaign.jobs.packs import PackIngestor
from tests.coordinator.in_process import InProcessWorkers

MANY = 10**6
LOOK_S = 0.01
LINE_S = 0.001  # that an answer takes, so that lines are under way
EXIT_BUG = 3


def say(**fields: Any) -> None:
    """In one write, so that no death leaves half a line."""
    os.write(1, json.dumps(fields).encode() + b"\n")


class Lines:
    """Answers the lines of batches: documents by the engine itself."""

    num_interactive = 0

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    async def serve(
        self, tenant: str, url: str, body: Body, request_id: str
    ) -> tuple[int, dict[str, Any]]:
        del tenant, request_id
        assert body.file is not None and body.line is not None, "it is a line"
        data = os.pread(body.file, body.length, body.offset)
        fields = request_of(data, body.line, Limits())
        if url != "/v1/documents":
            await asyncio.sleep(LINE_S)
            return answer_of(fields)
        key, text = fields["idempotency_key"], fields["source"]["text"]
        made = await make_document(self._documents, key, Source(text=text.encode()), key)
        while made.is_pending:
            made = await self._documents.engine.wait(TENANT, made.id, 60)
        assert made.state is DocumentState.READY, made
        return 200, {"id": made.id, "object": "document", "status": made.state.value}


async def make_document(documents: Documents, name: str, source: Source, key: str) -> Document:
    """A document that is durable."""
    document = Document(
        id=new_id(),
        tenant=TENANT,
        cache_salt=SALT,
        created_at=documents.table.clock(),
        kind="text" if source.path is None else "file",
        form="text",
        display_name=name,
    )
    made, _ = await documents.create(document, source, Idempotency(key, name.encode()))
    return made


class Poisoned(PackIngestor):
    """The process dies of one document, each time: it is killed as soon as it computes that.

    Args:
        poison: the document's first tokens; none of no document.
    """

    poison: tuple[int, ...] = ()

    async def compute(
        self, request: IngestRequest, on_progress: Callable[[int], None]
    ) -> IngestResult:
        if self.poison and request.token_ids[: len(self.poison)] == self.poison:
            os.kill(os.getpid(), signal.SIGKILL)
        return await super().compute(request, on_progress)


class Life:
    """One life.

    Args:
        folder: of the engine.
        failpoints: see ``protocol.process.failpoints``.
        poison: the key of a document that ends it. Without one it dies by nobody's fault, so that
            nothing is ever set aside.
    """

    def __init__(self, folder: Path, failpoints: str, poison: str) -> None:
        model = load_config("arithmetic")
        config = CoordinatorConfig(
            token="token",
            model="arithmetic",
            pools=(ExpectedPool("decode0", "decode", 1, 1),),
            block_size=BLOCK_SIZE,
            data_dir=str(folder),
            failpoints=failpoints,
            jobs=JobLimits(
                max_documents=MANY,
                max_tenant_documents=MANY,
                max_events=MANY,
                max_crashes=JobLimits().max_crashes if poison else MANY,
                segment_tokens=SEGMENT_TOKENS,
                progress_interval_s=0.01,
                retry_s=0.01,
                max_retry_s=0.1,
            ),
            batches=BatchLimits(max_open=MANY, retry_s=0.01, max_retry_s=0.1, min_free_bytes=1),
        )
        ingestor = Poisoned(
            folder / "kv", model.fingerprint, BLOCK_SIZE, CrashPoints(config.failpoints)
        )
        self._folder = folder
        workers = InProcessWorkers(Settings(config, model, os.getpid()))
        tools = load_tools(config)
        if poison:
            ingestor.poison = tuple(tools.tokenizer.encode(text_of(poison)))[:SEGMENT_TOKENS]
        text, max_len = tools.identity, 1 << 20
        self.jobs = Jobs(JobDependencies(config, model, text, workers, ingestor, lambda: max_len))
        self.jobs.attach(Lines(self.jobs.documents))
        self._asked: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until it is told to stop, or standard input ends."""
        await self.jobs.start()
        watching = asyncio.create_task(self.jobs.watch())
        watching.add_done_callback(_died_of)
        await self.jobs.recovered.wait()
        say(ready=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(0, "rb", closefd=False)
        )
        while line := await reader.readline():
            asked = json.loads(line)
            if "stop" in asked:
                break
            task = asyncio.create_task(self._do(asked))
            self._asked.add(task)
            task.add_done_callback(_died_of)
        watching.remove_done_callback(_died_of)
        watching.cancel()
        for task in self._asked:
            task.remove_done_callback(_died_of)
            task.cancel()
        await asyncio.wait({watching, *self._asked})
        await self.jobs.close()

    async def _do(self, asked: dict[str, Any]) -> None:
        try:
            made = await self._made(asked)
        except RequestError as error:
            say(asked=asked, refused=error.code)
        else:
            say(asked=asked, made=made)

    async def _made(self, asked: dict[str, Any]) -> str:
        documents = self.jobs.documents
        match asked:
            case {"document": str(key), "is_file": bool(is_file)}:
                return await self._make_document(key, is_file)
            case {"batch": int(seed)}:
                return await self._make_batch(seed)
            case {"file": str(text), "expires": bool(expires)}:
                return (await self._upload(text, expires=expires)).file_id
            case {"delete": str(document_id), "ready": bool(must_be_ready)}:
                if must_be_ready:
                    await documents.engine.wait(TENANT, document_id, 60)
                await documents.engine.delete(TENANT, document_id)
                return document_id
            case {"finish": True}:
                while await self._is_left():  # noqa: ASYNC110 - nobody tells of all of it
                    await asyncio.sleep(LOOK_S)
                return ""
        raise ValueError(f"nobody can do {asked}")

    async def _make_document(self, key: str, is_file: bool) -> str:
        source = Source(text=text_of(key).encode())
        if is_file:
            path = self._folder / f"upload-{key}"
            path.write_text(text_of(key))
            source = Source(path=path, is_ours=True)
        return (await make_document(self.jobs.documents, key, source, key)).id

    async def _make_batch(self, seed: int) -> str:
        text = "\n".join(json.dumps(line) for line in lines_of(seed))
        file = await self._upload(text, expires=False)
        asked = BatchRequest(
            tenant=TENANT,
            model="arithmetic",
            input_file_id=file.file_id,
            endpoint="/v1/completions",
            completion_window="24h",
        )
        batch = await self.jobs.batches.create(asked)
        await self.jobs.files.delete(TENANT, file.file_id)
        return batch.id

    async def _upload(self, text: str, *, expires: bool) -> StoredFile:
        files, now = self.jobs.files, int(self.jobs.files.clock())
        file_id = new_file_id()
        arrived = files.folder.path / f"{file_id}.upload"
        expires_at = now if expires else None
        arrived.write_text(text)
        try:
            file = StoredFile(file_id, TENANT, BATCH, "in", len(text), now, expires_at)
            return await files.add(file, arrived)
        finally:
            arrived.unlink(missing_ok=True)

    async def _is_left(self) -> bool:
        """Whether anything is still to be done."""
        tables = self.jobs.documents.table, self.jobs.batches.table
        for table in tables:
            if await table.in_states(table.of.PENDING) or await table.cleanups():
                return True
        return False


def _died_of(task: asyncio.Task[None]) -> None:
    """A bug ends the life, and says so."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        say(bug=repr(error))
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        os._exit(EXIT_BUG)


def live(folder: Path, failpoints: str, poison: str) -> NoReturn:
    """A life in a process of its own."""
    said = os.open(folder / "said", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(said, 2)

    async def run() -> None:
        await Life(folder, failpoints, poison).run()

    code = EXIT_BUG
    try:
        asyncio.run(run())
        code = 0
    except BaseException:  # noqa: BLE001 - the outermost frame of a process
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _line() -> bytes:
    """Of standard input; nothing behind it is taken from the next life."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def main() -> None:
    dead = 0
    while line := _line():
        if not line.startswith(b'{"live"'):
            continue  # for a life that has died
        asked = json.loads(line)
        if dead:  # only now another process may get its number: nobody will kill it any more
            os.waitpid(dead, 0)
        dead = os.fork()
        if dead == 0:
            say(began=os.getpid())  # here, so that it is the first that is said of a life
            live(Path(asked["live"]), asked["failpoints"], asked["poison"])
        ended = os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
        assert ended is not None, "it was waited for"
        os.set_blocking(0, True)  # the life had it otherwise
        status = ended.si_status
        say(ended=status if ended.si_code == os.CLD_EXITED else -status)


if __name__ == "__main__":
    main()
