"""Ways to give requests room for their KV, behind one interface; counting only.

Paged is the production :class:`kvcache.blocks.BlockPool`. The contiguous ones are what came before
it: a region per request, as large as any request may become, or the power of two that holds what
this one may become, from a buddy system.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from kvcache.blocks import BlockPool
from protocol.kv import BlockRef


@dataclass(frozen=True, slots=True)
class Need:
    """A request: tokens of its prompt, how many it will generate, and how many it may."""

    number: int
    num_prompt_tokens: int
    num_output_tokens: int
    max_output_tokens: int
    min_steps: int = 1  # it stays for so long even if it generates nothing


class Allocator(ABC):
    """Room for ``num_slots`` tokens. ``admit`` and ``grow`` change nothing when they say no."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_reserved = 0  # tokens that nobody else can have

    @abstractmethod
    def admit(self, need: Need, num_tokens: int) -> bool:
        """Room for a request that has so many tokens now."""

    @abstractmethod
    def grow(self, need: Need, num_tokens: int) -> bool:
        """Make sure that there is room for so many, which is one more than before."""

    @abstractmethod
    def release(self, need: Need) -> None:
        """It is over, or has to wait."""

    @property
    def num_free(self) -> int:
        return self.num_slots - self.num_reserved

    @property
    @abstractmethod
    def num_largest(self) -> int:
        """Tokens of the largest request that would find room now."""


class Paged(Allocator):
    """Blocks, each anywhere."""

    def __init__(self, num_slots: int, block_size: int) -> None:
        super().__init__(num_slots)
        self._pool = BlockPool(num_slots // block_size, block_size)
        self._blocks: dict[int, list[BlockRef]] = {}

    def admit(self, need: Need, num_tokens: int) -> bool:
        count = -(-num_tokens // self._pool.block_size)
        if not self._pool.can_allocate(count):
            return False
        self._blocks[need.number] = self._pool.allocate(count)
        self.num_reserved += count * self._pool.block_size
        return True

    def grow(self, need: Need, num_tokens: int) -> bool:
        blocks = self._blocks[need.number]
        if num_tokens <= len(blocks) * self._pool.block_size:
            return True
        if not self._pool.can_allocate(1):
            return False
        blocks += self._pool.allocate(1, blocks[-1])
        self.num_reserved += self._pool.block_size
        return True

    def release(self, need: Need) -> None:
        blocks = self._blocks.pop(need.number)
        self.num_reserved -= len(blocks) * self._pool.block_size
        self._pool.release(blocks)

    @property
    def num_largest(self) -> int:
        return self.num_free


class ContiguousMax(Allocator):
    """Every request gets a region for the longest that there may be."""

    def __init__(self, num_slots: int, max_len: int) -> None:
        super().__init__(num_slots)
        self._max_len = max_len

    def admit(self, need: Need, num_tokens: int) -> bool:
        del need, num_tokens
        if self.num_free < self._max_len:
            return False
        self.num_reserved += self._max_len
        return True

    def grow(self, need: Need, num_tokens: int) -> bool:
        del need, num_tokens
        return True

    def release(self, need: Need) -> None:
        del need
        self.num_reserved -= self._max_len

    @property
    def num_largest(self) -> int:
        return self.num_free // self._max_len * self._max_len


class Buddy(Allocator):
    """A region of the power of two that holds the prompt and all that may follow it.

    Args:
        num_slots: a power of two.
        knows_length: it is told how much will follow, not only how much may: an oracle.
    """

    def __init__(self, num_slots: int, *, knows_length: bool) -> None:
        super().__init__(num_slots)
        assert num_slots & (num_slots - 1) == 0
        self._knows_length = knows_length
        self._free: dict[int, set[int]] = {num_slots: {0}}  # size -> starts
        self._regions: dict[int, tuple[int, int]] = {}  # request -> (start, size)

    def admit(self, need: Need, num_tokens: int) -> bool:
        del num_tokens
        following = need.num_output_tokens if self._knows_length else need.max_output_tokens
        wanted = 1 << max(0, need.num_prompt_tokens + following - 1).bit_length()
        sizes = [size for size, starts in self._free.items() if starts and size >= wanted]
        if not sizes:
            return False
        size = min(sizes)
        start = min(self._free[size])
        self._free[size].remove(start)
        while size > wanted:
            size //= 2
            self._free.setdefault(size, set()).add(start + size)
        self._regions[need.number] = (start, size)
        self.num_reserved += size
        return True

    def grow(self, need: Need, num_tokens: int) -> bool:
        assert num_tokens <= self._regions[need.number][1]
        return True

    def release(self, need: Need) -> None:
        start, size = self._regions.pop(need.number)
        self.num_reserved -= size
        while size < self.num_slots and start ^ size in self._free.get(size, ()):
            self._free[size].remove(start ^ size)  # its buddy is free as well: join them
            start &= ~size
            size *= 2
        self._free.setdefault(size, set()).add(start)

    @property
    def num_largest(self) -> int:
        return max((size for size, starts in self._free.items() if starts), default=0)
