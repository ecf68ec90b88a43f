"""The process of a store: ``python -P -m kvtransfer.store --config FILE``.

It is a pool of one rank with all heads and no model: its KV pool is host memory, its transfer
thread speaks as every other does, and its disk threads read and write packs. Whatever happens, they
tell the scheduler, which decides.
"""

import logging
import time
from contextlib import closing
from pathlib import Path

import torch

from kvcache.blocks import BlockPool
from kvcache.pool import KVPool
from kvcache.tiers.files import PackFiles
from kvcache.tiers.index import PackIndex
from kvtransfer.boot import start_rank
from kvtransfer.events import FromDisk
from kvtransfer.kv_memory import check_free, plan_layout
from kvtransfer.process import RankProcess
from kvtransfer.store.config import StoreConfig
from kvtransfer.store.disk import Disk
from kvtransfer.store.disk_io import open_mover
from kvtransfer.store.jobs import DiskDone
from kvtransfer.store.scheduler import DISK, StoreFacts, StoreScheduler
from modeling.config import load_config
from modeling.dtypes import serving_dtype
from protocol.errors import ConfigError
from protocol.messages import CacheUpdate, GangReady
from protocol.places import Places

IDLE_WAIT_S = 1.0
MAX_HASHES = 100_000  # of one CacheUpdate

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
    places = Places(config.failpoints)
    mover = open_mover(config.disk_io, pool.view())
    try:
        files = PackFiles(Path(config.folder), pool, model.fingerprint, mover, places)
    except OSError as error:
        raise ConfigError(f"--data-dir: {config.folder}: {error.strerror}") from error
    index = PackIndex(config.disk_quota_bytes)
    now = time.monotonic()
    for name, header in files.scan():
        index.add(name, header, now)
    facts = StoreFacts(layout.block_size, files.block_bytes, config.pack_blocks, model.fingerprint)
    scheduler = StoreScheduler(BlockPool(layout.num_blocks, layout.block_size), index, facts)
    scheduler.count_damaged(len(files.damaged))
    for _, why in files.damaged:
        _log.error("a pack is given up: %s", why)
    with start_rank("store", config, model, pool) as process:
        process.form_gang(torch.device("cpu"))

        def answer(done: DiskDone) -> None:
            process.thread.events.put(FromDisk(done))

        with closing(mover), closing(Disk(files, config.num_io_threads, answer)) as disk:
            _log.info(
                "%d blocks of host memory, %d packs with %d blocks on disk",
                layout.num_blocks,
                len(index),
                len(index.hashes),
            )
            hashes = index.hashes
            for start in range(0, len(hashes), MAX_HASHES):
                process.tell(CacheUpdate(hashes[start : start + MAX_HASHES], tier=DISK))
            if damaged := tuple(block_hash for block_hash, _ in files.damaged):
                process.tell(CacheUpdate(tier=DISK, damaged=damaged))
            process.tell(GangReady())
            lead(process, scheduler, disk, places)


def lead(process: RankProcess, scheduler: StoreScheduler, disk: Disk, places: Places) -> None:
    """The loop; never returns but by an exception."""
    while True:
        for event in process.drain(IDLE_WAIT_S):
            scheduler.on_event(event, time.monotonic())
        scheduler.schedule(time.monotonic())
        for job in scheduler.take_jobs():
            disk.submit(job)
        for command in scheduler.take_commands():
            process.submit(command)
        waiting, running = scheduler.num_deposits
        process.report(
            num_waiting=waiting,
            num_running=running,
            blocks=(scheduler.counts(),),
            counters=(
                *scheduler.counters().items(),
                *((name, float(n)) for name, n in places.hits.copy().items()),
            ),
        )
