"""The rules for gangs whose processes die: reports and time come in, actions go out. Pure.

The life of a gang
1. SERVING until one of its processes exits, or the coordinator reports it lost: only the
   coordinator can see that a rank is silent or hangs.
2. ENDING: its processes are asked to end, and killed after a short grace, because a stopped
   process, or one in a collective that will never complete, obeys only SIGKILL.
3. WAITING, when the last of them has exited: the longer, the more often this has happened.
4. STARTING, under the next start number, until the coordinator reports that it serves.
5. GIVEN_UP when its restarts are used up. The cluster goes on as long as it can answer: with one
   decode pool, and a coordinator.

The coordinator is a gang of one, whose start number is its epoch. A silent coordinator is looked at
from outside (silence.py), and gets more time if it is busy. It is killed without grace: if it was
only slow, it would take a request to end as one for the whole cluster, and end every rank.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from launcher.supervise.restarts import RestartBudget, RestartPolicy
from launcher.supervise.silence import Silence, Vitals

COORDINATOR = "coordinator"
GRACE_S = 0.5
PAUSE_S = 2.0  # ticks come each second: after a longer gap this process was paused itself


class Phase(enum.Enum):
    STARTING = "starting"
    SERVING = "serving"
    ENDING = "ending"
    WAITING = "waiting"
    GIVEN_UP = "given up"


@dataclass(frozen=True, slots=True)
class End:
    """Ask the gang's processes to end."""

    name: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill the gang's processes."""

    name: str


@dataclass(frozen=True, slots=True)
class Start:
    """Start all of the gang's processes."""

    name: str
    start: int


@dataclass(frozen=True, slots=True)
class Look:
    """Read the vitals of the gang's process, and pass them to ``on_vitals``."""

    name: str
    start: int


@dataclass(frozen=True, slots=True)
class Say:
    """One line for the operator."""

    text: str


@dataclass(frozen=True, slots=True)
class Fail:
    """Nothing can be served any more."""

    reason: str


Action = End | Kill | Start | Look | Say | Fail


@dataclass(slots=True)
class Gang:
    """One gang: processes that live and die together."""

    name: str
    role: str  # "prefill", "decode" or "coordinator"
    num_ranks: int
    budget: RestartBudget
    phase: Phase = Phase.SERVING
    start: int = 1
    running: set[int] = field(default_factory=set)  # ranks whose process has not exited
    reason: str = ""
    lost_at: float = 0.0
    deadline: float | None = None  # of the phase

    def enter(self, phase: Phase, deadline: float | None = None) -> None:
        self.phase = phase
        self.deadline = deadline


@dataclass(frozen=True, slots=True)
class RestartTimeouts:
    """Budgets of time, in seconds."""

    start_s: float  # a gang, until it serves
    coordinator_start_s: float  # until it listens
    coordinator_silent_s: float  # and does nothing
    coordinator_stall_s: float  # and is busy


class Gangs:
    """All gangs of a cluster that has come up.

    Args:
        pools: (name, role, ranks) of each.
        policy: for every gang on its own.
        waits: budgets of time.
        now: when the cluster has come up.
    """

    def __init__(
        self,
        pools: Iterable[tuple[str, str, int]],
        policy: RestartPolicy,
        waits: RestartTimeouts,
        now: float,
    ) -> None:
        names = [*pools, (COORDINATOR, COORDINATOR, 1)]
        self._gangs = {
            name: Gang(name, role, size, RestartBudget(policy), running=set(range(size)))
            for name, role, size in names
        }
        self._policy = policy
        self._waits = waits
        self._ticked = now
        self._is_closed = False
        self._silence = Silence(waits.coordinator_silent_s, waits.coordinator_stall_s, now)
        self._gangs[COORDINATOR].deadline = self._silence.look_at

    def phase(self, name: str) -> Phase:
        return self._gangs[name].phase

    @property
    def serving_pools(self) -> list[str]:
        """Pools whose processes run and have served: a new coordinator may wait for them."""
        gangs = self._gangs.values()
        return [g.name for g in gangs if g.phase is Phase.SERVING and g.name != COORDINATOR]

    def close(self) -> None:
        """The cluster ends in order: from now on no process is started again, or reported lost."""
        self._is_closed = True
        for gang in self._gangs.values():
            if gang.phase is Phase.WAITING:
                gang.enter(Phase.GIVEN_UP)

    def wait_s(self, now: float) -> float:
        """Seconds until the next ``tick`` is due."""
        deadlines = [gang.deadline for gang in self._gangs.values() if gang.deadline is not None]
        return max(0.0, min(1.0, min(deadlines, default=now + 1.0) - now))

    # -- in: reports and time ----------------------------------------------------------------------

    def on_exit(self, name: str, rank: int, start: int, reason: str, now: float) -> list[Action]:
        """A process has exited, by itself or because it was asked to."""
        gang = self._gangs[name]
        if start != gang.start:
            return []
        gang.running.discard(rank)
        if gang.phase is Phase.ENDING:
            return [] if gang.running else self._ended(gang, now)
        return self._lose(gang, reason, now)

    def on_lost(self, name: str, start: int, reason: str, now: float) -> list[Action]:
        """The coordinator has lost a gang; ``start`` 0 is one that it has never seen."""
        gang = self._gangs[name]
        if start != gang.start and (start != 0 or gang.phase is not Phase.SERVING):
            return []
        return self._lose(gang, reason, now)

    def on_serving(self, name: str, start: int, now: float) -> list[Action]:
        """A gang serves; of a coordinator: it listens."""
        gang = self._gangs[name]
        if start != gang.start or gang.phase is not Phase.STARTING:
            return []
        gang.enter(Phase.SERVING)
        if name == COORDINATOR:
            self.on_alive(start, now)
        return [Say(f"{name} is serving again after {now - gang.lost_at:.1f} s")]

    def on_alive(self, epoch: int, now: float) -> None:
        """A sign of life of the coordinator."""
        gang = self._gangs[COORDINATOR]
        if epoch == gang.start and gang.phase is Phase.SERVING:
            self._silence.heard(now)
            gang.deadline = self._silence.look_at

    def on_vitals(self, epoch: int, vitals: Vitals | None, now: float) -> list[Action]:
        """The vitals of the coordinator; None if they cannot be read."""
        gang = self._gangs[COORDINATOR]
        if epoch != gang.start or gang.phase is not Phase.SERVING:
            return []
        reason = self._silence.look(vitals, now)
        gang.deadline = self._silence.look_at
        return [] if reason is None else self._lose(gang, reason, now)

    def on_start_failed(self, name: str, start: int, reason: str, now: float) -> list[Action]:
        """Not every process of the gang could be started; none of them is left."""
        gang = self._gangs[name]
        if start != gang.start:
            return []
        gang.running.clear()
        if gang.phase is Phase.ENDING:  # given up meanwhile: no process is left to exit
            return self._ended(gang, now)
        return self._lose(gang, reason, now)

    def tick(self, now: float) -> list[Action]:
        """Let time pass. Call it at least each second."""
        pause_s = now - self._ticked
        self._ticked = now
        actions: list[Action] = []
        for gang in self._gangs.values():
            if gang.deadline is None:
                continue
            is_for_others = gang.phase in (Phase.SERVING, Phase.STARTING)
            if pause_s > PAUSE_S and is_for_others:  # no report was read: that is no silence
                gang.deadline += pause_s
                if gang.name == COORDINATOR:
                    self._silence.excuse(pause_s)
            if now >= gang.deadline:
                actions += self._overdue(gang, now)
        return actions

    # -- inside ------------------------------------------------------------------------------------

    def _overdue(self, gang: Gang, now: float) -> list[Action]:
        match gang.phase:
            case Phase.ENDING:
                gang.deadline = now + GRACE_S
                return [Kill(gang.name)]
            case Phase.WAITING:
                return self._start(gang, now)
            case Phase.STARTING:
                return self._lose(gang, "it did not come up in time", now)
            case Phase.SERVING:
                return [Look(gang.name, gang.start)]
            case Phase.GIVEN_UP:
                return []

    def _lose(self, gang: Gang, reason: str, now: float) -> list[Action]:
        if gang.phase not in (Phase.SERVING, Phase.STARTING):
            return []
        if gang.phase is Phase.SERVING:
            gang.lost_at = now
        gang.phase = Phase.ENDING
        gang.reason = reason
        actions: list[Action] = []
        if not self._is_closed:
            actions.append(Say(f"{gang.name} is lost: {reason}"))
        if not gang.running:
            return actions + self._ended(gang, now)
        gang.deadline = now + GRACE_S
        return [*actions, Kill(gang.name) if gang.name == COORDINATOR else End(gang.name)]

    def _ended(self, gang: Gang, now: float) -> list[Action]:
        if self._is_closed:
            gang.enter(Phase.GIVEN_UP)
            return []
        wait_s = gang.budget.take(now)
        if wait_s is not None:
            gang.enter(Phase.WAITING, now + wait_s)
            return [Say(f"{gang.name} restarts in {wait_s:.2g} s")]
        gang.enter(Phase.GIVEN_UP)
        policy = self._policy
        text = (
            f"{gang.name} is given up after {policy.max_restarts} restarts within "
            f"{policy.window_s:.0f} s, the last reason: {gang.reason}"
        )
        actions: list[Action] = [Say(text)]
        is_vital = gang.role == COORDINATOR or all(
            g.phase is Phase.GIVEN_UP for g in self._gangs.values() if g.role == "decode"
        )
        return [*actions, Fail(text)] if is_vital else actions

    def _start(self, gang: Gang, now: float) -> list[Action]:
        gang.start += 1
        gang.running = set(range(gang.num_ranks))
        is_pool = gang.name != COORDINATOR
        waits = self._waits
        gang.enter(Phase.STARTING, now + (waits.start_s if is_pool else waits.coordinator_start_s))
        return [Start(gang.name, gang.start)]
