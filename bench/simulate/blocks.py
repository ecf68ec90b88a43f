"""What a block size wastes, against contiguous regions, and what a ring's dealing adds.

1. A replay of allocations alone, with always somebody waiting: requests are admitted in order as
   long as there is room, every one grows by a token a step, and leaves. Out of room, the newest
   goes back to the head of the queue, as in a decode pool. Each step counts what is reserved and
   what is used.
2. A ring deals whole blocks, so its busiest rank bounds what fits: the production placement says
   which rank gets how many.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from bench.simulate.allocators import Allocator, Buddy, ContiguousMax, Need, Paged
from bench.simulate.estimates import mean_of, pick, short
from bench.simulate.pools import seeded
from bench.simulate.report import COLOURS, EXACT, NullCase, Report, Scale, Table
from bench.simulate.workload import Lengths
from prefill.placement import Geometry, RingPlacement

NAME = "blocks"
QUESTION = "How much KV memory does a block size waste, and what do rings add?"
BLOCK_SIZES = (1, 16, 32, 64, 128, 512)
NUM_SLOTS = 1 << 16
MAX_LEN = 4096
MAX_OUTPUT = 1024
CP_SIZES = (1, 2, 4, 8)
CHUNK_TOKENS = 2048
SHAPES = {
    "chat": (Lengths(400, 1.0, MAX_LEN - MAX_OUTPUT), Lengths(200, 1.0, MAX_OUTPUT), 500),
    "documents": (Lengths(2000, 0.5, MAX_LEN - MAX_OUTPUT), Lengths(60, 0.5, MAX_OUTPUT), 200),
}
RING_LENGTHS = Lengths(12_000, 1.0, 65_536)
NULL_LENGTH = 4096
Maker = Callable[[], Allocator]


def allocators() -> dict[str, Maker]:
    """All that are compared, by name."""
    paged: dict[str, Maker] = {
        f"paged {size}": partial(Paged, NUM_SLOTS, size) for size in BLOCK_SIZES
    }
    return {
        **paged,
        "buddy, true length": partial(Buddy, NUM_SLOTS, knows_length=True),
        "buddy, limit": partial(Buddy, NUM_SLOTS, knows_length=False),
        "contiguous max": partial(ContiguousMax, NUM_SLOTS, MAX_LEN),
    }


def draw_needs(shape: str, seed: int, scale: Scale) -> list[Need]:
    prompt, output, usual = SHAPES[shape]
    random = seeded(NAME, shape, seed)
    return [
        Need(number, prompt.draw(random), output.draw(random), MAX_OUTPUT)
        for number in range(scale.count(usual, 150))
    ]


def replay(allocator: Allocator, needs: Sequence[Need]) -> dict[str, float]:
    """Shares of memory, in the mean over the steps in which somebody waited."""
    waiting = deque((need, need.num_prompt_tokens, 0) for need in needs)
    live: list[tuple[Need, int, int]] = []  # request, tokens, steps; oldest first
    used: list[float] = []
    reserved: list[float] = []
    largest: list[float] = []
    batch: list[int] = []
    num_preemptions = 0
    started_s = time.process_time()
    while waiting:
        while waiting and allocator.admit(waiting[0][0], waiting[0][1]):
            live.append(waiting.popleft())
        assert live, "nobody fits"
        used.append(sum(num_tokens for _, num_tokens, _ in live) / allocator.num_slots)
        reserved.append(allocator.num_reserved / allocator.num_slots)
        if allocator.num_free:
            largest.append(allocator.num_largest / allocator.num_free)
        batch.append(len(live))
        evicted = _step(allocator, live)
        waiting.extendleft(evicted)
        num_preemptions += len(evicted)
    for need, _, _ in live:
        allocator.release(need)
    assert allocator.num_reserved == 0
    return {
        "used": statistics.fmean(used),
        "internal_waste": 1 - sum(used) / sum(reserved),
        "largest_of_free": statistics.fmean(largest) if largest else 1.0,
        "requests_at_once": statistics.fmean(batch),
        "preemptions": num_preemptions / len(needs),
        "cpu_s": time.process_time() - started_s,
    }


def _step(allocator: Allocator, live: list[tuple[Need, int, int]]) -> list[tuple[Need, int, int]]:
    """Everybody grows, or ends; who had to go for others comes back newest first."""
    evicted: list[tuple[Need, int, int]] = []
    index = 0
    while index < len(live):
        need, num_tokens, num_steps = live[index]
        end = need.num_prompt_tokens + need.num_output_tokens
        if num_tokens >= end and num_steps >= need.min_steps:
            allocator.release(need)
            del live[index]
        elif num_tokens >= end or allocator.grow(need, num_tokens + 1):
            live[index] = (need, min(num_tokens + 1, end), num_steps + 1)
            index += 1
        else:
            evicted.append(live.pop())  # perhaps the very one
            allocator.release(evicted[-1][0])
    return evicted


def ring_waste(num_tokens: int, block_size: int, cp_size: int) -> float:
    """Share of a ring's memory that a prompt takes and does not use; the busiest rank counts."""
    geometry = Geometry(cp_size, block_size, CHUNK_TOKENS)
    ring = tuple(range(cp_size))
    demand = RingPlacement(geometry, num_tokens, 0, ring, 0.0, 0.0).demand
    return 1 - num_tokens / (max(demand.values()) * cp_size * block_size)


def run(scale: Scale) -> Report:
    """All of it."""
    rows = [*_replays(scale), *_rings(scale)]
    return Report(
        name=NAME,
        question=QUESTION,
        clock=EXACT,
        setting=[
            f"Memory for {NUM_SLOTS} tokens, at most {MAX_LEN} of one request, at most "
            f"{MAX_OUTPUT} generated; somebody always waits.",
            "chat: prompts of 400 tokens and answers of 200 on average, CV 1; documents: 2000 and "
            "60, CV 0.5; log-normal.",
            f"Rings: prompts of 12000 tokens on average, CV 1, dealt in chunks of {CHUNK_TOKENS} "
            "for each rank by the production placement.",
            "Contiguous max reserves the longest request; buddy the power of two above prompt and "
            "limit, or above the true length, which nobody can know.",
        ],
        tables=[*(_table(rows, shape) for shape in SHAPES), _ring_table(rows)],
        nulls=null_cases(),
        reading=_reading(rows),
        rows=rows,
        draw=partial(_draw, rows),
    )


def _replays(scale: Scale) -> Iterator[dict[str, Any]]:
    for shape in SHAPES:
        for seed in scale.seeds:
            needs = draw_needs(shape, seed, scale)
            for name, make in allocators().items():
                yield {"shape": shape, "allocator": name, "seed": seed, **replay(make(), needs)}


def _rings(scale: Scale) -> Iterator[dict[str, Any]]:
    for seed in scale.seeds:
        random = seeded(NAME, "rings", seed)
        prompts = [RING_LENGTHS.draw(random) for _ in range(scale.count(60, 5))]
        for cp_size in CP_SIZES:
            for size in BLOCK_SIZES:
                waste = [ring_waste(num_tokens, size, cp_size) for num_tokens in prompts]
                yield {
                    "shape": "rings", "seed": seed, "cp": cp_size, "block_size": size,
                    "waste": statistics.fmean(waste),
                }  # fmt: skip


def null_cases() -> list[NullCase]:
    """Lengths that all sizes divide: nothing can be wasted, by whatever allocator."""
    needs = [Need(number, NULL_LENGTH, 0, 0, 8) for number in range(20)]
    makers = allocators()
    makers["contiguous max"] = partial(ContiguousMax, NUM_SLOTS, NULL_LENGTH)
    waste = [replay(make(), needs)["internal_waste"] for make in makers.values()]
    dealt = 2 * max(CP_SIZES) * max(BLOCK_SIZES)
    rings = [ring_waste(dealt, size, cp_size) for size in BLOCK_SIZES for cp_size in CP_SIZES]
    return [
        NullCase(
            f"prompts of {NULL_LENGTH} tokens that generate nothing, waste of {len(waste)} "
            "allocators",
            f"at most {max(waste):.1%}",
            max(map(abs, waste)) == 0,
        ),
        NullCase(
            f"a prompt of {dealt} tokens, waste of dealing it over every ring",
            f"at most {max(rings):.1%}",
            max(map(abs, rings)) == 0,
        ),
    ]


def _table(rows: Sequence[dict[str, Any]], shape: str) -> Table:
    lines = []
    for name in allocators():
        found = {
            figure: mean_of(pick(rows, figure, shape=shape, allocator=name))
            for figure in ("internal_waste", "largest_of_free", "requests_at_once", "preemptions")
        }
        waste = found["internal_waste"]
        lines.append(
            (
                name,
                f"{waste.value:.2%} [{waste.low:.2%}, {waste.high:.2%}]",
                f"{found['largest_of_free'].value:.0%}",
                str(found["requests_at_once"]),
                f"{found['preemptions'].value:.2f}",
                short(statistics.fmean(pick(rows, "cpu_s", shape=shape, allocator=name))),
            )
        )
    header = [
        "allocator",
        "reserved, not used",
        "largest / free",
        "requests at once",
        "sent back, each",
        "CPU s of the replay",
    ]
    return Table(f"Replay: {shape}", header, tuple(lines))


def _ring_table(rows: Sequence[dict[str, Any]]) -> Table:
    lines = []
    for size in BLOCK_SIZES:
        cells = [
            f"{mean_of(pick(rows, 'waste', cp=cp_size, block_size=size)).value:.2%}"
            for cp_size in CP_SIZES
        ]
        lines.append((str(size), *cells))
    header = ("block size", *(f"cp{cp_size}" for cp_size in CP_SIZES))
    return Table("Rings: taken of the busiest rank times ranks, and not used", header, tuple(lines))


def _mean(rows: Sequence[dict[str, Any]], figure: str, **where: object) -> float:
    return statistics.fmean(pick(rows, figure, **where))


def _reading(rows: Sequence[dict[str, Any]]) -> list[str]:
    def waste(name: str, shape: str = "chat") -> str:
        return f"{_mean(rows, 'internal_waste', shape=shape, allocator=name):.1%}"

    def at_once(name: str) -> float:
        return _mean(rows, "requests_at_once", shape="chat", allocator=name)

    rings = [f"{_mean(rows, 'waste', cp=cp, block_size=32):.2%}" for cp in CP_SIZES]
    cost = [_mean(rows, "cpu_s", shape="documents", allocator=f"paged {size}") for size in (1, 32)]
    return [
        f"Of what is reserved for chat, blocks of 32 leave {waste('paged 32')} unused, blocks of "
        f"512 {waste('paged 512')}; contiguous regions for the longest request "
        f"{waste('contiguous max')}.",
        f"That is {at_once('paged 32'):.0f} requests at once instead of "
        f"{at_once('contiguous max'):.0f}; a buddy system that knew the true lengths would have "
        f"{at_once('buddy, true length'):.0f}.",
        f"Long prompts forgive large blocks: for documents, 512 wastes "
        f"{waste('paged 512', 'documents')}.",
        f"Small blocks are not free: the replay of documents took {cost[0] / cost[1]:.1f} times "
        "as much CPU with blocks of 1 as with 32 (this machine's time, the only figure here that "
        "is not exact), before any kernel or transfer has seen the longer tables.",
        "A full memory is used up by whoever grows: paging admits by the prompt alone and sends "
        "the newest back when it was too much. The contiguous ones never do; that is a loss of "
        "paging, and the column says how large it is.",
        f"Dealing blocks of 32 over rings of {', '.join(map(str, CP_SIZES))} wastes "
        f"{', '.join(rings)}: the ring multiplies the padding, because the busiest rank counts.",
    ]


def _draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:  # noqa: ANN401 - matplotlib's
    left, right = figure.subplots(1, 2)
    names = list(allocators())
    for offset, (colour, shape) in enumerate(zip(COLOURS, SHAPES, strict=False)):
        found = [mean_of(pick(rows, "internal_waste", shape=shape, allocator=n)) for n in names]
        ys = [place + 0.38 * offset for place in range(len(names))]
        left.barh(ys, [100 * one.value for one in found], 0.36, color=colour, label=shape,
                  xerr=[100 * (one.high - one.value) for one in found])  # fmt: skip
    left.set_yticks([place + 0.19 for place in range(len(names))], names)
    left.invert_yaxis()
    left.set(xlabel="reserved and not used (%)", title="allocators, replayed")
    left.legend(frameon=False)
    for colour, cp_size in zip(COLOURS, CP_SIZES, strict=False):
        found = [mean_of(pick(rows, "waste", cp=cp_size, block_size=size)) for size in BLOCK_SIZES]
        shown = [100 * one.value or float("nan") for one in found]  # 0 has no place on this axis
        right.plot(BLOCK_SIZES, shown, marker="o", color=colour, label=f"cp{cp_size}")
    right.set_xscale("log", base=2)
    right.set_xticks(BLOCK_SIZES, map(str, BLOCK_SIZES))
    right.set(xlabel="block size (tokens)", ylabel="taken and not used (%)",
              title="dealt over a ring, prompts of 12K", yscale="log")  # fmt: skip
    right.legend(frameon=False)
