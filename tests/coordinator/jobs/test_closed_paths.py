"""Every path of the application is closed to who has no key, but for those that are named open."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.routing import Route

from coordinator.auth import OPEN_PATHS, Tenants
from coordinator.http.api import build_app
from tests.coordinator.jobs.world import Site, start_site

KEY = "sk-alpha"
OPEN = {"/health", "/ready", "/version"}  # as SECURITY.md has them, and "/", which is nothing
DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with start_site(tmp_path_factory.mktemp("l"), api_keys=(KEY,)) as site:
        yield site


def offered(site: Site) -> set[tuple[str, str]]:
    """(method, path) of all that the application offers."""
    app = build_app(site.running.coordinator.frontend, Tenants((KEY,), "secret"))
    routes = [route for route in app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.routes), "something else answers, too"
    return {(method, route.path) for route in routes for method in route.methods or ()}


def named(path: str) -> str:
    """It, with a name for each of its parameters."""
    parts = path.split("/")
    return "/".join("x" if part.startswith("{") else part for part in parts)


def test_what_is_open_is_what_the_page_says(locked: Site) -> None:
    paths = {path for _, path in offered(locked)}
    assert {path for path in paths if path in OPEN_PATHS} == OPEN
    assert OPEN_PATHS - paths == {"/"}
    text = (Path(__file__).parents[3] / "SECURITY.md").read_text()
    for path in OPEN_PATHS:
        assert f"`{path}`" in text


@pytest.mark.parametrize(
    ("value", "code"), [("", "missing_api_key"), ("Bearer sk-alphA", "invalid_api_key")]
)
def test_each_path_is_closed_without_the_key(locked: Site, value: str, code: str) -> None:
    found = offered(locked)
    assert len(found) > 25, "documents, files and batches are among them"
    headers = {"authorization": value} if value else {}
    for method, path in sorted(found):
        reply = httpx.request(method, locked.running.url + named(path), headers=headers)
        if path in OPEN:
            assert reply.status_code == 200, (method, path)
            continue
        assert reply.status_code == 401, (method, path, reply.text)
        assert reply.json()["error"]["code"] == code
        with_key = locked.client.request(method, named(path))
        assert with_key.status_code != 401, (method, path)


@pytest.mark.parametrize(
    "target",
    [
        *("//metrics", "/./metrics", "/health/../metrics", "/health/%2e%2e/metrics", "/metrics/"),
        *(
            "/health;/../metrics",
            "/health%00/metrics",
            "/ready\\..\\metrics",
            "/health?/../metrics",
        ),
        *("http://localhost/metrics", "http://evil.example/health/../metrics", "metrics", "*"),
    ],
)
def test_no_spelling_leads_past_the_door(locked: Site, target: str) -> None:
    address = urlsplit(locked.running.url)
    for method in ("GET", "HEAD", "OPTIONS", "POST"):
        with socket.create_connection((address.hostname, address.port), DEADLINE_S) as connection:
            head = f"{method} {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
            connection.sendall(head.encode())
            answer = b""
            while piece := connection.recv(1 << 16):
                answer += piece
        status = int(answer.split()[1])
        if target == "/health?/../metrics":  # a question put to /health
            assert (status == 200) == (method == "GET"), answer
            assert b"baton_" not in answer
            continue
        assert status in (400, 401), (method, answer)
