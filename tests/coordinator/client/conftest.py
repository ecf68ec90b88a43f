"""A fake server that has just begun for each test, and both clients of it, used in the same way."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

import pytest

from baton_client import AsyncClient, Client, Retry
from tests.coordinator.client.fake_server import FakeServer, running
from tests.coordinator.client.fake_state import State

QUICK = Retry(max_attempts=3, first_delay_s=0.001, max_delay_s=0.01)


class Driven:
    """An object of the asynchronous client, used as its blocking counterpart is."""

    def __init__(self, inner: Any, run: Callable[[Awaitable[Any]], Any]) -> None:
        self._inner = inner
        self._run = run

    def _drive(self, value: Any) -> Any:
        if asyncio.iscoroutine(value):
            return self._drive(self._run(value))
        if callable(value):
            return lambda *given, **named: self._drive(value(*given, **named))
        is_ours = type(value).__name__.startswith("Async") or hasattr(value, "__aiter__")
        return Driven(value, self._run) if is_ours else value

    def __getattr__(self, name: str) -> Any:
        return self._drive(getattr(self._inner, name))

    def __iter__(self) -> Iterator[Any]:
        items = aiter(self._inner)
        while True:
            try:
                yield self._run(anext(items))
            except StopAsyncIteration:
                return

    def __enter__(self) -> "Driven":
        self._run(self._inner.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        self._run(self._inner.__aexit__(*error))


Connect = Callable[..., Client]


@pytest.fixture(params=["blocking", "asynchronous"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of one of the two kinds."""
    if request.param == "blocking":
        yield Client
        return
    with asyncio.Runner() as runner:

        def run(awaitable: Awaitable[Any]) -> Any:
            return runner.get_loop().run_until_complete(awaitable)

        yield lambda *given, **named: cast(Client, Driven(AsyncClient(*given, **named), run))


@pytest.fixture(scope="session")
def running_server() -> Iterator[FakeServer]:
    with running() as server:
        yield server


@pytest.fixture
def server(running_server: FakeServer) -> FakeServer:
    """As if it had just begun."""
    running_server.state = State()
    return running_server


@pytest.fixture
def client(server: FakeServer, connect: Connect) -> Iterator[Client]:
    """One that does not wait long."""
    with connect(server.url, timeout_s=10.0, poll_s=0.001, retry=QUICK) as client:
        yield client
