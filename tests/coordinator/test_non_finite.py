"""Numbers that are not finite: another pool tries once, nothing of them is found again, and who
makes them for several requests is lost. The real service and schedulers, see whole_cluster.py.
"""

import random
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.request import Request
from coordinator.requests.judging import Flaws
from protocol.errors import RequestError
from protocol.request import SamplingParams
from protocol.token_ids import TokenIds
from tests.coordinator.test_failover import SMALLEST, TWO_AND_TWO, prompt_of
from tests.coordinator.whole_cluster import WholeCluster
from tests.sizes import some_of

COLOCATED = (("decode0", "decode", 1, 32),)
ALL = ("prefill0", "prefill1", "decode0", "decode1")


def ask(cluster: WholeCluster, names: Sequence[str], num_tokens: int = 40) -> None:
    for number, name in enumerate(names):
        cluster.submit(name, prompt_of(num_tokens, number), 5)
    cluster.settle()
    cluster.assert_caches_finite()


def error_of(cluster: WholeCluster, name: str) -> RequestError | None:
    return cluster.deliveries[name]._error


@pytest.mark.parametrize("broken", ALL)
def test_another_pool_goes_on_and_the_caller_sees_nothing(broken: str) -> None:
    cluster = WholeCluster(TWO_AND_TWO)
    cluster.broken, cluster.is_read_at_once = {broken}, True
    names = [f"r{number}" for number in range(8)]
    ask(cluster, names)
    for name in names:
        cluster.assert_exact(name, 5)
        assert error_of(cluster, name) is None
    lost = [ended.reason for name in names for ended in cluster.requests[name].lost]
    num_flaws = lost.count("non_finite_logits")
    assert num_flaws and set(lost) <= {"non_finite_logits", "worker_lost"}
    assert cluster.service.num_non_finite == {broken: num_flaws}
    assert [pool_id for pool_id, _ in cluster.lost] == [broken] * (num_flaws >= 3)


def test_a_decode_pool_computes_what_the_only_prefill_pool_cannot() -> None:
    cluster = WholeCluster(SMALLEST)
    cluster.broken = {"prefill0"}
    ask(cluster, ["a"], 12)
    cluster.assert_exact("a", 5)
    assert cluster.requests["a"].prefill_pool == ""


@pytest.mark.parametrize("source", ["prefill0", "prefill1"])
def test_what_is_spoilt_on_the_way_costs_an_attempt(source: str) -> None:
    cluster = WholeCluster(TWO_AND_TWO)
    cluster.broken_links = {(source, target) for target in ("decode0", "decode1")}
    names = [f"r{number}" for number in range(6)]
    ask(cluster, names)
    for name in names:
        cluster.assert_exact(name, 5)
        assert error_of(cluster, name) is None, "the other prefill pool is asked as well"
    assert cluster.service.num_non_finite.total() > 0


def test_a_checkpoint_that_is_broken_everywhere_is_told_and_no_pool_is_blamed() -> None:
    cluster = WholeCluster(TWO_AND_TWO)
    cluster.broken = set(ALL)
    names = [f"r{number}" for number in range(9)]
    ask(cluster, names)
    for name in names:
        error = error_of(cluster, name)
        assert error is not None and (error.code, error.status) == ("non_finite_logits", 500)
        assert len(cluster.requests[name].flawed) == 2, "a flaky rank is given the benefit once"
    assert cluster.lost == []
    assert cluster.service.num_non_finite["prefill0"] > 0


def test_the_only_pool_is_lost_after_several_requests_in_a_row() -> None:
    cluster = WholeCluster(COLOCATED)
    cluster.broken = {"decode0"}
    ask(cluster, ["a", "b"])
    cluster.broken = set()
    ask(cluster, ["sound"], 30)  # it was the requests
    cluster.broken = {"decode0"}
    ask(cluster, ["c", "d"])
    assert cluster.lost == []
    cluster.submit("e", prompt_of(17, 9), 5)
    cluster.settle()
    [(pool_id, reason)] = cluster.lost
    assert pool_id == "decode0" and "not finite for 3 different requests" in reason
    cluster.broken = set()
    ask(cluster, ["f"])
    cluster.assert_exact("f", 5)
    assert len(cluster.lost) == 1, "what it was to blame for is forgotten"


def test_the_same_request_counts_once() -> None:
    cluster = WholeCluster(COLOCATED)
    cluster.broken = {"decode0"}
    for name in "abcdef":
        cluster.submit(name, prompt_of(20), 5)
        cluster.settle()
    assert cluster.lost == []


def make_request(name: str) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=TokenIds.of((1,)),
        sampling=SamplingParams(max_tokens=1),
        tenant="tenant",
        fingerprint=name.encode(),
    )


def test_what_is_proven_outlasts_successes_but_not_the_window() -> None:
    flaws = Flaws(num_requests=2, window_s=100.0)
    for number in range(2):
        request = make_request(f"r{number}")
        assert flaws.on_flaw(request, "decode0", 50.0 * number, can_avoid=True)
        assert flaws.guilty(50.0 * number) == [], "no other pool has gone on yet"
        for _ in range(3):
            flaws.on_tokens(request, 50.0 * number)
        flaws.on_finished(("decode0", "prefill0"))
    assert [pool_id for pool_id, _ in flaws.guilty(99.0)] == ["decode0"]
    assert flaws.guilty(101.0) == []


@settings(max_examples=some_of(60), suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, 2**32),
    st.sets(st.sampled_from(ALL), max_size=2),
    st.sets(st.tuples(st.sampled_from(ALL[:2]), st.sampled_from(ALL[2:])), max_size=2),
)
def test_in_any_order_no_token_is_wrong_and_nothing_spoilt_is_found_again(
    seed: int, broken: set[str], links: set[tuple[str, str]]
) -> None:
    rng = random.Random(seed)
    cluster = WholeCluster(TWO_AND_TWO)
    cluster.broken, cluster.broken_links = broken, links
    cluster.is_read_at_once = rng.random() < 0.7
    for number in range(5):  # of a few prefixes, so that they share blocks
        prompt = prompt_of(rng.choice([6, 20, 33]), number % 2) + prompt_of(number, 3)
        cluster.submit(f"r{number}", prompt, 5)
        for _ in range(rng.randrange(60)):
            rng.choice(cluster.choices())()
        # What is spoilt on the way shows to nobody but who computes with it.
        if rng.random() < 0.2 and not links:
            cluster.abort(f"r{number}")
    cluster.settle()
    for name in cluster.requests:
        cluster.assert_exact(name, 5)
    cluster.assert_caches_finite()
    cluster.broken, cluster.broken_links = set(), set()
    for number in range(5):
        name, again = f"r{number}", f"again{number}"
        cluster.submit(again, cluster.prompts[name], 5)
        cluster.settle()
        cluster.assert_exact(again, 5)
        assert cluster.requests[again].attempt == 1
