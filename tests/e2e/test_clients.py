"""Other people's clients against a real disaggregated cluster."""

import json
import socket
from collections.abc import Iterator

import openai
import pytest

from baton_client import BatonAPIError
from launcher.__main__ import main
from tests.e2e.cluster import Cluster, greedy, run_cluster, wait_until

MODEL = "arithmetic:layers=2,heads=4,kv_heads=2,vocab=512,max_len=4096"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    flags = ("--prefill", "cp2", "--decode", "tp1", "--kv-memory", "32MiB", "--block-size", "16")
    with run_cluster(MODEL, *flags) as running:
        yield running


@pytest.mark.cluster
def test_the_openai_client_streams(cluster: Cluster) -> None:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Tell me about rings. " * 30}],
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.completion_tokens == 20
        whole = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Tell me about rings. " * 30}],
            max_tokens=20,
            temperature=0,
        )
        again = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Tell me about rings. " * 30}],
            max_tokens=20,
            temperature=0,
        )
        assert whole.choices[0].message.content == again.choices[0].message.content
        assert text


@pytest.mark.cluster
def test_a_client_that_leaves_frees_every_block(cluster: Cluster) -> None:
    with cluster.client.complete_stream([5] * 2000, **greedy(1500)) as chunks:
        assert next(iter(chunks)).token_ids
    wait_until(lambda: cluster.state()["num_active_requests"] == 0, "the request goes on")
    cluster.assert_no_leaks()


@pytest.mark.cluster
def test_a_client_that_leaves_before_the_first_token(cluster: Cluster) -> None:
    host, port = cluster.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": list(range(400)) * 9, "max_tokens": 300}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=10.0) as connection:
            connection.sendall(head.encode() + body)
            wait_until(
                lambda: cluster.state()["num_active_requests"] > 0, "the request has not arrived"
            )
        wait_until(lambda: cluster.state()["num_active_requests"] == 0, "the request goes on")
    cluster.assert_no_leaks()


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b'{"prompt": ', None),
        (b'{"prompt": "", "max_tokens": 5}', "prompt"),
        (b'{"prompt": "x", "temperature": NaN}', None),
        (b'{"prompt": "x", "max_tokens": "5"}', "max_tokens"),
        (b'{"prompt": [1, 99999], "max_tokens": 5}', "prompt"),
        (b'{"prompt": [-1], "max_tokens": 5}', "prompt"),
        (b'{"prompt": "x", "n": true}', "n"),
    ],
)
def test_bad_requests_disturb_nobody(cluster: Cluster, content: bytes, param: str | None) -> None:
    headers = {"content-type": "application/json"}
    reply = cluster.http.post("/v1/completions", content=content, headers=headers)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert isinstance(error["code"], str)
    assert error["param"] == param
    assert len(cluster.tokens("the next request", 3)) == 3


@pytest.mark.cluster
def test_over_long_prompts_name_both_numbers(cluster: Cluster) -> None:
    with pytest.raises(BatonAPIError) as caught:
        cluster.client.complete([1] * 5000, max_tokens=4)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert "4096" in caught.value.message
    assert "5000" in caught.value.message


@pytest.mark.cluster
def test_the_doctor_finds_the_cluster_well(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """Right after a client has left, whose blocks are still on their way back."""
    with cluster.client.complete_stream([6] * 2000, **greedy(1500)) as chunks:
        next(iter(chunks))
    assert main(["doctor", "--json", "--url", cluster.url]) == 0
    report = json.loads(capsys.readouterr().out)
    told = {finding["name"]: finding["found"] for finding in report["findings"]}
    assert told["pools"] == "2 of 2 pools serve"
    assert told["requests"] == "0 active, 0 ended but still held"
    assert told["blocks"].startswith("all ") and told["blocks"].endswith(" accounted for, 0 held")
