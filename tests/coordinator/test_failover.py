"""Attempts: whatever is lost in whatever order, no token is, and none comes twice.

The real service and the real schedulers of both kinds of pools, see whole_cluster.py.
"""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from coordinator.request import Request, RequestState
from coordinator.requests.service import Service
from decode.memory import SequenceMemory
from decode.sequence import Sequence
from protocol.errors import IllegalTransition, RequestError
from protocol.messages import Abort, Heartbeat, NewToken, Prefill, Reserve
from tests.coordinator.whole_cluster import WholeCluster
from tests.decode.fake_cluster import reference
from tests.sizes import some_of

TWO_AND_TWO = (
    ("prefill0", "prefill", 2, 24),
    ("prefill1", "prefill", 1, 32),
    ("decode0", "decode", 1, 32),
    ("decode1", "decode", 1, 40),
)
SMALLEST = (("prefill0", "prefill", 1, 10), ("decode0", "decode", 1, 12))


def prompt_of(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((7 * position + 3 * seed) % 50 for position in range(num_tokens))


def run_until(cluster: WholeCluster, condition: Any) -> None:
    """Go on in turn, a message and a read at a time."""
    for _ in range(4000):
        if condition():
            return
        for action in cluster.choices():
            action()
            if condition():
                return
    raise AssertionError("never")


def test_without_faults_all_is_exact() -> None:
    cluster = WholeCluster(TWO_AND_TWO)
    for index in range(12):
        cluster.submit(f"r{index}", prompt_of(5 + 6 * index, index % 3), 6)
    cluster.settle()
    for index in range(12):
        cluster.assert_exact(f"r{index}", 6)
        assert cluster.requests[f"r{index}"].attempt == 1


@pytest.mark.parametrize("num_tokens", range(9))
def test_a_decode_pool_is_lost_after_each_number_of_tokens(num_tokens: int) -> None:
    cluster = WholeCluster(TWO_AND_TWO)
    cluster.submit("a", prompt_of(40), 9)
    request = cluster.requests["a"]
    run_until(cluster, lambda: request.num_output_tokens == num_tokens and request.decode_pool)
    victim = request.decode_pool
    cluster.kill_pool(victim)
    assert request.is_active and request.decode_pool not in (victim, "")
    cluster.settle()
    assert cluster.tokens("a") == reference(prompt_of(40), 9)
    assert (request.attempt, request.finish_reason) == (2, "length")
    assert [(lost.reason, lost.decode_pool) for lost in request.lost] == [("worker_lost", victim)]


@pytest.mark.parametrize("num_blocks", range(10))
def test_a_prefill_pool_is_lost_after_each_number_of_blocks(num_blocks: int) -> None:
    """What was handed over by then is fetched back, and not computed again."""
    cluster = WholeCluster(TWO_AND_TWO)
    cluster.submit("a", prompt_of(43), 5)
    request = cluster.requests["a"]

    def is_far_enough() -> bool:
        is_reserved = request.state is RequestState.PREFILLING
        return is_reserved and cluster.num_arrived(("a", 1)) >= num_blocks

    run_until(cluster, is_far_enough)
    victim, home = request.prefill_pool, request.decode_pool
    num_kept = min(cluster.num_arrived(("a", 1)), 43 // 4)
    assert num_blocks <= num_kept <= num_blocks + 3, "a segment may be of several blocks"
    cluster.kill_pool(victim)
    assert request.state is RequestState.WAITING, "its decode pool is still closing the hand-off"
    cluster.settle()
    assert cluster.tokens("a") == reference(prompt_of(43), 5)
    assert request.attempt == 2 and request.decode_pool == home
    [again] = [m for _, m in cluster.dispatched if isinstance(m, Prefill) and m.attempt == 2]
    assert again.num_target_tokens == 4 * num_kept
    if request.prefill_pool and num_kept:
        assert request.path is not None and request.path.num_fetched_tokens == 4 * num_kept


def test_a_finished_request_is_given_up_with_the_pool_that_was_to_hand_it_over() -> None:
    """Its only token has come from the prefill pool, whose first announcement may be lost: the
    decode pool would not know that there is nothing to wait for."""
    cluster = WholeCluster(TWO_AND_TWO)
    cluster.submit("a", prompt_of(20), 1)
    request = cluster.requests["a"]
    run_until(cluster, lambda: request.state is RequestState.ENDING)
    home = request.decode_pool
    assert request.holders == {(request.prefill_pool, 1), (home, 1)}
    cluster.kill_pool(request.prefill_pool)
    assert Abort("a", 1) in cluster.to_pools[home]
    cluster.settle()
    assert cluster.tokens("a") == reference(prompt_of(20), 1)


def test_it_waits_for_a_pool_and_goes_on_when_one_serves() -> None:
    cluster = WholeCluster(SMALLEST)
    cluster.submit("a", prompt_of(12), 9)
    request = cluster.requests["a"]
    run_until(cluster, lambda: request.num_output_tokens == 3)
    cluster.kill_pool("decode0")
    cluster.sweep(20.0)
    assert request.state is RequestState.WAITING
    with pytest.raises(RequestError) as caught:
        cluster.submit("b", prompt_of(3), 3)
    assert caught.value.code == "no_workers"
    cluster.start_pool("decode0")
    assert request.state is RequestState.RESERVING
    cluster.settle()
    assert cluster.tokens("a") == reference(prompt_of(12), 9)
    assert request.lost[0].num_output_tokens == 3


def test_it_ends_with_an_error_when_no_pool_comes() -> None:
    cluster = WholeCluster(SMALLEST)
    cluster.submit("a", prompt_of(12), 9)
    request = cluster.requests["a"]
    run_until(cluster, lambda: request.num_output_tokens == 3)
    cluster.kill_pool("decode0")
    for _ in range(31):
        cluster.sweep()
    assert (request.finish_reason, request.error_code) == ("error", "worker_lost")
    error = cluster.deliveries["a"]._error
    assert error is not None and (error.code, error.status) == ("worker_lost", 503)
    cluster.settle()


def test_attempts_are_bounded() -> None:
    cluster = WholeCluster(TWO_AND_TWO, max_attempts=3, poison_deaths=100)
    cluster.submit("a", prompt_of(12), 30)
    request = cluster.requests["a"]
    for attempt in (1, 2, 3):
        run_until(cluster, lambda: request.state is RequestState.DECODING)
        assert request.attempt == attempt
        victim = request.decode_pool
        cluster.kill_pool(victim)
        cluster.start_pool(victim)
    assert (request.error_code, len(request.lost)) == ("worker_lost", 2)
    cluster.settle()


def test_an_abort_while_it_waits_frees_what_is_left() -> None:
    cluster = WholeCluster(TWO_AND_TWO)
    cluster.submit("a", prompt_of(43), 5)
    request = cluster.requests["a"]
    run_until(cluster, lambda: request.num_prefilled_tokens > 8)
    cluster.kill_pool(request.prefill_pool)
    assert request.state is RequestState.WAITING
    cluster.abort("a")
    cluster.settle()
    assert cluster.tokens("a") == []
    assert [m.attempt for _, m in cluster.dispatched if isinstance(m, Reserve)] == [1]


@pytest.mark.parametrize("lost", range(12))
def test_a_message_that_is_lost_on_its_way_to_us(lost: int) -> None:
    """Any one of them, whatever it says: the request ends all the same, and right."""
    cluster = WholeCluster(TWO_AND_TWO)
    cluster.submit("a", prompt_of(30), 5)
    seen = 0
    for _ in range(60):
        for pool_id in list(cluster.pools):
            queue = cluster.pools[pool_id].to_coordinator
            if queue:
                if seen == lost:
                    queue.popleft()
                else:
                    cluster.deliver_to_coordinator(pool_id)
                seen += 1
            while cluster.to_pools[pool_id]:
                cluster.deliver_to_pool(pool_id)
            cluster.step(pool_id)
        for what in cluster.moving():
            cluster.move(what)
    cluster.settle()
    assert cluster.tokens("a") == reference(prompt_of(30), 5)


@pytest.mark.parametrize("lost", range(4))
def test_a_message_that_is_lost_on_its_way_to_a_pool(lost: int) -> None:
    cluster = WholeCluster(TWO_AND_TWO)
    cluster.submit("a", prompt_of(30), 5)
    seen = 0
    for _ in range(60):
        for pool_id in list(cluster.pools):
            queue = cluster.to_pools[pool_id]
            if queue:
                if seen == lost:
                    queue.popleft()
                else:
                    cluster.deliver_to_pool(pool_id)
                seen += 1
            cluster.step(pool_id)
            while cluster.pools[pool_id].to_coordinator:
                cluster.deliver_to_coordinator(pool_id)
        for what in cluster.moving():
            cluster.move(what)
    cluster.settle()
    assert cluster.tokens("a") == reference(prompt_of(30), 5)


# -- any order -------------------------------------------------------------------------------------


class History:
    """A cluster under a random history."""

    def __init__(self, rng: random.Random, pools: Any, **config: Any) -> None:
        self.rng = rng
        self.cluster = WholeCluster(pools, **config)
        self.wanted: dict[str, int] = {}
        self.refused = 0

    def run(self, num_events: int, faults: tuple[str, ...]) -> None:
        cluster, rng = self.cluster, self.rng
        for _ in range(num_events):
            if rng.random() < 0.06:
                self.submit()
            elif faults and rng.random() < 0.03:
                self.fault(rng.choice(faults))
            elif rng.random() < 0.02:
                cluster.sweep(rng.choice([0.1, 1.0, 3.0]))
            elif actions := cluster.choices():
                rng.choice(actions)()
            cluster.assert_loads()
        for pool_id in cluster.specs:
            if pool_id not in cluster.pools:
                cluster.start_pool(pool_id)
        cluster.settle()
        for name, max_tokens in self.wanted.items():
            cluster.assert_exact(name, max_tokens)

    def submit(self) -> None:
        name = f"r{len(self.wanted)}"
        prompt = prompt_of(self.rng.choice([1, 3, 4, 9, 17, 26, 33]), self.rng.randrange(3))
        max_tokens = self.rng.randint(1, 9)
        try:
            self.cluster.submit(name, prompt, max_tokens)
        except RequestError as error:
            assert error.code in ("no_workers", "request_quarantined")
            return
        self.wanted[name] = max_tokens

    def fault(self, fault: str) -> None:
        cluster, rng = self.cluster, self.rng
        match fault:
            case "kill" if cluster.pools:
                cluster.kill_pool(rng.choice(sorted(cluster.pools)))
            case "start" if gone := sorted(cluster.specs.keys() - cluster.pools.keys()):
                cluster.start_pool(rng.choice(gone))
            case "abort" if self.wanted:
                cluster.abort(rng.choice(sorted(self.wanted)))
            case "drop":
                queues = [pool.to_coordinator for pool in cluster.pools.values()]
                full = [queue for queue in queues if queue]
                if full:
                    rng.choice(full).popleft()
            case "repeat":
                queues = [queue for queue in cluster.to_pools.values() if queue]
                if queues:
                    queue = rng.choice(queues)
                    queue.append(queue[0])


FAULTS = ("kill", "start", "start", "abort", "repeat", "drop")
suppress = [HealthCheck.too_slow]
phases = (Phase.explicit, Phase.reuse, Phase.generate)  # a seed's history does not shrink


@given(rng=st.randoms(use_true_random=False), faults=st.sets(st.sampled_from(FAULTS)))
@settings(max_examples=some_of(60), suppress_health_check=suppress, phases=phases)
def test_any_history_is_exact(rng: random.Random, faults: set[str]) -> None:
    in_slices = rng.random() < 0.5
    history = History(rng, TWO_AND_TWO, poison_deaths=100, in_slices=in_slices)
    history.run(250, tuple(sorted(faults)))


@pytest.mark.parametrize("seed", range(6))
def test_many_histories(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(15):
        History(rng, TWO_AND_TWO, poison_deaths=100).run(300, FAULTS)


def _keep_a_block_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    close = SequenceMemory.close_transfer

    def hasty(self: SequenceMemory, sequence: Sequence, num_whole_blocks: int) -> None:
        close(self, sequence, num_whole_blocks + 1)

    monkeypatch.setattr(SequenceMemory, "close_transfer", hasty)


def _take_tokens_of_any_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Service, request_id: str, attempt: int) -> Request | None:  # noqa: ARG001
        return self.requests.get(request_id)

    def any_index(self: Request, token: NewToken) -> list[NewToken]:
        self.output_token_ids.append(token.token_id)
        self.finish_reason = token.finish_reason
        return [token]

    monkeypatch.setattr(Service, "_find", careless)
    monkeypatch.setattr(Request, "accept", any_index)


def _forget_the_tokens_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Request, "attempt_token_ids", property(lambda self: self.prompt_token_ids))


@pytest.mark.parametrize(
    "plant",
    [
        _keep_a_block_too_many,
        _take_tokens_of_any_attempt,
        _forget_the_tokens_that_were_given,
    ],
)
def test_a_planted_bug_is_noticed(monkeypatch: pytest.MonkeyPatch, plant: Any) -> None:
    plant(monkeypatch)
    rng = random.Random(1)
    with pytest.raises((AssertionError, KeyError, IllegalTransition)):
        for _ in range(60):
            History(rng, TWO_AND_TWO, poison_deaths=100).run(300, FAULTS)


@given(
    rng=st.randoms(use_true_random=False),
    num_prefill_blocks=st.integers(9, 12),
    num_decode_blocks=st.integers(11, 14),
)
@settings(max_examples=some_of(60), suppress_health_check=suppress, phases=phases)
def test_the_smallest_pools_never_get_stuck(
    rng: random.Random, num_prefill_blocks: int, num_decode_blocks: int
) -> None:
    """Decode reserves before prefill holds: whoever has begun can end, in pools for hardly one."""
    pools = (
        ("prefill0", "prefill", 1, num_prefill_blocks),
        ("decode0", "decode", 1, num_decode_blocks),
    )
    history = History(rng, pools)
    history.run(250, ("abort", "repeat"))
    dispatched = history.cluster.dispatched
    for index, (_, message) in enumerate(dispatched):
        if isinstance(message, Prefill):
            before = [m for _, m in dispatched[:index] if isinstance(m, Reserve)]
            key = (message.request_id, message.attempt)
            assert key in {(m.request_id, m.attempt) for m in before}


def test_what_can_never_fit_ends_with_an_error_and_what_fits_in_one_pool_does_not() -> None:
    pools = (
        ("prefill0", "prefill", 1, 6),
        ("decode0", "decode", 1, 6),
        ("decode1", "decode", 1, 20),
    )
    cluster = WholeCluster(pools)
    cluster.submit("never", prompt_of(100), 3)
    cluster.submit("large", prompt_of(60, 1), 3)
    cluster.settle()
    assert cluster.requests["never"].error_code == "kv_capacity_exceeded"
    error = cluster.deliveries["never"]._error
    assert error is not None and error.status == 400
    assert cluster.tokens("large") == reference(prompt_of(60, 1), 3)


# -- poison ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_poison_request_takes_two_pools_with_it_and_its_neighbours_complete(seed: int) -> None:
    rng = random.Random(seed)
    cluster = WholeCluster(TWO_AND_TWO, max_attempts=6)
    neighbours = [f"n{i}" for i in range(6)]
    for index, name in enumerate(neighbours):
        cluster.submit(name, prompt_of(rng.choice([6, 14, 30]), index), 25)
    run_until(cluster, lambda: all(cluster.requests[n].num_output_tokens > 1 for n in neighbours))
    cluster.poison = prompt_of(rng.choice([3, 20, 30]), 40)
    cluster.submit("poison", cluster.poison, 5)
    num_deaths = 0
    for _ in range(400):
        for action in cluster.choices():
            num_before = len(cluster.pools)
            action()
            if len(cluster.pools) < num_before:
                num_deaths += 1
                break
        for pool_id in cluster.specs:
            if pool_id not in cluster.pools and rng.random() < 0.3:
                cluster.start_pool(pool_id)
        cluster.sweep(0.05)
        if not cluster.requests["poison"].is_active:
            break
    for pool_id in cluster.specs.keys() - cluster.pools.keys():
        cluster.start_pool(pool_id)
    cluster.settle()
    assert cluster.requests["poison"].error_code == "request_quarantined"
    assert num_deaths == 2
    for name in neighbours:
        assert cluster.tokens(name) == reference(cluster.prompts[name], 25)
    with pytest.raises(RequestError) as caught:
        cluster.submit("again", cluster.poison, 5)
    assert (caught.value.code, caught.value.status) == ("request_quarantined", 500)
    cluster.now += 3601
    cluster.poison = None
    cluster.submit("later", prompt_of(3, 40), 5)
    cluster.settle()


def test_bystanders_of_many_deaths_are_not_quarantined() -> None:
    cluster = WholeCluster(TWO_AND_TWO, max_attempts=100)
    names = [f"n{i}" for i in range(5)]
    for index, name in enumerate(names):
        cluster.submit(name, prompt_of(9 + index, index), 100)
    rng = random.Random(1)
    for round_ in range(8):
        target = 10 * (round_ + 1)
        requests = [cluster.requests[name] for name in names]
        while not all(request.num_output_tokens >= target for request in requests):
            for action in cluster.choices():
                action()
        victim = rng.choice(["decode0", "decode1"])
        cluster.kill_pool(victim)
        cluster.start_pool(victim)
    cluster.settle()
    for name in names:
        assert cluster.tokens(name) == reference(cluster.prompts[name], 100)


def test_late_messages_of_a_lost_attempt_change_nothing() -> None:
    cluster = WholeCluster(TWO_AND_TWO)
    cluster.submit("a", prompt_of(30), 6)
    request = cluster.requests["a"]
    run_until(cluster, lambda: request.num_output_tokens == 3)
    decode = cluster.pools[request.decode_pool]
    home = request.decode_pool
    cluster.step(home)
    cluster.step(home)
    late = list(decode.to_coordinator)
    assert late
    error = RequestError("x", code="stalled", status=503)
    cluster.service._lose(request, error, cluster.now)
    for message in late:
        cluster.service.on_message(home, message, cluster.now)
    assert request.num_output_tokens == 3
    cluster.settle()
    assert cluster.tokens("a") == reference(prompt_of(30), 6)
    assert [m for _, m in cluster.dispatched if isinstance(m, Abort)]


@pytest.mark.parametrize("num_blocks", [0, 3])
def test_a_decode_pool_that_no_prefill_pool_reaches_computes_prompts_itself(
    num_blocks: int,
) -> None:
    """What has arrived is kept, and pools that reach each other again hand over again."""
    cluster = WholeCluster(SMALLEST)
    cluster.submit("a", prompt_of(34), 5)
    request = cluster.requests["a"]

    def is_far_enough() -> bool:
        return request.prefill_pool != "" and cluster.num_arrived(("a", 1)) >= num_blocks

    run_until(cluster, is_far_enough)
    peer = cluster.registry.pools["decode0"].leader
    cluster.registry.on_heartbeat(peer, Heartbeat(1, 0.0, cut_off=("prefill0",)), cluster.now)
    cluster.sweep()
    cluster.settle()
    cluster.assert_exact("a", 5)
    assert (request.attempt, request.prefill_pool) == (2, "")
    assert [lost.reason for lost in request.lost] == ["handoff_failed"]
    cluster.registry.on_heartbeat(peer, Heartbeat(2, 0.0), cluster.now)
    cluster.submit("b", prompt_of(34, 7), 5)
    cluster.settle()
    assert cluster.requests["b"].lost == [] and cluster.requests["b"].prefill_pool == "prefill0"
