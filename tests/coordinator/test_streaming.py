"""Server-sent events, byte for byte, and what a caller sees when things go wrong in between."""

import contextlib
import json
import socket
from typing import Any

import pytest

from protocol.messages import Abort, Reserve


def frames(raw: bytes) -> list[str]:
    assert b"\r" not in raw
    assert raw.endswith(b"\n\n")
    return raw.decode().split("\n\n")[:-1]


def events(raw: bytes) -> list[Any]:
    datas = [f.removeprefix("data: ") for f in frames(raw) if not f.startswith(":")]
    return [None if data == "[DONE]" else json.loads(data) for data in datas]


def stream(cluster: Any, path: str = "/v1/completions", **fields: Any) -> bytes:
    reply = cluster.client.post(path, json={"stream": True, **fields})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["x-baton-path"].startswith("decode=")
    content: bytes = reply.content
    return content


def scrub(raw: bytes) -> str:
    """The stream with what differs from run to run replaced."""
    text = raw.decode()
    head = json.loads(text[len("data: ") : text.index("\n\n")])
    return text.replace(head["id"], "ID").replace(f'"created":{head["created"]}', '"created":0')


def test_golden_completion(cluster: Any, helpers: Any) -> None:
    cluster.fake.scripts[tuple(b"golden")] = helpers.Script(tokens=(72, 105, 257), hold_after=1)
    with cluster.client.stream(
        "POST",
        "/v1/completions",
        json={"prompt": "golden", "stream": True, "stream_options": {"include_usage": True}},
    ) as reply:
        pieces = reply.iter_bytes()
        raw = next(pieces)
        cluster.fake.release(b"golden")
        raw += b"".join(pieces)
    head = '"id":"ID","object":"text_completion","created":0,"model":"arithmetic","choices":'
    lines = [line for line in scrub(raw).split("\n\n") if not line.startswith(":")]
    assert lines == [
        f'data: {{{head}[{{"index":0,"text":"H","logprobs":null,"finish_reason":null}}],'
        f'"usage":null}}',
        f'data: {{{head}[{{"index":0,"text":"i","logprobs":null,"finish_reason":null}}],'
        f'"usage":null}}',
        f'data: {{{head}[{{"index":0,"text":"","logprobs":null,"finish_reason":"stop",'
        f'"stop_reason":null}}],"usage":null}}',
        f'data: {{{head}[],"usage":{{"prompt_tokens":6,"completion_tokens":3,"total_tokens":9,'
        f'"prompt_tokens_details":{{"cached_tokens":0}}}}}}',
        "data: [DONE]",
        "",
    ]


def test_chat_role_comes_with_the_first_content_and_the_finish_on_its_own(cluster: Any) -> None:
    raw = stream(
        cluster,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "q"}],
        max_tokens=6,
    )
    *chunks, done = events(raw)
    assert done is None
    first, *rest, last = (chunk["choices"][0] for chunk in chunks)
    assert first["delta"]["role"] == "assistant"
    assert first["delta"]["content"]
    assert all(set(choice["delta"]) == {"content"} for choice in rest)
    assert all(choice["finish_reason"] is None for choice in [first, *rest])
    assert (last["delta"], last["finish_reason"]) == ({}, "length")
    assert all("usage" not in chunk for chunk in chunks)


def test_no_output_at_all_still_has_a_role(cluster: Any, helpers: Any) -> None:
    prompt = b"user: empty\nassistant:"
    cluster.fake.scripts[tuple(prompt)] = helpers.Script(tokens=(257,))
    raw = stream(cluster, "/v1/chat/completions", messages=[{"role": "user", "content": "empty"}])
    first, last, done = events(raw)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert done is None


@pytest.mark.parametrize("prompt", [[1, 2, 3], [4] * 300])
def test_streamed_equals_whole(cluster: Any, prompt: list[int]) -> None:
    fields: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": 40,
        "return_token_ids": True,
        "n": 2,
        "logprobs": 2,
    }
    whole = cluster.client.post("/v1/completions", json=fields).json()
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, usage, done = events(stream(cluster, **fields, stream_options=options))
    assert done is None
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 80
    assert all(chunk["usage"]["prompt_tokens"] == len(prompt) for chunk in chunks)
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [t for c in mine for t in c["token_ids"]] == choice["token_ids"]
        assert mine[0]["prompt_token_ids"] == prompt
        assert "prompt_token_ids" not in mine[1]
        offsets = [o for c in mine if c["logprobs"] for o in c["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]


def test_characters_are_never_split(cluster: Any, helpers: Any) -> None:
    text = "añ👩‍👩‍👧 한국어 é\u2028 data: [DONE]\n\n z"
    cluster.fake.scripts[tuple(b"utf8")] = helpers.Script(tokens=(*text.encode(), 257))
    *chunks, _ = events(stream(cluster, prompt="utf8", max_tokens=100))
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_true_invalid_bytes_become_replacement_characters(cluster: Any, helpers: Any) -> None:
    cluster.fake.scripts[tuple(b"bad")] = helpers.Script(tokens=(0x61, 0xFF, 0x62, 0xE2, 0x82))
    *chunks, _ = events(stream(cluster, prompt="bad", max_tokens=5))
    # The fake ends with STOP, so its last token is the one that gives no text.
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "a\ufffdb\ufffd"


def test_stop_string_over_token_boundaries_never_leaks(cluster: Any, helpers: Any) -> None:
    script = helpers.Script(tokens=tuple(b"one two STOP three"), hold_after=None)
    cluster.fake.scripts[tuple(b"halt")] = script
    *chunks, _ = events(stream(cluster, prompt="halt", max_tokens=50, stop=["STOP", "zzz"]))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two "
    assert chunks[-1]["choices"][0]["stop_reason"] == "STOP"
    shown = cluster.complete(
        "halt", max_tokens=50, stop="STOP", include_stop_str_in_output=True
    ).json()
    assert shown["choices"][0]["text"] == "one two STOP"
    assert shown["choices"][0]["finish_reason"] == "stop"


def test_a_stop_string_aborts_both_pools(cluster: Any, helpers: Any) -> None:
    prompt = [88] * 300
    cluster.fake.scripts[tuple(prompt)] = helpers.Script(tokens=tuple(b"abSTOPcdef"), hold_after=6)
    counted = delivered(cluster)
    body = cluster.complete(prompt, max_tokens=50, stop="STOP").json()
    assert body["choices"][0]["text"] == "ab"
    assert body["usage"]["completion_tokens"] == 6, "up to the end of the stop string"
    assert delivered(cluster) == counted + 6
    request_id = body["id"].removeprefix("cmpl-") + "-0"
    cluster.fake.wait_for(
        lambda: [m for m in cluster.fake.got(Abort, "prefill0") if m.request_id == request_id]
    )


def delivered(cluster: Any) -> float:
    """Output tokens as ``/metrics`` counts them."""
    lines = cluster.client.get("/metrics").text.splitlines()
    name = "baton_output_tokens_total "
    return float(next(line for line in lines if line.startswith(name)).removeprefix(name))


def test_keep_alives_tell_the_progress(cluster: Any, helpers: Any) -> None:
    prompt = [77] * 300
    cluster.fake.scripts[tuple(prompt)] = helpers.Script(hold_after=0)
    with cluster.client.stream(
        "POST", "/v1/completions", json={"prompt": prompt, "stream": True, "max_tokens": 3}
    ) as reply:
        assert reply.headers["x-baton-path"].endswith("prefill=prefill0")
        pieces = reply.iter_bytes()
        assert next(pieces) == b": prefill 150/300\n\n"
        cluster.fake.release(prompt)
        assert b"[DONE]" in b"".join(pieces)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_failure_before_the_first_token_is_plain_json(
    cluster: Any, helpers: Any, is_stream: bool
) -> None:
    cluster.fake.scripts[(5, 5)] = helpers.Script(
        fail_after=0, ticket=False, fail_code="kv_capacity_exceeded"
    )
    reply = cluster.complete([5, 5], stream=is_stream)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "kv_capacity_exceeded"
    cluster.fake.scripts[(5, 5)].fail_code = "something_else"
    reply = cluster.complete([5, 5], stream=is_stream)
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"


def test_a_failure_after_the_first_token_is_an_error_event_without_done(
    cluster: Any, helpers: Any
) -> None:
    prompt = [6] * 200
    cluster.fake.scripts[tuple(prompt)] = helpers.Script(fail_after=2, fail_code="worker_lost")
    got = events(stream(cluster, prompt=prompt, max_tokens=9))
    assert got[-1]["error"]["code"] == "worker_lost"
    assert all(event is not None for event in got)
    assert got[0]["choices"][0]["text"]


@pytest.mark.parametrize("phase", ["queued", "prefilling", "streaming"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_disconnect_reaches_every_pool(
    cluster: Any, helpers: Any, phase: str, is_stream: bool
) -> None:
    prompt = [40 + len(phase) + is_stream] * 250
    script = helpers.Script(ticket=phase != "queued", hold_after=0 if phase == "prefilling" else 3)
    cluster.fake.scripts[tuple(prompt)] = script
    body = json.dumps({"prompt": prompt, "stream": is_stream, "max_tokens": 50}).encode()
    host, port = cluster.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        job = cluster.fake.wait_for(
            lambda: next(
                (
                    j
                    for j in list(cluster.fake.jobs.values())
                    if j.reserve.prompt_token_ids == tuple(prompt)
                    and (phase == "queued" or j.prefill)
                    and (phase != "streaming" or j.num_sent == 3)
                ),
                None,
            ),
            phase,
        )
    pools = {job.decode} if phase == "queued" else {job.decode, "prefill0"}
    request_id = job.reserve.request_id
    cluster.fake.wait_for(
        lambda: {
            pool for pool, _, m in cluster.fake.received
            if isinstance(m, Abort) and m.request_id == request_id
        } == pools,
        "aborts",
    )  # fmt: skip


def test_a_reader_who_stops_is_cut_off(cluster: Any, helpers: Any) -> None:
    cluster.fake.scripts[tuple(b"slow")] = helpers.Script(hold_after=900)
    body = json.dumps(
        {"prompt": "slow", "stream": True, "max_tokens": 1000, "n": 8, "logprobs": 20}
    ).encode()
    host, port = cluster.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect((host, int(port)))
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        reserves = cluster.fake.wait_for(
            lambda: [
                m.request_id
                for m in cluster.fake.got(Reserve)
                if m.prompt_token_ids == tuple(b"slow")
            ]
        )
        cluster.fake.wait_for(
            lambda: any(m.request_id == reserves[0] for m in cluster.fake.got(Abort))
        )
        received = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 16):
                received += data
    assert received.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" not in received
    assert not received.endswith(b"0\r\n\r\n")
