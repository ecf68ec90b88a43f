"""Requests that kill what computes them. Pure; time comes as an argument.

1. When a pool dies, every request that it was computing at that moment may have been the cause:
   ``on_death`` counts it against each one's *fingerprint*, so that it does not help to ask again.
2. A request that gets past the point at which it was on board of a death is cleared.
3. One that was on board of ``num_deaths`` deaths, the only one of which that is true, is
   quarantined: refused for ``ttl_s``. If it is true of several, those are tried one at a time
   (failover.py), and the next death tells which of them it was. A bystander is not quarantined for
   having been in the same place as the culprit.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec

from protocol.request import SamplingParams

T = TypeVar("T")
MAX_REMEMBERED = 10_000  # fingerprints of each kind: a caller who invents requests fills no memory
_DIGEST_BYTES = 16


def fingerprint(
    prompt_token_ids: Sequence[int],
    block_hashes: Sequence[bytes],
    block_size: int,
    sampling: SamplingParams,
) -> bytes:
    """What is the same when the same thing is asked for again: prompt and sampling, but the seed.

    Args:
        block_hashes: of the prompt's full blocks, each of which covers all before it.
        block_size: tokens of such a block.
    """
    state = hashlib.blake2b(block_hashes[-1] if block_hashes else b"", digest_size=_DIGEST_BYTES)
    rest = prompt_token_ids[len(block_hashes) * block_size :]
    state.update(struct.pack(f"<{len(rest)}I", *rest))
    state.update(msgspec.msgpack.encode(msgspec.structs.replace(sampling, seed=0)))
    return state.digest()


class Quarantine:
    """Who was on board of how many deaths, and who is refused.

    Args:
        num_deaths: after so many, when it is clear who it was.
        ttl_s: how long a fingerprint is refused, and a death is remembered.
    """

    def __init__(self, num_deaths: int, ttl_s: float) -> None:
        self._num_deaths = num_deaths
        self._ttl_s = ttl_s
        self._deaths: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # count, until when
        self._refused: OrderedDict[bytes, float] = OrderedDict()  # until when

    def is_refused(self, request: bytes, now: float) -> bool:
        return now < self._refused.get(request, now)

    def num_deaths(self, request: bytes, now: float) -> int:
        """Deaths that it was on board of, and has not been cleared of."""
        count, until = self._deaths.get(request, (0, now))
        return count if now < until else 0

    def is_doubtful(self, request: bytes, now: float) -> bool:
        """Whether one more death could tell that it was this one."""
        return self.num_deaths(request, now) >= self._num_deaths

    def on_death(self, on_board: Iterable[bytes], now: float) -> bytes | None:
        """A pool has died while it computed these; who it was, if that is clear now."""
        guilty: list[bytes] = []
        for request in set(on_board):
            _put(self._deaths, request, (self.num_deaths(request, now) + 1, now + self._ttl_s))
            if self.is_doubtful(request, now):
                guilty.append(request)
        if len(guilty) != 1:
            return None
        del self._deaths[guilty[0]]
        _put(self._refused, guilty[0], now + self._ttl_s)
        return guilty[0]

    def clear(self, request: bytes) -> None:
        """It has done what it was doing, and nothing has died."""
        self._deaths.pop(request, None)


def _put(table: OrderedDict[bytes, T], key: bytes, value: T) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > MAX_REMEMBERED:
        table.popitem(last=False)
