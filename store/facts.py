"""The facts of a store, which never change while it lives. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """A store."""

    model_fingerprint: str  # part of every block hash
    block_size: int
    block_bytes: int  # of one block, all layers
    pack_blocks: int  # of one pack at most
