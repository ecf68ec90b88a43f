"""Tools, reasoning and forms over HTTP: what pools answer becomes what clients read."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from protocol.messages import Prefill, Reserve

CHAT = "/v1/chat/completions"
MOVE = {
    "type": "function",
    "function": {
        "name": "move",
        "description": "Moves.",
        "parameters": {
            "type": "object",
            "properties": {"to": {"enum": ["left", "right"]}},
            "required": ["to"],
        },
    },
}
CALL = '<tool_call>\n{"name": "move", "arguments": {"to": "left"}}\n</tool_call>'
GO = [{"role": "user", "content": "go"}]


def script(cluster: Any, helpers: Any, answer: str, **fields: Any) -> dict[str, Any]:
    """A request whose prompt is answered by a text."""
    request = {"messages": GO, "max_tokens": 400, **fields}
    shown = {name: request[name] for name in ("messages", "tools") if name in request}
    prompt = cluster.client.post("/tokenize", json=shown).json()["tokens"]
    cluster.fake.scripts[tuple(prompt)] = helpers.Script(tokens=(*answer.encode(), 257))
    return request


def whole(cluster: Any, request: dict[str, Any]) -> Any:
    reply = cluster.client.post(CHAT, json=request)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def streamed(cluster: Any, request: dict[str, Any]) -> list[Any]:
    with cluster.client.stream("POST", CHAT, json={**request, "stream": True}) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line[:5] == "data:"]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def test_a_call_is_read_and_its_markup_is_not_shown(cluster: Any, helpers: Any) -> None:
    request = script(cluster, helpers, f"I go. {CALL}", tools=[MOVE])
    choice = whole(cluster, request)
    message = choice["message"]
    assert message["content"].strip() == "I go."
    [call] = message["tool_calls"]
    assert call["function"] == {"name": "move", "arguments": '{"to": "left"}'}
    assert call["type"] == "function" and call["id"]
    assert choice["finish_reason"] == "tool_calls"


def test_a_streamed_call_comes_in_deltas_and_leaks_nothing(cluster: Any, helpers: Any) -> None:
    request = script(cluster, helpers, f"I go. {CALL}", tools=[MOVE])
    chunks = streamed(cluster, request)
    deltas = [chunk["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    content = "".join(delta.get("content") or "" for delta in deltas)
    assert content.strip() == "I go."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "move" and calls[0]["id"]
    assert {call["index"] for call in calls} == {0}
    assert "".join(call["function"]["arguments"] for call in calls) == '{"to": "left"}'
    assert len(calls) > 3  # as they come, not at the end
    assert chunks[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("answer", ["<tool_call>no call</tool_call>", "plain <b>text</b>", "{"])
def test_what_is_no_call_is_text(cluster: Any, helpers: Any, answer: str) -> None:
    request = script(cluster, helpers, answer, tools=[MOVE])
    choice = whole(cluster, request)
    assert choice["message"]["content"] == answer
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    chunks = streamed(cluster, request)
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == answer


def test_without_tools_an_answer_is_its_text(cluster: Any, helpers: Any) -> None:
    request = script(cluster, helpers, CALL)
    assert whole(cluster, request)["message"]["content"] == CALL
    request = script(cluster, helpers, CALL, tools=[MOVE], tool_choice="none")
    assert whole(cluster, request)["message"]["content"] == CALL


def test_a_conversation_with_calls_goes_through_the_template(cluster: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "move", "arguments": '{"to":1}'}}
    messages = [
        *GO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    reply = cluster.client.post("/tokenize", json={"messages": messages, "tools": [MOVE]})
    text = bytes(reply.json()["tokens"]).decode()
    assert '<tool_call>{"name": "move", "arguments": {"to": 1}}</tool_call>' in text
    assert text.startswith("tools: [{")
    assert "tool: done" in text


def test_the_last_message_can_be_continued(cluster: Any) -> None:
    messages = [*GO, {"role": "assistant", "content": "I go to the "}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    reply = cluster.client.post("/tokenize", json={"messages": messages, **fields})
    assert bytes(reply.json()["tokens"]).decode() == "user: go\nassistant: I go to the"


def grammar_of(cluster: Any, request: dict[str, Any]) -> str:
    """What the pools were told that an answer is to be."""
    reply = cluster.client.post(CHAT, json=request)
    assert reply.status_code == 200, reply.text
    request_id = f"{reply.headers['x-request-id']}-0"
    told = [
        message.sampling.grammar
        for _, _, message in cluster.fake.received
        if isinstance(message, Reserve | Prefill) and message.request_id == request_id
    ]
    assert told and len(set(told)) == 1  # the pool that samples first, and the one that goes on
    return str(told[0])


def test_a_form_travels_to_every_pool_that_samples(cluster: Any, helpers: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    long = [{"role": "user", "content": "go " * 100}]  # a prefill pool takes it
    asked = script(cluster, helpers, "{}", messages=long, response_format=form)
    grammar = grammar_of(cluster, asked)
    assert json.loads(grammar)["grammars"][0]["json_schema"]["properties"] == schema["properties"]
    asked = script(cluster, helpers, CALL, tools=[MOVE], tool_choice="required")
    assert "<tool_call>" in grammar_of(cluster, asked)
    assert grammar_of(cluster, script(cluster, helpers, "x", tools=[MOVE])) == ""


@pytest.fixture(scope="module")
def thinker(start_coordinator: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A coordinator of a model that reasons."""
    folder = tmp_path_factory.mktemp("t")
    (folder / "template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: "
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
        "{% endif %}{% endif %}{# </think> #}"
    )
    with start_coordinator(folder, chat_template=str(folder / "template.jinja")) as running:
        yield running


def test_reasoning_is_apart_from_the_answer(thinker: Any, helpers: Any) -> None:
    request = script(thinker, helpers, "<think>\nwell\n</think>\n\nyes")
    message = whole(thinker, request)["message"]
    assert (message["content"], message["reasoning_content"].strip()) == ("yes", "well")
    assert message["reasoning"] == message["reasoning_content"]
    chunks = streamed(thinker, request)
    deltas = [chunk["delta"] for chunk in chunks]
    assert "".join(d.get("reasoning_content") or "" for d in deltas).strip() == "well"
    assert "".join(d.get("content") or "" for d in deltas) == "yes"
    silent = whole(thinker, {**request, "include_reasoning": False})["message"]
    assert silent["content"] == "yes" and "reasoning_content" not in silent


def test_the_template_is_told_what_a_request_says(thinker: Any) -> None:
    fields = {"messages": GO, "chat_template_kwargs": {"enable_thinking": False}}
    tokens = thinker.client.post("/tokenize", json=fields).json()["tokens"]
    assert bytes(tokens).decode().endswith("<think>\n\n</think>\n\n")
    reply: httpx.Response = thinker.client.post(
        CHAT, json={"messages": GO, "chat_template_kwargs": {"enable_thinkin": False}}
    )
    assert reply.status_code == 400
    assert "it uses enable_thinking" in reply.json()["error"]["message"]


def test_a_form_leaves_room_for_the_reasoning(thinker: Any, helpers: Any) -> None:
    asked = script(thinker, helpers, "{}", response_format={"type": "json_object"})
    main, answer = json.loads(grammar_of(thinker, asked))["grammars"]
    assert "</think>" in main["lark_grammar"]
    assert answer["json_schema"]["type"] == "object"


def test_tools_are_refused_where_the_template_has_none(thinker: Any) -> None:
    reply = thinker.client.post(CHAT, json={"messages": GO, "tools": [MOVE]})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "tools"


def test_openai_reads_a_streamed_call(cluster: Any, helpers: Any) -> None:
    request = script(cluster, helpers, CALL, tools=[MOVE])
    with (
        openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client,
        client.chat.completions.stream(model="arithmetic", **request) as stream,
    ):
        for _ in stream:
            pass
        choice = stream.get_final_completion().choices[0]
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("move", {"to": "left"})
