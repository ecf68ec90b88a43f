"""A step of a prefill pool looks at few of those that wait, and at those that it should."""

import contextlib
import sys
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from prefill.backlog import BEGUN, Backlog, service_order
from prefill.request import Request
from prefill.states import RequestEvent, RequestState
from protocol.errors import IllegalTransition
from protocol.messages import Prefill
from protocol.request import SamplingParams

CHUNK_TOKENS = 8


EVENTS = (
    RequestEvent.ADMIT,
    RequestEvent.ADMIT,
    RequestEvent.FETCH,
    RequestEvent.GIVE_UP,
    RequestEvent.CLOSED,
    RequestEvent.DROP,
)


def make_request(number: int, num_tokens: int, priority: int) -> Request:
    message = Prefill(
        request_id=f"r{number}",
        attempt=1,
        prompt_token_ids=(1,) * num_tokens,
        sampling=SamplingParams(max_tokens=1),
        target_pool_id="decode0",
        target_epoch=1,
        num_target_tokens=0,
        priority=priority,
    )
    return Request(message, 0.0, number)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2)), min_size=1, max_size=60),
    events=st.lists(st.tuples(st.integers(0, 59), st.sampled_from(EVENTS)), max_size=60),
    serves=st.booleans(),
)
def test_a_step_sees_of_few_what_it_would_see_of_all(
    sizes: list[tuple[int, int]], events: list[tuple[int, RequestEvent]], serves: bool
) -> None:
    backlog = Backlog(CHUNK_TOKENS)
    requests = [make_request(number, *size) for number, size in enumerate(sizes)]
    for request in requests:
        backlog.add(request)
    for index, event in events:
        request = requests[index % len(requests)]
        before = request.state
        with contextlib.suppress(IllegalTransition):
            request.advance(event)
            backlog.moved(request, before)
    waiting = [request for request in requests if request.state is RequestState.WAITING]
    begun = [request for request in requests if request.state in BEGUN]
    assert backlog.num_waiting == len(waiting)
    assert sorted(request.number for request in backlog.begun) == [r.number for r in begun]
    assert backlog.num_pending_tokens == sum(r.num_left_tokens for r in (*waiting, *begun))
    unfinished = [r for r in requests if r.state in (RequestState.WAITING, RequestState.RUNNING)]
    served = {
        request.key
        for request in unfinished
        if serves and request.state is RequestState.RUNNING and request.num_tokens > CHUNK_TOKENS
    }
    of_few = service_order(backlog.candidates(), served, CHUNK_TOKENS)
    of_all = service_order(unfinished, served, CHUNK_TOKENS)
    assert [request.number for request in of_few] == [request.number for request in of_all]


def num_calls(work: Callable[[], object]) -> int:
    """Functions that are called, of Python and of C."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def test_a_step_costs_the_same_however_many_wait(make_pool: Callable, prompt: Callable) -> None:
    def calls_of_a_step(num_waiting: int) -> int:
        pool = make_pool(2, max_num_sequences=4, num_blocks=40)
        for number in range(num_waiting):
            pool.add(prompt(f"r{number}", 20 + number % 50, salt=f"{number}"))
        for _ in range(3):  # some have begun
            pool.step()

        def step() -> None:
            plan = pool.scheduler.schedule(pool.now)
            assert plan is not None and pool.scheduler.load().num_waiting > num_waiting - 20
            pool.finish(plan)

        return num_calls(step)

    few, many = calls_of_a_step(100), calls_of_a_step(1000)
    assert many < 1.1 * few, (few, many)
