"""A set of block hashes that takes some twenty bytes for each. Pure.

As objects of their own they would take a hundred, and would be worse than large: those that come in
the middle of a burst of requests lie scattered over all the memory that the burst takes, and none
of it could be given back as long as the blocks are cached.

Linear hashing (Litwin, "Linear hashing: a new tool for file and table addressing", VLDB 1980): the
hashes lie in buckets, one bucket is split when there are ``LOAD`` more of them, and so nothing ever
has to be moved all at once.
"""

from collections.abc import Iterable

SIZE = 16  # bytes of a hash
LOAD = 16  # hashes in a bucket, on average


class HashSet:
    """Supports ``in``, ``len``, ``update`` and ``difference_update``, as a set does."""

    def __init__(self) -> None:
        self._buckets = [b""]  # hashes one after the other
        self._num_whole = 1  # buckets when the present round of splits began: a power of two
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __contains__(self, block_hash: bytes) -> bool:
        bucket = self._buckets[self._number(block_hash)]
        return _place(bucket, block_hash) >= 0

    def num_leading(self, block_hashes: Iterable[bytes]) -> int:
        """How many of them are held before the first that is not."""
        buckets, num_whole = self._buckets, self._num_whole
        num_buckets, mask = len(buckets), 2 * num_whole - 1
        num_held = 0
        # Half of what ``in`` takes, of which a prompt of a million tokens would need 31 thousand.
        for block_hash in block_hashes:
            number = hash(block_hash) & mask
            bucket = buckets[number if number < num_buckets else number - num_whole]
            # Across two hashes a third is found by chance alone: never, with 128 bits.
            if block_hash not in bucket:
                break
            num_held += 1
        return num_held

    def update(self, block_hashes: Iterable[bytes]) -> None:
        """Add them all."""
        for block_hash in block_hashes:
            number = self._number(block_hash)
            if _place(self._buckets[number], block_hash) < 0:
                self._buckets[number] += block_hash
                self._len += 1
                if self._len > LOAD * len(self._buckets):
                    self._split()

    def difference_update(self, block_hashes: Iterable[bytes]) -> None:
        """Remove those that are there. Buckets are never joined: a pool's cache is bounded."""
        for block_hash in block_hashes:
            number = self._number(block_hash)
            bucket = self._buckets[number]
            if (place := _place(bucket, block_hash)) >= 0:
                self._buckets[number] = bucket[:place] + bucket[place + SIZE :]
                self._len -= 1

    def _number(self, block_hash: bytes) -> int:
        number = hash(block_hash) & (2 * self._num_whole - 1)
        # A bucket that has not been split in this round still has what will be its twin's.
        return number if number < len(self._buckets) else number - self._num_whole

    def _split(self) -> None:
        number = len(self._buckets) - self._num_whole
        old = self._buckets[number]
        hashes = [old[start : start + SIZE] for start in range(0, len(old), SIZE)]
        self._buckets[number] = b"".join(h for h in hashes if not hash(h) & self._num_whole)
        self._buckets.append(b"".join(h for h in hashes if hash(h) & self._num_whole))
        if len(self._buckets) == 2 * self._num_whole:
            self._num_whole *= 2


def _place(bucket: bytes, block_hash: bytes) -> int:
    """Where a hash begins, or -1: what is found across two hashes is none."""
    found = bucket.find(block_hash)
    while found % SIZE and found >= 0:
        found = bucket.find(block_hash, found + 1)
    return found
