"""Pins: quotas, times, and what becomes of them."""

from pathlib import Path
from typing import Any

import pytest

from coordinator.config import JobLimits
from coordinator.jobs.documents.document import HARD, SOFT, Pin
from coordinator.jobs.documents.pins import Pinned, PinPolicy, read_duration, read_pin
from protocol.errors import RequestError
from tests.coordinator.jobs.world import Site, start_site

TEXT = "Pinned. " * 60


@pytest.mark.parametrize(
    ("given", "seconds"), [("90s", 90), ("1.5m", 90), ("2h", 7200), ("7d", 604800), (30, 30)]
)
def test_durations(given: str | float, seconds: float) -> None:
    assert read_duration(given, "ttl") == seconds


@pytest.mark.parametrize(
    "given", ["", "2", "2 h", "-2h", "2y", "h", "0s", 0, -1, "1e9d", "\u0663s"]
)
def test_no_durations(given: str | float) -> None:
    with pytest.raises(RequestError):
        read_duration(given, "ttl")


def test_reading_pins() -> None:
    limits, tiers = JobLimits(), ("gpu",)
    assert read_pin("none", "2h", None, None, limits, tiers) == Pin()
    assert read_pin("soft", None, "gpu", True, limits, tiers) == Pin(SOFT, 86_400, "gpu", True)
    for bad in (("soft", "31d", None), ("hard", None, "disk"), ("hard", None, "tape")):
        with pytest.raises(RequestError):
            read_pin(*bad, None, limits, tiers)


def test_the_policy() -> None:
    policy = PinPolicy(JobLimits(disk_quota_bytes=1000), 1)
    assert (policy.max_bytes, policy.max_hard_bytes) == (500, 250)
    for mode, num_tokens, pinned, fits in (
        (HARD, 250, Pinned(0, 0), True),
        (HARD, 251, Pinned(0, 0), False),
        (HARD, 1, Pinned(250, 250), False),
        (SOFT, 251, Pinned(0, 250), True),
        (SOFT, 100, Pinned(401, 0), False),
        (SOFT, 100, Pinned(300, 0, 300), True),
        (SOFT, 101, Pinned(300, 0, 300), False),  # the rest is for the others
        (HARD, 101, Pinned(300, 0, 300), False),
        ("none", 10_000, Pinned(500, 0), True),
    ):
        try:
            policy.check(Pin(mode, 60), num_tokens, pinned)
            assert fits
        except RequestError as error:
            assert not fits
            assert (error.code, error.status) == ("pin_quota_exceeded", 409)


def test_a_pin_begins_when_the_document_is_ready(site: Site) -> None:
    made = site.post(source={"text": TEXT}, pin={"mode": "hard", "ttl": "2h"}).json()
    assert made["pin"] == {
        "mode": "hard",
        "ttl_s": 7200.0,
        "expires_at": None,
        "tier": "any",
        "sliding": False,
    }
    found = site.wait(made["id"])
    assert 7190 < found["pin"]["expires_at"] - found["ready_at"] <= 7200
    hashes, mode = site.ingestor.pins[made["id"]]
    assert (len(hashes), mode) == (found["tokens"]["total"] // 16, "hard")
    soft = site.client.patch(f"/v1/documents/{made['id']}", json={"pin": {"mode": "soft"}})
    assert soft.json()["pin"]["ttl_s"] == 86_400
    assert site.ingestor.pins[made["id"]][1] == "soft"
    site.client.patch(f"/v1/documents/{made['id']}", json={"pin": {"mode": "none"}})
    assert made["id"] not in site.ingestor.pins


def test_a_pin_expires(site: Site) -> None:
    made = site.post(source={"text": f"Soon. {TEXT}"}, pin={"mode": "soft", "ttl": 0.3}).json()
    site.wait(made["id"])
    found = site.until(
        lambda: (d := site.get(made["id"]))["pin"]["mode"] == "none" and d, "it expires"
    )
    assert found["status"] == "ready"
    assert made["id"] not in site.ingestor.pins
    assert site.events(made["id"])[-1]["type"] == "expired"
    site.evict(site.hashes_of(made["id"]))
    assert site.ask(made["id"], "Gone?")["cache_miss"]["reason"] == "expired"


def test_quotas(tmp_path: Path) -> None:
    bytes_per_token = 2 * 4 * 4 * 64 * 4  # more than any arithmetic model's
    with start_site(tmp_path, jobs={"disk_quota_bytes": 4 * 200 * bytes_per_token}) as site:
        quota = site.running.jobs.documents.parts.admission.pins.max_hard_bytes
        per_token = site.running.jobs.documents.parts.admission.pins.bytes_per_token
        fits = quota // per_token
        full = site.post(source={"token_ids": [1] * fits}, pin={"mode": "hard"})
        assert full.status_code == 202
        more = site.post(source={"token_ids": [2] * 16}, pin={"mode": "hard"})
        assert (more.status_code, more.json()["error"]["code"]) == (409, "pin_quota_exceeded")
        soft = site.post(source={"token_ids": [3] * 16}, pin={"mode": "soft"}).json()
        site.wait(soft["id"])
        path = f"/v1/documents/{soft['id']}"
        assert site.client.patch(path, json={"pin": {"mode": "hard"}}).status_code == 409
        assert site.get(soft["id"])["pin"]["mode"] == "soft"
        site.client.delete(f"/v1/documents/{full.json()['id']}")
        assert site.client.patch(path, json={"pin": {"mode": "hard"}}).status_code == 200


def test_pins_count_what_the_ranks_keep(tmp_path: Path) -> None:
    """KV may be kept in another dtype than the checkpoint's."""

    def bytes_per_token(**fields: Any) -> int:
        folder = tmp_path / fields.get("kv_dtype", "own")
        folder.mkdir()
        with start_site(folder, **fields) as site:
            count: int = site.running.jobs.documents.parts.admission.pins.bytes_per_token
            return count

    assert bytes_per_token() == 2 * bytes_per_token(kv_dtype="bfloat16")


def test_a_sliding_pin_is_extended_by_questions(site: Site) -> None:
    pin = {"mode": "soft", "ttl": 2, "sliding": True}
    made = site.post(source={"text": f"Sliding. {TEXT}"}, pin=pin).json()
    first = site.wait(made["id"])["pin"]["expires_at"]
    site.until(lambda: site.ask(made["id"], "?") and _later(site, made["id"], first))


def _later(site: Site, document_id: str, than: float) -> bool:
    expires_at = site.get(document_id)["pin"]["expires_at"]
    return bool(expires_at is not None and expires_at > than)
