"""The process that reads an uploaded file, seen from the coordinator.

It gets an open file and an open place for its text, limits on memory, processor time and output,
and a deadline. Whatever becomes of it, it has ended when ``extract`` returns, and its output is
under its name only if it is whole.
"""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

from coordinator.config import JobLimits
from coordinator.jobs.database import insufficient_storage
from coordinator.jobs.parsing.formats import unprocessable
from coordinator.jobs.parsing.parse import UNREADABLE, UNWRITABLE
from coordinator.jobs.space import told_when_full
from coordinator.loop.timeouts import patient
from protocol.crash_points import CrashPoints
from protocol.errors import BatonError
from protocol.failpoints import FILE_RENAMED, FILE_WRITE, PARSE

MAX_REASON_BYTES = 2000


class ParserCrashed(BatonError):
    """The process died, or did not end. The message says how."""


async def extract(
    source: Path,
    text: Path,
    media_type: str,
    limits: JobLimits,
    crash_points: CrashPoints | None = None,
    charset: str = "",
) -> list[str]:
    """Make the file ``text`` out of ``source``; returns warnings about it.

    Args:
        source: the uploaded file.
        text: appears when it is whole and on the disk.
        media_type: as it was identified.
        limits: of the process.
        crash_points: told of what becomes durable.
        charset: that was declared with the file; "" if none was.

    Raises:
        RequestError: ``unprocessable_document``, with the reason; or the disk is full.
        ParserCrashed: see there.
    """
    crash_points = CrashPoints() if crash_points is None else crash_points
    new = text.with_name(f"{text.name}.new")
    await crash_points.pass_by(PARSE)
    try:
        with source.open("rb") as input_, new.open("wb") as output:
            kind = (media_type, charset)
            warnings = await _run(kind, limits, input_.fileno(), output.fileno())
            await asyncio.to_thread(os.fsync, output.fileno())
        with told_when_full():
            await crash_points.pass_by(FILE_WRITE, "text")
            new.replace(text)
        await crash_points.pass_by(FILE_RENAMED, "text")
        return warnings
    finally:
        new.unlink(missing_ok=True)


async def _run(kind: tuple[str, str], limits: JobLimits, input_: int, output: int) -> list[str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "coordinator.jobs.parsing.parse", *kind),
        *(str(limits.parse_memory_bytes), str(limits.parse_cpu_s)),
        str(limits.max_text_bytes),
        stdin=input_,
        stdout=output,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        async with patient(limits.parse_timeout_s):
            said = b""
            while piece := await process.stderr.read(1 << 16):
                said = (said + piece)[-MAX_REASON_BYTES:]
            code = await process.wait()
    except TimeoutError as error:
        raise ParserCrashed(f"no end after {limits.parse_timeout_s:.0f} s") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if code == UNREADABLE:
        raise unprocessable(said.decode("utf-8", "replace").strip())
    if code == UNWRITABLE:
        raise insufficient_storage("the disk is full")
    if code == -signal.SIGXCPU:  # however often it is tried
        raise unprocessable(f"reading it takes more than {limits.parse_cpu_s} s of processor time")
    if code < 0:
        raise ParserCrashed(f"killed by signal {-code}")
    if code:
        lines = said.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        raise ParserCrashed(f"exit code {code}: {lines[-1][:200]}")
    return [line[:500] for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
