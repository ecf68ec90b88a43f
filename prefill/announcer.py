"""Announces the final blocks of a chunk, as its layers are computed.

On a GPU the host runs ahead of the device: a group of layers is final when the device has got
there. So each announcement waits for a mark in the device's stream, which is looked at again after
each further layer.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from kvtransfer.events import AnnounceBlocks, AnnouncedAll, Command
from prefill.manifest import CACHED_CHUNK, cached_blocks, moving_blocks
from prefill.request import ref_of
from protocol.plans import ChunkWork, HandoffRoute, PlacedBlock


class StreamMark(Protocol):
    """A point in a device's stream of work, such as a recorded ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Whether the device has got there."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...


class Announcer:
    """One rank's announcements, of any chunks.

    Args:
        submit: takes a command to the transfer thread; does not block.
        groups: of layers, announced together.
        mark: marks the end of the work that the device has been given; None if the host computes.
    """

    def __init__(
        self,
        submit: Callable[[Command], None],
        *,
        cp_rank: int,
        block_size: int,
        groups: Sequence[range],
        mark: Callable[[], StreamMark] | None = None,
    ) -> None:
        self._submit = submit
        self._cp_rank = cp_rank
        self._block_size = block_size
        self._groups = groups
        self._mark = mark
        self._pending: deque[tuple[StreamMark, AnnounceBlocks]] = deque()
        self._group_ending_at = {group.stop - 1: group for group in groups}

    def cached(self, work: ChunkWork) -> None:
        """Before the first chunk: announce the cached blocks, all layers at once."""
        blocks = cached_blocks(work, self._cp_rank)
        if work.route is not None and blocks:
            layers = range(self._groups[0].start, self._groups[-1].stop)
            self._submit(_announcement(work, work.route, CACHED_CHUNK, layers, blocks))

    def layer_callback(self, work: ChunkWork) -> Callable[[int], None] | None:
        """The function to call after each layer of the chunk; None if no block of it moves."""
        route = work.route
        blocks = moving_blocks(work, self._cp_rank, self._block_size)
        if route is None or not blocks:
            return None

        def on_layer_done(layer: int) -> None:
            self._flush(wait=False)
            group = self._group_ending_at.get(layer)
            if group is not None:
                self._announce(_announcement(work, route, work.chunk, group, blocks))

        return on_layer_done

    def chunk_done(self, work: ChunkWork) -> None:
        """After a chunk, also on ranks that had no part in it: the last one ends the hand-off."""
        self._flush(wait=True)
        if work.is_last and work.route is not None:
            self._submit(
                AnnouncedAll(
                    work.request_id,
                    work.attempt,
                    target_pool_id=work.route.pool_id,
                    target_epoch=work.route.epoch,
                )
            )

    def play(self, work: ChunkWork, compute: Callable[[int], None] | None = None) -> None:
        """Announce all of a chunk, in order, for a rank without a model.

        Args:
            compute: called with each layer whose KV is final from then on.
        """
        if self._cp_rank in work.ring:
            self.cached(work)
            on_layer_done = self.layer_callback(work)
            for layer in range(self._groups[-1].stop):
                if compute is not None:
                    compute(layer)
                if on_layer_done is not None:
                    on_layer_done(layer)
        self.chunk_done(work)

    def _announce(self, announcement: AnnounceBlocks) -> None:
        """Announce a group of layers whose last kernel has been launched; on CPU it has ended."""
        if self._mark is None:
            self._submit(announcement)
        else:
            self._pending.append((self._mark(), announcement))

    def _flush(self, *, wait: bool) -> None:
        """Submit the announcements whose layers the device has finished; ``wait`` for all."""
        while self._pending:
            computed, announcement = self._pending[0]
            if wait:
                computed.synchronize()
            elif not computed.query():
                return
            self._pending.popleft()
            self._submit(announcement)


def _announcement(
    work: ChunkWork,
    route: HandoffRoute,
    chunk: int,
    layers: range,
    blocks: Sequence[PlacedBlock],
) -> AnnounceBlocks:
    return AnnounceBlocks(
        request_id=work.request_id,
        attempt=work.attempt,
        target_pool_id=route.pool_id,
        target_epoch=route.epoch,
        chunk=chunk,
        layer_start=layers.start,
        layer_end=layers.stop,
        logical_blocks=tuple(block.logical for block in blocks),
        blocks=tuple(ref_of(block) for block in blocks),
    )
