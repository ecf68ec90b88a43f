"""A fake server that has just begun for each test, and a client of it that does not wait long."""

from collections.abc import Iterator

import pytest

from coordinator.client import Client, Retry
from tests.coordinator.client.fake_server import FakeServer, running
from tests.coordinator.client.fake_state import State

QUICK = Retry(max_attempts=3, first_delay_s=0.001, max_delay_s=0.01)


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
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.url, timeout_s=10.0, poll_s=0.001, retry=QUICK) as client:
        yield client
