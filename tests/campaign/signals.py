"""The stages that send signals to processes: stopped for a moment, stopped for good, killed.

stops   a rank or the coordinator stands still for less than anybody has to notice: all exact
kills   a rank is killed or stopped for good, or the coordinator is killed, while clients stream

What was noticed when is told by ``/v1/cluster``: the pool serves no more, then serves again at a
higher epoch. Where a death ends the whole cluster, as it does for a coordinator that nobody starts
again, a new cluster takes its place; with ``demand_survival`` that is a problem, and so is every
request that did not get all of its tokens.
"""

import asyncio
import contextlib
import signal
from dataclasses import dataclass

from tests.campaign.client import Stream
from tests.campaign.cluster import RunningCluster, process_state, send_signal
from tests.campaign.stages import SMALL, Context
from tests.campaign.watch import Watch, audit
from tests.campaign.workload import Mix, Workload

COORDINATOR = "coordinator"
POOLS = ("--prefill", "cp2", "--prefill", "cp1", "--decode", "tp2", "--decode", "tp1")
STOP_S = (0.1, 1.5)
# Far more deaths than in real life: none may count against the next one, or make it wait.
TIRELESS = ("--set", "restart_budget=1000", "--set", "restart_window_s=1")
BACK_S = 40.0  # for a gang or a coordinator to serve again
NOTICED_S = 20.0
_LOOK_S = 0.02
ENDS = (
    "error worker_lost",
    "error no_workers",
    "error handoff_failed",
    "error stale_target",
)
# How a stream may end whose coordinator ends: with the connection, or with its last words.
ORPHANED = ("cut", "refused", "error shutting_down", "error starting")
_ORPHAN_S = 30.0


@dataclass(frozen=True, slots=True)
class Blow:
    """One signal to one process."""

    name: str  # of the process
    number: signal.Signals

    @property
    def kind(self) -> str:
        role = self.name.split("/")[0].rstrip("0123456789")
        return f"{self.number.name} {role}"


async def stops(context: Context, num_stops: int) -> None:
    """Processes stand still and go on, under load; nobody may take them for dead."""
    tally, rng = context.tally, context.rng
    async with context.cluster(*SMALL) as (cluster, watch):
        load = Workload(cluster, context.oracle, rng, tally, Mix(leave_share=0.2))
        is_over = False

        async def stop_some() -> None:
            nonlocal is_over
            for _ in range(num_stops):
                if context.is_late:
                    break
                name, pid = rng.choice(sorted(cluster.processes().items()))
                await _stop_for(context, Blow(name, signal.SIGSTOP), pid, rng.uniform(*STOP_S))
                await asyncio.sleep(rng.uniform(0.05, 0.3))
            is_over = True

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(stop_some())
            tasks.create_task(load.run(lambda: not is_over))
        await audit(watch, tally)


async def _stop_for(context: Context, blow: Blow, pid: int, seconds: float) -> None:
    """Stop a process and let it go on; it counts only if it stood still to the end."""
    send_signal(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
        if process_state(pid) == "T":
            context.tally.faults[f"{blow.kind}, {STOP_S[0]} to {STOP_S[1]} s"] += 1
        else:
            context.tally.problem(f"{blow.name} was not stopped")
    finally:
        send_signal(pid, signal.SIGCONT)


async def kills(context: Context, num_kills: int) -> None:
    """Kill, or stop for good, one process after the other, on as many clusters as it takes."""
    num_left = num_kills
    while num_left > 0 and not context.is_late:
        async with context.cluster(*SMALL, *TIRELESS, pools=POOLS) as (cluster, watch):
            killer = _Killer(context, cluster, watch)
            num_left -= await killer.run(num_left)
            if killer.is_whole or context.demand_survival:
                await audit(watch, context.tally)


class _Killer:
    """Blows against one cluster under load, until there have been enough or it is gone."""

    def __init__(self, context: Context, cluster: RunningCluster, watch: Watch) -> None:
        self._context = context
        self._cluster = cluster
        self._watch = watch
        self.is_whole = True
        self._orphaned_at: list[float] = []  # when a coordinator ended, or all of the cluster
        mix = context.mix(Mix(concurrency=16, leave_share=0.1), *ENDS)
        self._load = Workload(cluster, context.oracle, context.rng, context.tally, mix)
        self._load.excuses = self._is_orphan

    async def run(self, num_blows: int) -> int:
        """How many there have been."""
        num_done, is_over = 0, False

        async def strike_all() -> None:
            nonlocal num_done, is_over
            while num_done < num_blows and not self._context.is_late:
                await asyncio.sleep(self._context.rng.uniform(0.5, 1.5))
                num_done += 1
                self.is_whole = await self._strike()
                if not self.is_whole:
                    break
            is_over = True

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(strike_all())
            tasks.create_task(self._load.run(lambda: not is_over and self._cluster.is_running))
        return num_done

    async def _strike(self) -> bool:
        """One blow; whether the cluster is whole again."""
        context, watch, tally = self._context, self._watch, self._context.tally
        clock = asyncio.get_running_loop().time
        processes = sorted(self._cluster.processes().items())
        if not processes:
            return False
        name, pid = context.rng.choice(processes)
        is_stop = name != COORDINATOR and context.rng.random() < 0.3
        blow = Blow(name, signal.SIGSTOP if is_stop else signal.SIGKILL)
        await watch.look()
        before, struck = watch.epochs(), clock()
        if name == COORDINATOR or not context.demand_survival:
            self._orphaned_at.append(struck)
        send_signal(pid, blow.number)
        is_noticed = await _wait_noticed(self._cluster, watch, blow, before)
        noticed = clock()
        if process_state(pid) not in ("T", "Z", ""):
            tally.problem(f"{blow.kind} had no effect on {name}")
        tally.faults[blow.kind] += 1
        if is_noticed:
            tally.detected(blow.kind, noticed - struck)
        else:
            tally.problem(f"{blow.kind} of {name} was not noticed in {NOTICED_S:.0f} s")
        is_back = await wait_back(self._cluster, watch, before)
        if is_back:
            tally.recovered(blow.kind, clock() - struck)
        elif context.demand_survival:
            tally.problem(f"nothing came back after {blow.kind} of {name}")
        else:
            self._orphaned_at.append(clock())  # going on, a process may end all of the cluster
        send_signal(pid, signal.SIGCONT)
        return is_back

    def _is_orphan(self, stream: Stream) -> bool:
        """Whether its coordinator ended while it was under way, or was about to start."""
        return stream.end in ORPHANED and any(
            stream.sent - _ORPHAN_S < moment < stream.ended for moment in self._orphaned_at
        )


async def _wait_noticed(
    cluster: RunningCluster, watch: Watch, blow: Blow, before: dict[str, int]
) -> bool:
    """Whether the cluster shows that it knows: another epoch, no such pool, or no answer at all."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(NOTICED_S):
            while cluster.is_running:
                state = await watch.look()
                pool_id = blow.name.split("/")[0]
                if state is None or watch.epochs().get(pool_id, -1) != before.get(pool_id, -1):
                    return True
                await asyncio.sleep(_LOOK_S)
            return True
    return False


async def wait_back(cluster: RunningCluster, watch: Watch, before: dict[str, int]) -> bool:
    """Whether every pool serves again."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(BACK_S):
            while cluster.is_running:
                await watch.look()
                if watch.epochs().keys() >= before.keys():
                    return True
                await asyncio.sleep(_LOOK_S)
    return False
