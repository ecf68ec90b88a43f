"""The process of a store: ``python -P -m store --config FILE``.

It is a pool of one rank with all heads and no model: its KV pool is host memory, its transfer
thread speaks as every other does, and its disk threads read and write packs. Whatever happens, they
tell the leader, which decides.
"""

import logging
import time
from contextlib import closing
from pathlib import Path
from typing import assert_never

import torch

from engine.boot import start_rank
from engine.kv_memory import check_free, plan_layout
from kvcache.blocks import BlockPool
from kvcache.pool import KVPool
from kvcache.tiers.files import PackFiles
from kvcache.tiers.index import PackIndex
from kvcache.tiers.jobs import DiskJob
from kvtransfer.events import Command
from modeling.checkpoint.config import load_config
from modeling.checkpoint.dtypes import serving_dtype
from protocol.errors import ConfigError
from protocol.messages import GangReady
from protocol.process.crash_points import CrashPoints
from store.config import StoreConfig
from store.disk import Disk
from store.disk_io import open_mover
from store.facts import StoreFacts
from store.scheduler import StoreScheduler

_log = logging.getLogger(__name__)


def serve(config: StoreConfig) -> None:
    """Run a store until it is stopped.

    Raises:
        ConfigError: it cannot run as configured.
        PeerError: its transfer thread has died.
        SystemExit: it was asked to stop.
    """
    model = load_config(config.model, max_model_len=config.max_model_len)
    dtype = serving_dtype(config.dtype, model, config.device)
    layout = plan_layout(config, model, dtype, config.kv_memory_bytes)
    check_free(layout.num_bytes, torch.device("cpu"))
    pool = KVPool(layout, torch.device("cpu"))
    crash_points = CrashPoints(config.failpoints)
    mover = open_mover(config.disk_io, pool.view())
    try:
        files = PackFiles(Path(config.folder), pool, model.fingerprint, mover, crash_points)
    except OSError as error:
        raise ConfigError(f"--data-dir: {config.folder}: {error.strerror}") from error
    index = PackIndex(config.disk_quota_bytes)
    now = time.monotonic()
    for name, header in files.scan():
        index.add(name, header, now)
    for _, why in files.damaged:
        _log.error("a pack is given up: %s", why)
    facts = StoreFacts(
        model_fingerprint=model.fingerprint,
        block_size=layout.block_size,
        block_bytes=files.block_bytes,
        pack_blocks=config.pack_blocks,
    )
    scheduler = StoreScheduler(
        facts,
        BlockPool(layout.num_blocks, layout.block_size),
        index,
        tuple(block_hash for block_hash, _ in files.damaged),
    )
    with start_rank("store", config, model, pool) as process:
        process.form_gang(torch.device("cpu"))
        _log.info(
            "%d blocks of host memory, %d packs with %d blocks on disk",
            layout.num_blocks,
            len(index),
            len(index.hashes),
        )
        disk = Disk(files, config.num_io_threads, process.thread.events.put)
        with closing(mover), closing(disk):

            def submit(command: Command) -> None:
                if isinstance(command, DiskJob):
                    disk.submit(command)
                else:
                    process.submit(command)

            for command in scheduler.take_commands():  # what is on disk, before it is asked for
                submit(command)
            process.tell(GangReady())
            process.lead(scheduler, assert_never, submit=submit, counters=crash_points.hits)
