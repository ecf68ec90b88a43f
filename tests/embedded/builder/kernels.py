"""Attention scores as functions of distance, made of the few frequencies that RoPE offers.

With a key that is the same everywhere and a query ``(c, -s)`` in the pair of frequency f, the score
over the distance d is ``c cos(f d) + s sin(f d)`` (Su et al. 2021, RoFormer, eq. 16). ``c`` and
``s`` of all pairs are found by a linear programme: the wanted shape near by, nothing that rivals it
up to MAX_DISTANCE, and the smallest amplitudes that do so, because float32 has to hold them.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

ROPE_THETA = 1e18
HEAD_DIM = 64
NUM_PAIRS = HEAD_DIM // 2
NUM_FREQUENCIES = 9  # the slowest of them turns once in 54,000 tokens
MAX_DISTANCE = 140_000
TOLERANCE = 0.1  # nats
REACH = 48  # tokens over which recency is decided
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Kernel:
    """``cosines`` and ``sines``, one of each for the first NUM_FREQUENCIES pairs; in nats."""

    cosines: Floats
    sines: Floats

    def scores(self, distances: Floats) -> Floats:
        found: Floats = _basis(distances) @ np.concatenate([self.cosines, self.sines])
        return found


def frequencies() -> Floats:
    """Radians per token of every pair, the fastest first."""
    turns: Floats = np.asarray([ROPE_THETA ** (-pair / NUM_PAIRS) for pair in range(NUM_PAIRS)])
    return turns


def recency(slope: float, margin: float) -> Kernel:
    """Falls by ``slope`` with each of the first REACH tokens, and ``margin`` below that beyond."""
    near = _basis(np.arange(REACH + 1.0))
    return _solve(near[1:] - near[:-1], np.full(REACH, -slope), near[-1], REACH + 1, margin)


def exactly(distance: int, margin: float) -> Kernel:
    """Highest at one distance, and ``margin`` below that at every other one."""
    near = _basis(np.arange(REACH + 1.0))
    others = np.delete(near, distance, axis=0) - near[distance]
    return _solve(others, np.full(REACH, -margin), near[distance], REACH + 1, margin)


def _basis(distances: Floats) -> Floats:
    angles = np.outer(distances, frequencies()[:NUM_FREQUENCIES])
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def _solve(rows: Floats, bounds: Floats, rival: Floats, first: int, margin: float) -> Kernel:
    """The least sum of amplitudes x with ``rows @ x <= bounds`` and, at every distance from
    ``first`` on, a score that is ``margin`` below ``rival @ x``. Distances are added to the
    programme as they turn out to matter."""
    everywhere = np.arange(first, MAX_DISTANCE, dtype=np.float64)
    distant = _basis(everywhere) - rival
    chosen = np.unique(np.geomspace(1, len(distant), 3000).astype(int)) - 1
    while True:
        size = rows.shape[1]
        known = np.concatenate([rows, distant[chosen]])
        limits = np.concatenate([bounds, np.full(len(chosen), -margin)])
        identity = np.eye(size)
        constraints = np.block(
            [[known, np.zeros_like(known)], [identity, -identity], [-identity, -identity]]
        )
        solution = linprog(
            np.concatenate([np.zeros(size), np.ones(size)]),
            A_ub=constraints,
            b_ub=np.concatenate([limits, np.zeros(2 * size)]),
            bounds=[(None, None)] * size + [(0, None)] * size,
            method="highs",
        )
        assert solution.status == 0, solution.message
        amplitudes = solution.x[:size]
        too_high = distant @ amplitudes > -margin + TOLERANCE
        if not too_high.any():
            return Kernel(amplitudes[:NUM_FREQUENCIES], amplitudes[NUM_FREQUENCIES:])
        chosen = np.union1d(chosen, np.flatnonzero(too_high))
