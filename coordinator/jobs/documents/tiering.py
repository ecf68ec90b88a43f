"""The cluster's side of document jobs: segments in, pins told, residency answered.

With a store, a segment is an *offload*: a request like any other whose decode pool is the store. A
prefill pool hands its KV over while it computes, no decode pool is disturbed, and it ends when all
of it is durable. In a cluster without prefill pools a decode pool computes it, and the store is
asked to collect it from there. Without a store it is what a decode pool has cached.
"""

import asyncio
from collections.abc import Callable, Sequence

from coordinator.cluster.placement import STORE_TIERS, Placement
from coordinator.cluster.pools import Pool
from coordinator.config import CoordinatorConfig
from coordinator.errors import pool_failure
from coordinator.jobs.documents.ingestor import Ingestor, IngestRequest, IngestResult, Residence
from coordinator.loop.timeouts import patient
from coordinator.node import CoordinatorNode
from coordinator.request import Request
from coordinator.requests.delivery import Delivery
from protocol.errors import RequestError
from protocol.messages import (
    Abort,
    Collect,
    Forget,
    Pin,
    RequestFailed,
    Stored,
    ToCoordinator,
)
from protocol.request import SamplingParams
from protocol.token_ids import TokenIds

BACKGROUND = 1  # the priority of what nobody waits for
PROGRESS_S = 0.25
COLLECT_TIMEOUT_S = 60.0


class Tiering(Ingestor):
    """The ingestor of a cluster; ``Ingestor`` says what each method promises.

    Args:
        config: which pools there should be.
        node: knows which serve, and runs the segments.
        clock: monotonic seconds.
    """

    def __init__(
        self, config: CoordinatorConfig, node: CoordinatorNode, clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._registry = node.registry
        self._service = node.service
        self._placement: Placement = node.service.placement
        self._send = node.send
        self._clock = clock
        roles = {pool.role for pool in config.pools}
        self._expects_store = "store" in roles
        self._has_prefill = "prefill" in roles
        self._pins: dict[str, tuple[str, tuple[bytes, ...]]] = {}
        self._collecting: dict[str, asyncio.Future[None]] = {}
        node.service.listener = self

    # -- what the cluster has ----------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        if self._expects_store and self._placement.store() is None:
            return False
        return bool(self._registry.serving("prefill" if self._has_prefill else "decode"))

    @property
    def tiers(self) -> tuple[str, ...]:
        return ("gpu", *STORE_TIERS) if self._expects_store else ("gpu",)

    def max_tokens(self) -> int:
        """What the largest prefill pool, and the largest decode pool, can hold of one prompt."""
        largest = [
            max((_num_tokens(pool) for pool in pools), default=0)
            for role in ("prefill", "decode")
            if (pools := self._registry.serving(role))
        ]
        return min(largest, default=0)

    def num_stored_blocks(self, block_hashes: Sequence[bytes]) -> int:
        if self._expects_store:
            return self._placement.num_stored_blocks(block_hashes, ("disk",))
        pools = self._registry.serving("decode")
        return max((self._placement.num_cached(pool, block_hashes) for pool in pools), default=0)

    def has_damaged(self, block_hashes: Sequence[bytes]) -> bool:
        return self._placement.has_damaged(block_hashes)

    def residency(self, block_hashes: Sequence[bytes]) -> list[Residence]:
        places = [(pool, "gpu", "") for pool in self._registry.serving("decode")]
        places += [
            (pool, tier, tier) for pool in self._registry.serving("store") for tier in STORE_TIERS
        ]
        held = [
            Residence(shown, pool.pool_id, self._placement.num_held(pool, tier, block_hashes))
            for pool, shown, tier in places
        ]
        return [residence for residence in held if residence.num_blocks]

    # -- segments ----------------------------------------------------------------------------------

    async def compute(
        self, request: IngestRequest, on_progress: Callable[[int], None]
    ) -> IngestResult:
        is_offload = self._expects_store and self._has_prefill
        result = await self._run(request, on_progress, is_offload=is_offload)
        if self._expects_store and not is_offload:
            await self._collect(request)
        return result

    async def warm(self, request: IngestRequest) -> None:
        await self._run(request, lambda _: None, is_offload=False)

    async def _run(
        self, segment: IngestRequest, on_progress: Callable[[int], None], *, is_offload: bool
    ) -> IngestResult:
        now, delivery = self._clock(), Delivery()
        has_rush = self._service.rush.is_on(now)
        request = Request(
            request_id=segment.request_id,
            prompt_token_ids=TokenIds.of(segment.token_ids),
            block_hashes=segment.block_hashes,
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
            tenant=segment.tenant,
            receiver=delivery,
            cache_salt=segment.cache_salt,
            is_offload=is_offload,
            priority=BACKGROUND,
            chunk_tokens=self._config.background_chunk_tokens if has_rush else 0,
            ring_size=segment.ring_size,
        )
        self._service.submit(request, now)
        try:
            while request.is_active:
                await delivery.take(PROGRESS_S)
                on_progress(
                    max(request.num_prefilled_tokens, request.num_target_cached_tokens or 0)
                )
        finally:
            self._service.abort(request, self._clock())
        return _result(request, self._clock() - now)

    async def _collect(self, request: IngestRequest) -> None:
        """Have the store read a prompt from the decode pool that has just computed it."""
        store = self._placement.store()
        pools = self._registry.serving("decode")
        held = [(self._placement.num_cached(pool, request.block_hashes), pool) for pool in pools]
        num_blocks, source = max(held, key=lambda item: item[0], default=(0, None))
        if store is None or source is None or num_blocks < len(request.block_hashes):
            raise RequestError("its KV was evicted early", code="worker_lost", status=503)
        name = f"{request.request_id}-collect"
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._collecting[name] = done
        collect = Collect(name, 1, request.block_hashes, source.pool_id, source.epoch)
        try:
            self._send(store.pool_id, collect)
            async with patient(COLLECT_TIMEOUT_S):
                await done
        except TimeoutError as error:
            raise RequestError("the store did not answer", code="stalled", status=503) from error
        finally:
            del self._collecting[name]
            self._send(store.pool_id, Abort(name, 1))

    # -- what the store is told --------------------------------------------------------------------

    def pin(self, document_id: str, block_hashes: Sequence[bytes], mode: str) -> None:
        self._pins[document_id] = (mode, tuple(block_hashes))
        self._tell_pin(document_id)

    def unpin(self, document_id: str) -> None:
        if self._pins.pop(document_id, None) is not None:
            self._tell_pin(document_id)

    def _tell_pin(self, document_id: str) -> None:
        store = self._placement.store()
        if store is not None:
            mode, hashes = self._pins.get(document_id, ("soft", ()))
            self._send(store.pool_id, Pin(document_id, hashes, mode))

    async def forget(self, block_hashes: Sequence[bytes]) -> None:
        store = self._placement.store()
        if store is not None:
            self._send(store.pool_id, Forget(tuple(block_hashes)))

    # -- what the service tells --------------------------------------------------------------------

    def on_store_message(self, message: ToCoordinator) -> None:
        """What the store says of something that is no request."""
        if not isinstance(message, Stored | RequestFailed):
            return
        done = self._collecting.get(message.request_id)
        if done is None or done.done():
            return
        if isinstance(message, Stored):
            done.set_result(None)
        else:
            done.set_exception(pool_failure(message.code, message.message))

    def on_pool_serving(self, pool_id: str) -> None:
        """A store has come, or come back: tell it what to keep. What it read is lost."""
        pool = self._registry.pools[pool_id]
        if pool.spec.role != "store":
            return
        for document_id in self._pins:
            self._tell_pin(document_id)

    def on_pool_lost(self, pool_id: str) -> None:
        """What it was asked to collect will not come."""
        if self._registry.pools[pool_id].spec.role == "store":
            error = RequestError(f"{pool_id} was lost", code="worker_lost", status=503)
            for done in self._collecting.values():
                if not done.done():
                    done.set_exception(error)


def _num_tokens(pool: Pool) -> int:
    """What a pool holds in all: each cp rank has blocks of its own."""
    layouts = [rank.hello.endpoint.layout for rank in pool.ranks.values()]
    return sum(layout.num_blocks * layout.block_size for layout in layouts if layout.tp_rank == 0)


def _result(request: Request, seconds: float) -> IngestResult:
    path = request.path
    return IngestResult(
        num_computed_tokens=request.num_computed_tokens or 0,
        num_cached_tokens=request.num_cached_tokens,
        ring_size=1 if path is None else path.ring_size,
        compute_s=seconds if path is None else path.compute_s,
    )
