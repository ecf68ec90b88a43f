"""Keys and tenants: everything is closed but what is named, and nobody hits another's cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.auth import Tenants
from protocol.errors import RequestError

KEYS = ("sk-alpha", "sk-beta")
ONE_POOL = (("decode0", "decode", 1, 1),)


@pytest.fixture(scope="module")
def locked(start_coordinator: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with start_coordinator(
        tmp_path_factory.mktemp("a"), ONE_POOL, api_keys=KEYS, host="127.0.0.1"
    ) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_path_is_closed_but_the_named_ones(locked: Any) -> None:
    for path in ("/health", "/ready", "/version"):
        assert locked.client.get(path).status_code == 200
    for path in (
        "/v1/models",
        "/v1/cluster",
        "/metrics",
        "/v1/requests/x/timeline",
        "/nothing",
        "/%2fhealth",
        "/Health",
        "/health/",
        "/%68ealthy",
    ):
        reply = locked.client.get(path)
        assert reply.status_code == 401, path
        assert reply.json()["error"]["code"] == "missing_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.headers["x-request-id"]
    reply = locked.client.post("/v1/completions", json={"prompt": "x"})
    assert reply.status_code == 401


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("Bearer sk-alpha", 200),
        ("bearer sk-beta", 200),
        ("Bearer sk-alphA", 401),
        ("Bearer  sk-alpha", 401),
        ("Basic c2stYWxwaGE=", 401),
        ("sk-alpha", 401),
        ("Bearer " + "x" * 20_000, 401),
    ],
)
def test_keys(locked: Any, value: str, status: int) -> None:
    reply = locked.client.get("/v1/models", headers={"authorization": value})
    assert reply.status_code == status
    twice = [("authorization", "Bearer sk-alpha")] * 2
    assert httpx.get(f"{locked.url}/v1/models", headers=twice).status_code == 400


def test_tenants_share_no_cache_and_no_timelines(locked: Any) -> None:
    prompt = list(range(100))

    def cached(key: str, **fields: Any) -> int:
        body = {"prompt": prompt, "max_tokens": 1, **fields}
        reply = locked.client.post("/v1/completions", json=body, headers=bearer(key))
        count: int = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    assert cached("sk-alpha") == 0
    assert cached("sk-alpha") == 96
    assert cached("sk-beta") == 0
    assert cached("sk-alpha", cache_salt="mine") == 0
    assert cached("sk-alpha", cache_salt="mine") == 96
    reply = locked.client.post(
        "/v1/completions", json={"prompt": "x"}, headers={**bearer("sk-alpha")}
    )
    path = f"/v1/requests/{reply.json()['id']}/timeline"
    assert locked.client.get(path, headers=bearer("sk-alpha")).status_code == 200
    assert locked.client.get(path, headers=bearer("sk-beta")).status_code == 404


def test_salts_depend_on_the_secret_and_the_tenant() -> None:
    header = [(b"authorization", b"Bearer a")]
    one = Tenants(["a", "b"], "secret").identify(header)
    assert one == Tenants(["b", "a"], "secret").identify(header)
    assert one.salt != Tenants(["a"], "other").identify(header).salt
    other = Tenants(["a", "b"], "secret").identify([(b"authorization", b"Bearer b")])
    assert one.cache_salt("x") != other.cache_salt("x") != other.cache_salt("y")
    assert Tenants([], "secret").identify([]).cache_salt(None)
    with pytest.raises(RequestError):
        one.cache_salt("x\n")


def test_beyond_loopback_a_key_is_needed(helpers: Any, tmp_path: Path) -> None:
    coordinator = helpers.CoordinatorProcess(tmp_path, host="0.0.0.0")
    errors = coordinator.errors()
    assert coordinator.end() == 2
    assert errors.startswith("error: ")
    assert "--api-key" in errors
    assert errors.count("\n") == 1
