"""The stage of the coordinator's event loop, which stands still under load by its failpoints.

endured   its GIL and a core are held for longer than anybody waits for a dead coordinator, then it
          sleeps for less: nobody is taken for dead, and every stream is whole and exact
replaced  it hangs, or is stopped, for good: it is killed and started again, rank and gang stay

That the first took effect is told by the counters of the failpoints and by the loop's own lag; that
the others did, by a process that answered nobody for as long as the launcher has patience, and was
gone then.
"""

import asyncio

from tests.campaign.cluster import RunningCluster, process_state
from tests.campaign.signals import COORDINATOR, ENDS, ORPHANED, TIRELESS, wait_back
from tests.campaign.stages import SMALL, Context
from tests.campaign.watch import Watch, audit
from tests.campaign.workload import Mix, Workload

SILENCE_S = 5.0  # coordinator_silence_s: of a dead coordinator, which says something each second
STALL_S = 60.0  # coordinator_stall_s: of one of which a thread waits for a core or a disk
HOLD_S, SLEEP_S = 8.0, 3.0
NUM_BEFORE = 60  # requests from a coordinator's start, or from one stall, to the next
_LOOK_S = 0.05


async def loop(context: Context, num_each: int) -> None:
    """Endure once, then have it replaced so many times for a hang, and as often for a stop."""
    await _endured(context)
    for action in ("hang", "stop"):
        await _replaced(context, action, num_each)


def _failpoints(*faults: str) -> tuple[str, str]:
    return "--set", f"coordinator.failpoints={','.join(f'loop.reserve:{f}' for f in faults)}"


async def _endured(context: Context) -> None:
    tally = context.tally
    faults = (f"hold={HOLD_S}@{NUM_BEFORE}", f"delay={SLEEP_S}@{2 * NUM_BEFORE}")
    async with context.cluster(*SMALL, *_failpoints(*faults)) as (cluster, watch):
        await watch.look()
        before, pids = watch.epochs(), cluster.processes()
        load = Workload(cluster, context.short, context.rng, tally, Mix(leave_share=0.1))
        worst_s = 0.0

        def goes_on() -> bool:
            nonlocal worst_s
            if watch.state is not None:
                worst_s = max(worst_s, watch.state.loop.lag_s)
            return load.num_ended < 4 * NUM_BEFORE and not context.is_late

        await load.run(goes_on)
        await audit(watch, tally)
        hits = watch.failpoint_hits()
        if not (hits["loop.reserve:hold"] == hits["loop.reserve:delay"] == 1):
            tally.problem(f"the loop was not held and put to sleep once each: {dict(hits)}")
        if worst_s < 0.9 * HOLD_S:
            tally.problem(f"the loop's largest lag was {worst_s:.1f} s, of {HOLD_S:.0f}")
        if watch.epochs() != before or cluster.processes() != pids:
            tally.problem("who was busy was taken for dead")


async def _replaced(context: Context, action: str, num_wanted: int) -> None:
    tally = context.tally
    flags = (*SMALL, *TIRELESS, *_failpoints(f"{action}@{NUM_BEFORE}"))
    async with context.cluster(*flags) as (cluster, watch):
        mix = Mix(concurrency=16, leave_share=0.1, allowed=frozenset((*ENDS, *ORPHANED)))
        load = Workload(cluster, context.short, context.rng, tally, mix)
        is_over = False

        async def follow_all() -> None:
            nonlocal is_over
            for _ in range(num_wanted):
                if context.is_late or not await _follow(context, cluster, watch, action):
                    break
            is_over = True

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(follow_all())
            tasks.create_task(load.run(lambda: not is_over and cluster.is_running))
        await audit(watch, tally)


async def _follow(context: Context, cluster: RunningCluster, watch: Watch, action: str) -> bool:
    """See a coordinator to its end, and its successor at work; whether that came."""
    tally, clock = context.tally, asyncio.get_running_loop().time
    kind, pid, before = f"{action} of the loop", cluster.processes()[COORDINATOR], watch.epochs()
    answered = clock()
    while process_state(pid) not in ("", "Z"):
        if await watch.look() is not None:
            answered, before = clock(), watch.epochs() or before
        if clock() - answered > STALL_S + SILENCE_S:
            tally.problem(f"{kind} was not noticed in {STALL_S:.0f} s")
            return False
        await asyncio.sleep(_LOOK_S)
    tally.faults[kind] += 1
    tally.detected(kind, clock() - answered)
    if clock() - answered < SILENCE_S - 2.0:
        tally.problem(f"{kind}: it ended after {clock() - answered:.1f} s, of something else")
    if not await wait_back(cluster, watch, before):
        tally.problem(f"nothing came back after {kind}")
        return False
    tally.recovered(kind, clock() - answered)
    return True
