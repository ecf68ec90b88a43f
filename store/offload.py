"""What a store keeps of one offload: a prompt whose KV a pool hands over, or is asked for. Pure."""

from dataclasses import dataclass, field

from kvcache.prefix import block_salt, hash_blocks
from kvtransfer.events import OpenTargetBlocks
from protocol.handoff import Fetch
from protocol.kv import BlockRef
from protocol.messages import Collect, Reserve
from protocol.request import RequestKey
from protocol.transitions import advance
from store.states import OFFLOAD, StoreEvent, StoreState
from store.writing import Chain


@dataclass(slots=True, eq=False)
class Offload:
    """One attempt at one prompt; its fields in the order in which they come to matter.

    ``num_blocks`` counts the partial last block too, which is handed over and not kept.
    """

    key: RequestKey
    hashes: tuple[bytes, ...]  # of its full blocks
    num_blocks: int
    max_first: int  # leading blocks that may be taken as known
    source: tuple[str, int] | None = None  # (pool, epoch) to be asked; None: it is handed over
    state: StoreState = StoreState.QUEUED
    first: int = 0  # the first block that is not here yet
    blocks: list[BlockRef] = field(default_factory=list)  # from ``first`` on
    is_doubtful: bool = False  # what is handed over may be wrong: nothing of it is kept

    @staticmethod
    def of(message: Reserve | Collect, block_size: int, model_fingerprint: str) -> "Offload":
        """An offload as it arrives."""
        if isinstance(message, Collect):
            return Offload(
                key=message.key,
                hashes=message.block_hashes,
                num_blocks=len(message.block_hashes),
                max_first=len(message.block_hashes),
                source=(message.source_pool_id, message.source_epoch),
            )
        tokens = message.prompt_token_ids
        salt = block_salt(model_fingerprint, message.cache_salt)
        return Offload(
            key=message.key,
            hashes=tuple(hash_blocks(tokens, block_size, salt)),
            num_blocks=-(-len(tokens) // block_size),
            # The last token is always computed, for there is nothing to sample from else.
            max_first=(len(tokens) - 1) // block_size,
        )

    @property
    def holds_handoff(self) -> bool:
        return self.state in (StoreState.OPENING, StoreState.RESERVED, StoreState.CLOSING)

    def advance(self, event: StoreEvent) -> None:
        """Move to the next state.

        Raises:
            IllegalTransition: ``event`` cannot happen now.
        """
        self.state = advance(OFFLOAD, self.state, event, of=self.key[0])

    def open(self) -> OpenTargetBlocks:
        """Have the rank expect its blocks."""
        return OpenTargetBlocks(*self.key, first_logical=self.first, blocks=tuple(self.blocks))

    def ask(self) -> Fetch:
        """Have the pool that has its blocks send them, once the rank expects them."""
        assert self.source is not None, "it is handed over without asking"
        source_pool_id, source_epoch = self.source
        return Fetch(
            *self.key,
            source_pool_id=source_pool_id,
            source_epoch=source_epoch,
            first_logical=self.first,
            owners=(0,) * len(self.blocks),
            block_hashes=self.hashes[self.first :],
        )

    def chain(self, num_blocks: int) -> Chain:
        """The content of the first ``num_blocks`` of its blocks."""
        return Chain(
            first_logical=self.first,
            parent=self.hashes[self.first - 1] if self.first else b"",
            hashes=self.hashes[self.first : self.first + num_blocks],
        )
