"""The catalogue of bad input: each row is refused in its way, and the next request is served."""

import json
import logging
from typing import Any

import pytest

from coordinator.validation.schemas import MAX_UNKNOWN_FIELDS, CompletionBody, UnknownFields

OK = {"prompt": "fine", "max_tokens": 2}
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def check_error(reply: Any, status: int, code: str | None = None, param: str | None = None) -> None:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert error["message"]
    if code is not None:
        assert error["code"] == code, error
    if param is not None:
        assert error["param"] == param, error


@pytest.fixture
def post(cluster: Any) -> Any:
    """Posts raw bytes, and checks afterwards that the next request is served as ever."""

    def send(body: bytes, path: str = COMPLETIONS, **headers: str) -> Any:
        return cluster.client.post(
            path, content=body, headers={"content-type": "application/json", **headers}
        )

    yield send
    assert cluster.client.post(COMPLETIONS, json=OK).status_code == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"prompt":"x"} x', "invalid_json"),
        (b"[]", "invalid_type"),
        (b"null", "invalid_type"),
        (b'"x"', "invalid_type"),
        (b"123", "invalid_type"),
        (b'\xef\xbb\xbf{"prompt":"x"}', "invalid_encoding"),
        ('{"prompt":"x"}'.encode("utf-16"), "invalid_encoding"),
        (b'{"prompt":"\xff\xfe"}', "invalid_encoding"),
        (b'{"prompt":"\xc0\x80"}', "invalid_encoding"),
        (b'{"prompt":"x","temperature":NaN}', "invalid_json"),
        (b'{"prompt":"x","n":Infinity}', "invalid_json"),
        (b'{"prompt":"x","foo":{"a":[-Infinity]}}', "invalid_json"),
        (b'{"prompt":"x","temperature":1e400}', "invalid_json"),
        (b'{"prompt":"x","logit_bias":{"1":NaN}}', "invalid_json"),
        (b'{"prompt":"x","n":1,"n":7}', "duplicate_key"),
        (b'{"prompt":"x","foo":{"a":1,"a":1}}', "duplicate_key"),
        (b'{"prompt":"x","foo":' + b"[" * 33 + b"]" * 33 + b"}", "too_deep"),
        (b'{"prompt":"x","foo":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep"),
        (b'{"a":' * 1000 + b"1" + b"}" * 1000, "too_deep"),
        (b'{"prompt":"x","n":' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"messages":[' + b'{"a":1},' * 50_000 + b"{}]}", "too_large"),
        (b'{"prompt":"\\ud800"}', "invalid_unicode"),
        (b'{"prompt":"\\udc00\\ud800"}', "invalid_unicode"),
        (b'{"prompt":"x","stop":"\\ud83d"}', "invalid_unicode"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_json(post: Any, body: bytes, code: str) -> None:
    check_error(post(body), 400, code)


def test_an_integer_of_too_many_digits_is_told_in_our_words(post: Any) -> None:
    message = post(b'{"prompt":"x","n":' + b"9" * 5000 + b"}").json()["error"]["message"]
    assert message == "an integer of the body has more digits than any field takes"


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":"x","max_tokens":1,"temperature":-0.0}',
        b'{"prompt":"x","max_tokens":1,"temperature":1e-320}',
        b'{"prompt":"x","max_tokens":1,"foo":1,"__proto__":{},"__class__":2}',
        b'{"prompt":"\\ud83d\\ude00","max_tokens":1}',
        '{"prompt":"\\u0000\ufffe\ufeff\u202e\u2028","max_tokens":1}'.encode(),
        b'{"prompt":"x","max_tokens":1,"stop":null,"n":null,"seed":null,"tools":null,"stream":null}',
        b'{"prompt":"x","max_tokens":1,"repetition_penalty":1.0,"logprobs":null,"top_k":-1}',
        b'{"prompt":[0],"max_tokens":1}',
        b'{"prompt":"   ","max_tokens":1}',
        b'{"prompt":[256,257],"max_tokens":1}',
        b'{"prompt":[226,130],"max_tokens":1}',
    ],
)
def test_odd_but_served(post: Any, body: bytes) -> None:
    assert post(body).status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/x-www-form-urlencoded"])
def test_content_type(post: Any, content_type: str) -> None:
    body = json.dumps(OK).encode()
    check_error(post(body, **{"content-type": content_type}), 415, "unsupported_media_type")
    assert post(body, **{"content-type": "application/json; charset=utf-8"}).status_code == 200
    check_error(post(body, **{"content-encoding": "gzip"}), 415, "unsupported_encoding")


FIELDS: list[tuple[str, list[Any]]] = [
    ("n", [0, -1, 129, 10**30, 1.5, True, "5"]),
    ("temperature", [-0.1, 2.01, "hot", True, [], 10**400]),
    ("top_p", [0, 1.0001, -1, "1"]),
    ("min_p", [1.1, -0.1]),
    ("top_k", [-2, 1.5, True, 2**31]),
    ("max_tokens", [-1, 2**31, 2**63, 1.0, True, "5", 5000]),
    ("logit_bias", [{"AI": 1}, {"-1": 1}, {"1e3": 1}, {"99999999": 1}, {str(10**18): 1}, {"": 1}]),
    (
        "logit_bias",
        [{"05": 1}, {"1": 101}, {"1": "x"}, {"1": True}, [1], {str(i): 1 for i in range(2000)}],
    ),
    ("stop", [["a"] * 33, "", [""], "x" * 257, [1], 5, {}]),
    ("seed", [2**63, 2**64, 1.5, "1", True]),
    ("presence_penalty", [-2.1, 2.1]),
    ("frequency_penalty", [-2.1, "1"]),
    ("repetition_penalty", [0, -1]),
    ("stream", ["yes", 1]),
    ("min_tokens", [-1, 17, 1.5]),
    ("stop_token_ids", [[-1], [10**6], ["a"], [True], 5]),
    ("user", ["x" * 1_000_00, 5]),
    ("metadata", ["x", {"a": "x" * 100_000}]),
    ("session_id", ["", "x" * 257, 5]),
    ("cache_salt", ["", "x" * 65, "../", "a\nb", "\U0001f600", 5]),
    ("model", [5]),
    ("ignore_eos", [1, "true"]),
    ("return_token_ids", [1]),
]


@pytest.mark.parametrize(
    ("param", "value"),
    [(param, value) for param, values in FIELDS for value in values],
    ids=lambda value: repr(value)[:24],
)
def test_fields(post: Any, param: str, value: Any) -> None:
    extra = {"max_tokens": 16} if param == "min_tokens" else {}
    body = json.dumps({"prompt": "x", **extra, param: value}).encode()
    check_error(post(body), 400, param=None if value == 10**400 else param)
    chat = json.dumps({"messages": HELLO, **extra, param: value}).encode()
    check_error(post(chat, CHAT), 400, param=None if value == 10**400 else param)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"logprobs": -1}, "logprobs"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (CHAT, {"logprobs": 5}, "logprobs"),
        (CHAT, {"top_logprobs": 5}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        (COMPLETIONS, {"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        (COMPLETIONS, {"min_tokens": 10**6}, "min_tokens"),
        (COMPLETIONS, {"best_of": 3}, "best_of"),
        (COMPLETIONS, {"echo": True, "logprobs": 1}, "echo"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"response_format": {"type": "yaml"}}, "response_format"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
        (CHAT, {"response_format": "json_object"}, "response_format"),
        (COMPLETIONS, {"structured_outputs": {}}, "structured_outputs"),
        (COMPLETIONS, {"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        (COMPLETIONS, {"structured_outputs": {"yaml": "a"}}, "structured_outputs"),
        (COMPLETIONS, {"structured_outputs": {"choice": []}}, "structured_outputs"),
        (COMPLETIONS, {"structured_outputs": {"choice": [1]}}, "structured_outputs"),
        (COMPLETIONS, {"guided_json": "{"}, "guided_json"),
        (COMPLETIONS, {"guided_json": {"type": "strin"}}, "guided_json"),
        (COMPLETIONS, {"guided_regex": "("}, "guided_regex"),
        (COMPLETIONS, {"guided_regex": ""}, "guided_regex"),
        (COMPLETIONS, {"guided_choice": ["x" * 300_000]}, "guided_choice"),
        (COMPLETIONS, {"guided_grammar": "start: <[999999]>"}, "guided_grammar"),
        (COMPLETIONS, {"structural_tag": {"triggers": []}}, "structural_tag"),
        (COMPLETIONS, {"regex": "a", "ebnf": 'root ::= "a"'}, "ebnf"),
        (COMPLETIONS, {"regex": "a", "min_tokens": 1}, "min_tokens"),
        (COMPLETIONS, {"regex": "a", "ignore_eos": True}, "ignore_eos"),
        (CHAT, {"tools": {}}, "tools"),
        (CHAT, {"tools": [TOOL, TOOL]}, "tools"),
        (CHAT, {"tools": [{**TOOL, "type": "web"}]}, "tools"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        (CHAT, {"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        (CHAT, {"tools": [TOOL], "regex": "a"}, "regex"),
        (CHAT, {"continue_final_message": True}, "continue_final_message"),
        (COMPLETIONS, {"tools": [TOOL]}, "tools"),
        (CHAT, {"chat_template": "{{ 1 }}"}, "chat_template"),
        (CHAT, {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        (COMPLETIONS, {"kv_transfer_params": {}}, "kv_transfer_params"),
        (COMPLETIONS, {"prompt_embeds": "x"}, "prompt_embeds"),
        (COMPLETIONS, {"remote_host": "x"}, "remote_host"),
        (COMPLETIONS, {"block_ids": [1]}, "block_ids"),
        (COMPLETIONS, {"suffix": "x"}, "suffix"),
        (COMPLETIONS, {"prompt": ["x"] * 128, "n": 16}, "n"),
        (COMPLETIONS, {"min_tokens": 1, "max_tokens": 0}, "min_tokens"),
        (CHAT, {"ebnf": "root ::= x"}, "ebnf"),
        (CHAT, {"enable_thinking": False}, "enable_thinking"),
        (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
        (CHAT, {"priority": 1}, "priority"),
        (CHAT, {"service_tier": "flex"}, "service_tier"),
        (CHAT, {"typical_p": 0.9}, "typical_p"),
        (CHAT, {"extra_body": {"top_k": 1}}, "extra_body"),
        (COMPLETIONS, {"max_new_tokens": 5}, "max_new_tokens"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
        (COMPLETIONS, {"document_id": 5}, "document_id"),
        (CHAT, {"document_id": "x"}, "document_id"),  # there it is a content part
        (COMPLETIONS, {"messages": HELLO}, "messages"),  # the other endpoint's
        (COMPLETIONS, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"prompt": "x"}, "prompt"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"maxTokens": 5}, "maxTokens"),  # ours in another spelling
        (CHAT, {"stop-sequences": ["a"]}, "stop-sequences"),
        (CHAT, {"system": "Be brief."}, "system"),
        (COMPLETIONS, {"truncate": 5}, "truncate"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_fields_together(post: Any, path: str, fields: dict[str, Any], param: str) -> None:
    prompt = {"prompt": "x"} if path == COMPLETIONS else {"messages": HELLO}
    check_error(post(json.dumps({**prompt, **fields}).encode(), path), 400, param=param)


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["a", "b", "c", "d", "e", "f"]},
        {"n": 16},
        {"functions": [], "tools": [], "documents": []},
        {"chat_template_kwargs": {}, "priority": 0, "service_tier": "auto"},
        {"typical_p": 1.0, "length_penalty": 1, "num_beams": 1, "do_sample": True},
        {"store": False, "parallel_tool_calls": True, "safety_identifier": "x", "verbosity": None},
        {"echo": False, "best_of": 1, "top_logprobs": 0},
    ],
    ids=lambda value: repr(value)[:50],
)
def test_what_changes_nothing_is_served(post: Any, fields: dict[str, Any]) -> None:
    for path, prompt in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": HELLO})):
        body = json.dumps({**prompt, "max_tokens": 2, **fields}).encode()
        assert post(body, path).status_code == 200


def test_an_unknown_field_is_logged_once(post: Any, caplog: pytest.LogCaptureFixture) -> None:
    fields = {**OK, "frequency_pennalty": 1.0, "priority": 0, "store": True}
    assert post(json.dumps(fields).encode()).status_code == 200
    unknown = UnknownFields()
    with caplog.at_level(logging.INFO, logger="coordinator.validation.schemas"):
        for _ in range(3):
            unknown.note(CompletionBody, fields)
        unknown.note_message({"weight"})
        unknown.note_message({"weight"})
        unknown.note(CompletionBody, {str(n): None for n in range(2 * MAX_UNKNOWN_FIELDS)})
    first, second, *others = [record.getMessage() for record in caplog.records]
    assert first == "requests have the unknown field 'frequency_pennalty': it is ignored"
    assert second == "messages have the unknown field 'weight': it is ignored"
    assert len(others) == MAX_UNKNOWN_FIELDS - 2


def test_no_token_is_a_number_of_tokens(cluster: Any) -> None:
    reply = cluster.complete("abc", max_tokens=0, echo=True).json()
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert reply["usage"]["completion_tokens"] == 0
    chat = {
        "messages": HELLO,
        "max_completion_tokens": 0,
        "max_tokens": 5,
        "return_token_ids": True,
    }
    (choice,) = cluster.client.post(CHAT, json=chat).json()["choices"]
    assert (choice["message"]["content"], choice["token_ids"]) == ("", [])


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([-1], "invalid_value"),
        ([10**6], "invalid_value"),
        ([2**63], "invalid_value"),
        ([1.5], "invalid_type"),
        ([True], "invalid_type"),
        ([None], "invalid_type"),
        ([1, "a"], "invalid_type"),
        (["a", 1], "invalid_type"),
        ([[1], "a"], "invalid_type"),
        ([], "empty_prompt"),
        ([[1], []], "empty_prompt"),
        ("", "empty_prompt"),
        ([""], "empty_prompt"),
        ({}, "invalid_type"),
        (None, "missing_required_parameter"),
        (5, "invalid_type"),
        (["a"] * 129, "invalid_value"),
        ([1] * 4096, "context_length_exceeded"),
        ([1] * 5000, "context_length_exceeded"),
        ("a" * 4096, "context_length_exceeded"),
        ("a" * 500_000, "context_length_exceeded"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_prompts(post: Any, prompt: Any, code: str) -> None:
    check_error(post(json.dumps({"prompt": prompt}).encode()), 400, code, "prompt")


def test_the_longest_prompt_is_served(cluster: Any) -> None:
    body = cluster.complete([1] * 4095).json()
    assert body["usage"]["completion_tokens"] == 1
    error = cluster.complete([1] * 4000, max_tokens=97).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "4096" in error["message"]
    assert "4097" in error["message"]


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "x",
        {},
        [5],
        HELLO * 2049,
        [{"role": "root", "content": "x"}],
        [{"role": "", "content": "x"}],
        [{"role": None, "content": "x"}],
        [{"content": "x"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}] * 65}],
        [{"role": "assistant", "tool_calls": [{}]}],
        [{"role": "user", "content": "x" * 5000}],
    ],
    ids=lambda value: repr(value)[:40],
)
def test_messages(post: Any, messages: Any) -> None:
    check_error(post(json.dumps({"messages": messages}).encode(), CHAT), 400, param="messages")


@pytest.mark.parametrize("name", ["nobody", "", "../arithmetic", "a\x00b", "x" * 10_000])
def test_unknown_model(post: Any, name: str) -> None:
    body = json.dumps({**OK, "model": name}).encode()
    check_error(post(body), 404, "model_not_found", "model")


def test_streaming_does_not_change_how_validation_fails(post: Any) -> None:
    check_error(post(b'{"prompt":"","stream":true}'), 400, "empty_prompt")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "x", "messages": HELLO}),
        ("/tokenize", {"prompt": "x" * 100_000}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": ["a"]}),
    ],
)
def test_text_routes(post: Any, path: str, body: Any) -> None:
    check_error(post(json.dumps(body).encode(), path), 400)


def test_paths_and_methods(cluster: Any) -> None:
    check_error(cluster.client.get(COMPLETIONS), 405, "method_not_allowed")
    assert cluster.client.get(COMPLETIONS).headers["allow"] == "POST"
    for path in ("/nothing", "//v1/models", "/V1/models", "/v1/completions/", "/docs"):
        check_error(cluster.client.get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("given", "is_echoed"),
    [
        ("___prefill_addr_1.2.3.4:5_decode_addr_evil", True),
        ("plain-1", True),
        ("x" * 129, False),
        ("a b", False),
        ("caf\u00e9", False),
    ],
)
def test_request_ids_are_opaque(cluster: Any, given: str, is_echoed: bool) -> None:
    reply = cluster.client.post(
        COMPLETIONS, json=OK, headers={"x-request-id": given.encode("latin-1")}
    )
    assert reply.status_code == 200
    assert (reply.headers["x-request-id"] == given) is is_echoed
    assert given not in reply.json()["id"]
    reply = cluster.client.get("/health", headers={"x-session-id": "x" * 300})
    assert reply.status_code == 200
