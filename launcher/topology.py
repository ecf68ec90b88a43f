"""The pools of a cluster, from their spellings on the command line. Pure.

A pool is written ``cp2``, ``tp2`` or ``cp4tp2``: the degrees of context and tensor parallelism. A
decode pool has no context parallelism. Pools are numbered in the order given: prefill0, decode0.
"""

import re
from collections.abc import Sequence

from coordinator.config import ExpectedPool
from protocol.errors import ConfigError

_SPELLING = re.compile(r"(?:cp(?P<cp>[1-9]\d{0,2}))?(?:tp(?P<tp>[1-9]\d{0,2}))?")
MAX_RANKS = 1024


def parse_pool(role: str, number: int, spelling: str) -> ExpectedPool:
    """The pool with a spelling.

    Raises:
        ConfigError: not a spelling of a pool, or one that this role cannot have.
    """
    match = _SPELLING.fullmatch(spelling.strip().lower())
    if match is None or not match.group():
        raise ConfigError(
            f"--{role} {spelling}: a pool is written cp2, tp2 or cp4tp2 "
            f"(degrees of context and tensor parallelism)"
        )
    cp_size = int(match["cp"] or 1)
    tp_size = int(match["tp"] or 1)
    if role == "decode" and cp_size > 1:
        raise ConfigError(
            f"--decode {spelling}: a decode pool is tensor-parallel only: --decode tp{tp_size}"
        )
    return ExpectedPool(f"{role}{number}", role, cp_size, tp_size)


def parse_pools(prefill: Sequence[str], decode: Sequence[str]) -> tuple[ExpectedPool, ...]:
    """All pools of a cluster that compute, prefill first. At least one must be a decode pool.

    Raises:
        ConfigError: see :func:`parse_pool`; no decode pool, or absurdly many ranks.
    """
    pools = tuple(
        parse_pool(role, number, spelling)
        for role, spellings in (("prefill", prefill), ("decode", decode))
        for number, spelling in enumerate(spellings)
    )
    if not decode:
        raise ConfigError("no decode pool: add --decode tp1")
    total = sum(pool.num_ranks for pool in pools)
    if total > MAX_RANKS:
        raise ConfigError(f"{total} ranks asked for, at most {MAX_RANKS} are supported")
    return pools


def store_pool() -> ExpectedPool:
    """The pool of the one process that keeps KV in host memory and on disk; it has no model."""
    return ExpectedPool("store0", "store", 1, 1)


def threads_per_rank(num_cores: int, pools: Sequence[ExpectedPool]) -> int:
    """An even share of the cores for each rank that computes, at least one thread."""
    return max(1, num_cores // sum(pool.num_ranks for pool in pools if pool.role != "store"))
