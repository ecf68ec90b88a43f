"""A coordinator as its own process, and a small exact cluster of fake ranks for it.

A fake pool computes nothing: token ``i`` of the answer to a prompt is ``reply_token(prompt, i)``,
or what a test has scripted for that prompt. It keeps the hashes of the prompts that it finished, so
prefix hits are real, and every message that it got, so a test can wait for one.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvcache.prefix import block_salt, hash_blocks
from launcher.supervise.forks import ForkedProcess
from modeling.checkpoint.config import ModelConfig, load_config
from protocol.codec import Codec
from protocol.kv import KVLayout, RankEndpoint
from protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    Ask,
    BlockCounts,
    CacheUpdate,
    Committed,
    ComputeHere,
    Connected,
    FirstToken,
    GangAddress,
    GangReady,
    Heartbeat,
    Hello,
    NewToken,
    Prefill,
    Progress,
    Refused,
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
from protocol.request import FinishReason, PrefillPath, TokenLogprobs, TransferStats
from protocol.sockets import Dealer, Poller, Waker, open_context
from tests.forks import shared_forks

DEADLINE_S = 20.0
BLOCK_SIZE = 16
MODEL = "arithmetic"
TOKEN = "secret-token"
MAX_MODEL_LEN = 4096
TO_RANK: Codec[ToRank] = Codec(ToRank)
TO_COORDINATOR: Codec[ToCoordinator] = Codec(ToCoordinator)
POOLS = (("prefill0", "prefill", 2, 1), ("decode0", "decode", 1, 2), ("decode1", "decode", 1, 1))


def reply_token(prompt: Sequence[int], index: int) -> int:
    """A printable ASCII character that depends on the whole prompt and the index."""
    return 32 + (sum((i + 1) * t for i, t in enumerate(prompt)) + 7 * index) % 95


def hello(pool: tuple[str, str, int, int], rank: int, config: ModelConfig, **changes: Any) -> Hello:
    """What a rank of ``pool`` says first; ``changes`` spoil it."""
    pool_id, role, cp_size, tp_size = pool
    cp_rank, tp_rank = divmod(rank, tp_size)
    layout = KVLayout(
        config.num_layers, changes.pop("num_blocks", MAX_MODEL_LEN // BLOCK_SIZE),
        config.num_kv_heads, tp_rank, tp_size,
        changes.pop("block_size", BLOCK_SIZE), config.head_dim, "float32",
    )  # fmt: skip
    incarnation = changes.pop("incarnation", f"i{pool_id}{rank}")
    endpoint = RankEndpoint(rank, cp_rank, tp_rank, incarnation, "inproc://nowhere", layout)
    fields: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "role": role,
        "pool_id": pool_id,
        "cp_size": cp_size,
        "tp_size": tp_size,
        "endpoint": endpoint,
        "model_fingerprint": config.fingerprint,
        "max_model_len": MAX_MODEL_LEN,
        "gang": GangAddress("inproc://plan", "tcp://127.0.0.1:1") if rank == 0 else None,
        "tokens_per_s": 1000.0,
    }
    return Hello(**{**fields, **changes})


@dataclass
class Script:
    """How the fake answers one prompt."""

    tokens: tuple[int, ...] | None = None  # then STOP; None is ``reply_token`` for ever
    hold_after: int | None = None  # tokens that come at once; the rest when released
    fail_after: int | None = None  # tokens that come before RequestFailed
    fail_code: str = "internal"
    scramble: bool = False  # every token twice, and the steps in reverse
    ticket: bool = True


@dataclass
class Job:
    """A request on the fake cluster."""

    reserve: Reserve
    decode: str
    prefill: str = ""
    script: Script = field(default_factory=Script)
    is_begun: bool = False  # somebody was told to compute it
    num_sent: int = 0  # by all attempts
    holders: set[str] = field(default_factory=set)

    @property
    def prompt(self) -> tuple[int, ...]:
        """What the caller gave; tokens of earlier attempts come after it."""
        tokens = self.reserve.prompt_token_ids
        return tokens[: len(tokens) - self.reserve.num_output_tokens]


class FakeCluster(threading.Thread):
    """All ranks of all pools in one thread. ``received`` is (pool_id, rank, message) in order."""

    def __init__(self, control: str, pools: Sequence[tuple[str, str, int, int]] = POOLS) -> None:
        super().__init__(daemon=True)
        self.config = load_config(MODEL)
        self.block_size = BLOCK_SIZE
        self.received: list[tuple[str, int, ToRank]] = []
        self.scripts: dict[tuple[int, ...], Script] = {}
        self.silent: set[str] = set()  # pools that are stopped: they neither hear nor speak
        self.step_ages: dict[tuple[str, int], float] = {}  # of a step that does not end
        self.jobs: dict[str, Job] = {}
        self.cache: dict[str, set[bytes]] = {pool[0]: set() for pool in pools}
        self._pools = {pool[0]: pool for pool in pools}
        self._changed = threading.Condition()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._contexts = open_context(TOKEN)
        self._context = self._contexts.__enter__()
        self._waker = Waker(self._context, "fake")
        self._handle = self._waker.handle()
        self._poller = Poller(self._waker)
        self._ranks: dict[tuple[str, int], Dealer] = {}
        self._control = control
        self._ended = False

    # -- for tests, from their own thread ----------------------------------------------------------

    def wait_for(self, condition: Callable[[], Any], what: str = "") -> Any:
        """Wait until something received makes ``condition`` true; its value."""
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S), f"never happened: {what}"
            return condition()

    def got(self, kind: type, pool_id: str | None = None) -> list[Any]:
        """Messages of a kind, of one pool or of all."""
        return [m for p, _, m in self.received if isinstance(m, kind) and pool_id in (None, p)]

    def do(self, command: Callable[[], None]) -> None:
        """Run ``command`` in the cluster's thread."""
        self._commands.put(command)
        self._handle.wake()

    def release(self, prompt: Sequence[int]) -> None:
        """Let a held answer go on."""
        self.scripts[tuple(prompt)].hold_after = None

        def go_on() -> None:
            for job in list(self.jobs.values()):
                if job.prompt == tuple(prompt) and job.is_begun:
                    self._generate(job)

        self.do(go_on)

    def kill(self, pool_id: str, rank: int) -> None:
        """Close a rank's connection, as the end of its process would."""

        def close() -> None:
            dealer = self._ranks.pop((pool_id, rank))
            self._poller.remove(dealer)
            dealer.close()

        self.do(close)

    def beat_unknown(self, pool_id: str) -> None:
        """Have the heartbeats of a rank sent that has never said hello."""

        def connect() -> None:
            dealer = Dealer(self._context, self._control, f"{pool_id}/unknown")
            self._ranks[pool_id, 99] = dealer
            self._poller.add(dealer)

        self.do(connect)

    def stop(self) -> None:
        self._ended = True
        self._handle.wake()
        self.join(DEADLINE_S)
        self._handle.close()
        self._contexts.__exit__(None, None, None)

    # -- the thread --------------------------------------------------------------------------------

    def run(self) -> None:
        for pool in self._pools.values():
            for rank in range(pool[2] * pool[3]):
                dealer = Dealer(self._context, self._control, f"{pool[0]}/{rank}/x")
                self._ranks[pool[0], rank] = dealer
                self._poller.add(dealer)
                self.say(pool[0], hello(pool, rank, self.config, block_size=self.block_size), rank)
        next_beat = 0.0
        while not self._ended:
            self._poller.wait(0.2)
            self._waker.drain()
            while not self._commands.empty():
                self._commands.get()()
            for (pool_id, rank), dealer in self._ranks.items():
                while pool_id not in self.silent and (frame := dealer.receive()) is not None:
                    self._handle_message(pool_id, rank, TO_RANK.decode(frame))
            if time.monotonic() > next_beat:
                next_beat = time.monotonic() + 0.5
                for pool_id, rank in self._ranks:
                    counts = (
                        (BlockCounts(total=64, free=60, owned=0, in_flight=0, cached=4),)
                        if rank == 0
                        else ()
                    )
                    age_s = self.step_ages.get((pool_id, rank), 0.0)
                    self.say(pool_id, Heartbeat(1, age_s, blocks=counts), rank)

    def say(self, pool_id: str, message: ToCoordinator, rank: int = 0) -> None:
        if pool_id not in self.silent:
            self._ranks[pool_id, rank].send(TO_COORDINATOR.encode(message))

    def _handle_message(self, pool_id: str, rank: int, message: ToRank) -> None:
        match message:
            case Welcome():
                self.say(pool_id, GangReady(500.0), rank)
            case Topology():
                self.say(pool_id, Connected(message.version), rank)
            case Reserve():
                self._on_reserve(pool_id, message)
            case ComputeHere():
                self._generate(self.jobs[message.request_id])
            case Prefill():
                self._on_prefill(pool_id, message)
            case Abort():
                self._let_go(pool_id, message.request_id, message.attempt)
            case Ask() if message.request_id not in self.jobs:
                self.say(pool_id, Released(message.request_id, message.attempt))
            case Shutdown() | Refused():
                pass
        with self._changed:
            self.received.append((pool_id, rank, message))
            self._changed.notify_all()

    def _hashes(self, message: Reserve | Prefill) -> list[bytes]:
        salt = block_salt(self.config.fingerprint, message.cache_salt)
        return hash_blocks(message.prompt_token_ids, self.block_size, salt)

    def _num_cached(self, pool_id: str, message: Reserve | Prefill) -> int:
        num_blocks = 0
        for block_hash in self._hashes(message):
            if block_hash not in self.cache[pool_id]:
                break
            num_blocks += 1
        most = (len(message.prompt_token_ids) - 1) // self.block_size
        return min(num_blocks, most) * self.block_size

    def _on_reserve(self, pool_id: str, message: Reserve) -> None:
        job = Job(message, pool_id, num_sent=message.num_output_tokens, holders={pool_id})
        job.script = script = self.scripts.get(job.prompt, job.script)
        self.jobs[message.request_id] = job
        if script.fail_after == 0 and not script.ticket:
            self._fail(job, pool_id)
        elif script.ticket:
            num_cached = self._num_cached(pool_id, message)
            self.say(pool_id, Ticket(message.request_id, message.attempt, num_cached))

    def _on_prefill(self, pool_id: str, message: Prefill) -> None:
        job = self.jobs[message.request_id]
        job.prefill = pool_id
        job.holders.add(pool_id)
        total = len(message.prompt_token_ids)
        self.say(pool_id, Progress(message.request_id, message.attempt, total // 2, total))
        self._generate(job)

    def _token(self, job: Job, index: int) -> NewToken:
        sampling, prompt = job.reserve.sampling, job.prompt
        scripted = job.script.tokens
        token_id = reply_token(prompt, index) if scripted is None else scripted[index]
        is_last_scripted = scripted is not None and index + 1 == len(scripted)
        finish = None
        if index + 1 == sampling.max_tokens:
            finish = FinishReason.LENGTH
        elif token_id in sampling.stop_token_ids or is_last_scripted:
            finish = FinishReason.STOP
        count = sampling.num_logprobs
        others = tuple(range(65, 65 + count)) if count else ()
        logprobs = None if count is None else TokenLogprobs(-0.5, others, (-0.5,) * len(others))
        reserve = job.reserve
        return NewToken(reserve.request_id, reserve.attempt, index, token_id, finish, logprobs)

    def _generate(self, job: Job) -> None:
        job.is_begun = True
        script, tokens = job.script, []
        while job.holders:
            if script.fail_after == job.num_sent:
                break
            if script.hold_after is not None and job.num_sent >= script.hold_after:
                break
            token = self._token(job, job.num_sent)
            job.num_sent += 1
            tokens.append(token)
            if token.finish_reason is not None:
                break
        self._tell(job, tokens)
        if script.fail_after == job.num_sent:
            self._fail(job, job.decode)

    def _tell(self, job: Job, tokens: list[NewToken]) -> None:
        decode = list(tokens)
        if job.prefill and tokens and tokens[0].index == job.reserve.num_output_tokens:
            self._tell_first(job, decode.pop(0))
        steps: list[tuple[NewToken, ...]] = [(token,) for token in decode]
        if job.script.scramble:
            steps = [(t, t) for t in reversed(decode)]
        for number, step in enumerate(steps):
            self.say(job.decode, Tokens(number, step))
        if tokens and tokens[-1].finish_reason is not None:
            self._finish(job)

    def _tell_first(self, job: Job, token: NewToken) -> None:
        num_prompt = len(job.reserve.prompt_token_ids)
        cached = self._num_cached(job.prefill, job.reserve)
        moved = num_prompt - self._num_cached(job.decode, job.reserve)
        path = PrefillPath(job.prefill, 2, 1, cached, num_prompt - cached, moved)
        request_id, attempt = token.request_id, token.attempt
        first = FirstToken(
            *(request_id, attempt, token.token_id, path),
            *(token.logprobs, token.finish_reason, token.index),
        )
        stats = TransferStats("fake", num_bytes=1, num_layers=4, num_layers_overlapped=3)
        self.say(job.prefill, first)
        self.say(job.decode, Committed(request_id, attempt, stats))

    def _finish(self, job: Job) -> None:
        for pool_id in list(job.holders):
            hashes = tuple(self._hashes(job.reserve))
            self.cache[pool_id].update(hashes)
            self.say(pool_id, CacheUpdate(stored=hashes))
            self._let_go(pool_id, job.reserve.request_id, job.reserve.attempt)

    def _fail(self, job: Job, pool_id: str) -> None:
        reserve, code = job.reserve, job.script.fail_code
        self.say(pool_id, RequestFailed(reserve.request_id, reserve.attempt, code, "scripted"))

    def _let_go(self, pool_id: str, request_id: str, attempt: int) -> None:
        self.say(pool_id, Released(request_id, attempt))
        job = self.jobs.get(request_id)
        if job is not None and job.reserve.attempt == attempt:
            job.holders.discard(pool_id)
            if not job.holders:
                del self.jobs[request_id]


class CoordinatorProcess:
    """``python -P -m coordinator``: its lines, and how it ended. ``prepare`` runs in it first."""

    def __init__(
        self, folder: Path, prepare: Callable[[], None] | None = None, **fields: Any
    ) -> None:
        self.config = {
            "token": TOKEN,
            "model": MODEL,
            "max_model_len": MAX_MODEL_LEN,
            "block_size": BLOCK_SIZE,
            "port": 0,
            "control_listen": f"ipc://{folder}/c",
            "pools": [
                {"pool_id": p, "role": role, "cp_size": cp, "tp_size": tp}
                for p, role, cp, tp in POOLS
            ],
            "ready_timeout_s": DEADLINE_S,
            "shutdown_grace_s": 0.0,
            "log_level": "WARNING",
            **fields,
        }
        file = folder / "coordinator.json"
        file.write_text(json.dumps(self.config))
        argv = ("coordinator", "--config", str(file))
        self.process: ForkedProcess | subprocess.Popen[bytes]
        if prepare is None:
            self.process = shared_forks().start(*argv, environment=os.environ)
        else:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", *argv],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                preexec_fn=prepare,
            )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.decode())
        self._lines.put("")

    def line(self) -> dict[str, str]:
        """The next line of its standard output."""
        line = self._lines.get(timeout=DEADLINE_S)
        assert line, f"ended early: {self.errors()}"
        said: dict[str, str] = json.loads(line)
        return said

    def errors(self) -> str:
        """Its standard error, once it has ended."""
        assert self.process.stderr is not None
        self.process.wait(DEADLINE_S)
        return self.process.stderr.read().decode()

    def end(self) -> int:
        """SIGTERM if it still runs; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(DEADLINE_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._reader.join(DEADLINE_S)
            for stream in (self.process.stdout, self.process.stderr):
                assert stream is not None
                stream.close()
        return code


@dataclass
class Running:
    """A coordinator that is ready, its fake cluster and a client."""

    coordinator: CoordinatorProcess
    fake: FakeCluster
    url: str
    client: httpx.Client

    def complete(self, prompt: Any, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": prompt, **fields})

    def chat(self, content: Any, **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return self.client.post("/v1/chat/completions", json={"messages": messages, **fields})

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.client.get("/v1/cluster").json()
        return state


@contextlib.contextmanager
def run_coordinator(
    folder: Path, pools: Sequence[tuple[str, str, int, int]] = POOLS, **fields: Any
) -> Iterator[Running]:
    """A coordinator with a fake cluster of ``pools``, ready to serve."""
    if pools is not POOLS:
        fields["pools"] = [
            {"pool_id": p, "role": role, "cp_size": cp, "tp_size": tp} for p, role, cp, tp in pools
        ]
    coordinator = CoordinatorProcess(folder, **fields)
    fake = None
    try:
        said = coordinator.line()
        fake = FakeCluster(said["control"], pools)
        fake.start()
        assert coordinator.line()["ready"] == said["http"]
        with httpx.Client(base_url=said["http"], timeout=DEADLINE_S) as client:
            yield Running(coordinator, fake, said["http"], client)
    finally:
        code = coordinator.end()
        if fake is not None:
            fake.stop()
    assert code == 0


@pytest.fixture(scope="session")
def start_coordinator() -> Any:
    """The function that runs a coordinator with a fake cluster until the block ends."""
    return run_coordinator


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One coordinator for all tests that leave it as they found it."""
    with run_coordinator(
        tmp_path_factory.mktemp("c"),
        header_wait_s=0.5,
        keep_alive_s=0.2,
        send_timeout_s=1.0,
        limits={"header_timeout_s": 1.0, "body_idle_timeout_s": 1.0, "max_body_bytes": 1 << 20},
    ) as running:
        yield running


@pytest.fixture
def cluster(shared_cluster: Running) -> Iterator[Running]:
    """The shared coordinator; afterwards nothing of the test may be left in any pool."""
    yield shared_cluster
    for script in shared_cluster.fake.scripts.values():
        script.hold_after = None
    deadline = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while shared_cluster.fake.jobs or shared_cluster.state()["num_active_requests"]:
        assert time.monotonic() < deadline, f"left over: {shared_cluster.fake.jobs}"
        pause.wait(0.02)
    assert shared_cluster.coordinator.process.poll() is None
    shared_cluster.fake.scripts.clear()


@pytest.fixture(scope="session")
def helpers() -> Any:
    """The fake's vocabulary for tests: ``helpers.Script`` and so on."""
    return type(
        "Helpers",
        (),
        {
            "Script": Script,
            "FakeCluster": FakeCluster,
            "CoordinatorProcess": CoordinatorProcess,
            "hello": staticmethod(hello),
            "reply_token": staticmethod(reply_token),
            "reply": staticmethod(
                lambda prompt, count: [reply_token(prompt, i) for i in range(count)]
            ),
        },
    )
