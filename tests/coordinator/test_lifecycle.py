"""The coordinator's own life: coming up, being refused, losing a pool, going down."""

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.config import CoordinatorConfig, ExpectedPool, is_loopback
from protocol.errors import ConfigError
from protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    ComputeHere,
    Heartbeat,
    Introduce,
    Prefill,
    Refused,
    Reserve,
    Shutdown,
)
from protocol.process.ending import DRAIN

ONE_POOL = (("decode0", "decode", 1, 1),)
ONE_POOL_FIELD = [{"pool_id": "decode0", "role": "decode", "cp_size": 1, "tp_size": 1}]


def test_before_ready_it_lives_and_refuses_politely(helpers: Any, tmp_path: Path) -> None:
    coordinator = helpers.CoordinatorProcess(tmp_path)
    url = coordinator.line()["http"]
    assert httpx.get(f"{url}/health").status_code == 200
    reply = httpx.get(f"{url}/ready")
    assert reply.status_code == 503
    assert "prefill0 lacks 2 of 2 ranks" in reply.json()["reason"]
    reply = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "starting")
    assert reply.headers["retry-after"]
    assert coordinator.end() == 0


def test_a_start_that_takes_too_long_fails(helpers: Any, tmp_path: Path) -> None:
    coordinator = helpers.CoordinatorProcess(tmp_path, ready_timeout_s=0.3)
    coordinator.line()
    assert "decode0 lacks 2 of 2 ranks" in coordinator.line()["failed"]
    assert coordinator.process.wait(10) == 1
    coordinator.end()


def test_a_refused_worker_fails_the_start(helpers: Any, tmp_path: Path) -> None:
    coordinator = helpers.CoordinatorProcess(tmp_path, block_size=99)
    fake = helpers.FakeCluster(coordinator.line()["control"])
    fake.start()
    assert "block size" in coordinator.line()["failed"]
    assert coordinator.process.wait(10) == 1
    fake.wait_for(lambda: fake.got(Refused))
    fake.stop()
    coordinator.end()


def test_a_taken_port_is_one_line(helpers: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        coordinator = helpers.CoordinatorProcess(tmp_path, port=taken.getsockname()[1])
        errors = coordinator.errors()
    assert coordinator.end() == 2
    assert errors.startswith("error: --port")
    assert errors.count("\n") == 1


def _tokens_of(stream: bytes) -> list[int]:
    events = [line.removeprefix(b"data: ") for line in stream.split(b"\n\n")]
    chunks = [json.loads(event) for event in events if event.startswith(b"{")]
    return [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())]


def _read_tokens(pieces: Iterator[bytes], num_tokens: int) -> bytes:
    """What has come once ``num_tokens`` tokens have, and no more than that."""
    received = b""
    while len(_tokens_of(received.rpartition(b"\n\n")[0])) < num_tokens:
        received += next(pieces)
    return received


def _stream(client: httpx.Client, prompt: list[int], max_tokens: int) -> Any:
    body = {"prompt": prompt, "stream": True, "max_tokens": max_tokens, "return_token_ids": True}
    return client.stream("POST", "/v1/completions", json={**body, "ignore_eos": True})


def test_a_lost_prefill_pool(start_coordinator: Any, helpers: Any, tmp_path: Path) -> None:
    """Requests in prefill are computed elsewhere; those that are past it, and new ones, go on."""
    with start_coordinator(tmp_path, heartbeat_timeout_s=1.5) as running:
        fake, client = running.fake, running.client
        decoding, prefilling = [1] * 300, [2] * 300
        fake.scripts[tuple(decoding)] = helpers.Script(hold_after=2)
        fake.scripts[tuple(prefilling)] = helpers.Script(hold_after=0)
        with contextlib.ExitStack() as stack:
            replies = [
                stack.enter_context(_stream(client, prompt, 4)) for prompt in (decoding, prefilling)
            ]
            pieces = [reply.iter_bytes() for reply in replies]
            begun = _read_tokens(pieces[0], 2)
            fake.silent.add("prefill0")
            fake.wait_for(lambda: [m for m in fake.got(Reserve) if m.attempt == 2], "attempt 2")
            fake.wait_for(lambda: [m for m in fake.got(Abort) if m.attempt == 1], "its abort")
            fake.wait_for(lambda: [m for m in fake.got(ComputeHere) if m.attempt == 2])
            fake.release(prefilling)
            fake.release(decoding)
            received_of = [begun + b"".join(pieces[0]), b"".join(pieces[1])]
            for received, prompt in zip(received_of, (decoding, prefilling), strict=True):
                assert received.endswith(b"data: [DONE]\n\n")
                assert _tokens_of(received) == helpers.reply(prompt, 4)
        reply = running.complete([3] * 300, max_tokens=2)
        assert "local" in reply.headers["x-baton-path"]
        pools = {pool["pool_id"]: pool for pool in running.state()["pools"]}
        assert pools["prefill0"]["state"] == "lost"
        assert running.state()["num_active_requests"] == 0


def test_a_lost_decode_pool_costs_an_attempt(
    start_coordinator: Any, helpers: Any, tmp_path: Path
) -> None:
    """The stream goes on at the other one, and the caller cannot tell where."""
    with start_coordinator(tmp_path, heartbeat_timeout_s=1.5) as running:
        fake, client, prompt = running.fake, running.client, [1] * 300
        fake.scripts[tuple(prompt)] = helpers.Script(hold_after=3)
        with _stream(client, prompt, 8) as reply:
            [first] = fake.wait_for(lambda: fake.got(Reserve))
            home = next(p for p, _, m in fake.received if m is first)
            pieces = reply.iter_bytes()
            received = _read_tokens(pieces, 3)
            fake.silent.add(home)
            again = fake.wait_for(lambda: [m for m in fake.got(Reserve) if m.attempt == 2])[0]
            assert again.prompt_token_ids == (*prompt, *helpers.reply(prompt, 3))
            assert (again.num_output_tokens, again.sampling) == (3, first.sampling)
            fake.wait_for(lambda: [m for m in fake.got(Prefill) if m.attempt == 2])
            fake.release(prompt)
            received += b"".join(pieces)
        assert _tokens_of(received) == helpers.reply(prompt, 8)
        assert received.endswith(b"data: [DONE]\n\n")
        chunk = json.loads(received.split(b"\n\n")[0].removeprefix(b"data: "))
        trace = client.get(f"/v1/requests/{chunk['id']}/timeline").json()["requests"][0]
        assert trace["attempt"] == 2
        assert trace["lost_attempts"][0]["reason"] == "worker_lost"
        assert trace["lost_attempts"][0]["num_output_tokens"] == 3
        assert trace["path"].endswith("attempts=2; lost=worker_lost")
        assert 'baton_attempts_lost_total{reason="worker_lost"} 1' in client.get("/metrics").text


def test_without_another_decode_pool_it_ends_with_an_error(
    start_coordinator: Any, helpers: Any, tmp_path: Path
) -> None:
    with start_coordinator(
        tmp_path, ONE_POOL, heartbeat_timeout_s=1.5, failover_wait_s=0.5
    ) as running:
        running.fake.scripts[(1, 2)] = helpers.Script(hold_after=0)
        running.fake.scripts[(1, 3)] = helpers.Script(hold_after=1)
        with _stream(running.client, [1, 3], 4) as stream:
            running.fake.wait_for(lambda: running.fake.got(ComputeHere))
            running.fake.silent.add("decode0")
            reply = running.complete([1, 2])
            streamed = b"".join(stream.iter_bytes())
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "worker_lost")
        assert b'"code":"worker_lost"' in streamed and b"[DONE]" not in streamed
        reply = running.complete([1, 2])
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_workers")
        assert running.client.get("/ready").status_code == 503
        assert running.client.get("/health").status_code == 200


def news(coordinator: Any, kind: str) -> dict[str, Any]:
    """The next line of a kind on its standard output."""
    while kind not in (said := coordinator.line()):
        assert set(said) in ({"alive"}, {"serving", "start"}, {"lost", "start", "reason"}), said
    return dict(said)


def test_a_rank_whose_connection_is_gone_is_missed_at_once(
    start_coordinator: Any, tmp_path: Path
) -> None:
    """The others go on without its gang; one that was only starved may come back until then."""
    with start_coordinator(tmp_path, rejoin_timeout_s=2.0) as running:
        fake = running.fake
        started = time.monotonic()
        fake.kill("prefill0", 1)
        fake.wait_for(lambda: fake.got(Introduce, "prefill0"))
        assert time.monotonic() - started < 3, "a second, on a machine with nothing else to do"
        assert running.complete([3] * 300, max_tokens=2).status_code == 200
        pools = {pool["pool_id"]: pool for pool in running.state()["pools"]}
        assert "prefill0/1" in pools["prefill0"]["lost_reason"]
        lost = news(running.coordinator, "lost")
        assert lost == {
            "lost": "prefill0",
            "start": 0,
            "reason": "it did not come back within 2 s",
        }
        assert running.state()["ready"]


def test_a_hung_rank_whose_heartbeats_come(start_coordinator: Any, tmp_path: Path) -> None:
    with start_coordinator(tmp_path, step_budget_s=20.0) as running:
        fake = running.fake
        fake.do(lambda: fake.say("prefill0", Heartbeat(1, 19.0), 1))
        fake.step_ages["prefill0", 1] = 21.0
        lost = news(running.coordinator, "lost")
        assert lost["reason"] == "rank 1 has been in one step for 21.0 s"


def test_who_beats_and_is_unknown_is_asked_to_introduce_itself(
    start_coordinator: Any, tmp_path: Path
) -> None:
    """So do the ranks of a coordinator that was here before, on the connection that they had."""
    with start_coordinator(tmp_path, ONE_POOL) as running:
        running.fake.beat_unknown("decode0")
        running.fake.wait_for(lambda: running.fake.got(Introduce))
        assert running.complete("x", max_tokens=1).status_code == 200


def test_a_stale_coordinator_ends_when_it_is_told(helpers: Any, tmp_path: Path) -> None:
    coordinator = helpers.CoordinatorProcess(tmp_path, epoch=5, pools=ONE_POOL_FIELD)
    fake = helpers.FakeCluster(coordinator.line()["control"], ONE_POOL)
    fake.start()
    coordinator.line()
    hello = helpers.hello(ONE_POOL[0], 0, fake.config, coordinator_epoch=6)
    fake.do(lambda: fake.say("decode0", hello))
    assert coordinator.process.wait(10) == 3
    assert "replaced by another coordinator" in coordinator.errors()
    assert not fake.got(Shutdown), "the ranks are its successor's"
    fake.stop()
    coordinator.end()


def test_a_coordinator_whose_address_is_taken_over_ends(helpers: Any, tmp_path: Path) -> None:
    """And leaves its successor's socket where it is."""
    old = helpers.CoordinatorProcess(tmp_path, epoch=5, pools=ONE_POOL_FIELD)
    old.line()
    new = helpers.CoordinatorProcess(tmp_path, epoch=6, pools=ONE_POOL_FIELD, is_restart=True)
    said = new.line()
    assert old.process.wait(10) == 3
    old.end()
    fake = helpers.FakeCluster(said["control"], ONE_POOL)
    fake.start()
    assert news(new, "ready")["ready"] == said["http"]
    assert new.end() == 0
    fake.stop()


def test_sigterm_ends_streams_with_an_error_and_tells_every_rank(
    start_coordinator: Any, helpers: Any, tmp_path: Path
) -> None:
    with start_coordinator(tmp_path) as running:
        running.fake.scripts[(1, 2)] = helpers.Script(hold_after=1)
        with running.client.stream(
            "POST", "/v1/completions", json={"prompt": [1, 2], "stream": True}
        ) as reply:
            pieces = reply.iter_bytes()
            received = next(pieces)
            started = time.monotonic()
            running.coordinator.process.send_signal(signal.SIGTERM)
            received += b"".join(pieces)
        assert b'"code":"shutting_down"' in received
        assert b"[DONE]" not in received
        assert running.coordinator.process.wait(10) == 0
        assert time.monotonic() - started < 5
        running.fake.wait_for(lambda: len(running.fake.got(Shutdown)) == 5)


def test_sigterm_lets_what_runs_end_and_nothing_new_begin(
    start_coordinator: Any, helpers: Any, tmp_path: Path
) -> None:
    with start_coordinator(tmp_path, shutdown_grace_s=60.0) as running:
        running.fake.scripts[(1, 2)] = helpers.Script(hold_after=1)
        with half_a_body(running.url) as half, _stream(running.client, [1, 2], 4) as reply:
            pieces = reply.iter_bytes()
            received = _read_tokens(pieces, 1)
            running.coordinator.process.send_signal(signal.SIGTERM)
            with httpx.Client(base_url=running.url, timeout=20) as other:
                ready = wait_unready(other)
                assert (ready["ready"], ready["code"]) == (False, "shutting_down")
                assert other.get("/health").status_code == 200
                for path in ("completions", "batches", "documents", "files"):
                    form = {"files": {"file": b"x"}} if path == "files" else {"json": {}}
                    refused = other.post(f"/v1/{path}", **form)
                    assert refused.status_code == 503, path
                    assert refused.json()["error"]["code"] == "shutting_down"
                    assert refused.headers["retry-after"]
                half.sendall(b" ")
                assert half.recv(100).startswith(b"HTTP/1.1 503")
                started = time.monotonic()
                running.fake.release([1, 2])
                received += b"".join(pieces)
                assert _tokens_of(received) == helpers.reply([1, 2], 4)
                assert received.endswith(b"data: [DONE]\n\n")
                assert running.coordinator.process.wait(20) == 0, "idle connections hold up nobody"
            assert time.monotonic() - started < 10
        running.fake.wait_for(lambda: len(running.fake.got(Shutdown)) == 5)


def test_the_second_sigterm_ends_it_at_once(
    start_coordinator: Any, helpers: Any, tmp_path: Path
) -> None:
    """What the launcher says is not one of the two: who signals both of them asks once."""
    with start_coordinator(tmp_path, shutdown_grace_s=60.0) as running:
        process = running.coordinator.process
        running.fake.scripts[(1, 2)] = helpers.Script(hold_after=1)
        with _stream(running.client, [1, 2], 4) as reply:
            pieces = reply.iter_bytes()
            received = _read_tokens(pieces, 1)
            for number in (DRAIN, signal.SIGTERM, DRAIN):
                process.send_signal(number)
            with httpx.Client(base_url=running.url, timeout=20) as other:
                wait_unready(other)
                assert other.get("/health").status_code == 200
            process.send_signal(signal.SIGINT)
            received += b"".join(pieces)
        assert b'"code":"shutting_down"' in received
        assert process.wait(20) == 0


def wait_unready(client: httpx.Client) -> dict[str, Any]:
    """What ``/ready`` says once it says no."""
    deadline = time.monotonic() + 20
    while (reply := client.get("/ready")).status_code == 200:
        assert time.monotonic() < deadline
    return dict(reply.json())


@contextlib.contextmanager
def half_a_body(url: str) -> Iterator[socket.socket]:
    """A request of which all but the last byte has been sent: it does not run."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n"
            b'content-length: 15\r\n\r\n{"prompt":"hi"}'[:-1]
        )
        yield connection


def test_odd_messages_on_the_control_socket_change_nothing(
    start_coordinator: Any, helpers: Any, tmp_path: Path
) -> None:
    with start_coordinator(tmp_path, ONE_POOL) as running:
        fake = running.fake
        message = helpers.hello(ONE_POOL[0], 0, fake.config, incarnation="other")
        fake.do(lambda: fake.say("decode0", message))
        fake.wait_for(lambda: len(fake.got(Refused)) == 1)
        fake.do(lambda: fake._ranks["decode0", 0].send(bytes([PROTOCOL_VERSION, 0xC1])))
        fake.do(lambda: fake._ranks["decode0", 0].send(b""))
        fake.do(lambda: fake._ranks["decode0", 0].send(b"\x09\x80"))
        assert running.complete("x", max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "10.0.0.1"},
        {"host": "example.org"},
        {"host": "::"},
        {"port": 70_000},
        {"pools": ()},
        {"pools": (ExpectedPool("a", "decode", 1, 1),) * 2},
        {"max_model_len": 1},
        {"log_level": "LOUD"},
        {"api_keys": ("a b",)},
        {"api_keys": ("",)},
        {"num_text_workers": 0},
        {"kv_dtype": "int3"},
    ],
)
def test_configurations_that_cannot_be_served_with(changes: dict[str, Any]) -> None:
    pools = (ExpectedPool("d", "decode", 1, 1),)
    fields: dict[str, Any] = {"token": "t", "model": "arithmetic", "pools": pools}
    CoordinatorConfig(**fields)
    with pytest.raises(ConfigError):
        CoordinatorConfig(**{**fields, **changes})


def test_which_hosts_are_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "8.8.8.8", "localhost.evil.org"))


def test_a_configuration_file_that_is_none(helpers: Any, tmp_path: Path) -> None:
    coordinator = helpers.CoordinatorProcess(tmp_path, surprise=1, pools=ONE_POOL_FIELD)
    errors = coordinator.errors()
    assert coordinator.end() == 2
    assert "surprise" in errors
    assert json.dumps(errors)
