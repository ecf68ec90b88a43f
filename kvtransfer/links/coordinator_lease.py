"""Which coordinator a rank obeys, and for how long. Pure.

The life of a lease
1. ``Hello`` goes over a new connection. Until ``Welcome`` comes back on it, nothing else is sent
   and nothing is obeyed.
2. ``Welcome`` begins the lease, if its epoch is not lower than any seen before. A gang that has
   formed under an earlier coordinator is ready at once; its leader sends again what its cache
   holds.
3. Each request of the coordinator is remembered until ``Released`` has been sent for it.
4. The lease lasts as long as the connection: libzmq's threads, at both ends, keep it up while the
   processes live, whatever these are busy with. So a coordinator that sends nothing for a minute is
   obeyed when it goes on.
5. The lease ends when the connection is down and does not come back at once, or when the
   coordinator does not know this rank. All its requests are aborted in its place, and the rank
   introduces itself over a new connection. There it may meet the same coordinator after a pause,
   or the next one, at a higher epoch.
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
    """A rank's lease from its coordinator, and then from the next one.

    Args:
        timeout_s: how long a connection may take to be made; then another is tried.
        counters: counts what is not obeyed.
    """

    def __init__(self, timeout_s: float, counters: Counter[str]) -> None:
        self.epoch = 0  # the highest coordinator's so far
        self.was_welcome = False  # under any coordinator
        self.is_welcome = False  # on the present connection
        self._timeout_s = timeout_s
        self._counters = counters
        self._was_up = False  # the present connection
        self._up_at: float | None = None  # when it was last, or was begun; None: not looked at yet
        self._looked = 0.0
        self._ready: GangReady | None = None
        self._asked: dict[tuple[str, int], None] = {}  # requests, in order of arrival
        # The hashes that the own pool holds, by tier, as it has reported them.
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
                self.epoch = message.coordinator_epoch
                self.is_welcome = True
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
        """The messages that answer a WELCOME: none for the first coordinator."""
        told: list[ToCoordinator] = []
        for tier, cached in self._cached.items():
            told += cache_updates(tuple(cached), tier)
        return told if self._ready is None else [*told, self._ready]

    # -- what is sent ------------------------------------------------------------------------------

    def may_say(self, message: ToCoordinator) -> bool:
        """Whether to send a message now. What the next coordinator must know is remembered."""
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
        """Whether the present connection is to be given up.

        Ask many times a second: time in which it was not asked does not count, because then it was
        this process that paused.

        Args:
            now: monotonic seconds.
            is_up: the connection stands.
        """
        paused_s = now - self._looked
        self._looked = now
        if is_up or self._up_at is None:
            self._was_up = is_up
            self._up_at = now
            return False
        if paused_s > PAUSE_S:
            self._up_at += paused_s
        if not self._was_up:
            return now - self._up_at > self._timeout_s
        # What was sent over it may be lost, and HELLO is sent only once.
        return not self.is_welcome or now - self._up_at > RETURN_S

    def end(self, now: float) -> list[Abort]:
        """Begin anew, over a new connection.

        Returns:
            An abort of each request of the last coordinator.
        """
        self.is_welcome = False
        self._was_up = False
        self._up_at = now
        aborts = [Abort(request_id, attempt) for request_id, attempt in self._asked]
        self._asked.clear()
        return aborts

    def welcomed(self) -> bool:
        """Note a WELCOME that was obeyed; whether it was the first."""
        is_first = not self.was_welcome
        self.was_welcome = True
        return is_first
