"""The disk threads of a store: jobs in, results out, in any order."""

import errno
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kvcache.tiers.files import PackFiles
from kvcache.tiers.jobs import (
    DeletePacks,
    DiskDone,
    DiskJob,
    PackRead,
    PackWritten,
    ReadPack,
    WritePack,
)
from kvcache.tiers.pack import PackError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger(__name__)


class Disk:
    """Executes jobs.

    Args:
        files: the packs.
        num_threads: jobs at one time.
        answer: called from a thread with the result of a job.
    """

    def __init__(
        self, files: PackFiles, num_threads: int, answer: Callable[[DiskDone], None]
    ) -> None:
        self._files = files
        self._answer = answer
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="disk")

    def submit(self, job: DiskJob) -> None:
        self._pool.submit(self._run, job)

    def close(self) -> None:
        """Drop the jobs that have not begun; wait for those that have."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: DiskJob) -> None:
        try:
            match job:
                case WritePack():
                    self._answer(self._write(job))
                case ReadPack():
                    self._answer(self._read(job))
                case DeletePacks():
                    for name in job.names:
                        self._files.delete(name)
        except OSError as error:
            _log.warning("packs not deleted: %s", error)

    def _write(self, job: WritePack) -> PackWritten:
        try:
            for name in job.victims:
                self._files.delete(name)
            block_ids = [block.block_id for block in job.blocks]
            name, header = self._files.write(job.first_logical, job.parent, job.hashes, block_ids)
        except OSError as error:
            text = error.strerror or str(error)
            return PackWritten(job.number, error=text, is_full=error.errno in _FULL)
        return PackWritten(number=job.number, name=name, header=header)

    def _read(self, job: ReadPack) -> PackRead:
        try:
            self._files.read(job.name, job.indices, [block.block_id for block in job.blocks])
        except PackError as error:
            _log.error("a pack is given up: %s", error)
            return PackRead(job.number, str(error))
        return PackRead(job.number)
