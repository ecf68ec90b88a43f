"""Which pages of a browser may use the server: names, origins, and CORS."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.http.connections.origins import Origins
from protocol.errors import ConfigError, RequestError

PAGE = "https://app.example"
ONE_POOL = (("decode0", "decode", 1, 1),)
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def refusal(method: str, *headers: tuple[str, str]) -> str:
    """The code with which a request is refused, or nothing."""
    try:
        Origins(("box.lan", "::"), (PAGE,)).check(
            method, [(name.encode(), value.encode()) for name, value in headers]
        )
    except RequestError as error:
        assert error.status == 403
        return str(error.code)
    return ""


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.8.8.8", "[::1]:80", "[::1]", "box.lan:9",
     "Box.LAN.", "localhost."],
)  # fmt: skip
def test_names_of_this_machine(host: str) -> None:
    assert refusal("GET", ("host", host)) == ""
    assert refusal("POST", ("host", host), ("origin", f"http://{host.lower()}")) == ""


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example",
     "", "[::1", "192.0.2.1", "box.lan.evil", "localhost evil", "\u00e9"],
)  # fmt: skip
def test_names_of_others(host: str) -> None:
    assert refusal("GET", ("host", host)) == "host_not_allowed"
    assert refusal("GET", ("host", "localhost"), ("host", host)) == "host_not_allowed"


HOST = ("host", "localhost:8000")


@pytest.mark.parametrize(
    ("headers", "is_taken"),
    [
        ((), True),  # no browser
        ((("origin", "http://localhost:8000"), ("sec-fetch-site", "same-origin")), True),
        ((("sec-fetch-site", "none"),), True),
        ((("origin", PAGE), ("sec-fetch-site", "cross-site")), True),
        ((("origin", "http://localhost:3000"), ("sec-fetch-site", "same-site")), False),
        ((("origin", "https://evil.example"),), False),
        ((("origin", "null"),), False),
        ((("origin", ""),), False),
        ((("sec-fetch-site", "cross-site"),), False),
        ((("origin", PAGE), ("origin", "https://evil.example")), False),
        ((("origin", PAGE + ".evil.example"),), False),
    ],
)
def test_pages(headers: tuple[tuple[str, str], ...], is_taken: bool) -> None:
    for method in ("POST", "DELETE", "PUT", "PATCH", "ODD"):
        assert refusal(method, HOST, *headers) == ("" if is_taken else "origin_not_allowed")
    assert refusal("GET", HOST, *headers) == ""


def test_a_server_without_keys(start_coordinator: Any, tmp_path: Path) -> None:
    with start_coordinator(tmp_path, ONE_POOL, cors_origins=(PAGE,)) as running:
        for path in ("/health", "/v1/models", "/metrics", "/nothing"):
            reply = running.client.get(path, headers={"host": "evil.example"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host_not_allowed")
            assert reply.headers["x-request-id"]
        form = {"file": ("a.txt", b"text", "text/plain")}
        reply = running.client.post(
            "/v1/documents", files=form, headers={"origin": "https://evil.example"}
        )
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "origin_not_allowed")
        body = {"prompt": "x", "max_tokens": 1}
        reply = running.client.post("/v1/completions", json=body, headers={"origin": PAGE})
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == PAGE


def test_a_page_that_has_a_key(start_coordinator: Any, tmp_path: Path) -> None:
    with start_coordinator(tmp_path, ONE_POOL, api_keys=("k",), cors_origins=(PAGE,)) as running:
        client: httpx.Client = running.client
        reply = client.options("/v1/completions", headers=PREFLIGHT)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in reply.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in reply.headers
        stranger = PREFLIGHT | {"origin": "https://evil.example"}
        reply = client.options("/v1/completions", headers=stranger)
        assert reply.status_code == 400
        assert "access-control-allow-origin" not in reply.headers
        asking = {"origin": PAGE, "host": "any.example"}
        reply = client.post("/v1/completions", json={"prompt": "x"}, headers=asking)
        assert reply.status_code == 401, "and the page can read why"
        assert reply.headers["access-control-allow-origin"] == PAGE
        asking["authorization"] = "Bearer k"
        body = {"prompt": "x", "max_tokens": 1}
        reply = client.post("/v1/completions", json=body, headers=asking)
        assert reply.status_code == 200
        exposed = reply.headers["access-control-expose-headers"].lower()
        assert "x-request-id" in exposed and "x-baton-path" in exposed


def test_any_page_that_has_a_key(start_coordinator: Any, tmp_path: Path) -> None:
    with start_coordinator(tmp_path, ONE_POOL, api_keys=("k",), cors_origins=("*",)) as running:
        headers = {"origin": PAGE, "authorization": "Bearer k"}
        body = {"prompt": "x", "max_tokens": 1}
        reply = running.client.post("/v1/completions", json=body, headers=headers)
        assert reply.status_code == 200, "its text workers know of no key, and read it all the same"
        assert reply.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "origin", ["*", "app.example", "https://app.example/", "https://*.example"]
)
def test_origins_that_are_refused(origin: str) -> None:
    pools = (ExpectedPool("decode0", "decode", 1, 1),)
    with pytest.raises(ConfigError, match="--cors-origin"):
        CoordinatorConfig(token="t", model="arithmetic", pools=pools, cors_origins=(origin,))
