"""The process that reads an uploaded file, seen from the coordinator.

It gets an open file and an open place for its text, limits on memory, processor time and output,
and a deadline. Whatever becomes of it, it has ended when ``extract`` returns.
"""

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

from coordinator.config import JobLimits
from coordinator.jobs.engine.disk import insufficient_storage
from coordinator.jobs.parsing.formats import unprocessable
from coordinator.jobs.parsing.parse import UNREADABLE, UNWRITABLE
from coordinator.loop.timeouts import patient
from protocol.errors import BatonError

MAX_REASON_BYTES = 2000


class ParserCrashed(BatonError):
    """The process died, or did not end. The message says how."""


async def extract(
    source: Path, text: Path, media_type: str, limits: JobLimits, charset: str = ""
) -> list[str]:
    """Make the file ``text`` out of ``source``; returns warnings about it.

    Args:
        source: the uploaded file.
        text: what is made; it is not there if anything is raised.
        media_type: as it was identified.
        limits: of the process.
        charset: that was declared with the file; "" if none was.

    Raises:
        RequestError: ``unprocessable_document``, with the reason; or the disk is full.
        ParserCrashed: see there.
    """
    try:
        with source.open("rb") as input_, text.open("wb") as output:
            return await _run((media_type, charset), limits, input_.fileno(), output.fileno())
    except BaseException:
        text.unlink(missing_ok=True)  # noqa: ASYNC240 - a cancelled caller waits for nothing
        raise


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
