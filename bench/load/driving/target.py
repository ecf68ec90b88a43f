"""Getting to know a server before a run, and asking it about its requests afterwards."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec

from bench.load.driving.client import Address
from bench.load.driving.driver import Target
from bench.load.record import OK, RequestRecord
from bench.load.workload.prompts import Api, Conversation, Dialect
from bench.load.workload.sessions import Segment, Turn
from protocol.errors import ConfigError

_TIMEOUT_S = 60.0
_NUM_AT_ONCE = 8
_NUM_TRIES = 5
_MAX_MISSING = (
    64  # a server remembers its latest requests: so many unknown in a row, and it is over
)


def discover(
    url: str, dialect: Dialect, *, name: str = "", api_key: str = "", plain: bool = False
) -> Target:
    """The server behind ``url``, tried with one small request.

    The model is asked for when the dialect names none. Fields beyond OpenAI's are given up when the
    server refuses them; then answers may be of any length and their tokens are counted by events.

    Args:
        plain: do not even try those fields.

    Raises:
        ConfigError: nobody answers, or it does not serve such requests.
    """
    address = Address.parse(url)
    base = _base(address)
    with httpx.Client(base_url=base, headers=headers_of(api_key), timeout=_TIMEOUT_S) as client:
        try:
            model = dialect.model or _only_model(client)
            dialect = msgspec.structs.replace(dialect, model=model, extensions=not plain)
            refusal, is_invalid = _try(client, dialect)
            if is_invalid and dialect.extensions:
                dialect = msgspec.structs.replace(dialect, extensions=False)
                refusal, _ = _try(client, dialect)
        except httpx.HTTPError as error:
            raise ConfigError(f"{url}: {error or type(error).__name__}") from error
    if refusal is not None:
        raise ConfigError(f"{url} refuses a request of {dialect.api.path}: {refusal}")
    return Target(name or model, base, dialect, api_key)


def _base(address: Address) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"http{'s' * address.is_tls}://{host}:{address.port}{address.prefix}"


def headers_of(api_key: str) -> dict[str, str]:
    """What every question to a server carries."""
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _only_model(client: httpx.Client) -> str:
    reply = client.get("/v1/models")
    if reply.status_code != 200:
        raise ConfigError(f"{reply.url}: status {reply.status_code}; name the model with --model")
    try:
        return str(reply.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{reply.url} names no model: name it with --model") from error


def _try(client: httpx.Client, dialect: Dialect) -> tuple[str | None, bool]:
    """What the server has against it, None when it answers; and whether it is about the fields."""
    turn = Turn("probe", (Segment("probe", 8),), 2)
    body = Conversation(dialect, 0).ask(turn, "baton-bench-probe")
    headers = {"content-type": "application/json"}
    for _ in range(_NUM_TRIES):  # a server that fails now and then can be measured all the same
        reply = client.post(dialect.api.path, content=body, headers=headers)
        if reply.status_code == 200:
            return None, False
        if reply.status_code < 500 and reply.status_code != 429:
            break
    refusal = f"status {reply.status_code}: {reply.text[:200]}"
    return refusal, reply.status_code in (400, 422)


def num_accelerators(target: Target) -> int | None:
    """All ranks of a Baton cluster, prefill and decode; None of any other server. A store's ranks
    have none: they keep KV in the host's memory and on its disk."""
    with httpx.Client(
        base_url=target.url, headers=headers_of(target.api_key), timeout=_TIMEOUT_S
    ) as client:
        try:
            reply = client.get("/v1/cluster")
            pools = reply.json()["pools"] if reply.status_code == 200 else []
            return sum(len(p["ranks"]) for p in pools if p.get("role") != "store") or None
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError):
            return None


async def join_timelines(target: Target, records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """The records, with what the server says of each of them, where it says anything.

    Asked from the latest backwards, since a server forgets the oldest first.
    """
    found: dict[int, dict[str, Any]] = {}
    asked = sorted(
        (r for r in records if r.outcome == OK and r.request_id), key=lambda r: -r.sent_s
    )
    async with httpx.AsyncClient(
        base_url=target.url, headers=headers_of(target.api_key), timeout=_TIMEOUT_S
    ) as client:
        num_missing = 0
        for start in range(0, len(asked), _NUM_AT_ONCE):
            batch = asked[start : start + _NUM_AT_ONCE]
            told = await asyncio.gather(*(_timeline(client, r.request_id) for r in batch))
            for record, timeline in zip(batch, told, strict=True):
                if timeline is not None:
                    found[record.index] = timeline
            num_missing = 0 if any(told) else num_missing + len(batch)
            if num_missing >= (_MAX_MISSING if found else 1):
                break
    return [
        msgspec.structs.replace(r, timeline=found[r.index]) if r.index in found else r
        for r in records
    ]


async def _timeline(client: httpx.AsyncClient, request_id: str) -> dict[str, Any] | None:
    try:
        reply = await client.get(f"/v1/requests/{request_id}/timeline")
        timeline = reply.json() if reply.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None
    return timeline if isinstance(timeline, dict) else None


def api_of(name: str) -> Api:
    """An ``Api`` by its name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return Api(name)
    except ValueError as error:
        raise ConfigError(f"no API {name!r}: there are {', '.join(Api)}") from error
