"""A cluster on virtual time: requests come as drawn, the production router places them.

The life of a request
1. It arrives at its moment and passes the *gate*: the open one lets everything through at once;
   batching and queueing policies are gates (batching.py, predictor.py).
2. The router picks a decode pool: by default the coordinator's own placement over its own registry
   and requests; other policies stand in for that one decision (routing.py).
3. Ticket; then the decode pool computes the prompt, or a prefill pool does and hands it over, by
   the coordinator's own rule.
4. Every token's moment is kept; nothing is measured anywhere else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, TypeVar

from bench.simulate.pools import (
    BLOCK_SIZE,
    FINGERPRINT,
    LAST_TOKEN,
    MAX_MODEL_LEN,
    DecodeSetting,
    PrefillSetting,
    Site,
    VirtualDecode,
    VirtualPool,
    VirtualPrefill,
    calm_world,
)
from bench.simulate.step_time import StepTime
from bench.simulate.workload import Arrival
from coordinator.cluster.joining import JoinRequirements
from coordinator.cluster.placement import Placement
from coordinator.cluster.registry import Registry, Timeouts
from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.request import Loads, Request, RequestEvent, as_new_token
from kvcache.prefix import block_salt, hash_blocks
from kvtransfer.events import ControlReceived, PoolsChanged
from protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    CacheUpdate,
    Committed,
    ComputeHere,
    Connected,
    FirstToken,
    GangAddress,
    GangReady,
    Hello,
    NewToken,
    Progress,
    RequestFailed,
    Ticket,
    ToCoordinator,
    Tokens,
)
from protocol.request import SamplingParams
from protocol.token_ids import TokenIds
from tests.simulation.ranks import Rank


@dataclass(slots=True)
class Served:
    """One request and when each of its tokens came."""

    arrival: Arrival
    decode_pool: str = ""
    prefill_pool: str = ""
    num_cached_tokens: int = 0
    ring_size: int = 0  # 0: no prefill pool computed it
    granted_s: float = 0.0  # when it got its blocks
    token_times_s: list[float] = field(default_factory=list)
    is_over: bool = False

    @property
    def ttft_s(self) -> float:
        """From the moment at which it was to come."""
        return self.token_times_s[0] - self.arrival.time_s

    @property
    def e2e_s(self) -> float:
        return self.token_times_s[-1] - self.arrival.time_s

    @property
    def itls_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.token_times_s)]

    @property
    def tpot_s(self) -> float:
        """Mean time between its tokens; 0 when it has one."""
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


class Router(Protocol):
    """Who takes a request; :class:`coordinator.cluster.placement.Placement` is one."""

    def choose_decode(self, request: Request, loads: Loads, now: float) -> str | None:
        """The decode pool for a request."""
        ...

    def choose_prefill(self, request: Request, loads: Loads) -> str | None:
        """Its prefill pool, or None if the decode pool computes its prompt."""
        ...

    def on_cache_update(self, pool_id: str, update: CacheUpdate) -> None:
        """What a pool has cached has changed."""
        ...


class Gate(Protocol):
    """Stands before the router and holds requests back."""

    def arrive(self, served: Served) -> None:
        """A request has come."""
        ...

    def leave(self, served: Served) -> None:
        """A request that was let through is over."""
        ...


class OpenGate:
    """Lets everything through at once, as the coordinator does."""

    def __init__(self, admit: Callable[[Served], None]) -> None:
        self._admit = admit

    def arrive(self, served: Served) -> None:
        self._admit(served)

    def leave(self, served: Served) -> None:
        del served


@dataclass(frozen=True, slots=True)
class ClusterSetting:
    """What a cluster consists of."""

    steps: StepTime
    decode: tuple[DecodeSetting, ...] = (DecodeSetting(),)
    prefill: tuple[PrefillSetting, ...] = ()
    local_prefill_threshold: int = 128
    max_tokens: int = 1024  # what requests say they may generate; less than is drawn is raised


class Cluster:
    """All of it, and the traffic through it."""

    def __init__(
        self,
        setting: ClusterSetting,
        make_gate: "Callable[[Cluster], Gate] | None" = None,
        make_router: Callable[[Placement, Registry], Router] | None = None,
    ) -> None:
        self.world = calm_world()
        self.setting = setting
        self._lengths: dict[str, int] = {}
        site = Site(self.world, setting.steps, self._lengths)
        self.decode = {
            name: VirtualDecode(site, name, one, partial(self._on_message, name))
            for name, one in _named("decode", setting.decode)
        }
        self.prefill = {
            name: VirtualPrefill(site, name, one, partial(self._on_message, name))
            for name, one in _named("prefill", setting.prefill)
        }
        self._registry = self._join()
        placement = Placement(self._config, self._registry)
        self._router: Router = (
            placement if make_router is None else make_router(placement, self._registry)
        )
        self._served: dict[str, Served] = {}
        self._loads = Loads()  # of all requests
        self._requests: dict[str, Request] = {}  # of those who are let in and not over
        self._set_aside: dict[str, Request] = {}  # by preempt
        self._num_left = 0
        self.gate: Gate = OpenGate(self.admit) if make_gate is None else make_gate(self)

    # -- the gangs join, as real ones do -----------------------------------------------------------

    def _join(self) -> Registry:
        pools: list[VirtualPool[Any]] = [*self.decode.values(), *self.prefill.values()]
        specs = [pool.spec for pool in pools]
        self._config = CoordinatorConfig(
            token="virtual",
            model="virtual",
            pools=tuple(specs),
            block_size=BLOCK_SIZE,
            local_prefill_threshold=self.setting.local_prefill_threshold,
        )
        requirements = JoinRequirements(FINGERPRINT, BLOCK_SIZE)
        registry = Registry(specs, requirements, coordinator_epoch=1, timeouts=Timeouts())
        ranks = [(pool.spec, rank) for pool in pools for rank in pool.ranks]
        for spec, rank in ranks:
            registry.on_hello(rank.identity.routing_id, _hello(spec, rank), 0.0)
        for spec, rank in ranks:
            speed = self._tokens_per_s(spec) if rank.identity.is_leader else 0.0
            registry.on_gang_ready(rank.identity.routing_id, GangReady(speed), 0.0)
        endpoints = tuple(pool.endpoint() for pool in registry.pools.values())
        for spec, rank in ranks:
            registry.on_connected(rank.identity.routing_id, Connected(registry.version), 0.0)
            rank.node.welcomed(registry.pools[spec.pool_id].epoch)
            rank.node.pools_changed(endpoints, 0.0)
        assert len(registry.serving("decode")) == len(self.decode)
        for pool in pools:
            pool.on_event(PoolsChanged(endpoints))
        return registry

    def _tokens_per_s(self, spec: ExpectedPool) -> float:
        """What a real pool measures when it starts: a short chunk, alone."""
        steps, num_tokens = self.setting.steps, 128
        if spec.role == "prefill":
            return spec.cp_size * num_tokens / steps.chunk_s(num_tokens, 0, 1)
        slowness = self.decode[spec.pool_id].setting.slowness
        return num_tokens / (steps.step_s(0, 0, [(num_tokens, 0)]) * slowness)

    # -- requests ----------------------------------------------------------------------------------

    def run(self, arrivals: Sequence[Arrival], horizon_s: float = float("inf")) -> list[Served]:
        """Let them come, and go on until all are over or the horizon is reached."""
        for arrival in arrivals:
            self._lengths[arrival.request_id] = arrival.num_output_tokens
            served = self._served[arrival.request_id] = Served(arrival)
            self.world.at(arrival.time_s - self.world.now, partial(self.gate.arrive, served))
        self._num_left += len(arrivals)
        self.world.run_until(lambda: self._num_left == 0, horizon_s)
        return [self._served[arrival.request_id] for arrival in arrivals]

    def admit(self, served: Served) -> None:
        """The gate lets it through, for the first time or again."""
        request = self._set_aside.pop(served.arrival.request_id, None) or self._request(served)
        pool_id = self._router.choose_decode(request, self._loads, self.world.now)
        assert pool_id is not None, "no decode pool serves"
        self._requests[request.request_id] = request
        request.reserve_on(pool_id, self.world.now)
        served.decode_pool = pool_id
        self.decode[pool_id].on_event(ControlReceived(request.reserve()))

    def preempt(self, served: Served) -> None:
        """Set a request aside until it is admitted again, by the coordinator's way of losing an
        attempt: what it has is cached where it was, and the next attempt goes on after its tokens.
        """
        request = self._requests.pop(served.arrival.request_id)
        pool = self.decode[request.decode_pool]
        pool.on_event(ControlReceived(Abort(request.request_id, request.attempt)))
        request.lose_attempt("preempted")
        self._set_aside[request.request_id] = request

    def _request(self, served: Served) -> Request:
        arrival = served.arrival
        prompt = arrival.prompt()
        # An application's limit, not the length: nobody knows that.
        sampling = SamplingParams(
            max_tokens=max(self.setting.max_tokens, arrival.num_output_tokens),
            stop_token_ids=(LAST_TOKEN,),
        )
        hashes = tuple(hash_blocks(prompt, BLOCK_SIZE, block_salt(FINGERPRINT, "")))
        return Request(
            request_id=arrival.request_id,
            prompt_token_ids=TokenIds.of(prompt),
            sampling=sampling,
            tenant="tenant",
            block_hashes=hashes,
            loads=self._loads,
        )

    # -- what the pools say ------------------------------------------------------------------------

    def _on_message(self, pool_id: str, message: ToCoordinator) -> None:
        match message:
            case Tokens():
                for token in message.tokens:
                    self._on_token(token)
            case FirstToken():
                self._served[message.request_id].ring_size = message.path.ring_size
                self._on_token(as_new_token(message))
            case Ticket():
                self._on_ticket(message)
            case CacheUpdate():
                self._router.on_cache_update(pool_id, message)
            case RequestFailed():
                raise AssertionError(f"{pool_id}: {message}")
            case Progress() | Committed() if message.request_id in self._requests:
                self._on_progress(self._requests[message.request_id], message)

    @staticmethod
    def _on_progress(request: Request, message: Progress | Committed) -> None:
        if isinstance(message, Progress):
            request.progress(message.num_done)
        else:
            request.advance(RequestEvent.COMMIT)

    def _on_ticket(self, message: Ticket) -> None:
        request = self._requests.get(message.request_id)
        if request is None or message.attempt != request.attempt:
            return  # set aside meanwhile
        served = self._served[message.request_id]
        served.granted_s = self.world.now
        served.num_cached_tokens = message.num_cached_tokens
        request.grant(message.num_cached_tokens)
        pool_id = self._router.choose_prefill(request, self._loads)
        if pool_id is None:
            request.advance(RequestEvent.COMPUTE_HERE)
            compute = ComputeHere(request.request_id, request.attempt)
            self.decode[request.decode_pool].on_event(ControlReceived(compute))
            return
        request.prefill_on(pool_id)
        served.prefill_pool = pool_id
        epoch = self._registry.pools[request.decode_pool].epoch
        self.prefill[pool_id].on_event(ControlReceived(request.prefill(epoch)))

    def _on_token(self, token: NewToken) -> None:
        request = self._requests.get(token.request_id)
        if request is None or token.attempt != request.attempt:
            return
        served = self._served[token.request_id]
        for _ in request.accept(token):
            served.token_times_s.append(self.world.now)
            request.advance(RequestEvent.TOKEN)
        if request.finish_reason is not None:
            request.advance(RequestEvent.END)
            served.is_over = True
            self._num_left -= 1
            del self._requests[token.request_id]
            self.gate.leave(served)


T = TypeVar("T")


def _named(role: str, settings: Sequence[T]) -> list[tuple[str, T]]:
    return [(f"{role}{index}", setting) for index, setting in enumerate(settings)]


def _hello(spec: ExpectedPool, rank: Rank) -> Hello:
    return Hello(
        PROTOCOL_VERSION, spec.role, spec.pool_id, spec.cp_size, 1,
        rank.identity.endpoint(rank.memory.layout), FINGERPRINT, MAX_MODEL_LEN,
        GangAddress("", "") if rank.identity.is_leader else None,
    )  # fmt: skip
