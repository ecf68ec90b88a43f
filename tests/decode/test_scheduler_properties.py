"""Whatever happens in whatever order: every block is accounted for, every token is right."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.request import FinishReason
from tests.sizes import some_of

ACTIONS = [
    *["arrive"] * 3, *["open"] * 2, *["commit"] * 2, *["compute_here"] * 2, "garbage",
    *["close"] * 2, "close_whole", "abort", "break", *["retry"] * 2, *["step"] * 5,
    *["fetch"] * 2, "end_serving", "break_serving",
]  # fmt: skip

arrivals = st.tuples(
    st.integers(0, 2),  # which text the prompt is the beginning of
    st.integers(1, 12),
    st.integers(1, 25),
    st.booleans(),
)
histories = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1 << 20), arrivals),
    min_size=40,
    max_size=150,
)
pools = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(6, 20),
        "block_size": st.sampled_from([1, 2, 3]),
        "max_num_sequences": st.integers(1, 6),
        "token_budget": st.integers(6, 20),
        "max_model_len": st.integers(20, 60),
        "watermark_blocks": st.integers(0, 2),
        "max_swapped_blocks": st.sampled_from([0, 3, 1000]),
    }
)


SIMPLE: dict[str, Callable[[Any, tuple[str, int]], None]] = {
    "open": lambda cluster, key: cluster.open(key),
    "garbage": lambda cluster, key: cluster.land_garbage(key),
    "close": lambda cluster, key: cluster.close(key),
    "break": lambda cluster, key: cluster.break_handoff(key),
    "abort": lambda cluster, key: cluster.abort(key),
    "break_serving": lambda cluster, key: cluster.break_serving(key),
}


class World:
    """Turns drawn actions into those that make sense now."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.computes_here: set[tuple[str, int]] = set()

    def act(self, action: str, pick: int, arrival: tuple[int, int, int, bool]) -> None:
        if action == "step":
            self.cluster.step()
        elif action == "arrive":
            self.arrive(*arrival)
        else:
            candidates = sorted(self.candidates(action))
            if candidates:
                self.apply(action, candidates[pick % len(candidates)])

    def arrive(self, text: int, num_tokens: int, max_tokens: int, is_local: bool) -> None:
        prompt = tuple((position * (text + 1)) % 50 for position in range(num_tokens))
        name = f"r{len(self.cluster.requests)}"
        stop = (3, 4) if num_tokens % 2 else ()
        key = self.cluster.reserve(name, prompt, max_tokens, stop_token_ids=stop)
        if is_local:
            self.apply("compute_here", key)

    def candidates(self, action: str) -> set[tuple[str, int]]:
        cluster = self.cluster
        opened = set(cluster.opened)
        match action:
            case "open":
                return opened - cluster.is_open - cluster.closing
            case "commit":
                return opened & cluster.is_open  # also one that is closing: the two may cross
            case "compute_here":
                return set(cluster.tickets) - cluster.committed - self.computes_here
            case "garbage" | "break":
                return opened
            case "close":
                return set(cluster.closing)
            case "close_whole":
                return cluster.closing & opened
            case "retry":  # the latest attempt of a request is lost for the coordinator
                return {
                    key for key in cluster.requests if (key[0], key[1] + 1) not in cluster.requests
                }
            case "end_serving" | "break_serving":
                return set(cluster.served)
            case _:
                return set(cluster.requests)

    def apply(self, action: str, key: tuple[str, int]) -> None:
        cluster = self.cluster
        match action:
            case "commit":
                is_closing = key in cluster.closing
                output = cluster.outputs.get(key)
                cluster.commit(key)
                if is_closing:  # the first token is the coordinator's only if it still wants it
                    cluster.outputs.pop(key) if output is None else None
            case "compute_here":
                self.computes_here.add(key)
                cluster.compute_here(key)
            case "fetch":
                num_blocks = cluster.tickets.get(key, 0) // cluster.pool.block_size
                is_held = num_blocks > 0 and key in cluster.opened
                cluster.fetch(key, num_blocks // 2, max(1, num_blocks) if is_held else 1)
            case "close_whole":
                cluster.close(key, len(cluster.opened[key].blocks) // 2)
            case "retry":
                self.retry(key)
            case "end_serving":
                cluster.end_serving(key, committed=key not in cluster.closing_served)
            case _:
                SIMPLE[action](cluster, key)

    def retry(self, key: tuple[str, int]) -> None:
        """As a coordinator does: not of what it knows to be over; sometimes without an abort."""
        cluster = self.cluster
        if key in cluster.finished:
            return
        num_tokens = len(cluster.outputs.get(key, ()))
        if num_tokens % 2:
            cluster.abort(key)
        new = cluster.retry(key, num_tokens)
        if num_tokens % 3 == 0:
            self.apply("compute_here", new)

    def settle(self) -> None:
        """Let everything that can end, end."""
        for _ in range(2000):
            plan = self.cluster.step()
            for action in ("end_serving", "close", "open", "commit"):
                for key in sorted(self.candidates(action)):
                    if action != "commit" or key not in self.cluster.closing:
                        self.apply(action, key)
            if plan is None and self.cluster.scheduler.is_idle:
                return
        raise AssertionError("some request never ends")


@settings(max_examples=some_of(150))
@given(history=histories, pool=pools)
def test_every_request_ends_once_with_the_right_tokens(
    make_cluster: Callable[..., Any], history: list[Any], pool: dict[str, int]
) -> None:
    cluster = make_cluster(**pool)
    world = World(cluster)
    for action, pick, arrival in history:
        world.act(action, pick, arrival)
    aborted = set(cluster.num_released) - set(cluster.finished)
    world.settle()
    cluster.assert_empty()
    for key, message in cluster.requests.items():
        if key in cluster.finished:
            assert cluster.num_released[key] >= 1
            is_stop = cluster.outputs[key][-1] in message.sampling.stop_token_ids
            assert (cluster.finished[key] is FinishReason.STOP) == is_stop
        elif key not in aborted and key not in cluster.failed:
            assert key in cluster.committed or key in cluster.num_released


@pytest.mark.parametrize("num_blocks", [8, 64])
def test_a_thousand_requests_through_a_small_pool(
    make_cluster: Callable[..., Any], num_blocks: int
) -> None:
    cluster = make_cluster(
        num_blocks=num_blocks, block_size=4, max_num_sequences=16, token_budget=32
    )
    world = World(cluster)
    for index in range(1000):
        world.arrive(index % 3, 1 + index * 7 % 30, 1 + index % 9, index % 2 == 0)
    for _ in range(20_000):
        if cluster.scheduler.is_idle:
            break
        cluster.step()
        for action in ("open", "commit"):
            for key in sorted(world.candidates(action)):
                world.apply(action, key)
    cluster.step()
    cluster.assert_empty()
    ended = set(cluster.finished) | set(cluster.failed)
    silent = {
        key for key, message in cluster.requests.items() if len(cluster.outputs.get(key, ())) == 1
    }
    assert ended | silent == set(cluster.requests)
