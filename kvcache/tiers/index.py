"""The packs on disk, their blocks, and which packs to evict when the disk is full. Pure.

A pack continues another one, its *parent*, or begins a prompt. Only a pack that no other continues
is ever evicted: blocks are of no use without those before them. Among these leaves the one with the
least value goes first:

    value = (1 + hits, halved every HALF_LIFE_S) * cost / bytes

where the cost is that of computing it again: blocks deep in a prompt attend to more. The rule is
GreedyDual-Size (Cao and Irani, 1997) with a decayed frequency in place of its clock. A pack with a
block that is pinned hard is never evicted, one that is pinned soft only when no other is left.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvcache.tiers.pack import PackHeader

HALF_LIFE_S = 3600.0
ATTENTION_SHARE = 1 / 4096  # cost of a block's attention per block before it, against the rest


@dataclass(slots=True)
class Pack:
    """One pack on disk."""

    name: str
    header: PackHeader
    num_bytes: int
    hits: float = 0.0  # as of ``hit_at``
    hit_at: float = 0.0
    num_readers: int = 0

    def value(self, now: float) -> float:
        """The value per byte of keeping it, in units of one block at the start of a prompt."""
        hits: float = self.hits * 0.5 ** (max(0.0, now - self.hit_at) / HALF_LIFE_S)
        first = self.header.first_logical
        count = self.header.num_blocks
        cost = count * (1 + ATTENTION_SHARE * (first + count / 2))
        return (1 + hits) * cost / max(1, self.num_bytes)


class PackIndex:
    """The packs of a store.

    Args:
        quota_bytes: of disk.
    """

    def __init__(self, quota_bytes: int) -> None:
        self.quota_bytes = quota_bytes
        self.num_bytes = 0
        self.num_reserved_bytes = 0  # of packs that are being written
        self.num_evicted = 0
        self._packs: dict[str, Pack] = {}
        self._by_hash: dict[bytes, tuple[str, int]] = {}
        self._by_parent: defaultdict[bytes, set[str]] = defaultdict(set)
        self._pins: dict[str, tuple[str, tuple[bytes, ...]]] = {}
        self._num_pinned: dict[str, Counter[bytes]] = {"soft": Counter(), "hard": Counter()}

    def __len__(self) -> int:
        return len(self._packs)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._by_hash

    @property
    def hashes(self) -> tuple[bytes, ...]:
        return tuple(self._by_hash)

    def pack(self, name: str) -> Pack:
        return self._packs[name]

    def find(self, block_hash: bytes) -> tuple[str, int] | None:
        """(pack, index in it) of a block; None if it is in no pack."""
        return self._by_hash.get(block_hash)

    def add(self, name: str, header: PackHeader, now: float) -> tuple[bytes, ...]:
        """Take in a pack that lies on disk; returns the hashes that are new."""
        pack = Pack(name, header, header.num_blocks * header.block_bytes, hit_at=now)
        self._packs[name] = pack
        self.num_bytes += pack.num_bytes
        new = []
        for index, block_hash in enumerate(header.hashes):
            if block_hash not in self._by_hash:
                self._by_hash[block_hash] = (name, index)
                new.append(block_hash)
        self._by_parent[header.parent].add(name)
        return tuple(new)

    def remove(self, name: str) -> tuple[bytes, ...]:
        """Forget a pack; returns the hashes that are gone with it."""
        pack = self._packs.pop(name)
        self.num_bytes -= pack.num_bytes
        self._by_parent[pack.header.parent].discard(name)
        gone = []
        for block_hash in pack.header.hashes:
            if self._by_hash.get(block_hash, ("", 0))[0] == name:
                del self._by_hash[block_hash]
                gone.append(block_hash)
        return tuple(gone)

    def hit(self, names: Iterable[str], now: float) -> None:
        """Count a use of these packs."""
        for name in names:
            pack = self._packs[name]
            pack.hits = 1 + pack.hits * 0.5 ** (max(0.0, now - pack.hit_at) / HALF_LIFE_S)
            pack.hit_at = now

    def pin(self, owner: str, hashes: Sequence[bytes], mode: str) -> None:
        """Pin these for ``owner``, in place of what was pinned for it before."""
        old_mode, old = self._pins.pop(owner, ("soft", ()))
        self._num_pinned[old_mode] -= Counter(old)
        if hashes:
            self._pins[owner] = (mode, tuple(hashes))
            self._num_pinned[mode] += Counter(hashes)

    def is_pinned(self, pack: Pack, mode: str) -> bool:
        counts = self._num_pinned[mode]
        return any(counts[block_hash] for block_hash in pack.header.hashes)

    def room_for(self, num_bytes: int, now: float) -> list[str] | None:
        """The packs to evict, in this order, so that ``num_bytes`` more are within the quota.

        Returns:
            None if the packs that may be evicted do not suffice. Nothing changes either way.
        """
        lacking = self.num_bytes + self.num_reserved_bytes + num_bytes - self.quota_bytes
        victims: list[str] = []
        gone: set[str] = set()
        while lacking > 0:
            pack = self._least_valuable(gone, now)
            if pack is None:
                return None
            gone.add(pack.name)
            victims.append(pack.name)
            lacking -= pack.num_bytes
        return victims

    def forgettable(self, hashes: Iterable[bytes]) -> list[str]:
        """The packs that can be deleted to forget ``hashes``, children before their parents.

        These are the packs of which every block is among ``hashes``, and which are not pinned, not
        being read and not continued by another pack that stays.
        """
        wanted = set(hashes)
        names = {self._by_hash[h][0] for h in wanted if h in self._by_hash}
        packs = sorted((self._packs[n] for n in names), key=lambda p: -p.header.first_logical)
        gone: set[str] = set()
        for pack in packs:
            is_free = wanted.issuperset(pack.header.hashes) and not pack.num_readers
            is_pinned = self.is_pinned(pack, "hard") or self.is_pinned(pack, "soft")
            if is_free and not is_pinned and self._children(pack) <= gone:
                gone.add(pack.name)
        return [pack.name for pack in packs if pack.name in gone]

    def _least_valuable(self, gone: set[str], now: float) -> Pack | None:
        leaves = [
            pack
            for pack in self._packs.values()
            if pack.name not in gone
            and not pack.num_readers
            and self._children(pack) <= gone
            and not self.is_pinned(pack, "hard")
        ]
        return min(
            leaves, key=lambda pack: (self.is_pinned(pack, "soft"), pack.value(now)), default=None
        )

    def _children(self, pack: Pack) -> set[str]:
        """Packs that go on where this one, or a part of it, ends."""
        found = (self._by_parent.get(block_hash, set()) for block_hash in pack.header.hashes)
        return set().union(*found)
