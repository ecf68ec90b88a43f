"""The files that a batch leaves: what was answered, and what was not.

They are written from the rows, each under its name at once and whole. When the process ends in
between, the next one writes them again under the same names.
"""

import asyncio
from collections.abc import Sequence
from typing import BinaryIO

from coordinator.jobs.batches.batch import Batch, unanswered
from coordinator.jobs.batches.lines import LineTable, Written
from coordinator.jobs.engine.disk import told_when_full
from coordinator.jobs.files.files import BATCH_OUTPUT, Files, StoredFile
from protocol.process.failpoints import RESULT_APPEND, RESULT_DONE


async def write_files(batch: Batch, lines: LineTable, files: Files) -> list[StoredFile]:
    """Write both files of a batch that is ending, those that have no lines left out.

    Raises:
        RequestError: the disk is full. What has been written is not seen by anybody.
    """
    folder, crash_points = files.folder, files.folder.crash_points
    names = (batch.output_file_id, batch.error_file_id)
    paths = [folder.new(name) for name in names]
    with told_when_full(), paths[0].open("wb") as output, paths[1].open("wb") as errors:
        after = 0
        while rows := await lines.rows(batch.id, after):
            await asyncio.to_thread(_write, batch, rows, output, errors)
            await crash_points.pass_by(RESULT_APPEND)
            after = rows[-1].number
    await crash_points.pass_by(RESULT_DONE)
    written = []
    for name, path in zip(names, paths, strict=True):
        if size := path.stat().st_size:
            await asyncio.to_thread(folder.adopt, path, name, "output")
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


def _as_file(batch: Batch, file_id: str, size_bytes: int, now: int) -> StoredFile:
    kind = "output" if file_id == batch.output_file_id else "error"
    return StoredFile(
        file_id=file_id,
        tenant=batch.tenant,
        purpose=BATCH_OUTPUT,
        file_name=f"{batch.id}_{kind}.jsonl",
        size_bytes=size_bytes,
        created_at=now,
        expires_at=now + batch.output_ttl_s,
    )
