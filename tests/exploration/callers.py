"""The coordinator: the real node, and the callers in front of it.

Callers come in the order of their numbers: they are alike but for their names, so any other order
is one of these with other names. Each may leave at any time.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.node import CoordinatorNode, Send
from coordinator.request import Request
from kvcache.prefix import block_salt, hash_blocks
from protocol.errors import PeerError, RequestError
from protocol.kv import RankEndpoint
from protocol.messages import (
    PROTOCOL_VERSION,
    GangAddress,
    Hello,
    NewToken,
    ToCoordinator,
)
from protocol.request import FinishReason, SamplingParams
from protocol.token_ids import TokenIds
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


class Collector:
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
        self.node = CoordinatorNode(config, FINGERPRINT, epoch=1)
        self.service = self.node.service
        self._now = 0.0
        self._calls = calls
        self._num_submitted = 0
        self._callers: dict[str, tuple[Request | None, Collector]] = {}
        self._lives: dict[str, int] = {}

    # -- steps of its own --------------------------------------------------------------------------

    def options(self) -> list[Option]:
        """What can happen here without a message."""
        found: list[Option] = []
        if self._num_submitted < self._calls.num_requests:
            found.append(Submit())
        if self._calls.may_leave:
            found += [
                Leave(name) for name, (request, _) in self._callers.items() if _is_on(request)
            ]
        requests = [request for request, _ in self._callers.values() if request is not None]
        waits = [request.wait for request in requests if request.is_active]
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
                request, _ = self._callers[option.request_id]
                assert request is not None
                self.service.abort(request, self._now)
            case Wait():
                self._now += MOMENT_S
                self.node.sweep(self._now)
        self._obey()

    def _submit(self) -> None:
        number = self._num_submitted
        self._num_submitted += 1
        prompt = prompt_of(number, self._calls.num_tokens)
        collector = Collector(prompt[-1])
        name = f"r{number}"
        sampling = SamplingParams(max_tokens=self._calls.max_tokens, temperature=0.0)
        hashes = tuple(hash_blocks(prompt, BLOCK_SIZE, block_salt(FINGERPRINT, "")))
        request = Request(
            request_id=name,
            prompt_token_ids=TokenIds.of(prompt),
            block_hashes=hashes,
            sampling=sampling,
            tenant="tenant",
            receiver=collector,
        )
        try:
            self.service.submit(request, self._now)
        except RequestError as error:
            collector.fail(error)
            self._callers[name] = (None, collector)
            return
        self._callers[name] = (request, collector)

    # -- what it is told ---------------------------------------------------------------------------

    def receive(self, sender: str, message: Message) -> None:
        """By a rank, by name; or by the launcher."""
        if isinstance(message, Died):
            self.node.lose_pool(message.pool_id, "killed", self._now)
            for name in message.next:
                self._say(name, Start())
        else:
            assert isinstance(message, ToCoordinator)
            with contextlib.suppress(PeerError):  # of a gang that is lost nothing is heard any more
                self.node.on_message(sender, message, self._now)
        self._obey()

    def _obey(self) -> None:
        for command in self.node.take_commands():
            if isinstance(command, Send):
                self._say(command.peer, command.message)

    def _say(self, receiver: str, message: Message) -> None:
        self.outbox.append((COORDINATOR, receiver, message))

    # -- the end -----------------------------------------------------------------------------------

    @property
    def is_quiet(self) -> bool:
        """Nobody will come, and nothing is expected of anybody."""
        return self._num_submitted == self._calls.num_requests and not self.service.requests

    def problems(self, may_fail: bool) -> list[str]:
        """What callers would complain about when all is over.

        Args:
            may_fail: something has befallen the cluster that can cost an attempt.
        """
        found = []
        for name, (request, collector) in self._callers.items():
            num_tokens = len(collector.tokens) - 1
            if num_tokens == self._calls.max_tokens or _has_left(request):
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


def _is_on(request: Request | None) -> bool:
    return request is not None and request.is_active


def _has_left(request: Request | None) -> bool:
    return request is not None and request.finish_reason is FinishReason.ABORT
