"""Which coordinator a rank obeys, and what it owes it. Pure.

The life of an lease
1. ``Hello`` is said on a new line. Until ``Welcome`` comes on that line, nothing else is told and
   nothing is obeyed.
2. ``Welcome`` of an epoch that is not lower than any seen before begins it. A gang that has formed
   under an earlier coordinator is ready at once; its leader says anew what its cache holds.
3. What the coordinator asks for is remembered until it has been told ``Released``.
4. The connection keeps it: libzmq's threads, at both ends, hold it up as long as the processes
   live, whatever these are busy with. A coordinator that says nothing for a minute is obeyed when
   it goes on. When the connection is down and does not come back at once, or the coordinator does
   not know this rank, the lease ends: everything that was asked for is aborted in the
   coordinator's place, and the rank introduces itself on a new line. It does not matter who listens
   there: the same coordinator after a pause, or the next one, at a higher epoch.
"""

from collections import Counter, defaultdict

from protocol.messages import (
    Abort,
    Alive,
    CacheUpdate,
    Collect,
    GangReady,
    Heartbeat,
    Hello,
    Introduce,
    Prefill,
    Refused,
    Released,
    Reserve,
    Shutdown,
    ToCoordinator,
    ToRank,
    Welcome,
    cache_updates,
)

RETURN_S = 0.3  # for a connection that has broken to come back
PAUSE_S = 0.5  # the transfer thread looks many times a second: a longer gap is a pause of its own

_OPENS = (Reserve, Prefill, Collect)  # a request is asked for by these, until Released


class CoordinatorLease:
    """A rank's relation to its coordinator, and to the next one.

    Args:
        timeout_s: how long a line may take to be connected; then another is tried.
        counters: counts what is not obeyed.
    """

    def __init__(self, timeout_s: float, counters: Counter[str]) -> None:
        self.epoch = 0  # the highest coordinator's so far
        self.was_welcome = False  # under any coordinator
        self.is_welcome = False  # on the present line
        self._timeout_s = timeout_s
        self._counters = counters
        self._was_up = False  # the present line
        self._up_at: float | None = None  # when it was last, or was begun; None: nobody has looked
        self._looked = 0.0
        self._ready: GangReady | None = None
        self._asked: dict[tuple[str, int], None] = {}  # requests, in order of arrival
        # What the own pool has said that it holds, by tier.
        self._cached: defaultdict[str, dict[bytes, None]] = defaultdict(dict)

    # -- what arrives ------------------------------------------------------------------------------

    def obeys(self, message: ToRank) -> bool:
        """Whether to act on a message; ``Alive`` asks for nothing."""
        match message:
            case Alive() | Introduce() | Welcome() if message.coordinator_epoch < self.epoch:
                self._counters["dropped_stale_coordinator"] += 1
                return False
            case Alive():
                self.epoch = message.coordinator_epoch
                return False
            case Welcome():
                self.epoch, self.is_welcome = message.coordinator_epoch, True
                return True
            case Introduce() | Refused() | Shutdown():
                return True
        if not self.is_welcome:
            self._counters["dropped_unwelcome"] += 1
            return False
        if isinstance(message, _OPENS):
            self._asked[message.key] = None
        return True

    def greeting(self) -> list[ToCoordinator]:
        """What to say when welcomed: nothing, to the first coordinator."""
        told: list[ToCoordinator] = []
        for tier, cached in self._cached.items():
            told += cache_updates(tuple(cached), tier)
        return told if self._ready is None else [*told, self._ready]

    # -- what is said ------------------------------------------------------------------------------

    def may_say(self, message: ToCoordinator) -> bool:
        """Whether to send a message now. What matters to the next coordinator is remembered."""
        match message:
            case Hello() | Heartbeat():
                return True
            case GangReady():
                self._ready = message
            case Released():
                self._asked.pop(message.key, None)
            case CacheUpdate():
                cached = self._cached[message.tier]
                for block_hash in message.evicted:
                    cached.pop(block_hash, None)
                cached.update(dict.fromkeys(message.stored))
        return self.is_welcome

    # -- its end -----------------------------------------------------------------------------------

    def is_over(self, now: float, *, is_up: bool) -> bool:
        """Whether the present line is to be given up; ``is_up``: it is connected.

        Ask many times a second: time in which nobody asked does not count, for then it was this
        process that paused.
        """
        paused_s, self._looked = now - self._looked, now
        if is_up or self._up_at is None:
            self._was_up, self._up_at = is_up, now
            return False
        if paused_s > PAUSE_S:
            self._up_at += paused_s
        if not self._was_up:
            return now - self._up_at > self._timeout_s
        # What was said on it may be lost, and HELLO is said once.
        return not self.is_welcome or now - self._up_at > RETURN_S

    def end(self, now: float) -> list[Abort]:
        """Begin anew with whoever listens; what to abort of what the last one asked for."""
        self.is_welcome = False
        self._was_up, self._up_at = False, now
        aborts = [Abort(request_id, attempt) for request_id, attempt in self._asked]
        self._asked.clear()
        return aborts

    def welcomed(self) -> bool:
        """Note a WELCOME that was obeyed; whether it was the first."""
        is_first, self.was_welcome = not self.was_welcome, True
        return is_first
