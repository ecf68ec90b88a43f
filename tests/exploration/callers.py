"""The coordinator: the real service and registry, and the callers in front of them.

Callers come in the order of their numbers: they are alike but for their names, so any other order
is one of these with other names. Each may leave at any time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.cluster.joining import HelloRefused, JoinRequirements
from coordinator.cluster.losses import Timeouts
from coordinator.cluster.pools import PoolState
from coordinator.cluster.registry import Registry
from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.records.generation import Generation
from coordinator.records.records import Record
from coordinator.requests.delivery import Delivery
from coordinator.requests.service import Service
from kvcache.prefix import block_salt, hash_blocks
from protocol.errors import RequestError
from protocol.kv import RankEndpoint
from protocol.messages import (
    PROTOCOL_VERSION,
    Connected,
    GangAddress,
    GangReady,
    Hello,
    NewToken,
    Refused,
    ToCoordinator,
    ToRank,
)
from protocol.request import FinishReason, SamplingParams
from tests.exploration.inputs import (
    COORDINATOR,
    Died,
    Leave,
    Message,
    Option,
    Outbox,
    Start,
    Submit,
    Wait,
)
from tests.exploration.mains import FINGERPRINT, MAX_MODEL_LEN, next_token, prompt_of
from tests.exploration.memory import BLOCK_SIZE

LONG_S = 1e6
MOMENT_S = 2.0


@dataclass(frozen=True, slots=True)
class Calls:
    """Who calls.

    ``num_tokens`` and ``max_tokens`` are of each. ``is_patient``: a request that has lost its pool
    waits for another one without an end, or else it may be failed after a moment.
    """

    num_requests: int = 1
    num_tokens: int = 1
    max_tokens: int = 2
    may_leave: bool = True
    max_attempts: int = 1
    is_patient: bool = True


class Collector(Delivery):
    """A caller that keeps what it is given, and knows what that should be."""

    def __init__(self, last_token: int) -> None:
        self.tokens = [last_token]
        self.error = ""

    def put(self, choice: int, tokens: Sequence[NewToken]) -> None:
        del choice
        for token in tokens:
            assert token.index == len(self.tokens) - 1, f"token {token.index} is not the next"
            assert token.token_id == next_token(self.tokens), f"{token} is not the right one"
            self.tokens.append(token.token_id)

    def fail(self, error: RequestError) -> None:
        self.error = self.error or error.code


class Coordinator:
    """The coordinator's logic.

    Args:
        pools: what the cluster consists of.
        calls: who calls.
    """

    def __init__(self, pools: tuple[ExpectedPool, ...], calls: Calls) -> None:
        config = CoordinatorConfig(
            token="explored",
            model="explored",
            pools=pools,
            block_size=BLOCK_SIZE,
            local_prefill_threshold=0,
            stall_timeout_s=LONG_S,
            handoff_timeout_s=LONG_S,
            failover_wait_s=LONG_S if calls.is_patient else MOMENT_S / 2,
            resume_wait_s=LONG_S,
            release_grace_s=LONG_S,
            max_attempts=calls.max_attempts,
            poison_deaths=100,
        )
        self.outbox: Outbox = []
        self.registry = Registry(
            config.pools, JoinRequirements(FINGERPRINT, BLOCK_SIZE), coordinator_epoch=1,
            timeouts=Timeouts(),
        )  # fmt: skip
        self.service = Service(config, self.registry, self._send, self._clock)
        self._now = 0.0
        self._calls = calls
        self._num_submitted = 0
        self._callers: dict[str, tuple[Record | None, Collector]] = {}
        self._lives: dict[str, int] = {}

    def _clock(self) -> float:
        return self._now

    def _send(self, pool_id: str, message: ToRank) -> None:
        pool = self.registry.pools[pool_id]
        if pool.state is PoolState.READY:
            self._say(pool.leader, message)

    # -- steps of its own --------------------------------------------------------------------------

    def options(self) -> list[Option]:
        """What can happen here without a message."""
        found: list[Option] = []
        if self._num_submitted < self._calls.num_requests:
            found.append(Submit())
        if self._calls.may_leave:
            found += [Leave(name) for name, (record, _) in self._callers.items() if _is_on(record)]
        records = [record for record, _ in self._callers.values() if record is not None]
        waits = [record.wait for record in records if record.is_active]
        if any(
            wait is not None and (wait.not_before > self._now or not self._calls.is_patient)
            for wait in waits
        ):
            found.append(Wait())
        return found

    def take(self, option: Option, found: bytes | None) -> None:
        """Take one of its options."""
        del found
        match option:
            case Submit():
                self._submit()
            case Leave():
                record, _ = self._callers[option.request_id]
                assert record is not None
                self.service.abort(record)
            case Wait():
                self._now += MOMENT_S
                self.service.sweep(self._now)

    def _submit(self) -> None:
        number = self._num_submitted
        self._num_submitted += 1
        prompt = prompt_of(number, self._calls.num_tokens)
        collector = Collector(prompt[-1])
        name = f"r{number}"
        sampling = SamplingParams(max_tokens=self._calls.max_tokens, temperature=0.0)
        hashes = tuple(hash_blocks(prompt, BLOCK_SIZE, block_salt(FINGERPRINT, "")))
        generation = Generation(name, prompt, hashes, sampling, "tenant")
        record = None
        try:
            record = self.service.submit(generation, collector, 0, self._now)
        except RequestError as error:
            collector.fail(error)
        self._callers[name] = (record, collector)

    # -- what it is told ---------------------------------------------------------------------------

    def receive(self, sender: str, message: Message) -> None:
        """By a rank, by name; or by the launcher."""
        if isinstance(message, Died):
            self._deliver(self.registry.lose(message.pool_id, "killed"))
            self.service.on_pool_lost(message.pool_id)
            for name in message.next:
                self._say(name, Start())
            return
        if isinstance(message, Hello):
            self._on_hello(sender, message)
            return
        known = self.registry.pool_of(sender)
        if known is None:
            return  # of a gang that is lost nothing is heard any more
        match message:
            case GangReady():
                self._deliver(self.registry.on_gang_ready(sender, message, self._now))
            case Connected():
                before = self._serving()
                self.registry.on_connected(sender, message, self._now)
                for pool_id in self._serving() - before:
                    self.service.on_pool_serving(pool_id)
            case _:
                assert isinstance(message, ToCoordinator)
                if known[0].state is PoolState.READY:
                    self.service.on_message(known[0].pool_id, message)

    def _on_hello(self, sender: str, message: Hello) -> None:
        try:
            self._deliver(self.registry.on_hello(sender, message, self._now))
        except HelloRefused as error:  # of a gang that has died since
            self._say(sender, Refused(str(error)))

    def _serving(self) -> set[str]:
        return {pool.pool_id for pool in self.registry.pools.values() if pool.is_serving}

    def _deliver(self, outgoing: Sequence[tuple[str, ToRank]]) -> None:
        for peer, message in outgoing:
            self._say(peer, message)

    def _say(self, receiver: str, message: Message) -> None:
        self.outbox.append((COORDINATOR, receiver, message))

    # -- the end -----------------------------------------------------------------------------------

    @property
    def is_quiet(self) -> bool:
        """Nobody will come, and nothing is expected of anybody."""
        return self._num_submitted == self._calls.num_requests and not self.service._records

    def problems(self, may_fail: bool) -> list[str]:
        """What callers would complain about when all is over.

        Args:
            may_fail: something has befallen the cluster that can cost an attempt.
        """
        found = []
        for name, (record, collector) in self._callers.items():
            num_tokens = len(collector.tokens) - 1
            if num_tokens == self._calls.max_tokens or _has_left(record):
                continue
            if not (collector.error and may_fail):
                found.append(f"{name} has ended after {num_tokens} tokens: {collector.error!r}")
        return found


def hello(pool: ExpectedPool, endpoint: RankEndpoint, life: int) -> Hello:
    """What a rank says first."""
    return Hello(
        PROTOCOL_VERSION, pool.role, pool.pool_id, pool.cp_size, pool.tp_size, endpoint,
        FINGERPRINT, MAX_MODEL_LEN, GangAddress("", "") if endpoint.rank == 0 else None,
        gang_start=life,
    )  # fmt: skip


def _is_on(record: Record | None) -> bool:
    return record is not None and record.is_active


def _has_left(record: Record | None) -> bool:
    return record is not None and record.finish_reason is FinishReason.ABORT
