"""Text workers: what a caller's text does to one of them is that caller's failure alone."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.tokenizer_file import write_tokenizer
from coordinator.auth import Tenant
from coordinator.config import CoordinatorConfig, ExpectedPool, Limits
from coordinator.text.fair_queue import FairQueue
from coordinator.text.frames import memory_file
from coordinator.text.tasks import Call, Prepared, ReadChat, ReadTokenize, Refused, Settings
from coordinator.text.worker import TextWorker
from coordinator.text.workers import TextWorkers
from coordinator.validation.bodies import Body, Budget, receive_body
from modeling.checkpoint.config import load_config
from protocol.errors import RequestError

TENANT = Tenant("t", "salt")
DEADLINE_S = 60.0
CHAT = ReadChat(4096, TENANT)
HELLO = [{"role": "user", "content": "hello"}]
# Only a conversation that says "hostile" is; the template serves the others as ever.
TEMPLATE = (
    "{{% for m in messages %}}{{% if m.content == 'hostile' %}}{hostile}{{% endif %}}"
    "{{{{ m.content }}}}{{% endfor %}}"
)
HOSTILE = {
    "loops without output": (
        "{% set s = m.content * 1000 %}{% for a in s %}{% for b in s %}{% for c in s %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "doubling strings": (
        "{% set n = namespace(s=m.content) %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
        "{% endfor %}{{ n.s }}"
    ),
    "a huge center": "{{ m.content.center(9999999999) }}",
}


def settings(folder: Path, hostile: str = "", **fields: Any) -> Settings:
    """Of workers whose tokenizer and template lie in ``folder``."""
    if hostile or not (folder / "tokenizer.json").exists():
        write_tokenizer(folder, 512)
        path = folder / "tokenizer_config.json"
        template = TEMPLATE.format(hostile=hostile)
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    config = CoordinatorConfig(
        "token",
        str(folder),
        (ExpectedPool("decode0", "decode", 1, 1),),
        **{"text_timeout_s": 1.0, "text_memory_bytes": 1 << 30, **fields},
    )
    return Settings(config, load_config("arithmetic"), os.getpid())


@asynccontextmanager
async def workers(given: Settings) -> AsyncIterator[TextWorkers]:
    made = TextWorkers(given, 1)
    made.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield made
    finally:
        await made.close()


def body(**fields: Any) -> Body:
    return Body(json.dumps(fields).encode())


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await work()

    asyncio.run(whole())


async def refusal(asked: Awaitable[object]) -> RequestError:
    with pytest.raises(RequestError) as refused:
        await asked
    return refused.value


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_fails_its_request_and_no_other(tmp_path: Path, kind: str) -> None:
    async def work() -> None:
        async with workers(settings(tmp_path, HOSTILE[kind])) as some:
            hostile = some.run("a", CHAT, body(messages=[{"role": "user", "content": "hostile"}]))
            bad = asyncio.create_task(refusal(hostile))
            others = [some.run(f"{n}", CHAT, body(messages=HELLO)) for n in range(5)]
            for answer in await asyncio.gather(*others):
                assert isinstance(answer, Prepared)
            error = await bad
            assert (error.status, error.param) in ((400, "messages"), (400, None))
            assert error.code in ("template_error", "text_too_large"), error
            assert "coordinator.text_" in error.message or "cannot render" in error.message

    run(work)


def worker_pids() -> set[int]:
    """Children of this process."""
    children: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        children |= {int(pid) for pid in (task / "children").read_text().split()}
    return children


def test_a_task_is_tried_again_when_its_worker_dies_and_then_refused(tmp_path: Path) -> None:
    async def work() -> None:
        before = worker_pids()
        given = settings(tmp_path, HOSTILE["loops without output"], text_timeout_s=30.0)
        async with workers(given) as some:
            await some.run("a", CHAT, body(messages=HELLO))
            (idle,) = worker_pids() - before
            os.kill(idle, signal.SIGKILL)
            assert isinstance(await some.run("a", CHAT, body(messages=HELLO)), Prepared)
            assert some.counters["lost_crashed"] == 1
            hostile = some.run("a", CHAT, body(messages=[{"role": "user", "content": "hostile"}]))
            asked = asyncio.create_task(refusal(hostile))
            for num_lost in (2, 3):
                (pid,) = await until(lambda: busy(worker_pids() - before))
                assert not asked.done()
                os.kill(pid, signal.SIGKILL)
                await until(lambda num_lost=num_lost: some.counters["lost_crashed"] == num_lost)  # type: ignore[misc]
            error = await asked
            assert (error.status, error.code) == (500, "text_worker_lost")
            assert isinstance(await some.run("a", CHAT, body(messages=HELLO)), Prepared)

    run(work)


def busy(pids: set[int]) -> set[int]:
    """Those that compute."""
    states = {pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids}
    return {pid for pid, fields in states.items() if fields[0] == "R" and int(fields[11]) > 80}


async def until(look: Callable[[], Any]) -> Any:
    while not (found := look()):  # noqa: ASYNC110 - another process's doing
        await asyncio.sleep(0.005)
    return found


def test_large_bodies_do_not_keep_small_ones_waiting(tmp_path: Path) -> None:
    async def work() -> None:
        async with workers(settings(tmp_path, text_timeout_s=30.0)) as some:
            await some.run("b", CHAT, body(messages=HELLO))
            text = json.dumps({"prompt": "word " * 60_000}).encode()
            file = memory_file(text)
            large = Body(file=file, length=len(text))
            asked = [
                asyncio.create_task(some.run("a", ReadTokenize(1 << 20), large)) for _ in range(3)
            ]
            assert isinstance(await some.run("b", CHAT, body(messages=HELLO)), Prepared)
            assert not any(task.done() for task in asked)
            for task in asked:
                task.cancel()
            await asyncio.wait(asked)
            os.close(file)

    run(work)


class PanicException(BaseException):
    """As pyo3 names what Rust panics become: it is no Exception."""


def test_a_panic_and_a_lack_of_memory_are_the_requests(tmp_path: Path) -> None:
    given = settings(tmp_path)
    worker = TextWorker(given, lambda _stage, _size: None)

    class Bad:
        def __init__(self, error: BaseException) -> None:
            self._error = error

        def encode(self, _text: str, **_options: Any) -> list[int]:
            raise self._error

    call = Call(ReadTokenize(4096), memoryview(b'{"prompt": "x"}'))
    for error, code in (
        (PanicException("index out of bounds"), "tokenizer_error"),
        (MemoryError(), "text_too_large"),
    ):
        worker._tools = type("Tools", (), {"tokenizer": Bad(error)})()
        answer = worker.do(call, None)
        assert isinstance(answer, Refused)
        assert (answer.status, answer.code, answer.is_worn) == (400, code, True)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60))
def test_tenants_take_turns(steps: list[tuple[str, bool]]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue(20, lambda: 8)
    mine: dict[str, list[int]] = {name: [] for name in "abc"}
    turns: list[str] = []
    for number, (tenant, takes) in enumerate(steps):
        if takes:
            item = queue.take()
            assert (item is None) == (not any(mine.values()))
            if item is not None:
                assert mine[item[0]].pop(0) == item[1]  # a tenant's own are in order
                turns.append(item[0])
        else:
            has_place = len(queue) < 20 and len(mine[tenant]) < 8
            assert queue.put(tenant, (tenant, number)) is has_place
            if has_place:
                mine[tenant].append(number)
    waiting = {name for name, items in mine.items() if items}
    following = [queue.take() for _ in waiting]
    assert {item[0] for item in following if item is not None} == waiting  # each has a turn


def test_bytes_of_bodies_are_bounded_for_all_and_for_each() -> None:
    limits = Limits(max_body_bytes=40, max_total_body_bytes=100, max_tenant_body_share=0.6)
    tenants = ["a", "b"]
    budget = Budget(limits, lambda: len(tenants))
    budget.take("a", 60)
    with pytest.raises(RequestError) as refused:
        budget.take("a", 1)
    assert (refused.value.status, refused.value.code) == (503, "overloaded")
    assert refused.value.retry_after_s >= 1
    budget.take("b", 40)
    with pytest.raises(RequestError):
        budget.take("c", 1)
    budget.give_back("a", 60, 100.0)
    budget.take("c", 60)
    with pytest.raises(RequestError) as refused:
        budget.take("c", 1)
    assert refused.value.retry_after_s >= 10  # bodies are held for long
    budget.give_back("b", 40, 1.0)
    del tenants[1:]
    budget.take("c", 40)  # who is alone may have all


@pytest.mark.parametrize("declared", [0, 3 << 20])
def test_a_body_is_counted_while_it_is_here(declared: int) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(48):
            yield bytes(1 << 16)

    async def work() -> None:
        limits = Limits(max_body_bytes=4 << 20, max_total_body_bytes=4 << 20)
        budget = Budget(limits, lambda: 1)
        async with receive_body(pieces(), declared, budget, "a") as body:
            assert (body.size, budget.num_bytes) == (3 << 20, 3 << 20)
            with body.lent() as file:
                assert file is not None
                assert os.pread(file, 10, (3 << 20) - 5) == bytes(5)
            with pytest.raises(RequestError, match="memory"):
                async with receive_body(pieces(), declared, budget, "b"):
                    raise AssertionError("there is no room for it")
            assert budget.num_bytes == 3 << 20
        assert budget.num_bytes == 0

    run(work)
