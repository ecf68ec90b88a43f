"""Real decode processes and a coordinator that is a few lines: from HELLO to a clean end."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import zmq

from decode.config import DecodeConfig
from launcher.supervise.forks import ForkedProcess
from modeling.checkpoint.config import load_config
from protocol.codec import Codec
from protocol.errors import ConfigError
from protocol.kv import PoolEndpoint
from protocol.messages import (
    Abort,
    CacheUpdate,
    ComputeHere,
    Connected,
    GangReady,
    Heartbeat,
    Hello,
    Released,
    RequestFailed,
    Reserve,
    Shutdown,
    Ticket,
    ToCoordinator,
    Tokens,
    Topology,
    ToRank,
    Welcome,
)
from protocol.request import FinishReason, SamplingParams
from protocol.sockets import Poller, Router, open_context
from tests.arithmetic_reference import expected_tokens
from tests.forks import end, outputs, shared_forks

MODEL = "arithmetic:layers=2,heads=4,kv_heads=2,head_dim=4"
BUDGET_S = 60.0
M = TypeVar("M")


class Coordinator:
    """Starts the ranks of one decode pool and talks to them."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path, tp_size: int) -> None:
        self._folder, self._tp_size = folder, tp_size
        self._router = Router(context, f"ipc://{folder}/control")
        self._poller = Poller(self._router)
        self._in: Codec[ToCoordinator] = Codec(ToCoordinator)
        self._out: Codec[ToRank] = Codec(ToRank)
        self._received: list[tuple[str, Any]] = []
        self.processes: list[ForkedProcess] = []
        self.names: list[str] = []  # of the ranks, by rank

    def start(self, num_blocks: int) -> None:
        block_bytes = 2 * 2 * 2 * 4 * 4 * 4 // self._tp_size
        for rank in range(self._tp_size):
            config = DecodeConfig(
                model=MODEL,
                pool_id="decode0",
                control_address=self._router.address,
                token="secret",
                listen=f"ipc://{self._folder}",
                rank=rank,
                tp_size=self._tp_size,
                block_size=4,
                kv_memory_bytes=num_blocks * block_bytes,
                transport="tcp",
                step_timeout_s=20.0,
            )
            path = self._folder / f"rank{rank}.json"
            path.write_bytes(msgspec.json.encode(config))
            self.processes.append(shared_forks().start("decode", "--config", str(path)))

    def form(self) -> None:
        """From HELLO to a pool that serves."""
        hellos = sorted(
            (self.wait(Hello) for _ in range(self._tp_size)), key=lambda pair: pair[1].endpoint.rank
        )
        self.names = [name for name, _ in hellos]
        gang = hellos[0][1].gang
        assert gang is not None
        for name in self.names:
            self.send(name, Welcome(1, 1, gang))
        for _ in self.names:
            self.wait(GangReady)
        ranks = tuple(hello.endpoint for _, hello in hellos)
        pool = PoolEndpoint("decode0", "decode", 1, 1, self._tp_size, ranks)
        for name in self.names:
            self.send(name, Topology(1, (pool,)))
        for _ in self.names:
            self.wait(Connected)

    def send(self, name: str, message: ToRank) -> None:
        self._router.send(name, self._out.encode(message))

    def tell(self, message: ToRank) -> None:
        self.send(self.names[0], message)

    def wait(self, kind: type[M]) -> tuple[str, M]:
        """The next message of that kind, setting others aside in their order."""
        deadline = time.monotonic() + BUDGET_S
        while time.monotonic() < deadline:
            for index, (name, message) in enumerate(self._received):
                if isinstance(message, kind):
                    del self._received[index]
                    return name, message
            self._poller.wait(0.5)
            while (received := self._router.receive()) is not None:
                self._received.append((received[0], self._in.decode(received[1])))
            assert all(process.poll() is None for process in self.processes), "a rank has ended"
        raise AssertionError(f"no {kind.__name__}; there are {self._received}")

    def end(self) -> list[int]:
        """The exit codes, once all have ended."""
        return [process.wait(BUDGET_S) for process in self.processes]

    def close(self) -> None:
        for process in self.processes:
            end(process)
        self._router.close()


@pytest.fixture(params=[1, 2], ids=["tp1", "tp2"])
def coordinator(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Coordinator]:
    with open_context("secret") as context:
        coordinator = Coordinator(context, tmp_path, request.param)
        with contextlib.closing(coordinator):
            yield coordinator


def reserve(name: str, prompt: tuple[int, ...], max_tokens: int) -> Reserve:
    return Reserve(name, 1, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0))


@pytest.mark.cluster
def test_prompts_computed_here(coordinator: Coordinator) -> None:
    coordinator.start(num_blocks=32)
    coordinator.form()
    prompts = {f"r{i}": tuple((i + 3 * j) % 256 for j in range(9 + 5 * i)) for i in range(4)}
    for name, prompt in prompts.items():
        coordinator.tell(reserve(name, prompt, 20))
    for _ in prompts:
        ticket = coordinator.wait(Ticket)[1]
        coordinator.tell(ComputeHere(ticket.request_id, ticket.attempt))
    coordinator.tell(reserve("huge", tuple(range(256)) * 40, 1))
    assert coordinator.wait(RequestFailed)[1].code == "kv_capacity_exceeded"
    outputs: dict[str, list[int]] = {name: [] for name in prompts}
    num_finished = 0
    while num_finished < len(prompts):
        for token in coordinator.wait(Tokens)[1].tokens:
            assert token.index == len(outputs[token.request_id])
            outputs[token.request_id].append(token.token_id)
            num_finished += token.finish_reason is FinishReason.LENGTH
    config = load_config(MODEL)
    for name, prompt in prompts.items():
        assert outputs[name] == expected_tokens(config, prompt, 20)
    released = {coordinator.wait(Released)[1].request_id for _ in range(5)}
    assert released == {*prompts, "huge"}
    assert coordinator.wait(CacheUpdate)[1].stored
    while True:  # the audit comes with a heartbeat
        name, heartbeat = coordinator.wait(Heartbeat)
        if name == coordinator.names[0] and heartbeat.counters.get("output_tokens_total") == 80:
            [blocks] = heartbeat.blocks
            assert blocks.free + blocks.cached == blocks.total
            break
    for name in coordinator.names:
        coordinator.send(name, Shutdown("the test is over"))
    assert coordinator.end() == [0] * len(coordinator.processes)


@pytest.mark.cluster
def test_sigterm_in_the_middle_of_a_request_ends_cleanly(coordinator: Coordinator) -> None:
    coordinator.start(num_blocks=4096)
    coordinator.form()
    coordinator.tell(reserve("a", (1, 2, 3), 10_000))
    coordinator.tell(ComputeHere("a", 1))
    coordinator.wait(Tokens)
    coordinator.tell(reserve("b", (1, 2, 3), 10_000))
    coordinator.wait(Ticket)
    coordinator.wait(Ticket)
    coordinator.tell(Abort("b", 1))  # its hand-off is open on every rank
    assert coordinator.wait(Released)[1].request_id == "b"
    coordinator.processes[0].send_signal(signal.SIGTERM)
    codes = coordinator.end()
    assert codes[0] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cp_size": 2}, "no context parallelism"),
        ({"token_budget": 3, "max_num_sequences": 4}, "below max_num_sequences"),
        ({"max_num_sequences": 0}, "at least 1"),
        ({"watermark": 1.0}, "watermark"),
    ],
)
def test_configurations_that_cannot_run(changes: dict[str, Any], said: str) -> None:
    fields = {"model": MODEL, "pool_id": "d", "control_address": "", "token": ""}
    with pytest.raises(ConfigError, match=said):
        DecodeConfig(**{**fields, "listen": "ipc:///x", **changes})


def test_a_mistake_in_the_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model": "arithmetic", "pool": 1}')
    rank = shared_forks().start("decode", "--config", str(path))
    _, errors = outputs(rank, BUDGET_S)
    end(rank)
    assert rank.poll() == 2
    assert errors.startswith("error: ") and errors.count("\n") == 1
