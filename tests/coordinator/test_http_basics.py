"""The surface over real HTTP: what each path answers when all is well."""

import json
from typing import Any

import pytest

from coordinator.validation.parameters import mixed_seed
from protocol.messages import PROTOCOL_VERSION, ComputeHere, Prefill, Reserve


def parse_path(header: str) -> dict[str, str]:
    return dict(part.strip().partition("=")[::2] for part in header.split(";"))


def test_completion_of_text(cluster: Any, helpers: Any) -> None:
    reply = cluster.complete("hello", max_tokens=5, temperature=0)
    assert reply.status_code == 200
    body = reply.json()
    expected = bytes(helpers.reply(b"hello", 5)).decode()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected, "length")
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    path = parse_path(reply.headers["x-baton-path"])
    assert path["computed"] == "5"
    assert "local" in path


def test_default_length_is_sixteen_for_completions_and_the_context_for_chat(cluster: Any) -> None:
    assert cluster.complete("abc").json()["usage"]["completion_tokens"] == 16
    body = cluster.chat("x" * 4000).json()
    assert body["usage"]["total_tokens"] == 4096


def test_a_long_prompt_goes_through_prefill(cluster: Any, helpers: Any) -> None:
    prompt = list(range(200, 0, -1)) * 2
    reply = cluster.complete(prompt, max_tokens=3, return_token_ids=True)
    (choice,) = reply.json()["choices"]
    assert choice["token_ids"] == helpers.reply(prompt, 3)
    assert choice["prompt_token_ids"] == prompt
    path = parse_path(reply.headers["x-baton-path"])
    assert (path["prefill"], path["ring"], path["computed"]) == ("prefill0", "2", "400")
    assert path["moved"] == "400"
    sent = cluster.fake.wait_for(  # the answer may be here before it is noted
        lambda: [m for m in cluster.fake.got(Prefill) if m.prompt_token_ids == tuple(prompt)]
    )
    assert sent[0].target_pool_id == path["decode"]


def test_a_returning_session_goes_home_and_moves_only_what_is_new(cluster: Any) -> None:
    first = [9, 8, 7] * 100
    reply = cluster.complete(first, max_tokens=2, session_id="s1")
    home = parse_path(reply.headers["x-baton-path"])["decode"]
    reply = cluster.client.post(
        "/v1/completions",
        json={"prompt": [*first, *([5] * 200)], "max_tokens": 2},
        headers={"X-Session-ID": "s1"},
    )
    path = parse_path(reply.headers["x-baton-path"])
    assert path["decode"] == home
    assert path["computed"] == path["moved"] == str(500 - 288)
    assert reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 288
    reply = cluster.complete([*first, 1, 2, 3], max_tokens=2, session_id="s1")
    path = parse_path(reply.headers["x-baton-path"])
    assert path == {"decode": home, "local": "", "cached": "288", "computed": "15"}


def test_many_prompts_and_choices_are_independent_requests(cluster: Any, helpers: Any) -> None:
    prompts = [[1, 2], [3], [4, 5, 6]]
    body = cluster.complete(prompts, n=2, max_tokens=4, seed=11, return_token_ids=True).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    for index, choice in enumerate(body["choices"]):
        assert choice["token_ids"] == helpers.reply(prompts[index // 2], 4)
    assert body["usage"]["prompt_tokens"] == 6
    assert body["usage"]["completion_tokens"] == 24
    seeds = {
        m.sampling.seed for m in cluster.fake.got(Reserve) if m.prompt_token_ids in ((1, 2), (3,))
    }
    assert seeds == {11, mixed_seed(11, 1)}


def test_chat(cluster: Any, helpers: Any) -> None:
    body = cluster.chat("hi", max_completion_tokens=4).json()
    (choice,) = body["choices"]
    prompt = b"user: hi\nassistant:"
    assert choice["message"]["content"] == bytes(helpers.reply(prompt, 4)).decode()
    assert choice["message"]["role"] == "assistant"
    assert body["object"] == "chat.completion"
    parts = [{"type": "text", "text": "hi"}]
    again = cluster.chat(parts, max_tokens=4).json()
    assert again["choices"][0]["message"] == choice["message"]


def test_echo(cluster: Any, helpers: Any) -> None:
    body = cluster.complete("ab", max_tokens=2, echo=True).json()
    assert body["choices"][0]["text"] == "ab" + bytes(helpers.reply(b"ab", 2)).decode()


def test_end_of_sequence_gives_no_text(cluster: Any, helpers: Any) -> None:
    cluster.fake.scripts[tuple(b"eos")] = helpers.Script(tokens=(72, 105, 257))
    body = cluster.complete("eos", max_tokens=10, return_token_ids=True).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "stop")
    assert choice["token_ids"] == [72, 105, 257]
    cluster.fake.scripts[tuple(b"stp")] = helpers.Script(tokens=(72, 105, 72))
    body = cluster.complete("stp", max_tokens=10, stop_token_ids=[105]).json()
    assert body["choices"][0]["text"] == "H"
    assert body["choices"][0]["stop_reason"] == 105


def test_models_tokenize_and_state(cluster: Any) -> None:
    client = cluster.client
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["root"], model["max_model_len"]) == ("arithmetic",) * 2 + (4096,)
    assert client.get("/v1/models/arithmetic").json() == model
    body = client.post("/tokenize", json={"prompt": "héy", "model": "arithmetic"}).json()
    assert (body["count"], body["max_model_len"]) == (4, 4096)
    back = client.post("/detokenize", json={"tokens": body["tokens"]}).json()
    assert back == {"prompt": "héy"}
    messages = [{"role": "user", "content": "x"}]
    assert client.post("/tokenize", json={"messages": messages}).json()["count"] > 1
    assert client.get("/health").status_code == 200
    assert client.get("/ready").json()["ready"] is True
    assert client.get("/version").json()["protocol"] == PROTOCOL_VERSION
    state = cluster.state()
    assert [pool["pool_id"] for pool in state["pools"]] == ["prefill0", "decode0", "decode1"]
    assert all(pool["serving"] for pool in state["pools"])


def test_metrics_and_timeline(cluster: Any) -> None:
    prompt = [3] * 300
    reply = cluster.client.post(
        "/v1/completions",
        json={"prompt": prompt, "max_tokens": 2},
        headers={"x-request-id": "my-request"},
    )
    assert reply.headers["x-request-id"] == "my-request"
    for name in ("my-request", reply.json()["id"], reply.json()["id"] + "-0"):
        timeline = cluster.client.get(f"/v1/requests/{name}/timeline").json()
        (request,) = timeline["requests"]
        assert next(iter(request["events"])) == "arrived"
        assert request["events"]["finished"] >= request["events"]["first_token"] > 0
        assert request["prefill"]["num_computed_tokens"] == 300
        assert request["transfer"]["transport"] == "fake"
    text = cluster.client.get("/metrics").text
    assert 'baton_requests_total{outcome="length"}' in text
    assert "baton_time_to_first_token_seconds_count" in text
    assert "baton_requests_leaked 0" in text
    missing = cluster.client.get("/v1/requests/nothing/timeline")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "request_not_found"


def test_prefill_is_never_asked_for_a_short_rest(cluster: Any) -> None:
    before = len(cluster.fake.got(ComputeHere))
    assert "local" in cluster.complete([7] * 128, max_tokens=1).headers["x-baton-path"]
    assert "prefill=" in cluster.complete([6] * 129, max_tokens=1).headers["x-baton-path"]
    assert len(cluster.fake.got(ComputeHere)) == before + 1


@pytest.mark.parametrize("scramble", [False, True])
def test_duplicates_and_gaps(cluster: Any, helpers: Any, scramble: bool) -> None:
    for prompt in ([1] * 20, [2] * 200):
        cluster.fake.scripts[tuple(prompt)] = helpers.Script(scramble=scramble)
        body = cluster.complete(prompt, max_tokens=9, return_token_ids=True).json()
        assert body["choices"][0]["token_ids"] == helpers.reply(prompt, 9)
        assert json.dumps(body)
