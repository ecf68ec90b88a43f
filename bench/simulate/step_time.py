"""How long a step takes on virtual time: the one place where the experiments' machines are.

``measured``: a rank with one core of the machine named below and the benchmark model, from a table
of runs of the real decode runner (``python -m bench.simulate.calibrate`` prints a new one),
linear between the points. A step that has both decoding sequences and a chunk is charged for both:
mixed steps were measured as well, and take what their parts take, within 2 %.

``roofline``: a stated analytic machine, so that conclusions that depend on the machine can be seen
to: an 8B model in bf16 on an accelerator of 989 TFLOP/s of which half is reached, and 3.35 TB/s of
which 80 % is. A step takes the larger of its arithmetic and its memory traffic, and a fixed cost.

What a ring of N saves is the production cost model's word (ring_attention/cost.py) in both.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prefill.placement import PoolCosts
from ring_attention.cost import ChunkShape, CostModel

Chunk = tuple[int, int]  # (new tokens, tokens before them)


class StepTime(Protocol):
    """What the virtual pools ask."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str:
        """Where its figures come from, in a sentence."""
        ...

    @property
    def costs(self) -> PoolCosts:
        """What a prefill scheduler on this machine predicts."""
        ...

    def step_s(self, num_seqs: int, sum_kv: int, chunks: Sequence[Chunk]) -> float:
        """A decode pool's step: so many sequences one token each, over ``sum_kv`` keys; chunks."""
        ...

    def chunk_s(self, new: int, past: int, cp_size: int) -> float:
        """A chunk on a ring of a prefill pool, from its first layer to its last."""
        ...

    def handoff_s(self, num_tokens: int) -> float:
        """What of a hand-off is not hidden behind the prefill."""
        ...


@dataclass(frozen=True, slots=True)
class Grid:
    """A function of two figures, linear between the points at which it is known, and beyond."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]  # [x][y]

    def __post_init__(self) -> None:
        assert len(self.values) == len(self.xs)
        assert all(len(row) == len(self.ys) for row in self.values)

    def at(self, x: float, y: float) -> float:
        i, u = _between(self.xs, x)
        j, v = _between(self.ys, y)
        low = self.values[i][j] * (1 - v) + self.values[i][j + 1] * v
        high = self.values[i + 1][j] * (1 - v) + self.values[i + 1][j + 1] * v
        return low * (1 - u) + high * u


def _between(points: Sequence[float], x: float) -> tuple[int, float]:
    """Index of the interval that serves ``x``, and how far into it ``x`` lies."""
    index = min(max(bisect_right(points, x) - 1, 0), len(points) - 2)
    return index, (x - points[index]) / (points[index + 1] - points[index])


@dataclass(frozen=True, slots=True)
class MeasuredSteps:
    """A machine known by measured points."""

    name: str
    source: str
    costs: PoolCosts
    prefill: Grid  # (new tokens, past tokens) -> seconds
    decode: Grid  # (sequences, keys of each) -> seconds
    exposed_handoff_s: float

    def step_s(self, num_seqs: int, sum_kv: int, chunks: Sequence[Chunk]) -> float:
        seconds = sum(self._alone_s(new, past) for new, past in chunks)
        return seconds + (self.decode.at(num_seqs, sum_kv / num_seqs) if num_seqs else 0.0)

    def chunk_s(self, new: int, past: int, cp_size: int) -> float:
        alone_s = self._alone_s(new, past)
        if cp_size == 1:
            return alone_s
        predict = self.costs.seconds
        return alone_s * predict(new, past, cp_size) / predict(new, past, 1)

    def _alone_s(self, new: int, past: int) -> float:
        """Of a longer chunk than the table has, the sum of its pieces: attention adds up."""
        longest = int(self.prefill.xs[-1])
        num_whole, rest = divmod(new, longest)
        pieces = [(longest, past + i * longest) for i in range(num_whole)]
        if rest:
            pieces.append((rest, past + num_whole * longest))
        return sum(self.prefill.at(*piece) for piece in pieces)

    def handoff_s(self, num_tokens: int) -> float:
        del num_tokens  # all but the last group of layers moves while the next computes
        return self.exposed_handoff_s


@dataclass(frozen=True, slots=True)
class RooflineSteps:
    """A machine known by its limits."""

    name: str
    source: str
    costs: PoolCosts
    num_parameters: float
    kv_bytes: float  # of one token
    flops_per_s: float
    bytes_per_s: float
    fixed_s: float  # of a step
    link_bytes_per_s: float

    def step_s(self, num_seqs: int, sum_kv: int, chunks: Sequence[Chunk]) -> float:
        flops = 2 * self.num_parameters * num_seqs + self._attention_flops(sum_kv)
        num_bytes = 2 * self.num_parameters + self.kv_bytes * sum_kv
        for new, past in chunks:
            flops += 2 * self.num_parameters * new + self._attention_flops(new * (past + new / 2))
            num_bytes += self.kv_bytes * (past + new)
        return self.fixed_s + max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)

    def chunk_s(self, new: int, past: int, cp_size: int) -> float:
        alone_s = self.step_s(0, 0, [(new, past)])
        if cp_size == 1:
            return alone_s
        predict = self.costs.seconds
        return alone_s * predict(new, past, cp_size) / predict(new, past, 1)

    def handoff_s(self, num_tokens: int) -> float:
        # The last of eight groups of layers has nothing left to hide behind.
        return 0.001 + self.kv_bytes * num_tokens / 8 / self.link_bytes_per_s

    def _attention_flops(self, num_pairs: float) -> float:
        shape = self.costs.shape
        return 4 * num_pairs * shape.num_heads * shape.head_dim * shape.num_layers


LLAMA_8B = ChunkShape(
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    linear_weights=4096 * (2 * (32 + 8) * 128 + 3 * 14336),
    itemsize=2,
    block_size=32,
)
ROOFLINE = RooflineSteps(
    name="roofline",
    source="analytic: an 8B model in bf16, 495 TFLOP/s and 2.7 TB/s reached, 3 ms fixed in a step, "
    "links of 50 GB/s",
    costs=PoolCosts(CostModel(300e12, 495e12, 50e9, 20e-6), LLAMA_8B),
    num_parameters=8.0e9,
    kv_bytes=2 * 32 * 8 * 128 * 2,
    flops_per_s=495e12,
    bytes_per_s=2.7e12,
    fixed_s=0.003,
    link_bytes_per_s=50e9,
)

BENCH_MODEL = ChunkShape(
    num_layers=12,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    linear_weights=1024 * (2 * (16 + 4) * 64 + 3 * 2816),
    itemsize=2,
    block_size=32,
)
MEASURED = MeasuredSteps(
    name="measured",
    source="the benchmark model (152M parameters, bf16) on one core of an AMD EPYC with bf16 "
    "instructions, CPU seconds of the real decode runner, 2026-11-21, "
    "`python -m bench.simulate.calibrate`",
    costs=PoolCosts(CostModel(1.42e11, 2.12e11, 2.66e9, 1.35e-4), BENCH_MODEL),
    prefill=Grid(
        (1, 32, 128, 512, 1024, 2048),
        (0, 1024, 4096),
        (
            (0.0241, 0.0296, 0.0240),
            (0.0552, 0.0739, 0.1241),
            (0.1888, 0.2486, 0.3873),
            (0.7631, 0.9731, 1.4851),
            (1.5487, 1.9249, 3.0408),
            (3.4801, 4.2589, 6.3756),
        ),
    ),
    decode=Grid(
        (1, 2, 4, 8, 16, 32, 64),
        (32, 512, 2048),
        (
            (0.0200, 0.0207, 0.0222),
            (0.0247, 0.0257, 0.0291),
            (0.0183, 0.0206, 0.0276),
            (0.0258, 0.0295, 0.0395),
            (0.0344, 0.0438, 0.0644),
            (0.0594, 0.0762, 0.1230),
            (0.1040, 0.1385, 0.2197),
        ),
    ),
    exposed_handoff_s=0.0039,  # docs/measurements/handoff.txt
)
