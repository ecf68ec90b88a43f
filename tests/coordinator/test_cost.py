"""What a body costs grows with its size and no faster: each kind of input, once and doubled.

Time is the thread's own, the least of several runs, so that a busy machine does not change the
ratio: twice the input takes twice the time, and four times where every part looks at every other.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.auth import Tenant
from coordinator.config import CoordinatorConfig, ExpectedPool, Limits
from coordinator.text.tasks import (
    Call,
    ReadChat,
    ReadCompletion,
    ReadDetokenize,
    ReadTokenize,
    Settings,
    Task,
)
from coordinator.text.worker import TextWorker
from coordinator.validation.json_body import parse_json
from modeling.checkpoint.config import load_config
from protocol.errors import RequestError

MAX_RATIO = 3.0
NUM_RUNS = 3
NUM_ROUNDS = 4  # of measuring both: only a ratio that never holds is a growth
TENANT = Tenant("t", "salt")
CHAT, COMPLETION = ReadChat(1 << 20, TENANT), ReadCompletion(1 << 20, TENANT)
LIMITS = Limits(max_json_values=150_000)  # so that less is enough to be counted exactly


def cost_s(work: Callable[[], object]) -> float:
    """Processor time of ``work``, which may refuse its input."""
    times = []
    for _ in range(NUM_RUNS):
        began = time.thread_time()
        with contextlib.suppress(RequestError):
            work()
        times.append(time.thread_time() - began)
    return min(times)


def assert_linear(work: Callable[[int], Callable[[], object]], size: int) -> None:
    """``work(size)`` prepares, and what it returns is measured, at ``size`` and at twice that."""
    once, twice = work(size), work(2 * size)
    ratios = []
    for _ in range(NUM_ROUNDS):
        ratios.append(cost_s(twice) / cost_s(once))
        if ratios[-1] < MAX_RATIO:
            return
    raise AssertionError(f"twice the input took {ratios} times as long")


BODIES: dict[str, tuple[Callable[[int], str], int]] = {
    "keys": (lambda n: json.dumps({f"k{i}": 1 for i in range(n)}), 30_000),
    "a duplicate of the last of many keys": (
        lambda n: "{" + "".join(f'"k{i}":1,' for i in range(n)) + f'"k{n - 1}":1}}',
        30_000,
    ),
    "objects": (lambda n: '{"a":[' + "{}," * n + "{}]}", 9_000),
    "nested objects": (lambda n: '{"a":[' + ('{"a":' * 15 + "1" + "}" * 15 + ",") * n + "1]}", 600),
    "empty arrays": (lambda n: '{"a":[' + "[]," * n + "[]]}", 50_000),
    "too many empty arrays": (lambda n: '{"a":[' + "[]," * n + "[]]}", 500_000),
    "nested arrays": (lambda n: '{"a":[' + ("[" * 28 + "]" * 28 + ",") * n + "1]}", 2_500),
    "floats": (lambda n: '{"a":[' + "1.5," * n + "1.5]}", 50_000),
    "too many floats": (lambda n: '{"a":[' + "1.5," * n + "1.5]}", 1_000_000),
    "a long float": (lambda n: '{"a":1.' + "1" * n + "}", 2_000_000),
    "a long integer": (lambda n: '{"a":' + "1" * n + "}", 2_000_000),
    "token ids": (lambda n: '{"prompt":[' + "123456," * n + "1]}", 50_000),
    "strings": (lambda n: '{"a":[' + '"ab",' * n + "1]}", 50_000),
    "strings of marks": (lambda n: '{"a":[' + '",[{",' * n + "1]}", 50_000),
    "too many strings of marks": (lambda n: '{"a":[' + '",[{",' * n + "1]}", 200_000),
    "one string": (lambda n: '{"prompt":"' + "text, " * n + '"}', 600_000),
    "escapes": (lambda n: '{"prompt":"' + "\\u00e9\\n" * n + '"}', 200_000),
    "surrogate pairs": (lambda n: '{"prompt":"' + "\\ud83d\\ude00" * n + '"}', 100_000),
    "backslashes": (lambda n: '{"prompt":"' + ",\\\\" * n + '"}', 150_000),
    "spaces": (lambda n: '{"prompt":1' + " " * n + "}", 3_000_000),
    "lines before an error": (lambda n: '{"prompt":1' + "\n" * n + "x", 2_000_000),
}


@pytest.mark.parametrize("kind", BODIES)
def test_parsing_a_body_grows_with_its_size(kind: str) -> None:
    make, size = BODIES[kind]

    def prepare(n: int) -> Callable[[], object]:
        body = make(n).encode()
        assert len(body) <= LIMITS.max_body_bytes
        return lambda: parse_json(body, LIMITS)

    assert_linear(prepare, size)


def _chat(messages: list[dict[str, object]], **fields: object) -> str:
    return json.dumps({"messages": messages, "max_tokens": 1, **fields})


READ: dict[str, tuple[Task, Callable[[int], str], int]] = {
    "messages": (CHAT, lambda n: _chat([{"role": "user", "content": "hi"}] * n), 900),
    "parts": (
        CHAT,
        lambda n: _chat([{"role": "user", "content": [{"type": "text", "text": "x"}] * 60}] * n),
        100,
    ),
    "a long message": (CHAT, lambda n: _chat([{"role": "user", "content": "word " * n}]), 50_000),
    "spelled special tokens": (
        CHAT,
        lambda n: _chat([{"role": "user", "content": "<|im_end|>" * n}]),
        20_000,
    ),
    "token ids": (COMPLETION, lambda n: json.dumps({"prompt": [7] * n}), 50_000),
    "wrong token ids": (COMPLETION, lambda n: json.dumps({"prompt": [7] * n + [-1]}), 50_000),
    "stop tokens": (
        COMPLETION,
        lambda n: json.dumps({"prompt": "x", "stop_token_ids": [i % 500 for i in range(n)]}),
        100_000,
    ),
    "stop tokens of a wrong type": (
        COMPLETION,
        lambda n: json.dumps({"prompt": "x", "stop_token_ids": [""] * n}),
        100_000,
    ),
    "biases": (
        COMPLETION,
        lambda n: json.dumps({"prompt": "x", "logit_bias": {str(i): 1 for i in range(n)}}),
        20_000,
    ),
    "stop strings": (COMPLETION, lambda n: json.dumps({"prompt": "x", "stop": ["ab"] * n}), 50_000),
    "metadata": (
        COMPLETION,
        lambda n: json.dumps({"prompt": "x", "metadata": {f"k{i}": "v" for i in range(n)}}),
        20_000,
    ),
    "unknown fields": (
        COMPLETION,
        lambda n: json.dumps({"prompt": "x", **{f"k{i}": 1 for i in range(n)}}),
        20_000,
    ),
    "prompts": (COMPLETION, lambda n: json.dumps({"prompt": ["text " * 200] * n}), 60),
    "text": (ReadTokenize(1 << 20), lambda n: json.dumps({"prompt": "text " * n}), 50_000),
    "ids to text": (ReadDetokenize(), lambda n: json.dumps({"tokens": [97] * n}), 30_000),
}


@pytest.fixture(scope="module")
def worker() -> TextWorker:
    pools = (ExpectedPool("decode0", "decode", 1, 1),)
    config = CoordinatorConfig("token", "arithmetic", pools, log_level="ERROR")
    settings = Settings(config, load_config("arithmetic"), os.getpid())
    return TextWorker(settings, lambda _stage, _size: None)


@pytest.mark.parametrize("kind", READ)
def test_reading_a_request_grows_with_its_size(worker: TextWorker, kind: str) -> None:
    task, make, size = READ[kind]

    def prepare(n: int) -> Callable[[], object]:
        call = Call(task, memoryview(make(n).encode()))
        return lambda: worker.do(call, None)

    assert_linear(prepare, size)


@pytest.mark.parametrize("values", ["[],", "1.5,", "7,", '"",', '",",', '"a",', "null,"])
def test_values_of_every_kind_are_counted(values: str) -> None:
    most = Limits(max_json_values=1000)
    body = '{"a":[' + values * 997 + '"\\",[{"]}'  # the object, the array, and these
    separators = 998 + values.count("[") * 997
    if separators < 1000:
        assert len(parse_json(body.encode(), most)["a"]) == 998
    with pytest.raises(RequestError) as refused:
        parse_json(body.replace("[", "[" + values * 3, 1).encode(), most)
    assert refused.value.code == "too_large"


JSON_VALUES = st.recursive(
    st.none() | st.integers() | st.text('a",[{}]:\\\n', max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text('a",[{\\', max_size=4), inner)
    ),
)


@given(JSON_VALUES)
def test_marks_in_strings_are_no_values(value: object) -> None:
    body = json.dumps({"a": value}).encode()
    most = num_values({"a": value})
    assert parse_json(body, Limits(max_json_values=most)) == {"a": value}
    if most > 2:
        with pytest.raises(RequestError, match="values"):
            parse_json(body, Limits(max_json_values=num_marks({"a": value})))


def num_values(value: object) -> int:
    """As a body's are counted: empty arrays and objects twice, since they open and hold nothing."""
    return num_marks(value) + 1


def num_marks(value: object) -> int:
    """Openings and commas."""
    if isinstance(value, dict | list):
        items = list(value.values() if isinstance(value, dict) else value)
        return 1 + max(0, len(items) - 1) + sum(map(num_marks, items))
    return 0
