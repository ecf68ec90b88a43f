"""The files that a batch leaves: what was answered, and what was not.

They are written from the rows, each under its name at once and whole. When the process ends in
between, the next one writes them again under the same names.
"""

import asyncio
import os
from collections.abc import Sequence
from typing import BinaryIO

from coordinator.jobs.batches.batch import Batch, unanswered
from coordinator.jobs.batches.table import BatchTable, Written
from coordinator.jobs.files import BATCH_OUTPUT, Files, StoredFile
from coordinator.jobs.space import told_when_full
from protocol.failpoints import RESULT_APPEND, RESULT_DONE


async def write_files(batch: Batch, table: BatchTable, files: Files) -> list[StoredFile]:
    """Both files of a batch that is ending, those that have no lines left out.

    Raises:
        RequestError: the disk is full. What has been written is not seen by anybody.
    """
    names = (batch.output_file_id, batch.error_file_id)
    paths = [files.path(f"{name}.new") for name in names]
    with told_when_full(), paths[0].open("wb") as output, paths[1].open("wb") as errors:
        after = 0
        while rows := await table.rows(batch.batch_id, after):
            await asyncio.to_thread(_write, batch, rows, output, errors)
            await files.crash_points.pass_by(RESULT_APPEND)
            after = rows[-1].number
        sizes = [await asyncio.to_thread(_sync, file) for file in (output, errors)]
    await files.crash_points.pass_by(RESULT_DONE)
    written = []
    for name, path, size in zip(names, paths, sizes, strict=True):
        if size:
            with told_when_full():
                await asyncio.to_thread(files.move_durably, path, files.path(name), "output")
            written.append(_as_file(batch, name, size, int(files.clock())))
        else:
            await asyncio.to_thread(path.unlink)
    return written


def _write(batch: Batch, rows: Sequence[Written], output: BinaryIO, errors: BinaryIO) -> None:
    for row in rows:
        text = row.text
        if text is None:
            text = unanswered(batch, row.number, row.custom_id)
        file = errors if row.is_error or row.text is None else output
        file.write(text + b"\n")


def _sync(file: BinaryIO) -> int:
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def _as_file(batch: Batch, file_id: str, size_bytes: int, now: int) -> StoredFile:
    kind = "output" if file_id == batch.output_file_id else "error"
    return StoredFile(
        file_id=file_id,
        tenant=batch.tenant,
        purpose=BATCH_OUTPUT,
        file_name=f"{batch.batch_id}_{kind}.jsonl",
        size_bytes=size_bytes,
        created_at=now,
        expires_at=now + batch.output_ttl_s,
    )
