"""The control plane: every message between the coordinator and the ranks.

The life of a pool
1. each rank connects and sends ``Hello``; when the whole gang has, each gets ``Welcome`` with the
   pool's epoch and the addresses at which the gang forms;
2. a rank whose gang has formed sends ``GangReady``;
3. ``Topology`` names every pool that is ready; a rank answers ``Connected`` once it reaches them;
4. each rank's transfer thread sends a ``Heartbeat`` each second, so a long step does not look like
   a death. The coordinator sends ``Alive``, and so finds out which connections are gone. A rank
   sees from the connection itself that the coordinator lives, however busy it is. A rank that has
   lost it ends all its requests and sends ``Hello`` to the coordinator that it finds at the control
   address then; ``Introduce`` asks it to do the same.

The life of a request, all with ``(request_id, attempt)``
1. coordinator -> decode ``Reserve``; decode -> coordinator ``Ticket``: blocks are granted;
2. either ``ComputeHere`` to the decode pool, or ``Prefill`` to a prefill pool;
3. prefill -> coordinator ``Progress`` per chunk, then ``FirstToken``, sampled by the prefill pool;
4. decode -> coordinator ``Committed`` when the KV is whole and its own, then ``Tokens`` per step;
5. ``Abort`` at any time, any number of times; ``RequestFailed`` from either side; ``Released`` from
   each pool that held blocks for the request, once it holds none any more.
6. ``Ask`` when no message has come for a while: one may have been lost with a connection.

An attempt that cannot go on is followed by another, of the same request, on any pools: its prompt
ends with the ``num_output_tokens`` tokens that the caller has from the attempts before, and the
sampling goes on after them. Late messages of an earlier attempt change nothing.

Token ``index`` counts generated tokens from 0, over all attempts. Fields are appended with
defaults, never reordered.
"""

import msgspec

from protocol.kv import PoolEndpoint, RankEndpoint
from protocol.request import (
    FinishReason,
    Keyed,
    PrefillPath,
    SamplingParams,
    TokenLogprobs,
    TransferStats,
)

PROTOCOL_VERSION = 4
MAX_HASHES = 100_000  # of one CacheUpdate


class _Message(
    msgspec.Struct, frozen=True, tag=True, omit_defaults=True, forbid_unknown_fields=True
):
    """Tagged by class name; an unknown tag, field or type is refused by the decoder."""


class _OfRequest(Keyed, frozen=True, tag=True, omit_defaults=True, forbid_unknown_fields=True):
    """A message about one attempt at a request."""


# -- the life of a pool ----------------------------------------------------------------------------


class GangAddress(msgspec.Struct, frozen=True):
    """The addresses at which a pool's ranks meet."""

    plan: str  # a ZMQ address, of the leader's socket for plans
    store: str  # "tcp://HOST:PORT" of a torch TCPStore, or "file://PATH" of a FileStore


class Hello(_Message, frozen=True):
    """rank -> coordinator, the first message. The connection has proven that it has the token."""

    version: int
    role: str
    pool_id: str
    cp_size: int
    tp_size: int
    endpoint: RankEndpoint
    model_fingerprint: str
    max_model_len: int
    gang: GangAddress | None = None  # from the leader only
    tokens_per_s: float = 0.0  # measured at start; weighs the router's load
    gang_start: int = 0  # how many times the launcher has started this gang
    coordinator_epoch: int = 0  # the highest that this rank has seen; 0 is none


class Welcome(_Message, frozen=True):
    """coordinator -> rank: the whole gang is here, form it."""

    coordinator_epoch: int
    pool_epoch: int
    gang: GangAddress
    num_blocks: int = 0  # of KV that every rank of the gang has; 0: as many as this rank


class Refused(_Message, frozen=True):
    """coordinator -> rank: do not come back with the same HELLO."""

    reason: str


class GangReady(_Message, frozen=True):
    """rank -> coordinator: collectives work, the model is loaded."""

    tokens_per_s: float = 0.0


class Topology(_Message, frozen=True):
    """coordinator -> rank: all pools that are ready, the receiver's own among them."""

    version: int
    pools: tuple[PoolEndpoint, ...]


class Connected(_Message, frozen=True):
    """rank -> coordinator: every pool of that topology can be reached."""

    version: int


class Alive(_Message, frozen=True):
    """coordinator -> rank, a few times a second, from its HELLO on.

    Sending it fails if the rank is gone, which is its purpose. No rank waits for it.
    """

    coordinator_epoch: int


class Introduce(_Message, frozen=True):
    """coordinator -> rank: you are not known here, or no longer: end all requests, send HELLO."""

    coordinator_epoch: int


class BlockCounts(msgspec.Struct, frozen=True, array_like=True):
    """The conservation audit: ``free + owned + in_flight + cached == total``."""

    total: int
    free: int
    owned: int
    in_flight: int
    cached: int


class Heartbeat(_Message, frozen=True):
    """rank -> coordinator, each second. ``step_age_s`` is how long the present step has run."""

    num_steps: int
    step_age_s: float
    num_waiting: int = 0
    num_running: int = 0
    pending_tokens: int = 0
    blocks: tuple[BlockCounts, ...] = ()  # one per block space; from the leader only
    rss_bytes: int = 0
    counters: dict[str, float] = {}
    cut_off: tuple[str, ...] = ()  # pools of which this rank does not reach every rank now


class CacheUpdate(_Message, frozen=True):
    """leader -> coordinator: the block hashes that its cache has gained and lost."""

    stored: tuple[bytes, ...] = ()
    evicted: tuple[bytes, ...] = ()
    tier: str = ""  # of a store: "cpu" or "disk"; "" is the memory of the device
    damaged: tuple[bytes, ...] = ()  # of the evicted, those whose bytes on disk were wrong


def cache_updates(hashes: tuple[bytes, ...], tier: str) -> list[CacheUpdate]:
    """The whole content of a cache, in messages of a bounded size."""
    starts = range(0, len(hashes), MAX_HASHES)
    return [CacheUpdate(hashes[start : start + MAX_HASHES], tier=tier) for start in starts]


class Shutdown(_Message, frozen=True):
    """coordinator -> rank: end now."""

    reason: str = ""


# -- the life of a request -------------------------------------------------------------------------


class Reserve(_OfRequest, frozen=True):
    """coordinator -> decode leader: grant blocks. Ticket answers when there is room."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str = ""  # the tenant's; part of every block hash
    num_output_tokens: int = 0  # at the prompt's end: generated by earlier attempts
    store_pool_id: str = ""  # holds the KV of a prefix, if one does
    store_epoch: int = 0
    num_store_tokens: int = 0  # of that prefix, a multiple of the block size


class Ticket(_OfRequest, frozen=True):
    """decode leader -> coordinator: blocks are reserved, of which a prefix holds KV already."""

    num_cached_tokens: int
    num_loaded_tokens: int = 0  # of those, brought from a store for this request


class ComputeHere(_OfRequest, frozen=True):
    """coordinator -> decode leader: compute the rest of the prompt yourself."""


class Prefill(_OfRequest, frozen=True):
    """coordinator -> prefill leader: compute the prompt, hand its KV to ``target_pool_id``."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    target_pool_id: str
    target_epoch: int
    num_target_tokens: int  # a prefix that the target holds already, a multiple of the block size
    cache_salt: str = ""
    num_output_tokens: int = 0  # at the prompt's end: generated by earlier attempts
    priority: int = 0  # the lower ones go first, between chunks
    chunk_tokens: int = 0  # of each rank at most, so that others wait less; 0: as configured
    ring_size: int = 0  # that the caller wants, if the pool has so many ranks; 0: the best


class Progress(_OfRequest, frozen=True):
    """prefill leader -> coordinator: the first ``num_done`` prompt tokens are computed.

    Also sent when the first chunk begins, so that the coordinator knows which requests were being
    computed if the pool dies.
    """

    num_done: int
    num_total: int


class FirstToken(_OfRequest, frozen=True):
    """prefill leader -> coordinator, at once, before the hand-off is complete."""

    token_id: int
    path: PrefillPath
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    index: int = 0  # above 0 when earlier attempts have generated some


class Committed(_OfRequest, frozen=True):
    """decode leader -> coordinator: the hand-off is whole, the sequence joins the batch."""

    stats: TransferStats


class NewToken(Keyed, frozen=True, array_like=True, omit_defaults=True):
    """One token of one sequence."""

    index: int
    token_id: int
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None


class Tokens(_Message, frozen=True):
    """decode leader -> coordinator: all new tokens of one step."""

    step: int
    tokens: tuple[NewToken, ...]


class Abort(_OfRequest, frozen=True):
    """coordinator -> leader: give up all blocks of the request. Released answers. Idempotent.

    ``is_doubtful``: its KV may be wrong, and must not be found in a cache. Its blocks may be
    released, and cached, already: so the blocks of its prompt are named by ``doubtful_hashes``.
    """

    is_doubtful: bool = False
    doubtful_hashes: tuple[bytes, ...] = ()


class Ask(_OfRequest, frozen=True):
    """coordinator -> leader: repeat the state of the request. Changes nothing.

    The answer is ``Released`` if it is unknown or over, the ``Ticket`` again from a decode pool
    that has given one, ``Progress`` from a prefill pool, and none if the request waits.
    """


class RequestFailed(_OfRequest, frozen=True):
    """leader -> coordinator: this request cannot go on here."""

    code: str
    message: str


class Released(_OfRequest, frozen=True):
    """leader -> coordinator: no block of this pool is owned by, or in flight for, the request."""


# -- stores ----------------------------------------------------------------------------------------


class Stored(_OfRequest, frozen=True):
    """store -> coordinator: the first ``num_tokens`` of the prompt are in its lowest tier."""

    num_tokens: int
    num_bytes: int = 0  # newly written for it


class Collect(_OfRequest, frozen=True):
    """coordinator -> store: read these blocks from a pool that has them. Stored answers.

    ``block_hashes`` are those of the prompt's leading full blocks.
    """

    block_hashes: tuple[bytes, ...]
    source_pool_id: str
    source_epoch: int


class Pin(_Message, frozen=True):
    """coordinator -> store: keep these blocks for ``owner``; "soft" ones only while there is room.

    It replaces the owner's earlier pins; without hashes the owner has none any more.
    """

    owner: str
    block_hashes: tuple[bytes, ...]
    mode: str = "soft"


class Forget(_Message, frozen=True):
    """coordinator -> store: these blocks are not needed any more. Pinned ones stay."""

    block_hashes: tuple[bytes, ...]


ToRank = (
    Welcome
    | Refused
    | Topology
    | Alive
    | Introduce
    | Shutdown
    | Reserve
    | ComputeHere
    | Prefill
    | Abort
    | Ask
    | Collect
    | Pin
    | Forget
)
ToCoordinator = (
    Hello
    | GangReady
    | Connected
    | Heartbeat
    | CacheUpdate
    | Ticket
    | Progress
    | FirstToken
    | Committed
    | Tokens
    | RequestFailed
    | Released
    | Stored
)
