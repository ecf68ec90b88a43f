"""Keys in a file: read strictly, and read again while the cluster serves."""

import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from coordinator.auth import Tenants
from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.key_file import KeyFile, read_keys
from protocol.errors import ConfigError

DEADLINE_S = 20.0
ONE_POOL = (("decode0", "decode", 1, 1),)


def test_a_line_is_a_key_or_a_comment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\nfirst\n  second  \r\n#third\n")
    assert read_keys(path) == ("first", "second")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no key"),
        (b"# nobody\n\n", "no key"),
        (b"two words\n", "without spaces"),
        ("schl\u00fcssel\n".encode(), "ASCII"),
        (b"\xff\n", "UTF-8"),
    ],
)
def test_what_is_no_file_of_keys(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=why) as refused:
        read_keys(path)
    assert "two words" not in str(refused.value), "a key is not shown"
    tenants = Tenants((), "secret")
    with pytest.raises(ConfigError):
        KeyFile(path, (), tenants).load()
    with pytest.raises(ConfigError, match="--api-key-file"):
        read_keys(tmp_path / "none")


def test_a_tenant_is_its_key_wherever_that_stands() -> None:
    tenants = Tenants(("one", "two"), "secret")
    before = tenants.identify([(b"authorization", b"Bearer one")])
    assert tenants.replace(("three", "two")) == (1, 1)
    assert tenants.named(before.name) is None
    assert tenants.replace(("one",)) == (1, 2)
    assert tenants.identify([(b"authorization", b"Bearer one")]) == before


def test_a_file_of_keys_opens_the_server_to_other_machines() -> None:
    pools = (ExpectedPool("decode0", "decode", 1, 1),)
    fields: dict[str, Any] = {"token": "t", "model": "m", "pools": pools, "host": "0.0.0.0"}
    assert CoordinatorConfig(**fields, api_key_file="keys").host == "0.0.0.0"
    with pytest.raises(ConfigError, match="--api-key-file"):
        CoordinatorConfig(**fields)


def test_keys_change_without_a_restart(
    tmp_path: Path, start_coordinator: Any, helpers: Any
) -> None:
    path = tmp_path / "keys"
    path.write_text("old\n")
    with start_coordinator(
        tmp_path, ONE_POOL, api_keys=["fixed"], api_key_file=str(path)
    ) as running:

        def status(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return httpx.get(f"{running.url}/v1/models", headers=headers).status_code

        def until(wanted: dict[str, int]) -> None:
            deadline, pause = time.monotonic() + DEADLINE_S, threading.Event()
            while {key: status(key) for key in wanted} != wanted:
                assert time.monotonic() < deadline, {key: status(key) for key in wanted}
                pause.wait(0.05)

        assert (status("old"), status("fixed"), status("new")) == (200, 200, 401)
        prompt = [1, 2, 3]
        running.fake.scripts[tuple(prompt)] = helpers.Script(hold_after=3)
        body = {"prompt": prompt, "max_tokens": 8, "stream": True}
        headers = {"authorization": "Bearer old"}
        with httpx.stream(
            "POST", f"{running.url}/v1/completions", json=body, headers=headers, timeout=DEADLINE_S
        ) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            path.with_suffix(".new").write_text("# rotated\nnew\n")
            path.with_suffix(".new").rename(path)
            until({"old": 401, "new": 200, "fixed": 200})
            running.fake.release(prompt)
            assert "data: [DONE]" in list(lines), "what runs goes on"
        for content in ("", "half a ke"):  # such as an editor leaves for a moment
            path.write_text(content)
            until({"new": 200, "fixed": 200, "old": 401})
        path.write_text("old\n")
        until({"old": 200, "new": 401, "fixed": 200})


def test_a_body_takes_no_more_than_a_share_while_the_file_has_several_keys(
    tmp_path: Path, start_coordinator: Any
) -> None:
    path = tmp_path / "keys"
    path.write_text("one\ntwo\n")
    limits = {"max_body_bytes": 3 << 20, "max_total_body_bytes": 8 << 20}
    with (
        start_coordinator(tmp_path, ONE_POOL, api_key_file=str(path), limits=limits) as running,
        contextlib.ExitStack() as stack,
    ):
        address = urlsplit(running.url)

        def begin(key: str) -> socket.socket:
            """A body of 2 MiB and more that is declared, and does not come."""
            connection = socket.create_connection((address.hostname, address.port), DEADLINE_S)
            stack.enter_context(connection)
            head = (
                f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
                f"authorization: Bearer {key}\r\ncontent-type: application/json\r\n"
                f"content-length: {(2 << 20) + 1}\r\n\r\n"
            )
            connection.sendall(head.encode())
            return connection

        def held() -> float:
            headers = {"authorization": "Bearer one"}
            text = httpx.get(f"{running.url}/metrics", headers=headers).text
            (line,) = [line for line in text.splitlines() if line.startswith("baton_body_bytes ")]
            return float(line.split()[1])

        begin("one")
        deadline, pause = time.monotonic() + DEADLINE_S, threading.Event()
        while not held():
            assert time.monotonic() < deadline
            pause.wait(0.02)
        answer = begin("one").recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 503 "), "half of 8 MiB is less than two of them"
        begin("two")
        while held() < 4 << 20:
            assert time.monotonic() < deadline
            pause.wait(0.02)
