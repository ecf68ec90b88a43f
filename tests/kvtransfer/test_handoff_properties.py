"""Any order, any duplicate, any loss, any close: only whole and true KV ever commits.

What is checked in every history:
- ``TargetCommitted`` only when every byte of every target rank is the source's, and at most once;
- what is said to be whole when it is closed is the source's, on every rank;
- no read is in flight, and none starts, once the target's leader was told TargetClosed;
- a source told that it is over, without a commit, is never committed by the target;
- blocks that are given to others after SourceClosed are never seen in what commits;
- after closing both sides everything is over, exactly once, on every rank.
"""

import random
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtransfer.events import (
    CloseSource,
    CloseTarget,
    Command,
    HandoffBroken,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from kvtransfer.handoff.actions import Action
from kvtransfer.handoff.source import SourceHandoff
from kvtransfer.handoff.target import TargetSide
from kvtransfer.handoff.target_handoff import TargetHandoff
from kvtransfer.identity import PeerName
from kvtransfer.plan import ByteRun, plan
from protocol.handoff import Confirm
from protocol.kv import KVLayout
from tests.kvtransfer.world import LEASE_S, Rank, Transfer, two_pools
from tests.sizes import some_of

SHAPES = st.tuples(st.integers(1, 4), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
FAULTS = (
    *("duplicate", "drop", "late copy", "failed read", "reuse", "close source", "close target"),
    "source dies",
)
MAX_STEPS = 3_000


class History:
    """One run of one hand-off, each step chosen by ``rng``."""

    def __init__(self, shape: tuple[int, int, int], faults: list[str], rng: random.Random) -> None:
        self.rng, self.faults, self.lease_s = rng, list(faults), LEASE_S
        checksum = rng.choice(["off", "always"])
        self.world = two_pools(*shape, checksum=checksum, max_reads=rng.choice([1, 2, 4]))
        self.transfer = Transfer(
            self.world,
            num_blocks=rng.randint(1, 7),
            num_chunks=rng.randint(1, 3),
        )
        self.source, self.target = self.transfer.source[0], self.transfer.target[0]
        self.scripts: list[tuple[Rank, Iterator[Command]]] = []
        self.is_reused = False
        self.is_source_dead = False

    def run(self) -> None:
        self.transfer.open()
        self.world.settle()
        assert len(self.target.told(TargetIsOpen)) == 1
        self.scripts = [(rank, self.transfer.script(rank)) for rank in self.transfer.source]
        for _ in range(MAX_STEPS):
            if not self.step():
                break
            self.check()
        else:
            raise AssertionError("it does not come to rest")
        self.end()

    def step(self) -> bool:
        """One thing happens; False when nothing is left that could."""
        world, rng = self.world, self.rng
        pairs, reads = world.waiting(), world.in_flight()
        choices = ["deliver"] * 3 * bool(pairs) + ["land"] * 2 * bool(reads)
        choices += ["command"] * bool(self.scripts)
        if not choices:
            return False
        if self.faults and rng.random() < 0.15:
            return self.fault(self.faults.pop())
        match rng.choice(choices):
            case "deliver":
                world.deliver(rng.choice(pairs))
            case "land":
                world.land(*rng.choice(reads))
            case "command":
                self.advance(rng.randrange(len(self.scripts)))
        world.now += rng.random() / 100
        return True

    def advance(self, index: int) -> None:
        rank, script = self.scripts[index]
        command = next(script, None)
        if command is None:
            del self.scripts[index]
        else:
            self.world.command(rank, command)

    def fault(self, fault: str) -> bool:
        world, rng = self.world, self.rng
        crossing = [pair for pair in world.waiting() if pair[0].pool_id != pair[1].pool_id]
        match fault:
            case "duplicate" if world.waiting():
                pair = rng.choice(world.waiting())
                again = world.queues[pair][0]
                world.deliver(pair)
                world.message(*pair, again)
            case "late copy" if world.sent:
                world.message(*rng.choice(world.sent))
            case "drop" if crossing:
                world.queues[rng.choice(crossing)].popleft()
            case "failed read" if world.in_flight():
                world.land(*rng.choice(world.in_flight()), is_done=False)
            case "close source":
                world.command(self.source, CloseSource(*self.transfer.key))
            case "close target":
                world.command(self.target, CloseTarget(*self.transfer.key))
            case "reuse":
                self.reuse_if_closed()
            case "source dies":
                self.kill_source()
        return True

    def kill_source(self) -> None:
        """Its ranks fall silent, what they had said may still arrive; then all learn of it."""
        world = self.world
        self.scripts.clear()
        for pair in [pair for pair in world.waiting() if pair[1].pool_id == "p"]:
            world.queues[pair].clear()
        for rank in world.of("d"):
            world.tell_pools(rank, "d")
        self.is_source_dead = True

    def reuse_if_closed(self) -> None:
        if self.source.told(SourceClosed):
            self.transfer.scramble()
            self.is_reused = True

    def check(self) -> None:
        committed = self.target.told(TargetCommitted)
        assert len(committed) <= 1
        if committed:
            assert self.transfer.has_arrived
            assert all(event.committed for event in self.source.told(SourceClosed))
        for closed in self.target.told(TargetClosed):
            assert self.transfer.holds_true(closed.num_whole_blocks), "kept, and not the source's"
            assert not any(rank.reads for rank in self.transfer.target)

    def end(self) -> None:
        """Both sides are closed, as their leaders do in the end; nothing may be left over."""
        world, transfer = self.world, self.transfer
        is_whole = bool(self.target.told(TargetCommitted))
        if not is_whole:
            world.command(self.source, CloseSource(*transfer.key))
            world.command(self.target, CloseTarget(*transfer.key))
            world.settle()
            world.tick(0.0)  # for the readers whose word was lost
            world.tick(self.lease_s + 1)
            world.settle()
        self.reuse_if_closed()
        self.check()
        assert bool(self.target.told(TargetCommitted)) == is_whole
        assert self.source.told(SourceClosed) or self.is_source_dead
        assert is_whole or self.target.told(TargetClosed)
        assert len(self.source.told(HandoffBroken)) <= 1
        assert len(self.target.told(HandoffBroken)) <= 1
        living = world.of("d") if self.is_source_dead else list(world.ranks.values())
        assert not any(rank.node.num_open for rank in living)
        assert not world.in_flight()


@given(shape=SHAPES, rng=st.randoms(use_true_random=False))
@settings(max_examples=some_of(60), suppress_health_check=[HealthCheck.too_slow])
def test_any_order_commits(shape: tuple[int, int, int], rng: random.Random) -> None:
    history = History(shape, [], rng)
    history.run()
    assert history.target.told(TargetCommitted)
    assert not history.world.counters


@given(
    shape=SHAPES,
    faults=st.lists(st.sampled_from(FAULTS), max_size=8),
    rng=st.randoms(use_true_random=False),
)
@settings(max_examples=some_of(150), suppress_health_check=[HealthCheck.too_slow])
def test_any_fault_is_survived(
    shape: tuple[int, int, int], faults: list[str], rng: random.Random
) -> None:
    History(shape, faults, rng).run()


@pytest.mark.parametrize("seed", range(8))
def test_many_histories(seed: int) -> None:
    """The same from plain seeds: quicker than hypothesis, and each seed repeats its histories."""
    rng = random.Random(seed)
    for _ in range(some_of(250)):
        shape = (rng.randint(1, 4), rng.choice([1, 2]), rng.choice([1, 2]))
        faults = rng.choices(FAULTS, k=rng.randint(0, 8))
        History(shape, faults, rng).run()


# -- the histories can fail ------------------------------------------------------------------------


def _close_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = TargetSide._finish_if_quiet

    def hasty(self: TargetSide, handoff: TargetHandoff) -> list[Action]:
        handoff.num_in_flight = 0
        return finish(self, handoff)

    monkeypatch.setattr(TargetSide, "_finish_if_quiet", hasty)


def _swap_two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(
        source: KVLayout, target: KVLayout, layers: range, pairs: list[tuple[int, int]]
    ) -> list[ByteRun]:
        ids = [pair[1] for pair in pairs]
        ids[0], ids[-1] = ids[-1], ids[0]
        return plan(source, target, layers, list(zip((p[0] for p in pairs), ids, strict=True)))

    monkeypatch.setattr("kvtransfer.handoff.target.plan", swapped)


def _read_without_validating(monkeypatch: pytest.MonkeyPatch) -> None:
    on_confirm = TargetSide.on_confirm

    def believing(self: TargetSide, sender: PeerName, message: Confirm, now: float) -> list[Action]:
        return on_confirm(self, sender, msgspec.structs.replace(message, valid=True), now)

    monkeypatch.setattr(TargetSide, "on_confirm", believing)
    monkeypatch.setattr(SourceHandoff, "is_read", property(lambda _: True))


@pytest.mark.parametrize(
    "plant",
    [
        _close_without_waiting,
        _swap_two_blocks,
        _read_without_validating,
    ],
)
def test_a_planted_bug_is_noticed(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    rng = random.Random(1)
    with pytest.raises((AssertionError, KeyError)):  # the code may stumble over it first
        for _ in range(400):
            faults = rng.choices(("reuse", "close target"), k=4)
            History((2, 1, 2), faults, rng).run()
