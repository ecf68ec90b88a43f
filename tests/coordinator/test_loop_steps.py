"""No step of the coordinator's loop is long, whatever a caller sends within the limits.

The whole coordinator runs in a thread, with its text workers and a cluster of fake ranks. Each
callback of its loop is measured in processor time of that thread, so that neither another process
nor the fake's own work counts. ``MAX_STEP_S`` is for a slow and busy machine; the largest step is
shown with ``pytest -s``.
"""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.control import Owner
from coordinator.server import Coordinator
from modeling.checkpoint.config import load_config

DEADLINE_S = 30.0
MAX_STEP_S = 0.15
MAX_MODEL_LEN = 1 << 20
MODEL = f"arithmetic:max_len={MAX_MODEL_LEN}"
NUM_IDS = 500_000


class Steps:
    """Callbacks of one thread's loop."""

    def __init__(self) -> None:
        self.thread = 0
        self.longest: tuple[float, str] = (0.0, "")

    def wrap(self, run: Any) -> Any:
        def measured(handle: asyncio.Handle) -> None:
            if threading.get_ident() != self.thread:
                run(handle)
                return
            began = time.thread_time()
            run(handle)
            step_s = time.thread_time() - began
            if step_s > self.longest[0]:
                self.longest = (step_s, repr(handle))

        return measured


class Running(threading.Thread):
    """A coordinator in a thread of its own."""

    def __init__(self, config: CoordinatorConfig, steps: Steps, fakes: Any) -> None:
        super().__init__(daemon=True)
        self.ready = threading.Event()
        self._config, self._steps, self._fakes = config, steps, fakes

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._steps.thread = threading.get_ident()
        self.loop = asyncio.get_running_loop()
        self.coordinator = Coordinator(
            self._config, self._on_control, lambda _: self.ready.set(), Owner()
        )
        await self.coordinator.run()

    def _on_control(self, control: str, _url: str) -> None:
        self.fake = self._fakes(control)
        self.fake.config = load_config(MODEL)
        self.fake.start()


@pytest.fixture
def measured(
    tmp_path: Path, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[httpx.Client, Steps]]:
    steps = Steps()
    monkeypatch.setattr(asyncio.Handle, "_run", steps.wrap(asyncio.Handle._run))
    # Ranks that can hold long prompts, too.
    monkeypatch.setitem(helpers.hello.__globals__, "MAX_MODEL_LEN", MAX_MODEL_LEN)
    pools = [("prefill0", "prefill", 2, 1)]
    pools += [("decode0", "decode", 1, 2), ("decode1", "decode", 1, 1)]
    config = CoordinatorConfig(
        helpers.FakeCluster.__init__.__globals__["TOKEN"],
        MODEL,
        tuple(ExpectedPool(*pool) for pool in pools),
        control_listen=f"ipc://{tmp_path}/c",
        port=0,
        block_size=16,
        max_model_len=MAX_MODEL_LEN,
        log_level="WARNING",
    )
    running = Running(config, steps, helpers.FakeCluster)
    running.start()
    assert running.ready.wait(DEADLINE_S)
    with httpx.Client(base_url=running.coordinator.url, timeout=DEADLINE_S) as client:
        yield client, steps
    running.loop.call_soon_threadsafe(running.coordinator.stop)
    running.join(DEADLINE_S)
    running.fake.stop()
    assert not running.is_alive()


def bodies() -> dict[str, tuple[str, str]]:
    """(Path, body), the worst of its kind within the limits."""
    many = 1_900_000
    ids = ",".join(map(str, (n % 256 for n in range(NUM_IDS))))
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}] * 8}] * 2000
    return {
        "keys": ("/v1/completions", json.dumps({f"k{n}": 1 for n in range(500_000)})),
        "a duplicate key": ("/v1/completions", "{" + '"a":1,' * 500_000 + '"a":1}'),
        "arrays": ("/v1/completions", '{"prompt":[' + "[]," * (many // 2) + "[]]}"),
        "too many arrays": ("/v1/completions", '{"prompt":[' + "[]," * 8_000_000 + "[]]}"),
        "floats": ("/v1/completions", '{"prompt":[' + "1.5," * many + "1.5]}"),
        "wrong ids": ("/v1/completions", '{"stop_token_ids":[' + '"",' * many + '""]}'),
        "messages": ("/v1/chat/completions", json.dumps({"messages": messages, "max_tokens": 1})),
        "text": ("/tokenize", json.dumps({"prompt": "a text, " * 120_000})),
        "detokenize": ("/detokenize", f'{{"tokens":[{ids}]}}'),
        "a document": ("/v1/documents", json.dumps({"source": {"text": "word " * 1_000_000}})),
        "ids of a document": ("/v1/documents", f'{{"source":{{"token_ids":[{ids}]}}}}'),
        "ids": (
            "/v1/completions",
            f'{{"prompt":[{ids}],"max_tokens":2,"return_token_ids":true,"n":2}}',
        ),
        "echo": (
            "/v1/completions",
            f'{{"prompt":[{ids}],"max_tokens":2,"echo":true,"stream":true}}',
        ),
        "many prompts": (
            "/v1/completions",
            json.dumps({"prompt": ["a prompt " * 400] * 128, "n": 4, "max_tokens": 2}),
        ),
    }


def test_no_input_makes_a_step_long(measured: tuple[httpx.Client, Steps]) -> None:
    client, steps = measured
    long: list[tuple[str, float, str]] = []
    for kind, (path, body) in bodies().items():
        steps.longest = (0.0, "")
        with contextlib.suppress(httpx.ReadTimeout):
            reply = client.post(
                path, content=body.encode(), headers={"content-type": "application/json"}
            )
            assert reply.status_code in (200, 202, 400), (kind, reply.text[:500])
        step_s, handle = steps.longest
        print(f"{kind}: {1000 * step_s:.1f} ms, {reply.status_code}")
        if step_s > MAX_STEP_S:
            long.append((kind, step_s, handle))
    assert not long
