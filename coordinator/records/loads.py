"""What all requests together add up to, kept as each of them changes. Pure.

A record tells its *share* whenever it takes a step, is given a pool, or gets further; nobody sums
over all records, of which there may be thousands, for each new one.
"""

from collections import Counter
from typing import NamedTuple


class Share(NamedTuple):
    """What one request adds."""

    decode_pool: str = ""  # "" while it has none
    decode_tokens: int = 0  # that its decode pool has still to compute for it, prompt or answer
    prefill_pool: str = ""
    prefill_tokens: int = 0
    tenant: str = ""  # "" when it is of no concern any more
    is_active: bool = False
    is_interactive: bool = False  # active, and somebody waits for it


NO_SHARE = Share()


class Loads:
    """The sums."""

    def __init__(self) -> None:
        self.num_active = 0
        self.num_interactive = 0
        self._decode_tokens: Counter[str] = Counter()
        self._prefill_tokens: Counter[str] = Counter()
        self._num_held: Counter[str] = Counter()

    def decode_tokens(self, pool_id: str) -> int:
        """What a decode pool has still to compute."""
        return self._decode_tokens[pool_id]

    def prefill_tokens(self, pool_id: str) -> int:
        """What a prefill pool has still to compute."""
        return self._prefill_tokens[pool_id]

    def num_held(self, tenant: str) -> int:
        """Requests of a tenant for which something is kept, in a pool or here."""
        return self._num_held[tenant]

    def replace(self, before: Share, after: Share) -> None:
        """A request's share has changed."""
        self.num_active += after.is_active - before.is_active
        self.num_interactive += after.is_interactive - before.is_interactive
        _move(self._decode_tokens, before[0], before[1], after[0], after[1])
        _move(self._prefill_tokens, before[2], before[3], after[2], after[3])
        if before.tenant != after.tenant:
            _move(self._num_held, before.tenant, 1, after.tenant, 1)


def _move(sums: Counter[str], old: str, less: int, new: str, more: int) -> None:
    if old == new:
        if old and more != less:
            sums[old] += more - less
        return
    if old:
        sums[old] -= less
        if not sums[old]:
            del sums[old]  # tenants come and go
    if new and more:
        sums[new] += more
