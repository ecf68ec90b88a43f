"""A real pool: processes, sockets, gloo. The test is the coordinator; the decode pool has no ranks.

So hand-offs have nobody to read them and commit at once; all else is as in a cluster.
"""

import json
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.supervise.forks import ForkedProcess
from modeling.checkpoint.config import load_config
from protocol.codec import Codec
from protocol.kv import PoolEndpoint
from protocol.messages import (
    Abort,
    Connected,
    FirstToken,
    GangReady,
    Hello,
    Prefill,
    Progress,
    Released,
    RequestFailed,
    Shutdown,
    ToCoordinator,
    Topology,
    ToRank,
    Welcome,
)
from protocol.request import SamplingParams
from protocol.sockets import Poller, Router, open_context
from tests.arithmetic_reference import expected_tokens
from tests.forks import end, shared_forks

pytestmark = pytest.mark.cluster

MODEL = "arithmetic:layers=4,heads=4,kv_heads=2,vocab=512,max_len=4096"
BUDGET_S = 90.0


class Coordinator:
    """As little of a coordinator as a prefill pool needs."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._poller = Poller(router)
        self._incoming: Codec[ToCoordinator] = Codec(ToCoordinator)
        self._outgoing: Codec[ToRank] = Codec(ToRank)
        self.peers: dict[int, str] = {}
        self.hellos: dict[int, Hello] = {}
        self._messages: deque[ToCoordinator] = deque()

    def send(self, rank: int, message: ToRank) -> None:
        self._router.send(self.peers[rank], self._outgoing.encode(message))

    def send_all(self, message: ToRank) -> None:
        for rank in self.peers:
            self.send(rank, message)

    def wait(self, kind: type, count: int = 1) -> list[Any]:
        """The next ``count`` messages of a kind; those before them are passed over."""
        found: list[Any] = []
        deadline = time.monotonic() + BUDGET_S
        while len(found) < count:
            while self._messages and len(found) < count:
                message = self._messages.popleft()
                assert not isinstance(message, RequestFailed), message
                if isinstance(message, kind):
                    found.append(message)
            assert time.monotonic() < deadline, f"{len(found)} of {count} {kind.__name__}"
            if len(found) < count:
                self._receive()
        return found

    def _receive(self) -> None:
        self._poller.wait(0.5)
        while (received := self._router.receive()) is not None:
            message = self._incoming.decode(received[1])
            if isinstance(message, Hello):
                self.peers[message.endpoint.rank] = received[0]
                self.hellos[message.endpoint.rank] = message
            self._messages.append(message)

    def boot(self, world_size: int) -> None:
        self.wait(Hello, world_size)
        gang = self.hellos[0].gang
        assert gang is not None
        assert all(self.hellos[rank].gang is None for rank in range(1, world_size))
        self.send_all(Welcome(coordinator_epoch=1, pool_epoch=3, gang=gang))
        assert all(ready.tokens_per_s > 0 for ready in self.wait(GangReady, world_size))
        first = self.hellos[0]
        ranks = tuple(self.hellos[rank].endpoint for rank in range(world_size))
        own = PoolEndpoint("prefill0", "prefill", 3, first.cp_size, first.tp_size, ranks)
        decode = PoolEndpoint("decode0", "decode", 5, 1, 1, ())
        self.send_all(Topology(version=1, pools=(own, decode)))
        self.wait(Connected, world_size)

    def prefill(self, request_id: str, token_ids: tuple[int, ...]) -> None:
        message = Prefill(
            request_id=request_id,
            attempt=1,
            prompt_token_ids=token_ids,
            sampling=SamplingParams(max_tokens=4, temperature=0.0),
            target_pool_id="decode0",
            target_epoch=5,
            num_target_tokens=0,
        )
        self.send(0, message)


Start = Callable[..., tuple[Coordinator, list[ForkedProcess]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes: list[ForkedProcess] = []
    with open_context("secret") as context:
        router = Router(context, f"ipc://{tmp_path}/control")

        def start_pool(cp_size: int, tp_size: int) -> tuple[Coordinator, list[ForkedProcess]]:
            for rank in range(cp_size * tp_size):
                config = {
                    "model": MODEL,
                    "pool_id": "prefill0",
                    "control_address": router.address,
                    "token": "secret",
                    "listen": f"ipc://{tmp_path}",
                    "rank": rank,
                    "cp_size": cp_size,
                    "tp_size": tp_size,
                    "device": "cpu",
                    "block_size": 8,
                    "kv_memory_bytes": 1 << 22,
                    "transport": "tcp",
                    "chunk_tokens": 64,
                    "ring_threshold_tokens": 100,
                }
                file = tmp_path / f"{rank}.json"
                file.write_text(json.dumps(config))
                processes.append(shared_forks().start("prefill", "--config", str(file)))
            return Coordinator(router), processes

        yield start_pool
        for process in processes:
            end(process)
        router.close()


def test_a_pool_of_processes_computes_exactly(start: Start) -> None:
    coordinator, processes = start(2, 2)
    coordinator.boot(4)
    config = load_config(MODEL)
    long = tuple(7 * i % 512 for i in range(300))
    for request_id, prompt in (("long", long), ("short", (1, 2, 3)), ("again", (*long, 5))):
        coordinator.prefill(request_id, prompt)
        [first] = coordinator.wait(FirstToken)
        assert first.request_id == request_id
        assert first.token_id == expected_tokens(config, prompt, 1)[0]
        assert first.path.ring_size == (1 if request_id == "short" else 2)
        assert first.path.num_cached_tokens == (296 if request_id == "again" else 0)
        assert [released.request_id for released in coordinator.wait(Released)] == [request_id]

    coordinator.prefill("gone", tuple(range(500)))
    coordinator.wait(Progress)
    coordinator.send(0, Abort("gone", 1))
    assert [released.request_id for released in coordinator.wait(Released)] == ["gone"]

    coordinator.send_all(Shutdown("the test is over"))
    assert [process.wait(BUDGET_S) for process in processes] == [0] * 4


def test_a_pool_of_one_ends_on_sigterm_even_before_it_is_welcome(start: Start) -> None:
    coordinator, [process] = start(1, 1)
    coordinator.wait(Hello)
    process.send_signal(signal.SIGTERM)
    assert process.wait(BUDGET_S) == 0


def test_followers_end_with_their_leader(start: Start) -> None:
    coordinator, processes = start(2, 1)
    coordinator.boot(2)
    processes[0].send_signal(signal.SIGTERM)
    assert [process.wait(BUDGET_S) for process in processes] == [0, 0]


def test_a_leader_ends_when_a_rank_of_its_ring_dies(start: Start) -> None:
    coordinator, processes = start(2, 1)
    coordinator.boot(2)
    processes[1].kill()
    processes[1].wait(BUDGET_S)
    coordinator.prefill("a", tuple(range(500)))
    assert processes[0].wait(BUDGET_S) == 1


def test_a_rank_dies_with_its_parent(tmp_path: Path) -> None:
    config = {
        "model": MODEL,
        "pool_id": "prefill0",
        "control_address": f"ipc://{tmp_path}/control",
        "token": "secret",
        "listen": f"ipc://{tmp_path}",
        "device": "cpu",
        "kv_memory_bytes": 1 << 22,
        "transport": "tcp",
    }
    file = tmp_path / "rank.json"
    parent_code = (
        "import json, os, subprocess, sys\n"
        f"config = {config!r} | {{'parent_pid': os.getpid()}}\n"
        f"open({str(file)!r}, 'w').write(json.dumps(config))\n"
        f"command = [sys.executable, '-P', '-m', 'prefill', '--config', {str(file)!r}]\n"
        "subprocess.Popen(command).wait()\n"
    )
    with open_context("secret") as context:
        router = Router(context, config["control_address"])
        parent = subprocess.Popen(
            [sys.executable, "-c", parent_code], stderr=subprocess.PIPE, text=True
        )
        coordinator = Coordinator(router)
        coordinator.wait(Hello)
        parent.kill()
        # The child holds the other end of this pipe: it is closed when both have ended.
        parent.communicate(timeout=BUDGET_S)
        router.close()
