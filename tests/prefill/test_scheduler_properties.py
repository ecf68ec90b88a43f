"""Whatever comes, in any order: blocks are conserved, the manifest is right, nobody starves."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvtransfer.events import HandoffBroken
from prefill.placement import Geometry, RingPlacement, fits_ever
from prefill.request import ref_of
from protocol.messages import FirstToken, Prefill, Released, RequestFailed
from protocol.plans import PrefillPlan
from tests.sizes import some_of

BLOCK_SIZE = 4

arrival = st.tuples(
    st.just("add"),
    st.integers(0, 9),  # which request
    st.integers(1, 140),  # tokens
    st.integers(0, 12),  # blocks that the target holds
    st.sampled_from([0, 0, 500]),  # prompts that share a prefix, or do not
)
ended = st.tuples(
    st.sampled_from(["abort", "close", "break", "restart"]), st.integers(0, 9), st.booleans()
)
fetches = st.tuples(
    st.sampled_from(["open_fetch", "fetched", "break_fetch", "close_fetch"]), st.integers(0, 9)
)
steps = st.tuples(st.sampled_from(["step", "step", "step_and_abort"]), st.integers(0, 9))


class Run:
    """A pool under a random history, with what must hold at every point."""

    def __init__(self, pool: Any, prompt: Callable[..., Prefill]) -> None:
        self.pool = pool
        self.prompt = prompt
        self.added: dict[tuple[str, int], Prefill] = {}
        self.attempts: Counter[str] = Counter()
        self.done: dict[tuple[str, int], int] = {}  # tokens computed or cached
        self.epoch = 7
        self.open: list[tuple[str, int]] = []

    def add(self, name: int, num_tokens: int, num_target_blocks: int, first: int) -> None:
        request_id = f"r{name}"
        self.attempts[request_id] += 1
        message = self.prompt(
            request_id,
            num_tokens,
            attempt=self.attempts[request_id],
            num_target_tokens=min(num_target_blocks, num_tokens // BLOCK_SIZE) * BLOCK_SIZE,
            first=first,
            epoch=self.epoch,
        )
        self.added[message.request_id, message.attempt] = message
        self.pool.add(message)
        self.pool.add(message)  # a duplicate, always

    def end(self, how: str, name: int, committed: bool) -> None:
        request_id = f"r{name}"
        attempt = self.attempts[request_id]
        match how:
            case "abort":
                self.pool.abort(request_id, attempt)
            case "break":
                event = HandoffBroken(request_id, attempt, "source", "x")
                self.pool.on_event(event)
            case "restart" if name == 0:
                self.epoch += 1
                self.pool.set_pools(decode0=self.epoch)
            case "close" if self.open:
                key = self.open[name % len(self.open)]
                self.close(key, committed and key in self.pool.commits)

    def fetch(self, what: str, pick: int) -> None:
        """Something becomes of a fetch, or of one that is being closed."""
        pool = self.pool
        keys = sorted(pool.closing_fetch if what == "close_fetch" else pool.fetches)
        if what == "fetched":  # also one that is closing: the two may cross
            keys = [key for key in keys if key in pool.asked]
        if keys:
            key = keys[pick % len(keys)]
            getattr(pool, what)(*key)
            if what == "fetched" and key not in pool.closing_fetch:
                self.open.append(key)  # it runs from here on, though nothing is planned of it yet

    def close(self, key: tuple[str, int], committed: bool) -> None:
        if key in self.open:
            self.open.remove(key)
            self.pool.close(*key, committed=committed)

    def step(self, abort: int | None = None) -> PrefillPlan | None:
        plan = self.pool.schedule()
        if plan is None:
            return None
        self.check_plan(plan)
        if abort is not None:
            self.end("abort", abort, False)
        self.pool.finish(plan)
        return plan

    def check_plan(self, plan: PrefillPlan) -> None:
        assert len({work.request_id for work in plan.work}) == len(plan.work)
        written: Counter[tuple[int, int]] = Counter()
        for work in plan.work:
            key = (work.request_id, work.attempt)
            if key not in self.open:
                self.open.append(key)
            tokens = self.added[key].prompt_token_ids
            end = work.start + len(work.token_ids)
            assert work.token_ids == tokens[work.start : end]
            assert key not in self.pool.fetches, "its prefix is not there yet"
            assert work.start == self.done.get(key, work.start) and work.start % BLOCK_SIZE == 0
            assert work.is_last == (end == len(tokens))
            assert [block.logical for block in work.blocks] == list(range(-(-end // BLOCK_SIZE)))
            assert {block.cp_rank for block in work.blocks} <= set(work.ring)
            self.done[key] = end
            first = work.start // BLOCK_SIZE
            written.update((block.cp_rank, block.block_id) for block in work.blocks[first:])
        assert all(count == 1 for count in written.values()), "two items write one block"
        for work in plan.work:
            for block in work.blocks[: work.start // BLOCK_SIZE]:
                assert (block.cp_rank, block.block_id) not in written, ref_of(block)

    def finish(self) -> None:
        """From here on every hand-off completes: everything must come to its end."""
        for _ in range(400):
            if self.step() is None and not (
                self.open or self.pool.fetches or self.pool.closing_fetch
            ):
                break
            for what in ("close_fetch", "open_fetch", "fetched"):
                self.fetch(what, 0)
            for key in list(self.open):
                if key in self.pool.commits or key in self.pool.closing:
                    self.close(key, key in self.pool.commits)
        assert not self.open
        load = self.pool.scheduler.load()
        assert (load.num_waiting, load.num_running) == (0, 0), "somebody starved"

    def check_end(self) -> None:
        self.pool.scheduler.check()
        for counts in self.pool.scheduler.load().blocks:
            assert counts.free + counts.cached == counts.total
        for key, commit in self.pool.commits.items():
            announced = self.pool.announced.get(key, set())
            assert len(set(commit.manifest)) == len(commit.manifest)
            assert set(commit.manifest) == announced
            message = self.added[key]
            first = message.num_target_tokens // BLOCK_SIZE
            num_blocks = -(-len(message.prompt_token_ids) // BLOCK_SIZE)
            assert self.pool.sent.get(key, Counter()) == Counter(
                (tp_rank, layer, logical)
                for tp_rank in range(self.pool.scheduler.facts.tp_size)
                for layer in range(6)
                for logical in range(first, num_blocks)
            )
        released = Counter((m.request_id, m.attempt) for m in self.pool.of(Released))
        assert set(self.added) <= set(released)
        firsts = Counter((m.request_id, m.attempt) for m in self.pool.of(FirstToken))
        assert all(count == 1 for count in firsts.values())
        failed = Counter((m.request_id, m.attempt) for m in self.pool.of(RequestFailed))
        assert all(count == 1 for count in failed.values())


@settings(
    max_examples=some_of(120),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    cp_size=st.integers(1, 4),
    tp_size=st.integers(1, 2),
    num_blocks=st.integers(6, 40),
    max_num_sequences=st.sampled_from([1, 3, 64]),
    fetch_from=st.sampled_from([1, 12, 1 << 30]),
    history=st.lists(st.one_of(arrival, ended, fetches, steps), max_size=40),
)
@example(  # ended between the fetch and the first chunk
    cp_size=1,
    tp_size=1,
    num_blocks=6,
    max_num_sequences=1,
    fetch_from=1,
    history=[
        ("add", 2, 5, 1, 0),
        ("step", 1),
        ("open_fetch", 4),
        ("add", 0, 37, 6, 0),
        ("fetched", 5),
        ("add", 2, 51, 5, 0),
    ],
)
def test_any_history_ends_clean(
    make_pool: Callable,
    prompt: Callable,
    cp_size: int,
    tp_size: int,
    num_blocks: int,
    max_num_sequences: int,
    fetch_from: int,
    history: list[tuple],
) -> None:
    pool = make_pool(
        cp_size,
        tp_size=tp_size,
        num_blocks=num_blocks,
        chunk_tokens=16,
        max_num_sequences=max_num_sequences,
        ring_from=40,
        fetch_from=fetch_from,
    )
    run = Run(pool, prompt)
    for event, *values in history:
        match event:
            case "add":
                run.add(*values)
            case "step":
                run.step()
            case "step_and_abort":
                run.step(abort=values[0])
            case "open_fetch" | "fetched" | "break_fetch" | "close_fetch":
                run.fetch(event, *values)
            case _:
                run.end(event, *values)
        pool.scheduler.check()
    run.finish()
    run.check_end()


@given(
    cp_size=st.integers(1, 8),
    num_tokens=st.integers(1, 3000),
    cached=st.integers(0, 200),
    chunk_tokens=st.integers(1, 200),
    ring_size=st.integers(1, 8),
)
def test_chunks_cover_the_prompt_and_are_dealt_evenly(
    cp_size: int, num_tokens: int, cached: int, chunk_tokens: int, ring_size: int
) -> None:
    geometry = Geometry(cp_size, BLOCK_SIZE, chunk_tokens)
    assert geometry.ring_sizes[0] == 1 and geometry.ring_sizes[-1] == cp_size
    ring_size = min(ring_size, cp_size)
    cached = min(cached, (num_tokens - 1) // BLOCK_SIZE)
    placement = RingPlacement(geometry, num_tokens, cached, tuple(range(ring_size)), 0.0, 0.0)
    assert placement.chunks[0].start == cached * BLOCK_SIZE
    assert placement.chunks[-1].stop == num_tokens
    for before, after in zip(placement.chunks, placement.chunks[1:], strict=False):
        assert before.stop == after.start
        assert len(before) % (2 * ring_size * BLOCK_SIZE) == 0
    assert len(placement.owners) == -(-num_tokens // BLOCK_SIZE) - cached
    shares = [placement.demand[rank] for rank in range(ring_size)]
    assert max(shares) - min(shares) <= 2


@given(num_tokens=st.integers(1, 400), num_blocks=st.integers(1, 40), cp_size=st.integers(1, 4))
def test_what_fits_is_said_about_right(num_tokens: int, num_blocks: int, cp_size: int) -> None:
    geometry = Geometry(cp_size, BLOCK_SIZE, 16)
    needed = -(-num_tokens // BLOCK_SIZE)
    fits = fits_ever(geometry, num_tokens, num_blocks)
    if needed > cp_size * num_blocks:
        assert not fits
    if needed <= cp_size * (num_blocks - 2):
        assert fits
