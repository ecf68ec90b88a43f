"""``/v1/batches`` with OpenAI's client: from the file that goes in to the files that come out."""

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.coordinator.conftest import Script, reply_token
from tests.coordinator.jobs.world import Site, start_site

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
DOCUMENTS = "/v1/documents"


def line(custom_id: str, body: dict[str, Any], url: str = COMPLETIONS) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def prompts(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [line(f"c{n}", {"prompt": [n + 1], "max_tokens": 3, **fields}) for n in range(count)]


def hold(site: Site, *prompt: int) -> None:
    """Answers to this prompt stop after two tokens, until they are released."""
    site.running.fake.scripts[prompt] = Script(hold_after=2)


def test_a_batch_of_completions(site: Site) -> None:
    made = site.batch(
        *prompts(30, return_token_ids=True),
        line("bad", {"prompt": "x", "temperature": 9}),
        line("other", {"prompt": "x", "model": "other"}),
        metadata={"job": "nightly"},
    )
    assert (made.status, made.object, made.completion_window) == ("validating", "batch", "24h")
    assert made.expires_at == made.created_at + 86400
    batch = site.ended(made.id)
    assert batch.request_counts.to_dict() == {"total": 32, "completed": 30, "failed": 2}
    assert (batch.metadata, batch.model, batch.errors) == ({"job": "nightly"}, "arithmetic", None)
    times = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert list(times) == sorted(times)
    assert batch.usage.to_dict() == {
        "input_tokens": 30,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 90,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 120,
    }
    output, errors = site.results(batch)
    assert [entry["custom_id"] for entry in output] == [f"c{n}" for n in range(30)]
    for number, entry in enumerate(output):
        assert set(entry) == {"id", "custom_id", "response", "error"}
        assert entry["error"] is None
        response = entry["response"]
        assert response["status_code"] == 200
        (choice,) = response["body"]["choices"]
        assert choice["token_ids"] == [reply_token([number + 1], i) for i in range(3)]
        assert response["body"]["id"] == f"cmpl-{response['request_id']}"
    statuses = [(e["custom_id"], e["response"]["status_code"]) for e in errors]
    assert statuses == [("bad", 400), ("other", 404)]
    assert errors[0]["response"]["body"]["error"]["param"] == "temperature"
    assert len({entry["id"] for entry in output + errors}) == 32
    file = site.openai.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert file.expires_at == file.created_at + 30 * 86400


def test_a_line_is_answered_as_a_request_is(site: Site) -> None:
    body = {"messages": [{"role": "user", "content": "same"}], "max_tokens": 5, "n": 2, "seed": 1}
    batch = site.ended(site.batch(line("a", body, CHAT), endpoint=CHAT).id)
    (entry,) = site.results(batch)[0]
    direct = site.client.post(CHAT, json=body).json()
    ours = entry["response"]["body"]
    for field in ("id", "created"):
        assert type(direct.pop(field)) is type(ours.pop(field))
    direct["usage"]["prompt_tokens_details"] = ours["usage"]["prompt_tokens_details"]
    assert ours == direct
    assert batch.error_file_id is None


def test_pages_of_batches(site: Site) -> None:
    made = [site.batch(*prompts(1)).id for _ in range(4)]
    for batch_id in made:
        site.ended(batch_id)
    assert [batch.id for batch in site.openai.batches.list(limit=4).data] == made[::-1]
    listed = [batch.id for batch in site.openai.batches.list(limit=3)]  # it turns the pages
    assert listed[:4] == made[::-1]
    assert len(listed) == len(set(listed))
    page = site.client.get("/v1/batches", params={"limit": 2, "after": made[3]}).json()
    assert [batch["id"] for batch in page["data"]] == [made[2], made[1]]
    for query in ("limit=0", "limit=x"):
        assert site.client.get(f"/v1/batches?{query}").status_code == 400
    assert site.client.get("/v1/batches?after=batch_0").status_code == 404


WRONG: list[tuple[Any, str, str | None]] = [
    ("{", "invalid_json", None),
    ("[]", "invalid_type", None),
    ('{"custom_id": "a", "custom_id": "b"}', "duplicate_key", "custom_id"),
    ({}, "invalid_value", "custom_id"),
    (line("", {}), "invalid_value", "custom_id"),
    (line("x" * 513, {}), "invalid_value", "custom_id"),
    ({**line("a", {}), "custom_id": 5}, "invalid_value", "custom_id"),
    (line("c0", {}), "duplicate_custom_id", "custom_id"),
    ({**line("a", {}), "method": "GET"}, "invalid_value", "method"),
    (line("a", {}, CHAT), "invalid_value", "url"),
    ({**line("a", {}), "url": ["x"]}, "invalid_value", "url"),
    ({**line("a", {}), "body": []}, "invalid_value", "body"),
    (line("a", {"prompt": "x", "stream": True}), "invalid_value", "stream"),
    (line("a", {"document_id": "custom:c0"}), "invalid_value", "document_id"),
    (line("a", {"document_id": "custom:a"}), "invalid_value", "document_id"),
    ("\ufeff{}", "invalid_encoding", None),
    ("[" * 5000, "too_deep", None),
]


def test_every_wrong_line_is_named_and_nothing_is_begun(site: Site) -> None:
    asked = len(site.server.asked)
    made = site.batch(*prompts(1), "", *(wrong for wrong, _, _ in WRONG))
    batch = site.ended(made.id, "failed")
    assert batch.failed_at is not None
    errors = [(error.line, error.code, error.param) for error in batch.errors.data]
    expected = [(number, code, param) for number, (_, code, param) in enumerate(WRONG, 3)]
    assert errors == expected
    assert all(error.message for error in batch.errors.data)
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert len(site.server.asked) == asked


def test_inputs_that_are_no_batch(tmp_path: Path) -> None:
    limits = {"max_lines": 3, "max_errors": 2}
    with start_site(
        tmp_path, data_dir=str(tmp_path), batches=limits, limits={"max_body_bytes": 1000}
    ) as site:
        cases: list[tuple[list[Any], int | None, str]] = [
            ([], None, "empty_file"),
            (["", "  "], None, "empty_file"),
            (prompts(4), 4, "too_many_lines"),
            ([*prompts(1), "x" * 2000, "{"], 2, "line_too_long"),
        ]
        for lines, number, code in cases:
            batch = site.ended(site.batch(*lines).id, "failed")
            assert [(e.line, e.code) for e in batch.errors.data] == [(number, code)]
        batch = site.ended(site.batch("{", "{", "{", "{").id, "failed")
        assert [error.line for error in batch.errors.data] == [1, 2]
        folder = tmp_path / "batches"
        site.until(lambda: not list(folder.iterdir()), "nothing of them is left")


def test_what_is_refused_at_once(tmp_path: Path) -> None:
    data = str(tmp_path)
    with start_site(tmp_path, data_dir=data, batches={"max_batch_bytes": 100}) as site:

        def refusal(**changes: Any) -> tuple[int, str, str | None]:
            fields = {"endpoint": COMPLETIONS, "completion_window": "24h", **changes}
            reply = site.client.post("/v1/batches", json=fields)
            error = reply.json()["error"]
            return reply.status_code, error["code"], error["param"]

        def upload(data: bytes, purpose: Any) -> str:
            made = site.openai.files.create(file=("x", data), purpose=purpose)
            return str(made.id)

        good, other = upload(b"{}", "batch"), upload(b"{}", "user_data")
        large = upload(bytes(101), "batch")
        missing = (400, "missing_required_parameter", "input_file_id")
        assert refusal() == missing
        assert refusal(input_file_id=5) == (400, "invalid_type", "input_file_id")
        assert refusal(input_file_id="file-0") == (404, "file_not_found", "input_file_id")
        for file_id in (other, large):
            assert refusal(input_file_id=file_id) == (400, "invalid_value", "input_file_id")
        for field, value in [
            ("endpoint", "/v1/embeddings"),
            ("completion_window", "1h"),
            ("metadata", {"k" * 65: "v"}),
            ("metadata", {"k": "v" * 513}),
            ("metadata", {str(n): "v" for n in range(17)}),
            ("output_expires_after", {"anchor": "created_at", "seconds": 3599}),
        ]:
            assert refusal(input_file_id=good, **{field: value}) == (400, "invalid_value", field)
        assert refusal(input_file_id=good, metadata={"k": 1})[1] == "invalid_type"
        assert not list((tmp_path / "batches").iterdir())
        assert site.client.get("/v1/batches").json()["data"] == []


def test_the_same_request_again_means_the_same_batch(site: Site) -> None:
    text = json.dumps(prompts(1)[0]).encode()
    file = site.openai.files.create(file=("in.jsonl", text), purpose="batch")
    fields = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    headers = {"idempotency-key": "once"}

    def post(**more: Any) -> httpx.Response:
        return site.client.post("/v1/batches", json={**fields, **more}, headers=headers)

    first, again, other = post(), post(), post(metadata={"a": "b"})
    assert first.json()["id"] == again.json()["id"]
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    headers["idempotency-key"] = "k" * 257
    assert post().json()["error"]["param"] == "idempotency_key"
    site.ended(first.json()["id"])


def test_cancelling_keeps_what_is_answered(site: Site) -> None:
    hold(site, 99)
    made = site.batch(*prompts(5), line("held", {"prompt": [99], "max_tokens": 3}), *prompts(9)[5:])
    site.until(
        lambda: site.openai.batches.retrieve(made.id).request_counts.completed == 9, "the others"
    )
    reply = site.client.post(f"/v1/batches/{made.id}/cancel")
    assert (reply.status_code, reply.json()["status"]) == (202, "cancelling")
    batch = site.ended(made.id, "cancelled")
    assert batch.cancelled_at >= batch.cancelling_at
    output, errors = site.results(batch)
    assert [entry["custom_id"] for entry in output] == [f"c{n}" for n in range(9)]
    (entry,) = errors
    assert (entry["custom_id"], entry["response"]) == ("held", None)
    assert entry["error"]["code"] == "batch_cancelled"
    again = site.openai.batches.cancel(made.id)
    assert again.status == "cancelled"
    site.until(lambda: not site.running.fake.jobs, "the pools have let go")
    site.running.fake.release([99])
    done = site.batch(*prompts(1))
    site.ended(done.id)
    with pytest.raises(openai.ConflictError):
        site.openai.batches.cancel(done.id)


def test_a_batch_that_takes_too_long_expires(tmp_path: Path) -> None:
    with start_site(tmp_path) as site:
        hold(site, 99)
        made = site.batch(*prompts(3), line("held", {"prompt": [99], "max_tokens": 3}))
        site.until(lambda: site.openai.batches.retrieve(made.id).request_counts.completed == 3)
        site.clock.offset_s = 86401
        batch = site.ended(made.id, "expired")
        assert batch.expired_at >= batch.expires_at
        output, errors = site.results(batch)
        assert len(output) == 3
        assert [(e["custom_id"], e["error"]["code"]) for e in errors] == [("held", "batch_expired")]
        site.clock.offset_s += 31 * 86400
        site.until(lambda: not site.client.get("/v1/batches").json()["data"], "it is forgotten")
        site.until(lambda: not site.stored(), "so are its files")


def test_documents_are_made_before_the_lines_that_name_them(site: Site) -> None:
    site.close_gate()
    part = {"type": "document", "document_id": "custom:doc"}
    question = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 3}
    made = site.batch(
        line("doc", {"source": {"text": "A book in a batch. " * 40}}, DOCUMENTS),
        line("ask", question, CHAT),
        line("broken", {"source": {"text": ""}}, DOCUMENTS),
        line("vain", {"document_id": "custom:broken", "messages": []}, CHAT),
        line("alone", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}, CHAT),
        endpoint=CHAT,
    )
    asked = site.server.asked
    begun = len(asked)
    site.until(lambda: site.openai.batches.retrieve(made.id).request_counts.completed == 1)
    assert not any("doc_" in json.dumps(body) for body in asked[begun:])
    site.open_gate()
    batch = site.ended(made.id)
    output, errors = site.results(batch)
    assert [entry["custom_id"] for entry in output] == ["doc", "ask", "alone"]
    document, answer = (entry["response"]["body"] for entry in output[:2])
    assert (document["object"], document["status"]) == ("document", "ready")
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= document["tokens"]["total"] // 16 * 16
    codes = [(e["custom_id"], e["response"]["body"]["error"]["code"]) for e in errors]
    assert codes == [("broken", "unprocessable_document"), ("vain", "dependency_failed")]


def test_lines_wait_while_others_ask(tmp_path: Path) -> None:
    with start_site(tmp_path, batches={"max_interactive": 0}) as site:
        hold(site, 77)
        stream = {"prompt": [77], "max_tokens": 3, "stream": True}
        with site.client.stream("POST", COMPLETIONS, json=stream) as reply:
            pieces = reply.iter_bytes()
            next(pieces)
            made = site.batch(*prompts(9))
            site.until(lambda: site.openai.batches.retrieve(made.id).status == "in_progress")
            assert site.client.get("/health").status_code == 200
            assert site.server.asked == []
            site.running.fake.release([77])
            site.ended(made.id)


def test_few_lines_run_at_once_and_batches_take_turns(tmp_path: Path) -> None:
    with start_site(tmp_path, batches={"max_running": 2}) as site:
        hold(site, 50)
        first = site.batch(*(line(f"a{n}", {"prompt": [50], "max_tokens": 3}) for n in range(20)))
        site.until(lambda: len(site.server.asked) == 2, "both slots are taken")
        second = site.batch(*(line(f"b{n}", {"prompt": [51 + n]}) for n in range(3)))
        site.until(lambda: site.openai.batches.retrieve(second.id).status == "in_progress")
        assert len(site.server.asked) == 2
        site.running.fake.release([50])
        assert site.ended(second.id).completed_at is not None
        assert site.ended(first.id).request_counts.completed == 20
        others = [n for n, body in enumerate(site.server.asked) if body["prompt"] != [50]]
        assert max(others) < 12  # they did not wait for the end of the first batch


def test_what_there_is_no_room_for_is_tried_again(site: Site) -> None:
    site.server.failures += [(status, {"error": {"code": "x"}}) for status in (503, 429, 507, 503)]
    batch = site.ended(site.batch(*prompts(2)).id)
    assert batch.request_counts.to_dict() == {"total": 2, "completed": 2, "failed": 0}
    assert site.server.failures == []


def test_deleting_the_input_takes_nothing_from_the_batch(site: Site) -> None:
    hold(site, 98)
    made = site.batch(line("held", {"prompt": [98], "max_tokens": 3}), *prompts(20))
    site.openai.files.delete(made.input_file_id)
    site.running.fake.release([98])
    assert site.ended(made.id).request_counts.completed == 21
    site.until(
        lambda: not list((site.running.jobs.folder / "batches").iterdir()), "the link is removed"
    )


def test_tenants_and_limits(tmp_path: Path) -> None:
    with start_site(tmp_path, api_keys=("one", "two"), batches={"max_open": 1}) as site:
        hold(site, 97)
        made = site.batch(line("held", {"prompt": [97], "max_tokens": 3}))
        with pytest.raises(openai.RateLimitError):
            site.batch(*prompts(1))
        other = site.openai.with_options(api_key="two")
        assert list(other.batches.list()) == []
        for ask in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                ask(made.id)
        with pytest.raises(openai.NotFoundError):
            other.batches.create(
                input_file_id=made.input_file_id,
                endpoint=COMPLETIONS,
                completion_window="24h",
            )
        site.running.fake.release([97])
        batch = site.ended(made.id)
        with pytest.raises(openai.NotFoundError):
            other.files.content(batch.output_file_id)
        assert len(site.results(batch)[0]) == 1


def test_a_key_that_is_gone_ends_its_lines(tmp_path: Path) -> None:
    data = str(tmp_path)
    with start_site(tmp_path, data_dir=data, api_keys=("one",)) as site:
        hold(site, 96)
        made = site.batch(line("held", {"prompt": [96], "max_tokens": 3}))
        site.until(lambda: site.server.asked)
    with start_site(tmp_path, data_dir=data, api_keys=("one", "two")) as site:
        batch = site.ended(made.id)
        assert batch.request_counts.completed == 1
        hold(site, 96)
        made = site.batch(line("held", {"prompt": [96], "max_tokens": 3}))
        site.until(lambda: site.server.asked[1:])
    with start_site(tmp_path, data_dir=data, api_keys=("two",)) as site:
        site.until(lambda: site.server.asked)
    with start_site(tmp_path, data_dir=data, api_keys=("one",)) as site:
        (entry,) = site.results(site.ended(made.id))[1]
        assert entry["response"]["body"]["error"]["code"] == "invalid_api_key"
