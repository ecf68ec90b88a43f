"""A store's scheduler with a disk that lives in memory: offloads, onboardings, all the ways out."""

from collections.abc import Callable

import pytest

from kvcache.blocks import BlockPool
from kvcache.prefix import block_salt, hash_blocks
from kvcache.tiers.index import PackIndex
from kvcache.tiers.jobs import DeletePacks, DiskJob, PackRead, PackWritten, ReadPack, WritePack
from kvcache.tiers.pack import KVShape, PackHeader
from kvtransfer.events import (
    CloseSource,
    CloseTarget,
    Command,
    ControlReceived,
    Event,
    HandoffBroken,
    OpenTargetBlocks,
    SendControl,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from protocol.handoff import Fetch, FetchRefused, Serve
from protocol.kv import BlockRef
from protocol.messages import (
    Abort,
    Ask,
    CacheUpdate,
    Collect,
    Forget,
    Pin,
    Released,
    RequestFailed,
    Reserve,
    Stored,
    Ticket,
    ToCoordinator,
)
from protocol.request import SamplingParams, TransferStats
from store.facts import StoreFacts
from store.onboarding import ONBOARDING_TIMEOUT_S
from store.scheduler import StoreScheduler

BLOCK_SIZE, BLOCK_BYTES, PACK_BLOCKS = 4, 100, 2
SHAPE = KVShape(1, 1, BLOCK_SIZE, 1, "float32")
Key = tuple[str, int]


def hashes_of(prompt: tuple[int, ...]) -> tuple[bytes, ...]:
    return tuple(hash_blocks(prompt, BLOCK_SIZE, block_salt("model", "")))


class Store:
    """The scheduler, its transfer thread and its disk; the disk answers when it is told to."""

    def __init__(self, num_blocks: int, quota_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.index = PackIndex(quota_blocks * BLOCK_BYTES)
        facts = StoreFacts(
            model_fingerprint="model",
            block_size=BLOCK_SIZE,
            block_bytes=BLOCK_BYTES,
            pack_blocks=PACK_BLOCKS,
        )
        self.scheduler = StoreScheduler(facts, self.pool, self.index)
        self.now = 0.0
        self.said: list[ToCoordinator] = []
        self.commands: list[Command] = []
        self.jobs: list[DiskJob] = []
        self.num_packs = 0

    def tell(self, event: Event) -> None:
        self.scheduler.on_event(event, self.now)
        self.turn()

    def turn(self) -> None:
        self.scheduler.schedule(self.now)
        for command in self.scheduler.take_commands():
            if isinstance(command, SendControl):
                self.said.append(command.message)
            elif isinstance(command, DiskJob):
                self.jobs.append(command)
            else:
                self.commands.append(command)
        self.pool.check()

    def reserve(self, name: str, prompt: tuple[int, ...], attempt: int = 1) -> Key:
        message = Reserve(name, attempt, prompt, SamplingParams(max_tokens=1))
        self.tell(ControlReceived(message))
        return name, attempt

    def commit(self, key: Key, num_tokens: int) -> None:
        self.tell(TargetCommitted(*key, num_tokens, 0, TransferStats()))

    def write(self, error: str = "", *, is_full: bool = False) -> None:
        """The disk finishes its oldest write."""
        job = next(job for job in self.jobs if isinstance(job, WritePack))
        self.jobs.remove(job)
        if error:
            self.tell(PackWritten(job.number, error=error, is_full=is_full))
            return
        self.num_packs += 1
        header = PackHeader(
            "model", SHAPE, BLOCK_BYTES, job.first_logical, job.parent, job.hashes,
            (0,) * len(job.hashes),
        )  # fmt: skip
        self.tell(PackWritten(job.number, f"p{self.num_packs}", header))

    def read(self, error: str = "") -> None:
        job = next(job for job in self.jobs if isinstance(job, ReadPack))
        self.jobs.remove(job)
        self.tell(PackRead(job.number, error))

    def offload(self, name: str, prompt: tuple[int, ...]) -> None:
        """From its Reserve to its Released."""
        key = self.reserve(name, prompt)
        self.tell(TargetIsOpen(*key))
        self.commit(key, len(prompt))
        while any(isinstance(job, WritePack) for job in self.jobs):
            self.write()
        assert self.kinds(name)[-2:] == ["Stored", "Released"]

    def lend(self, name: str, hashes: tuple[bytes, ...]) -> Key:
        owners = (0,) * len(hashes)
        fetch = Fetch(
            name,
            1,
            source_pool_id="store0",
            source_epoch=1,
            first_logical=0,
            owners=owners,
            block_hashes=hashes,
            target_pool_id="decode0",
            target_epoch=3,
        )
        self.tell(fetch)
        return name, 1

    def kinds(self, name: str) -> list[str]:
        return [type(m).__name__ for m in self.said if getattr(m, "request_id", "") == name]

    def last(self, kind: type[Command]) -> Command:
        return next(c for c in reversed(self.commands) if isinstance(c, kind))

    def fill_memory(self) -> None:
        """Others need the room: nothing but the disk keeps anything."""
        refs = self.pool.allocate(self.pool.num_available)
        self.pool.release(refs)

    def assert_quiet(self) -> None:
        assert self.scheduler.is_idle
        counts = self.pool.counts()
        assert counts.free + counts.cached == counts.total, counts


MakeStore = Callable[..., Store]


@pytest.fixture
def make_store() -> MakeStore:
    def make(num_blocks: int = 12, quota_blocks: int = 100) -> Store:
        return Store(num_blocks, quota_blocks)

    return make


PROMPT = tuple(range(18))  # four full blocks and a half


def test_a_deposit_from_reserve_to_stored(make_store: MakeStore) -> None:
    store = make_store()
    key = store.reserve("d", PROMPT)
    opened = store.last(OpenTargetBlocks)
    assert (opened.first_logical, len(opened.blocks)) == (0, 5)
    assert store.kinds("d") == []
    store.tell(TargetIsOpen(*key))
    assert store.said[-1] == Ticket("d", 1, 0)
    store.commit(key, len(PROMPT))
    assert [len(job.hashes) for job in store.jobs] == [2, 2]
    assert store.kinds("d") == ["Ticket", "Committed"]
    store.write()
    assert store.kinds("d")[-1] == "Committed", "half of it is not all of it"
    store.write()
    assert store.kinds("d")[2:] == ["Stored", "Released"]
    assert [m.num_tokens for m in store.said if isinstance(m, Stored)] == [16]
    updates = [m for m in store.said if isinstance(m, CacheUpdate)]
    for tier in ("cpu", "disk"):
        told = [h for update in updates if update.tier == tier for h in update.stored]
        assert sorted(told) == sorted(hashes_of(PROMPT))
    store.assert_quiet()


def test_what_is_durable_is_not_asked_for_again(make_store: MakeStore) -> None:
    store = make_store()
    store.offload("a", PROMPT)
    longer = (*PROMPT, *range(100, 110))
    key = store.reserve("b", longer)
    assert store.last(OpenTargetBlocks).first_logical == 4
    store.tell(TargetIsOpen(*key))
    assert store.said[-1] == Ticket("b", 1, 16)
    store.commit(key, len(longer))
    assert [(job.first_logical, job.parent) for job in store.jobs] == [
        (4, hashes_of(PROMPT)[3]),
        (6, hashes_of(longer)[5]),
    ]
    store.write(), store.write()
    store.assert_quiet()


def test_two_that_bring_the_same_wait_for_one_write(make_store: MakeStore) -> None:
    store = make_store()
    first, second = store.reserve("a", PROMPT[:8]), store.reserve("b", PROMPT[:8])
    for key in (first, second):
        store.tell(TargetIsOpen(*key))
        store.commit(key, 8)
    assert len(store.jobs) == 1
    store.write()
    assert store.kinds("a")[-2:] == store.kinds("b")[-2:] == ["Stored", "Released"]
    store.assert_quiet()


ENDS = {
    "queued": lambda *_: None,
    "opening": lambda *_: None,
    "reserved": lambda store, key: store.tell(TargetIsOpen(*key)),
    "storing": lambda store, key: (store.tell(TargetIsOpen(*key)), store.commit(key, 16)),
}


@pytest.mark.parametrize("state", ENDS)
def test_an_abort_frees_everything(make_store: MakeStore, state: str) -> None:
    store = make_store()
    held = store.pool.allocate(10) if state == "queued" else []
    key = store.reserve("d", PROMPT[:16])
    ENDS[state](store, key)
    store.tell(ControlReceived(Abort(*key)))
    if state in ("opening", "reserved"):
        assert store.kinds("d")[-1:] != ["Released"], "bytes can still land"
        assert store.last(CloseTarget) == CloseTarget(*key)
        store.tell(TargetClosed(*key, 0))
    store.pool.release(held)
    assert store.kinds("d")[-1] == "Released"
    while any(isinstance(job, WritePack) for job in store.jobs):
        store.write()
    store.tell(ControlReceived(Abort(*key)))
    assert store.kinds("d").count("Stored") == 0
    store.assert_quiet()


def test_what_had_arrived_of_a_broken_handoff_is_kept(make_store: MakeStore) -> None:
    store = make_store()
    key = store.reserve("d", PROMPT)
    store.tell(TargetIsOpen(*key))
    store.tell(HandoffBroken(*key, "target", "the source died"))
    assert [m.code for m in store.said if isinstance(m, RequestFailed)] == ["handoff_failed"]
    store.tell(TargetClosed(*key, 3))
    assert store.kinds("d")[-1] == "Released"
    store.write(), store.write()
    again = store.reserve("d", PROMPT, attempt=2)
    store.tell(TargetIsOpen(*again))
    assert store.said[-1] == Ticket("d", 2, 12)
    store.tell(ControlReceived(Abort(*again)))
    store.tell(TargetClosed(*again, 0))
    store.assert_quiet()


def test_a_loan_from_memory_and_from_disk(make_store: MakeStore) -> None:
    store = make_store()
    store.offload("d", PROMPT)
    hashes = hashes_of(PROMPT)
    for is_warm in (True, False):
        if not is_warm:
            store.fill_memory()
        key = store.lend(f"onboarding {is_warm}", hashes)
        if not is_warm:
            assert [job.indices for job in store.jobs] == [(0, 1), (0, 1)]
            store.read()
            assert store.commands[-1].request_id != key[0], "half of it is not lent"
            store.read()
        served = store.last(Serve)
        assert (served.request_id, len(served.blocks)) == (key[0], 4)
        assert store.pool.counts().in_flight == 4
        store.tell(SourceClosed(*key, committed=True))
        store.assert_quiet()


def test_a_damaged_pack_is_given_up(make_store: MakeStore) -> None:
    store = make_store()
    store.offload("d", PROMPT)
    store.fill_memory()
    store.lend("onboarding", hashes_of(PROMPT))
    store.read(error="block 1 is damaged")
    store.read()
    assert isinstance(store.commands[-1], FetchRefused)
    assert store.jobs == [DeletePacks(("p1",))]
    evicted = [
        h for m in store.said if isinstance(m, CacheUpdate) and m.tier == "disk" for h in m.evicted
    ]
    damaged = [h for m in store.said if isinstance(m, CacheUpdate) for h in m.damaged]
    assert damaged == evicted
    assert sorted(evicted) == sorted(hashes_of(PROMPT)[:2])
    store.lend("again", hashes_of(PROMPT))
    assert store.last(FetchRefused).request_id == "again"
    store.assert_quiet()


def test_a_loan_that_nobody_ends_is_closed(make_store: MakeStore) -> None:
    store = make_store()
    store.offload("d", PROMPT)
    key = store.lend("onboarding", hashes_of(PROMPT))
    store.now = ONBOARDING_TIMEOUT_S + 1
    store.turn()
    assert store.last(CloseSource) == CloseSource(*key)
    store.tell(SourceClosed(*key, committed=False))
    store.assert_quiet()


def test_a_loan_waits_for_room(make_store: MakeStore) -> None:
    store = make_store()
    store.offload("d", PROMPT)
    held = store.pool.allocate(store.pool.num_available)
    store.lend("onboarding", hashes_of(PROMPT))
    assert not store.jobs
    store.pool.release(held)
    store.turn()
    assert len(store.jobs) == 2
    store.read(), store.read()
    store.tell(SourceClosed("onboarding", 1, committed=True))
    store.assert_quiet()


def test_a_full_disk_gives_up_what_is_worth_least(make_store: MakeStore) -> None:
    store = make_store(quota_blocks=4)
    store.offload("old", PROMPT[:8])
    other = tuple(range(50, 58))
    store.offload("other", other)
    store.now = 1.0
    third = tuple(range(80, 88))
    key = store.reserve("third", third)
    store.tell(TargetIsOpen(*key))
    store.commit(key, 8)
    assert [job.victims for job in store.jobs] == [("p1",)]
    store.write(error="no space left", is_full=True)
    assert [job.victims for job in store.jobs] == [("p2",)], "once more, with less"
    store.write(error="no space left", is_full=True)
    codes = [m.code for m in store.said if isinstance(m, RequestFailed)]
    assert codes == ["insufficient_storage"] and store.kinds("third")[-1] == "Released"
    store.assert_quiet()


def test_what_is_pinned_leaves_no_room(make_store: MakeStore) -> None:
    store = make_store(quota_blocks=2)
    store.offload("old", PROMPT[:8])
    store.tell(ControlReceived(Pin("doc", hashes_of(PROMPT[:8]), "hard")))
    key = store.reserve("new", tuple(range(50, 58)))
    store.tell(TargetIsOpen(*key))
    store.commit(key, 8)
    assert [m.code for m in store.said if isinstance(m, RequestFailed)] == ["insufficient_storage"]
    store.tell(ControlReceived(Pin("doc", (), "hard")))
    store.tell(ControlReceived(Forget(hashes_of(PROMPT[:8]))))
    assert store.jobs == [DeletePacks(("p1",))]
    store.assert_quiet()


def test_collecting_from_a_decode_pool(make_store: MakeStore) -> None:
    store = make_store()
    hashes = hashes_of(PROMPT)
    store.tell(ControlReceived(Collect("c", 1, hashes, "decode0", 7)))
    store.tell(TargetIsOpen("c", 1))
    assert store.commands[-1] == Fetch("c", 1, "decode0", 7, 0, (0,) * 4, hashes)
    store.commit(("c", 1), 16)
    store.write(), store.write()
    assert store.kinds("c") == ["Stored", "Released"]
    store.tell(ControlReceived(Collect("again", 1, hashes, "decode0", 7)))
    assert store.kinds("again") == ["Stored", "Released"], "all of it is here"
    store.assert_quiet()


def test_asked_how_it_stands(make_store: MakeStore) -> None:
    store = make_store()
    store.tell(ControlReceived(Ask("unknown", 1)))
    assert store.said == [Released("unknown", 1)]
    key = store.reserve("d", PROMPT)
    store.tell(TargetIsOpen(*key))
    store.tell(ControlReceived(Ask(*key)))
    assert store.kinds("d") == ["Ticket", "Ticket"]


def test_more_than_the_memory_is_refused(make_store: MakeStore) -> None:
    store = make_store(num_blocks=3)
    store.reserve("d", PROMPT)
    [failed] = [m for m in store.said if isinstance(m, RequestFailed)]
    assert failed.code == "kv_capacity_exceeded" and "12 tokens" in failed.message
    assert store.kinds("d")[-1] == "Released"
    store.assert_quiet()


def test_blocks_are_not_reused_while_they_are_lent(make_store: MakeStore) -> None:
    store = make_store(num_blocks=5)
    store.offload("d", PROMPT[:16])
    store.lend("onboarding", hashes_of(PROMPT[:16]))
    lent: tuple[BlockRef, ...] = store.last(Serve).blocks
    store.tell(HandoffBroken("onboarding", 1, "source", "decode0 is gone"))
    store.reserve("next", tuple(range(50, 62)))
    assert all(command.request_id != "next" for command in store.commands), "there is no room"
    store.tell(SourceClosed("onboarding", 1, committed=False))
    opened = store.last(OpenTargetBlocks)
    assert opened.request_id == "next" and len(lent) == 4
