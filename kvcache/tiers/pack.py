"""A pack: a file with the KV of adjacent blocks of one prompt, whatever ranks computed it.

    8 bytes  magic
    4 + 4    length and CRC-32 of the header, little-endian
             the header, :class:`PackHeader` as msgpack, then zeros up to a multiple of 4096
             block after block, each [num_layers, num_kv_heads_total, 2, block_size, head_dim]

A block holds all heads of the model, so a pack does not depend on the degrees of context or tensor
parallelism of the pools that wrote or will read it. A pack is written under another name, synced,
and renamed: a file with the name of a pack is whole. Each block has a checksum, which is compared
whenever the block is read.
"""

import struct
import zlib
from pathlib import Path

import msgspec

from protocol.errors import BatonError
from protocol.kv import KVLayout

SUFFIX = ".pack"
UNFINISHED = ".part"
ALIGNMENT = 4096
_MAGIC = b"BATONKV\x01"
_PREFIX = struct.Struct("<8sII")
MAX_HEADER_BYTES = 16 << 20


class PackError(BatonError):
    """A pack cannot be read, or does not hold what its header says. The message says why."""


class KVShape(msgspec.Struct, frozen=True):
    """The meaning of a block's bytes. Stores of one model with equal shapes can share packs."""

    num_layers: int
    num_kv_heads_total: int
    block_size: int
    head_dim: int
    dtype: str

    @staticmethod
    def of(layout: KVLayout) -> "KVShape":
        """The shape of a rank that holds all heads."""
        assert layout.tp_size == 1, "a store holds whole blocks"
        return KVShape(
            num_layers=layout.num_layers,
            num_kv_heads_total=layout.num_kv_heads_total,
            block_size=layout.block_size,
            head_dim=layout.head_dim,
            dtype=layout.dtype,
        )


class PackHeader(msgspec.Struct, frozen=True):
    """The content of a pack. The chained hash of a block names it and everything before it."""

    model_fingerprint: str
    shape: KVShape
    block_bytes: int  # of one block, all layers
    first_logical: int  # position of the first block in its prompt
    parent: bytes  # the hash of the block before it; empty for the first of a prompt
    hashes: tuple[bytes, ...]
    checksums: tuple[int, ...]  # CRC-32 of each block

    @property
    def num_blocks(self) -> int:
        return len(self.hashes)


def encode_header(header: PackHeader) -> bytes:
    """The bytes in front of the first block."""
    body = msgspec.msgpack.encode(header)
    size = _PREFIX.size + len(body)
    padding = -size % ALIGNMENT
    return _PREFIX.pack(_MAGIC, len(body), zlib.crc32(body)) + body + bytes(padding)


def read_header(path: Path) -> tuple[PackHeader, int]:
    """A pack's header, and where its first block starts.

    Raises:
        PackError: not a pack, damaged, or shorter than it should be.
    """
    try:
        with path.open("rb") as file:
            magic, length, checksum = _PREFIX.unpack(file.read(_PREFIX.size))
            if magic != _MAGIC or length > MAX_HEADER_BYTES:
                raise PackError(f"{path.name}: not a pack of this version")
            body = file.read(length)
        if zlib.crc32(body) != checksum:
            raise PackError(f"{path.name}: its header is damaged")
        header = msgspec.msgpack.decode(body, type=PackHeader)
        num_bytes = path.stat().st_size
    except (OSError, struct.error, msgspec.DecodeError) as error:
        raise PackError(f"{path.name}: {error}") from error
    start = _PREFIX.size + length
    start += -start % ALIGNMENT
    expected = start + header.num_blocks * header.block_bytes
    if num_bytes != expected or len(header.checksums) != header.num_blocks:
        raise PackError(f"{path.name}: {num_bytes} bytes, {expected} were written")
    return header, start
