"""Time-outs that do not count the stalls of their own loop."""

import asyncio
import gc
import socket
import threading
import time
import weakref

import pytest
import uvloop

from coordinator.loop.timeouts import SLICE_S, patient


def run(body: object) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(body)  # type: ignore[arg-type]  # a coroutine


def test_it_ends_what_takes_too_long() -> None:
    async def body() -> None:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            async with patient(SLICE_S * 1.5):
                await asyncio.Event().wait()
        assert SLICE_S * 1.4 < time.monotonic() - started < SLICE_S * 6
        async with patient(0.01) as quick:
            pass
        assert quick.spent_s < 0.01
        with pytest.raises(TimeoutError):
            async with patient(-1.0):
                await asyncio.Event().wait()

    run(body())


def test_what_has_come_during_a_stall_is_in_time() -> None:
    async def body() -> None:
        ours, theirs = await asyncio.open_connection(*_serve())
        async with patient(SLICE_S * 0.8) as limit:
            theirs.write(b"asked\n")
            await asyncio.sleep(SLICE_S * 0.2)
            threading.Event().wait(SLICE_S * 3)  # the answer lies unread meanwhile
            assert await ours.readline() == b"answered\n"
            assert limit.spent_s < SLICE_S * 1.5
        theirs.close()

    run(body())


def test_what_is_over_leaves_nothing_to_the_garbage_collector() -> None:
    """Each holds its task, and all that the task holds."""

    async def body() -> None:
        gone = []
        for _ in range(3):
            limit = patient(30.0)
            async with limit:
                pass
            gone.append(weakref.ref(limit._timeout))
            del limit
        assert [ref() for ref in gone] == [None, None, None]

    gc.disable()
    try:
        run(body())
    finally:
        gc.enable()


def _serve() -> tuple[str, int]:
    """An answerer in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        with listener, connection:
            connection.recv(100)
            threading.Event().wait(SLICE_S * 0.5)
            connection.sendall(b"answered\n")
            connection.recv(100)

    threading.Thread(target=answer, daemon=True).start()
    host, port = listener.getsockname()
    return host, port
