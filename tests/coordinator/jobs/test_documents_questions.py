"""Requests that begin with a document."""

import json
from datetime import datetime
from typing import Any

import httpx
import pytest

from coordinator.jobs.questions.canonical import apart, encode_document, joined, show
from coordinator.jobs.questions.questions import Attached
from coordinator.text.tokenizing import TextTools
from modeling.text.chat_template import ChatTemplate, encode_chat
from modeling.text.tokenizer import ByteTokenizer
from protocol.errors import RequestError
from tests.coordinator.jobs.world import Site

TEXT = "Baton hands the KV cache over. " * 30
BLOCK = 16
NOW = datetime(2026, 11, 30, 12)


def full_blocks(num_tokens: int) -> int:
    return num_tokens // BLOCK * BLOCK


def complete(site: Site, document_id: str, prompt: Any, **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "document_id": document_id, "max_tokens": 4, **fields}
    return site.client.post("/v1/completions", json=body)


def code_of(reply: httpx.Response) -> tuple[int, str, str]:
    error = reply.json()["error"]
    return reply.status_code, error["code"], error["param"]


@pytest.fixture
def ready(site: Site) -> str:
    document_id: str = site.ingest(text=TEXT)["id"]
    site.wait(document_id)
    return document_id


def test_a_chat_question_hits_the_document(site: Site, ready: str) -> None:
    answer = site.ask(ready, "What is handed over?", return_token_ids=True)
    prompt = bytes(answer["choices"][0]["prompt_token_ids"]).decode()
    assert prompt == f"user: {TEXT}\n\nWhat is handed over?\nassistant:"
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= full_blocks(len(f"user: {TEXT}"))
    assert "cache_miss" not in answer


def test_the_same_prefix_without_a_document_hits_too(site: Site, ready: str) -> None:
    assert ready
    messages = [{"role": "user", "content": TEXT + "Anything?"}]
    reply = site.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    cached = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= full_blocks(len(f"user: {TEXT}"))


def test_streamed(site: Site, ready: str) -> None:
    parts = [{"type": "document", "document_id": ready}, {"type": "text", "text": "Who?"}]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": "mine",
    }
    text = site.client.post("/v1/chat/completions", json=body).text
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    promised = full_blocks(len(f"user: {TEXT}"))
    assert chunks[-1]["cache_miss"] == {"reason": "prefix_changed", "missed_tokens": promised}
    assert all("cache_miss" not in chunk for chunk in chunks[:-1])


def test_completion_of_a_text_document(site: Site) -> None:
    made = site.post(source={"text": TEXT}, form="text").json()
    site.wait(made["id"])
    body = complete(site, made["id"], " And then", return_token_ids=True).json()
    assert bytes(body["choices"][0]["prompt_token_ids"]).decode() == f"{TEXT} And then"
    cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == full_blocks(len(TEXT))
    ids = complete(site, made["id"], list(b" And then"), return_token_ids=True).json()
    assert ids["choices"] == body["choices"]
    two = complete(site, made["id"], ["a", "b"]).json()
    assert len(two["choices"]) == 2
    bare = site.client.post(
        "/v1/completions",
        json={"document_id": made["id"], "max_tokens": 1, "return_token_ids": True},
    )
    assert bytes(bare.json()["choices"][0]["prompt_token_ids"]).decode() == TEXT


def test_the_other_form_is_computed_anew(site: Site, ready: str) -> None:
    text = "Some other text, so that nothing of it is cached. " * 10
    chat = site.ingest(text=text)["id"]
    site.wait(chat)
    body = complete(site, chat, "?", return_token_ids=True).json()
    assert bytes(body["choices"][0]["prompt_token_ids"]).decode() == f"{text}?"
    promised = full_blocks(len(f"user: {text}"))
    assert body["cache_miss"] == {"reason": "prefix_changed", "missed_tokens": promised}
    plain = site.post(source={"text": text + "!"}, form="text").json()["id"]
    site.wait(plain)
    answer = site.ask(plain, "?", return_token_ids=True)
    prompt = bytes(answer["choices"][0]["prompt_token_ids"]).decode()
    assert prompt == f"user: {text}!\n\n?\nassistant:"
    assert ready


def test_token_ids_are_taken_as_they_are(site: Site) -> None:
    token_ids = [7 * n % 251 for n in range(300)]
    for form in ("text", "chat"):
        made = site.post(source={"token_ids": token_ids}, form=form).json()
        assert made["tokens"]["total"] == 300
        site.wait(made["id"])
        body = complete(site, made["id"], [1, 2, 3], return_token_ids=True).json()
        assert body["choices"][0]["prompt_token_ids"] == [*token_ids, 1, 2, 3]
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == full_blocks(300)
        answer = site.ask(made["id"], "?", return_token_ids=True)
        prompt = answer["choices"][0]["prompt_token_ids"]
        before = [] if form == "chat" else list(b"user: ")
        assert prompt == [*before, *token_ids, *b"\n\n?\nassistant:"]
        assert ("cache_miss" in answer) == (form == "text")


def test_system_messages_must_be_the_same(site: Site) -> None:
    system = {"role": "system", "content": "Be brief."}
    made = site.ingest(messages=[system, {"role": "user", "content": TEXT}])
    found = site.wait(made["id"])
    part = {"type": "document", "document_id": made["id"]}
    question = {"role": "user", "content": [part, {"type": "text", "text": "So?"}]}

    def ask(*messages: Any) -> httpx.Response:
        body = {"messages": messages, "max_tokens": 2}
        return site.client.post("/v1/chat/completions", json=body)

    usage = ask(system, question).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= full_blocks(found["tokens"]["total"])
    for before in ((), ({"role": "system", "content": "Be long."},), (system, system)):
        assert code_of(ask(*before, question)) == (400, "document_prefix", "messages")
    follow_up = [{"role": "assistant", "content": "It is."}, {"role": "user", "content": "Why?"}]
    assert ask(system, question, *follow_up).status_code == 200
    assert code_of(complete(site, made["id"], "?")) == (400, "document_form", "document_id")


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "first"}, {"type": "document", "document_id": "doc_1"}],
        [{"type": "document", "document_id": "d"}, {"type": "document", "document_id": "d"}],
        [{"type": "document"}],
        [{"type": "document", "document_id": 5}],
        [{"type": "document", "document_id": ""}],
    ],
)
def test_where_a_document_may_stand(site: Site, content: Any) -> None:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    reply = site.client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")


def test_only_the_first_user_message_has_one(site: Site, ready: str) -> None:
    part = {"type": "document", "document_id": ready}
    messages = [{"role": "user", "content": "Hello."}, {"role": "user", "content": [part]}]
    reply = site.client.post("/v1/chat/completions", json={"messages": messages})
    assert code_of(reply) == (400, "unsupported_content", "messages")
    alone = [{"role": "user", "content": [part]}]
    reply = site.client.post("/v1/chat/completions", json={"messages": alone, "max_tokens": 1})
    assert reply.status_code == 200
    body = {"messages": alone, "document_id": ready}
    reply = site.client.post("/v1/chat/completions", json=body)
    assert code_of(reply) == (400, "unsupported_parameter", "document_id")


def test_not_ready_and_not_usable(site: Site) -> None:
    site.close_gate()
    document_id = site.ingest(text="Not yet. " * 50)["id"]
    assert code_of(complete(site, document_id, "?")) == (409, "document_not_ready", "document_id")
    site.post(f"/{document_id}/cancel")
    assert code_of(complete(site, document_id, "?"))[:2] == (400, "document_not_usable")
    unknown = complete(site, "doc_" + "0" * 32, "?")
    assert code_of(unknown) == (404, "document_not_found", "document_id")


def test_evicted_blocks_are_told(site: Site) -> None:
    text = "Evicted later. " * 40
    document_id = site.ingest(text=text)["id"]
    site.wait(document_id)
    site.evict(site.hashes_of(document_id))
    answer = site.ask(document_id, "Where is it?")
    promised = full_blocks(len(f"user: {text}"))
    assert answer["cache_miss"] == {"reason": "evicted", "missed_tokens": promised}
    assert site.get(document_id)["status"] == "evicted"
    assert "cache_miss" not in site.ask(document_id, "Where is it?")  # the question brought it


def test_a_prompt_that_is_too_long_together(site: Site) -> None:
    document_id = site.ingest(text="long " * 800)["id"]
    site.wait(document_id)
    reply = complete(site, document_id, "x" * 200)
    assert code_of(reply)[:2] == (400, "context_length_exceeded")


TEMPLATES = {
    "headers": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "system": (
        "{% if messages[0]['role'] != 'system' %}Default.\n{% endif %}"
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    ),
    "bare": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("text", ["a document", "  spaces \n", "it says <|im_end|>\U000f0000 here"])
def test_document_and_rest_are_the_whole_conversation(name: str, text: str) -> None:
    tokenizer = ByteTokenizer(512)
    template = ChatTemplate(TEMPLATES[name], name, tokenizer.special_tokens)
    tools = TextTools(tokenizer, template)
    question = {"role": "user", "content": "What does it say?"}
    made = encode_document(tools, text, "chat", (), NOW)
    shown = show(tools, text, [question])
    assert (made.shown, made.varies_with) == (shown.digest, ())
    tokens = made.token_ids + shown.encode_rest()
    whole = [{"role": "user", "content": joined(text, question["content"])}]
    assert tokens == encode_chat(template, tokenizer, whole)


def test_a_template_that_hides_the_message() -> None:
    tokenizer = ByteTokenizer(512)
    for source in ("{{ messages | length }}", "{{ messages[0]['content'] * 2 }}"):
        tools = TextTools(tokenizer, ChatTemplate(source, "odd", {}))
        with pytest.raises(RequestError) as caught:
            encode_document(tools, "text", "chat", (), NOW)
        assert caught.value.code == "template_error"


def test_what_follows_stands_apart() -> None:
    assert [apart(rest) for rest in ("", "a", " a", "\na")] == ["", "\n\na", " a", "\na"]


def test_a_pool_that_is_lost_is_the_reason() -> None:
    attached = Attached("doc_1", "salt", 64, "evicted")
    assert attached.cache_miss(64, is_retried=True) is None
    assert attached.cache_miss(80, is_retried=False) is None
    assert attached.cache_miss(32, is_retried=True) == {
        "reason": "worker_lost",
        "missed_tokens": 32,
    }
