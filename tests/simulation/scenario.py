"""One seed: a cluster, clients, faults and accidents drawn from it; then the verdict.

Right is: every client has each token once, in order and right; all of them, unless it left or came
when nobody could take it. And when all is quiet no rank holds anything for anybody.
"""

import logging
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from bench.simulate.event_loop import EventLoop, FaultModel
from coordinator.config import ExpectedPool
from coordinator.request import Request
from kvcache.prefix import block_salt, hash_blocks
from protocol.errors import BatonError, RequestError
from protocol.messages import Forget, NewToken, Pin
from protocol.request import SamplingParams
from protocol.token_ids import TokenIds
from tests.simulation.cluster import MortalCluster
from tests.simulation.gangs import FINGERPRINT
from tests.simulation.model import BLOCK_SIZE, VOCAB_SIZE, reference

HORIZON_S = 6.0  # in which clients come and accidents happen
LIMIT_S = 400.0
TURNED_AWAY = "no_workers"
FAULT_MODELS = (
    FaultModel(),
    FaultModel(late=0.05, late_s=1.0, doubled=0.05),
    FaultModel(late=0.1, late_s=5.0, failed=0.01),
    FaultModel(read_s=0.5, late=0.1, late_s=6.0),
    FaultModel(lost_control=0.02, late=0.02, late_s=0.5),
    FaultModel(corrupted=0.02, failed=0.02, doubled=0.02),
    FaultModel(lost=0.01, late=0.05, late_s=2.0, doubled=0.05),
)


class Collector:
    """A client that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.problem = ""
        self.error = ""

    def put(self, choice: int, tokens: Sequence[NewToken]) -> None:
        del choice
        for token in tokens:
            if token.index != len(self.tokens):
                self.problem = f"token {token.index} came after {len(self.tokens)} tokens"
            self.tokens.append(token.token_id)

    def fail(self, error: RequestError) -> None:
        self.error = self.error or error.code


@dataclass
class Client:
    """One request, and what came of it."""

    name: str
    prompt: tuple[int, ...]
    max_tokens: int
    session: str
    follow_ups: int
    is_offload: bool = False
    delivery: Collector = field(default_factory=Collector)
    request: Request | None = None
    has_left: bool = False

    @property
    def is_over(self) -> bool:
        return self.request is None or not self.request.is_active

    def verdict(self) -> str:
        """What is wrong with it; empty if nothing is."""
        tokens, delivery = self.delivery.tokens, self.delivery
        if self.is_offload:
            is_told = delivery.error in ("", TURNED_AWAY, "insufficient_storage")
            return "" if is_told else f"{self.name}: was told {delivery.error}"
        if delivery.problem:
            return f"{self.name}: {delivery.problem}"
        expected = reference(self.prompt, self.max_tokens)
        if tokens != expected[: len(tokens)]:
            return f"{self.name}: got {tokens}, not {expected}"
        if delivery.error not in ("", TURNED_AWAY):
            return f"{self.name}: was told {delivery.error} after {len(tokens)} tokens"
        if len(tokens) < self.max_tokens and not (delivery.error or self.has_left):
            return f"{self.name}: ended after {len(tokens)} of {self.max_tokens} tokens, silently"
        return ""


@dataclass(frozen=True)
class Outcome:
    """What a seed came to."""

    seed: int
    problems: tuple[str, ...]
    num_clients: int
    num_tokens: int
    errors: dict[str, int]  # that clients were told, by code
    num_attempts_lost: int
    faults: dict[str, int]
    virtual_s: float
    trace: tuple[str, ...]


def run(seed: int) -> Outcome:
    """Live through one seed."""
    return _Scenario(seed).run()


def quieten() -> None:
    """Losses are what this is about: the service need not warn of each."""
    logging.disable(logging.CRITICAL)


class _Scenario:
    def __init__(self, seed: int) -> None:
        self._seed = seed
        random = Random(f"scenario {seed}")
        self._world = EventLoop(seed, FAULT_MODELS[seed % len(FAULT_MODELS)])
        pools = _pools(random)
        self._has_store = any(spec.role == "store" for spec, _ in pools)
        self._cluster = MortalCluster(self._world, pools)
        self._random = random
        self._texts = [_text(random, 48) for _ in range(2)]
        self._clients: list[Client] = []
        self._num_coming = 0
        for number in range(random.randint(3, 9)):
            self._come(random.random() * HORIZON_S, self._new_client(number))
        if seed % 3:
            self._plan_accidents()

    def _new_client(self, number: int) -> Client:
        random = self._random
        text = self._texts[int(random.random() < 0.3)]
        prompt = text[: random.randint(1, 40)]
        if random.random() < 0.5:
            prompt += _text(random, random.randint(1, 8))
        if self._has_store and random.random() < 0.35:
            return Client(f"d{number}", prompt, 1, "", 0, is_offload=True)
        session = f"s{number}" if random.random() < 0.7 else ""
        follow_ups = random.choice((0, 0, 1, 2)) if session else 0
        return Client(f"r{number}", prompt, random.randint(1, 8), session, follow_ups)

    def _plan_accidents(self) -> None:
        random, cluster = self._random, self._cluster
        pool_ids = list(cluster.num_blocks)
        for _ in range(random.randint(0, 3)):
            pool_id = random.choice(pool_ids)
            when = random.random() * HORIZON_S
            if random.random() < 0.7:
                self._world.at(when, partial(cluster.kill, pool_id))
            else:
                self._world.at(when, partial(cluster.pause, pool_id, random.random() * 3))

    # -- clients -----------------------------------------------------------------------------------

    def _come(self, delay_s: float, client: Client) -> None:
        self._num_coming += 1
        self._world.at(delay_s, partial(self._submit, client))

    def _submit(self, client: Client) -> None:
        self._num_coming -= 1
        self._clients.append(client)
        service, world = self._cluster.node.service, self._world
        sampling = SamplingParams(max_tokens=client.max_tokens, temperature=0.0)
        hashes = tuple(hash_blocks(client.prompt, BLOCK_SIZE, block_salt(FINGERPRINT, "")))
        session = ("tenant", client.session) if client.session else None
        request = Request(
            request_id=client.name,
            prompt_token_ids=TokenIds.of(client.prompt),
            block_hashes=hashes,
            sampling=sampling,
            tenant="tenant",
            receiver=client.delivery,
            session=session,
            is_offload=client.is_offload,
            priority=int(client.is_offload),
        )
        if client.is_offload:
            mode = self._random.choice(("soft", "hard"))
            self._cluster.tell_store(Pin(client.name, hashes[: self._random.randint(0, 9)], mode))
            if self._random.random() < 0.2:
                self._cluster.tell_store(Forget(hashes))
        try:
            service.submit(request, world.now)
        except RequestError as error:
            client.delivery.fail(error)
            return
        client.request = request
        if self._random.random() < 0.2:
            world.at(self._random.random() * 2, partial(self._leave, client))

    def _leave(self, client: Client) -> None:
        if client.request is not None and client.request.is_active:
            self._world.faults["left"] += 1
            client.has_left = True
            self._cluster.node.service.abort(client.request, self._world.now)

    def _ask_again(self) -> None:
        """Whose request has ended and who has more to ask does so, with what it was told."""
        for client in self._clients:
            if client.follow_ups and client.is_over and not client.delivery.error:
                asked = _text(self._random, self._random.randint(1, 6))
                prompt = (*client.prompt, *client.delivery.tokens, *asked)
                following = Client(
                    f"{client.name}+", prompt, self._random.randint(1, 6), client.session,
                    client.follow_ups - 1,
                )  # fmt: skip
                client.follow_ups = 0
                self._come(self._random.random() * 0.2, following)

    # -- the verdict -------------------------------------------------------------------------------

    def run(self) -> Outcome:
        broken = ""
        is_quiet = True
        try:
            is_quiet = self._world.run_until(self._is_quiet, LIMIT_S)
        except (AssertionError, BatonError, LookupError) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            broken = f"{type(error).__name__} in {where.name}: {error}"
        problems = [broken] if broken else []
        problems += [verdict for client in self._clients if (verdict := client.verdict())]
        if not is_quiet:
            problems.append(f"not quiet after {LIMIT_S} s: {self._what_is_left()}")
        clients = self._clients
        return Outcome(
            seed=self._seed,
            problems=tuple(problems),
            num_clients=len(clients),
            num_tokens=sum(len(client.delivery.tokens) for client in clients),
            errors=Counter(c.delivery.error for c in clients if c.delivery.error),
            num_attempts_lost=sum(
                client.request.attempt - 1 for client in clients if client.request is not None
            ),
            faults=dict(self._world.faults),
            virtual_s=self._world.now,
            trace=tuple(self._world.trace) if problems else (),
        )

    def _is_quiet(self) -> bool:
        if self._num_coming or self._cluster.node.service.loads.num_active:
            return False
        self._ask_again()
        return not self._num_coming and self._world.now > HORIZON_S and not self._what_is_left()

    def _what_is_left(self) -> str:
        left = [f"{client.name} is active" for client in self._clients if not client.is_over]
        for pool_id, gang in self._cluster.gangs.items():
            if not gang.is_alive:
                left.append(f"{pool_id} is down")
                continue
            if not gang.node.is_idle:
                left.append(f"{pool_id} is not idle")
            if gang.num_open:
                left.append(f"{pool_id} has {gang.num_open} open hand-offs")
            for counts in gang.node.load().blocks:
                if counts.free + counts.cached != counts.total:
                    left.append(f"{pool_id} holds {counts}")
        return "; ".join(left)


def _pools(random: Random) -> list[tuple[ExpectedPool, int]]:
    pools = []
    for role in ("prefill", "decode"):
        for number in range(random.randint(1, 2)):
            cp_size = random.choice((1, 1, 2, 3)) if role == "prefill" else 1
            spec = ExpectedPool(f"{role}{number}", role, cp_size, random.choice((1, 2)))
            pools.append((spec, random.randint(20, 60)))
    if random.random() < 0.5:
        pools.append((ExpectedPool("store0", "store", 1, 1), random.randint(12, 24)))
    return pools


def _text(random: Random, length: int) -> tuple[int, ...]:
    return tuple(random.randrange(VOCAB_SIZE) for _ in range(length))
