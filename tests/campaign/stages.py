"""The stages of a campaign: each a cluster, a workload, the faults that it is exposed to, an audit.

abandon    clients go away in every phase; how long until every block is free again
landing    reads land after their request was given up, while others take its blocks
messages   hand-off messages come twice, late and out of order, steps are slow: all must be exact
drops      frames between ranks are lost: each is sent again, and costs nobody an attempt
silence    all of one kind are lost, each time: attempts end by their budgets, nothing stays held
bytes      read bytes are changed, reads fail and come late: never a wrong token
unchecked  the same without checksums: a wrong token *must* be seen, or the fault is not one
"""

import asyncio
import contextlib
import functools
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.campaign.client import Leave
from tests.campaign.cluster import RunningCluster, run_cluster
from tests.campaign.oracle import MODEL, Oracle, mixed_lengths
from tests.campaign.tally import Tally
from tests.campaign.watch import Watch, audit, watching
from tests.campaign.workload import Mix, Workload

NUM_PROMPTS = 64
BASE_FLAGS = ("--block-size", "8", "--threads-per-rank", "1", "--log-level", "WARNING")
SETTINGS = ("--set", "coordinator.local_prefill_threshold=16")
SMALL, TINY = ("--kv-memory", "2MiB"), ("--kv-memory", "1MiB")
POOLS = ("--prefill", "cp2", "--decode", "tp2")
HANDOFF_FAILED, STALLED = "error handoff_failed", "error stalled"
LATE_S = 0.05
# Each of many messages and reads goes wrong by chance: the default of 4 attempts is for real life.
MANY_ATTEMPTS = ("--set", "coordinator.max_attempts=12")
TOLD_TWICE = ("reserve", "prefill", "abort")  # by the coordinator
ONE_ATTEMPT = ("--set", "coordinator.max_attempts=1")
SILENCE_HANDOFF_S, SILENCE_GRACE_S, SILENCE_LEASE_S = 2.0, 0.5, 0.5  # an audit waits for 2 s


@dataclass
class Context:
    """What all stages of one campaign have in common.

    Args:
        deadline: of the event loop's clock; no stage starts another request after it.
        transport: "nixl" or "tcp".
        demand_survival: a request that a fault has hit must still be answered in full.
        log: the clusters' standard error; None for our own.
    """

    rng: random.Random
    tally: Tally
    deadline: float
    transport: str = "nixl"
    demand_survival: bool = True
    log: Path | None = None

    @functools.cached_property
    def oracle(self) -> Oracle:
        """Prompts of all lengths."""
        return Oracle(self.rng, mixed_lengths(self.rng, NUM_PROMPTS))

    @functools.cached_property
    def short(self) -> Oracle:
        """Prompts of a few blocks."""
        return Oracle(self.rng, [self.rng.randint(20, 120) for _ in range(NUM_PROMPTS)])

    @property
    def is_late(self) -> bool:
        return asyncio.get_running_loop().time() > self.deadline

    def mix(self, mix: Mix, *allowed: str) -> Mix:
        """``mix``, in which a fault may end a request so; unless it has to survive."""
        return mix if self.demand_survival else replace(mix, allowed=frozenset(allowed))

    def seed(self) -> int:
        """Of one failpoint."""
        return self.rng.randrange(1 << 30)

    @contextlib.asynccontextmanager
    async def cluster(
        self, *flags: str, pools: tuple[str, ...] = POOLS, checksum: str = "always"
    ) -> AsyncIterator[tuple[RunningCluster, Watch]]:
        """A cluster of the campaign's kind, its counters watched; what they say is counted."""
        common = (*BASE_FLAGS, *SETTINGS, "--checksum", checksum, "--transport", self.transport)
        async with (
            run_cluster(MODEL, *pools, *common, *flags, log=self.log) as cluster,
            watching(cluster) as watch,
        ):
            yield cluster, watch
            await watch.look()
        self.tally.faults.update(watch.failpoint_hits())
        self.tally.num_landed_late += watch.total("reads_landed_late")


def failpoints(role: str, *entries: str) -> tuple[str, str]:
    """The flags that give every rank of a role's pools these failpoints."""
    return "--set", f"{role}_pool.failpoints={','.join(entries)}"


def until(context: Context, load: Workload, num_requests: int) -> Callable[[], bool]:
    """Whether a workload goes on: until so many requests have ended, or the time is over."""
    return lambda: load.num_ended < num_requests and not context.is_late


async def abandon(context: Context, num_aborts: int) -> None:
    """Clients go away, in the phases as they come."""
    tally = context.tally
    before = num_aborted(tally)
    async with context.cluster(*SMALL) as (cluster, watch):
        mix = Mix(leave_share=0.85, measures_free=True)
        load = Workload(cluster, context.oracle, context.rng, tally, mix)
        await load.run(lambda: num_aborted(tally) - before < num_aborts and not context.is_late)
        await audit(watch, tally)


def num_aborted(tally: Tally) -> int:
    """Requests that the coordinator has aborted because their client was gone."""
    phases = tally.abort_phases
    return phases.total() - phases["had ended"] - phases["not submitted"]


async def landing(context: Context, num_rounds: int) -> None:
    """Requests are given up with reads in flight, and others want the blocks at once.

    A round is one request whose blocks were held for a late read after everything else of it was
    gone: it was in transfer, and was not free before the read had landed.
    """
    tally, rng = context.tally, context.rng
    late = f"transfer.read:delay={LATE_S}%{context.seed()}:0.2"
    async with context.cluster(*TINY, *failpoints("decode", late)) as (cluster, watch):
        others = Workload(cluster, context.short, rng, tally, Mix(concurrency=8))
        victims = Workload(cluster, context.short, rng, tally, Mix(concurrency=8, cold_share=1.0))
        victims.held_after_s = LATE_S / 4

        def goes_on() -> bool:
            return victims.num_held < num_rounds and not context.is_late

        async def give_up() -> None:
            while goes_on():
                await victims.one(Leave(after_tokens=1, is_reset=rng.random() < 0.5))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(others.run(goes_on))
            for _ in range(8):
                tasks.create_task(give_up())
        await victims.settled()
        await audit(watch, tally)
        tally.num_late_rounds += victims.num_held
        if num_rounds and not watch.total("reads_landed_late"):
            tally.problem("no read has landed late: the fault has no effect")


async def messages(context: Context, num_requests: int) -> None:
    """Nothing of this is an excuse for anything: every stream is whole and exact."""
    seed = context.seed
    faults = (
        f"handoff.send:duplicate%{seed()}:0.1",
        f"handoff.send:delay=0.03%{seed()}:0.05",
        f"control.send:duplicate%{seed()}:0.05",
        f"step:delay=0.03%{seed()}:0.05",
    )
    told = [f"control.send.{kind}:duplicate%{seed()}:0.3" for kind in TOLD_TWICE]
    everywhere = (*failpoints("prefill", *faults), *failpoints("decode", *faults))
    flags = (*everywhere, "--set", f"coordinator.failpoints={','.join(told)}")
    async with context.cluster(*SMALL, *flags) as (cluster, watch):
        mix = Mix(leave_share=0.2)
        load = Workload(cluster, context.oracle, context.rng, context.tally, mix)
        await load.run(until(context, load, num_requests))
        await audit(watch, context.tally)
        _expect_hits(context, watch, "handoff.send:duplicate", "handoff.send:delay", "step:delay")
        _expect_hits(context, watch, *(f"control.send.{kind}:duplicate" for kind in TOLD_TWICE))


async def drops(context: Context, num_requests: int) -> None:
    """Frames are lost: every stream is whole and exact, at its first attempt.

    Ranks send again what is not acknowledged (kvtransfer/links/peers.py). There is no second
    attempt, so a request whose message stays lost ends with an error, which is a problem.
    """
    seed = context.seed
    lost = "handoff.send.{}:drop%{}:0.02"
    kinds = {
        "prefill": ("announce", "confirm", "commit", "source_done", "acknowledgement"),
        "decode": ("read_done", "reads_ended", "target_opened", "closed", "acknowledgement"),
    }
    flags = [*SMALL, *ONE_ATTEMPT]
    for role, names in kinds.items():
        flags += failpoints(role, *(lost.format(kind, seed()) for kind in names))
    async with context.cluster(*flags) as (cluster, watch):
        mix = Mix(leave_share=0.2)
        load = Workload(cluster, context.oracle, context.rng, context.tally, mix)
        await load.run(until(context, load, num_requests))
        await audit(watch, context.tally)
        _expect_hits(context, watch, "handoff.send.announce:drop", "handoff.send.confirm:drop")
        if num_requests and not watch.total("messages_resent"):
            context.tally.problem("no message was sent again: the fault has no effect")


async def silence(context: Context, num_requests: int) -> None:
    """What is sent again is lost again: hand-offs end all the same, and nothing is held for them.

    An attempt is given up after ``coordinator.handoff_timeout_s``, the hand-off of a request that
    has ended after ``coordinator.release_grace_s``; what a source holds is free with its lease. No
    hand-off can be whole, so requests of more tokens than attempts end with an error.
    """
    kind = context.rng.choice(("announce", "confirm", "commit"))
    flags = (
        *failpoints("prefill", f"handoff.send.{kind}:drop"),
        *("--set", f"prefill_pool.lease_s={SILENCE_LEASE_S}"),
        *("--set", f"coordinator.release_grace_s={SILENCE_GRACE_S}"),
        *("--set", f"coordinator.handoff_timeout_s={SILENCE_HANDOFF_S}"),
        *("--set", "coordinator.max_attempts=2"),
    )
    tally = context.tally
    async with context.cluster(*SMALL, *flags) as (cluster, watch):
        mix = Mix(leave_share=0.2, allowed=frozenset({HANDOFF_FAILED, STALLED}))
        load = Workload(cluster, context.short, context.rng, tally, mix)
        before = tally.ends[HANDOFF_FAILED] + tally.ends[STALLED]
        await load.run(until(context, load, num_requests))
        await audit(watch, tally)
        _expect_hits(context, watch, f"handoff.send.{kind}:drop")
        if num_requests and tally.ends[HANDOFF_FAILED] + tally.ends[STALLED] == before:
            tally.problem(f"no hand-off was given up, although each {kind} was lost")


async def changed_bytes(context: Context, num_requests: int) -> None:
    """Changed bytes are noticed, each time; a request may fail, but not lie."""
    seed, tally = context.seed, context.tally
    faults = (
        f"transfer.read:corrupt%{seed()}:0.02",
        f"transfer.read:fail%{seed()}:0.01",
        f"transfer.read:delay=0.1%{seed()}:0.03",
    )
    flags = (*SMALL, *failpoints("decode", *faults), *MANY_ATTEMPTS)
    async with context.cluster(*flags) as (cluster, watch):
        mix = context.mix(Mix(leave_share=0.2), HANDOFF_FAILED)
        load = Workload(cluster, context.oracle, context.rng, tally, mix)
        await load.run(until(context, load, num_requests))
        await audit(watch, tally)
        _expect_hits(context, watch, "transfer.read:corrupt", "transfer.read:fail")
        found, made = watch.total("checksum_mismatches"), watch.failpoint_hits()
        unseen = made["transfer.read:corrupt"] - found - watch.total("reads_landed_late")
        if found == 0 or unseen > 0:
            tally.problem(f"{unseen} changed reads were not noticed, {found} were")


async def unchecked(context: Context, num_requests: int) -> None:
    """The test of the test: with checksums off the same fault must show as foreign tokens."""
    trial = Tally()
    fault = f"transfer.read:corrupt%{context.seed()}:0.2"
    flags = (*SMALL, *failpoints("decode", fault))
    async with context.cluster(*flags, checksum="off") as (cluster, _):
        load = Workload(cluster, context.oracle, context.rng, trial, Mix(cold_share=1.0))
        await load.run(until(context, load, num_requests))
    context.tally.num_planted_seen += trial.lies["foreign"]
    if not trial.lies["foreign"]:
        context.tally.problem("without checksums no changed byte was seen: the fault is not real")


def _expect_hits(context: Context, watch: Watch, *names: str) -> None:
    hits = watch.failpoint_hits()
    for name in names:
        if not hits[name]:
            context.tally.problem(f"the failpoint {name} has never taken effect")
