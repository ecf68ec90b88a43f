"""Many streams at once, each compared with the oracle token by token, some of them abandoned.

1. Each of a number of workers sends a request, follows it, has it compared, and sends the next.
2. A share of the clients go away at a random moment. What the coordinator's time line says of such
   a request tells the phase it was in and when the last block of it was free again.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from baton_client import ClientError
from tests.campaign.client import Leave, Stream, draw_leave, run_stream
from tests.campaign.cluster import RunningCluster
from tests.campaign.oracle import MAX_TOKENS, Oracle
from tests.campaign.tally import Tally

RELEASE_S = 60.0  # how long a request that nobody wants any more is watched
_RELEASE_POLL_S = 0.25
_REFUSED_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Mix:
    """What a workload consists of.

    Args:
        leave_share: clients that go away early.
        cold_share: requests that no cache can help.
        allowed: ends, besides done and left, that the faults at hand may cause.
        measures_free: whether times to free count for the table; not while faults delay them.
        patience_s: a client waits no longer for its stream.
    """

    concurrency: int = 24
    leave_share: float = 0.0
    cold_share: float = 0.8
    allowed: frozenset[str] = frozenset()
    measures_free: bool = False
    patience_s: float = 60.0


class Workload:
    """Streams against one cluster.

    Args:
        rng: decides prompts, lengths and who leaves.
    """

    def __init__(
        self, cluster: RunningCluster, oracle: Oracle, rng: random.Random, tally: Tally, mix: Mix
    ) -> None:
        self.num_ended = 0
        self.num_held = 0  # abandoned in transfer, and held for more than ``held_after_s``
        self.held_after_s = 0.0
        self.excuses: Callable[[Stream], bool] = lambda _: False  # of an end that is nobody's fault
        self._cluster = cluster
        self._oracle = oracle
        self._rng = rng
        self._tally = tally
        self._mix = mix
        self._watches: set[asyncio.Task[None]] = set()

    async def run(self, goes_on: Callable[[], bool], pause_s: float = 0.0) -> None:
        """Until ``goes_on`` says no; returns when every stream and every watch has ended.

        Each client waits ``pause_s`` before its next request.
        """
        async with asyncio.TaskGroup() as workers:
            for _ in range(self._mix.concurrency):
                workers.create_task(self._work(goes_on, pause_s))
        await self.settled()

    async def settled(self) -> None:
        """Wait until every abandoned request has been seen to its end."""
        if self._watches:
            await asyncio.wait(self._watches)

    async def _work(self, goes_on: Callable[[], bool], pause_s: float) -> None:
        while goes_on():
            await self.one()
            await asyncio.sleep(pause_s)

    async def one(self, leave: Leave | None = None) -> Stream:
        """One request to its end, compared and counted."""
        rng, mix = self._rng, self._mix
        stream = Stream(self._oracle.draw(rng), rng.randint(1, MAX_TOKENS))
        if leave is None and rng.random() < mix.leave_share:
            leave = draw_leave(rng, stream.max_tokens)
        salt = f"{rng.getrandbits(64):x}" if rng.random() < mix.cold_share else None
        await run_stream(
            self._cluster.address, stream, salt=salt, leave=leave, patience_s=mix.patience_s
        )
        self.num_ended += 1
        self._judge(stream)
        if stream.end == "refused":
            await asyncio.sleep(_REFUSED_PAUSE_S)
        if stream.end in ("left", "late"):
            watch = asyncio.create_task(self._watch_release(stream))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)
        return stream

    def _judge(self, stream: Stream) -> None:
        tally, name = self._tally, stream.request_id[:8]
        tally.ends[stream.end] += 1
        tally.compare(name, stream.tokens, stream.prompt.tokens[: stream.max_tokens])
        if stream.end == "done" and len(stream.tokens) < stream.max_tokens:
            tally.lies["lost"] += 1
            tally.problem(f"{name}: ended well after {len(stream.tokens)} of {stream.max_tokens}")
        is_allowed = stream.end in self._mix.allowed or self.excuses(stream)
        if stream.is_lost and not is_allowed:
            tally.problem(f"{name}: ended as {stream.end!r} after {len(stream.tokens)} tokens")

    async def _watch_release(self, stream: Stream) -> None:
        """See an abandoned request to the moment when nothing of it is held anywhere."""
        loop = asyncio.get_running_loop()
        until = loop.time() + RELEASE_S
        answered_none = 0
        while loop.time() < until and self._cluster.is_running:
            await asyncio.sleep(_RELEASE_POLL_S)
            try:
                requests = (await self._cluster.client.timeline(stream.request_id)).requests
            except ClientError:
                requests = []
            if not requests:
                answered_none += 1
                if answered_none > 2:
                    self._tally.abort_phases["not submitted"] += 1
                    return
                continue
            (request,) = requests
            events = request.events
            if "released" not in events:
                continue
            if request.finish_reason == "abort":
                phase = _phase(events)
                self._tally.abort_phases[phase] += 1
                held_s = events["released"] - events["finished"]
                self.num_held += phase == "transfer" and held_s > self.held_after_s
                if self._mix.measures_free:
                    left = stream.ended - stream.sent
                    self._tally.free_s.append(max(0.0, events["released"] - left))
            else:
                self._tally.abort_phases["had ended"] += 1
            return
        if self._cluster.is_running:
            self._tally.problem(f"{stream.request_id[:8]}: not released after {RELEASE_S:.0f} s")


def _phase(events: dict[str, float]) -> str:
    """What a request was at when it was given up."""
    if "reserved" not in events:
        return "queued"
    if "first_token" not in events:
        return "prefill"
    if "first_decode" in events:
        return "decode"
    return "committed" if "committed" in events else "transfer"
