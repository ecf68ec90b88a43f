"""The transfer plane: every message between the transfer threads of two ranks.

A *hand-off* moves the KV of one ``(request_id, attempt)`` from a source pool to a target pool. A
*segment* is what one source rank has for one target rank after one group of layers of one chunk.

1. target leader -> its ranks ``OpenTarget``; each answers ``TargetOpened``. Only then is the ticket
   given, so that no announcement can come early. A source opens with its first announcement.
2. source rank -> target rank ``Announce``: logical blocks, their ids and generations.
3. The target rank reads into the blocks that *its own leader* named for those logical blocks, waits
   for the read to end, compares the checksum, and sends ``ReadDone``.
4. ``Confirm`` answers whether the source rank still owned the blocks at that generation.
5. A source rank whose chunks are all announced and confirmed sends its leader ``SourceDone``;
   when all have, the leader sends every target rank ``Commit`` with the manifest.
6. A target rank that holds exactly the manifest sends its leader ``TargetReady``; when all have,
   the sequence may decode. A missing or surplus segment is ``HandoffFailed``.
7. ``Close`` from a leader to its own ranks ends a side early: nothing new is announced or read, and
   ``Closed`` follows when no read is in flight any more. A closing target rank sends its sources
   ``ReadsEnded``, and only after that are their blocks free of transfers. The target may keep the
   leading blocks that are read and confirmed on every rank: a later attempt goes on there.

A *fetch* is a hand-off the other way, of a prefix that the decode pool holds and the prefill pool
misses. 1. When its target is open, its leader asks the source's leader: ``Fetch``. 2. The answer is
``FetchRefused``, or ``Serve`` from the source's leader to its own ranks: each announces its heads
of those blocks as one segment. 3. From there on it is a hand-off like any other. A request's fetch
and its hand-off have the same key: a pool is the source of one and the target of the other.

Every message carries ``(request_id, attempt)`` and the epochs of the pools that it speaks of; one
that does not match an open hand-off is dropped and counted.
"""

import msgspec

from protocol.kv import BlockRef
from protocol.request import Keyed, TransferStats


class SegmentKey(msgspec.Struct, frozen=True, array_like=True):
    """Names a segment within one hand-off and one target rank."""

    source_rank: int
    chunk: int
    layer_start: int
    layer_end: int


class _Message(Keyed, frozen=True, tag=True, omit_defaults=True, forbid_unknown_fields=True):
    """Tagged by class name, and about one hand-off, which its request's attempt names."""


class OpenTarget(_Message, frozen=True):
    """target leader -> target rank: expect this hand-off.

    ``blocks[i]`` is for logical block ``first_logical + i``.
    """

    target_epoch: int
    first_logical: int
    blocks: tuple[BlockRef, ...]
    owners: tuple[int, ...] = ()  # the cp rank on which each block lies; empty: on every rank


class TargetOpened(_Message, frozen=True):
    """target rank -> target leader: announcements may come."""

    rank: int


class Announce(_Message, frozen=True):
    """source rank -> target rank: these blocks of these layers are final and may be read."""

    source_pool_id: str
    source_epoch: int
    target_epoch: int
    segment: SegmentKey
    logical_blocks: tuple[int, ...]
    blocks: tuple[BlockRef, ...]  # the source's, one for each logical block
    checksum: int | None = None  # of the bytes that this target rank is to read, in plan order


class ReadDone(_Message, frozen=True):
    """target rank -> source rank: the bytes are here. Were the blocks still yours?"""

    target_pool_id: str
    target_rank: int
    target_epoch: int
    source_epoch: int
    segment: SegmentKey


class Confirm(_Message, frozen=True):
    """source rank -> target rank: the blocks were still this rank's when they were read, or not."""

    source_epoch: int
    target_epoch: int
    segment: SegmentKey
    valid: bool


class SourceDone(_Message, frozen=True):
    """source rank -> source leader: all that this rank announced is confirmed."""

    rank: int
    keys: tuple[SegmentKey, ...]


class Commit(_Message, frozen=True):
    """source leader -> target rank: the hand-off is exactly this set of segments."""

    source_pool_id: str
    source_epoch: int
    target_epoch: int
    manifest: tuple[SegmentKey, ...]
    num_tokens: int  # the prompt's
    first_token_id: int
    prefill_age_s: float  # since the prefill ended


class TargetReady(_Message, frozen=True):
    """target rank -> target leader: the manifest is complete here."""

    rank: int
    num_tokens: int
    first_token_id: int
    stats: TransferStats


class HandoffFailed(_Message, frozen=True):
    """rank of either side -> its leader: this hand-off cannot complete."""

    rank: int
    reason: str
    side: str = "target"  # or "source"


class Close(_Message, frozen=True):
    """leader -> its own rank: end this side, "source" or "target". Closed answers."""

    side: str


class Closed(_Message, frozen=True):
    """rank -> its leader: no byte moves from, or into, the blocks of this side any more.

    ``num_whole_blocks`` leading blocks of a target are whole here and may be kept.
    """

    rank: int
    side: str
    num_whole_blocks: int = 0


class ReadsEnded(_Message, frozen=True):
    """target rank -> source rank: nothing of this hand-off is or will be read from you any more."""

    target_pool_id: str
    target_rank: int
    target_epoch: int


class Fetch(_Message, frozen=True):
    """target leader -> source leader: the target expects these blocks; announce them to it.

    A leader node asks with this very struct. Its rank knows which pool and epoch it is, and adds
    them when it sends the message.
    """

    source_pool_id: str
    source_epoch: int
    first_logical: int
    owners: tuple[int, ...]  # the target's cp rank for each block
    block_hashes: tuple[bytes, ...] = ()  # their content; none: a prefix of the source's request
    target_pool_id: str = ""
    target_epoch: int = 0

    def served(self, blocks: tuple[BlockRef, ...]) -> "Serve":
        """The answer of a source that has all of it, as ``blocks``."""
        return Serve(
            *self.key,
            target_pool_id=self.target_pool_id,
            target_epoch=self.target_epoch,
            source_epoch=self.source_epoch,
            first_logical=self.first_logical,
            blocks=blocks,
            owners=self.owners,
        )

    def refused(self, reason: str) -> "FetchRefused":
        """The answer of a source that does not have all of it, or will not give it."""
        return FetchRefused(
            *self.key,
            target_pool_id=self.target_pool_id,
            target_epoch=self.target_epoch,
            source_epoch=self.source_epoch,
            reason=reason,
        )


class FetchRefused(_Message, frozen=True):
    """source leader -> target leader: these blocks are not here, or are not given."""

    target_pool_id: str
    target_epoch: int
    source_epoch: int
    reason: str


class Serve(_Message, frozen=True):
    """source leader -> source rank: announce these blocks, all layers at once, and nothing more."""

    target_pool_id: str
    target_epoch: int
    source_epoch: int
    first_logical: int
    blocks: tuple[BlockRef, ...]
    owners: tuple[int, ...]  # the target's cp rank for each block


HandoffMessage = (
    OpenTarget
    | TargetOpened
    | Announce
    | ReadDone
    | Confirm
    | SourceDone
    | Commit
    | TargetReady
    | HandoffFailed
    | Close
    | Closed
    | ReadsEnded
    | Fetch
    | FetchRefused
    | Serve
)
