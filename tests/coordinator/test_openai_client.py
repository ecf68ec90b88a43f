"""OpenAI's own client, sync and async, as people call it."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest


@pytest.fixture
def client(cluster: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["arithmetic"]


def test_chat_whole_with_logprobs(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="arithmetic",
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        max_completion_tokens=4,
        n=2,
        logprobs=True,
        top_logprobs=3,
        seed=5,
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.choices[0].finish_reason == "length"
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == 4
    assert len(logprobs.content[0].top_logprobs) == 3
    assert "".join(e.token for e in logprobs.content) == reply.choices[0].message.content
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 8
    assert reply.usage.prompt_tokens_details is not None


def test_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="arithmetic",
            messages=[{"role": "user", "content": "stream"}],
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


def test_completions_with_extra_body(client: openai.OpenAI, helpers: Any) -> None:
    reply = client.completions.create(
        model="arithmetic",
        prompt=[1, 2, 3],
        max_tokens=5,
        logprobs=1,
        extra_body={"ignore_eos": True, "min_tokens": 5, "top_k": 3, "return_token_ids": True},
    )
    choice = reply.choices[0]
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == helpers.reply([1, 2, 3], 5)
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [-0.5] * 5


def test_completion_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(model="arithmetic", prompt="x", max_tokens=5, stream=True, n=2)
    )
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}


def test_errors_have_their_classes(cluster: Any, client: openai.OpenAI, helpers: Any) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="arithmetic", prompt="x", temperature=9)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")
    cluster.fake.scripts[(3, 3)] = helpers.Script(fail_after=1, fail_code="worker_lost")
    stream = client.completions.create(model="arithmetic", prompt=[3, 3], stream=True)
    with pytest.raises(openai.APIError, match="scripted"):
        list(stream)


def test_async_requests_at_once(cluster: Any, helpers: Any) -> None:
    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
            replies = await asyncio.gather(
                *(
                    client.completions.create(
                        model="arithmetic", prompt=[i] * (i * 9), max_tokens=7
                    )
                    for i in range(1, 31)
                )
            )
        return [reply.choices[0].text for reply in replies]

    texts = asyncio.run(ask_all())
    assert texts == [bytes(helpers.reply([i] * (i * 9), 7)).decode() for i in range(1, 31)]
