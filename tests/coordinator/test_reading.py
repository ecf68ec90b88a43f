"""What a body says about its prompt is what the prompt becomes."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.tokenizer_file import write_tokenizer
from coordinator.auth import Tenant
from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.text.tasks import Prepared, ReadChat, ReadCompletion, Settings
from coordinator.validation.bodies import Body
from modeling.checkpoint.config import load_config
from modeling.embedded import CHECKPOINT
from modeling.text.tokenizer import load_tokenizer
from protocol.errors import RequestError
from protocol.token_ids import TokenIds
from tests.coordinator.in_process import InProcessWorkers

TENANT = Tenant("tenant", "salt")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content or '' }}|{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def read(folder: Path, task: Any, **fields: Any) -> Prepared:
    config = CoordinatorConfig("token", str(folder), (ExpectedPool("decode0", "decode", 1, 1),))
    model = load_config("arithmetic:vocab=4096")
    workers = InProcessWorkers(Settings(config, model, os.getpid()))
    prepared = asyncio.run(workers.run("tenant", task, Body(json.dumps(fields).encode())))
    assert isinstance(prepared, Prepared)
    return prepared


def prompt_ids(prepared: Prepared) -> list[int]:
    return list(TokenIds(prepared.prompts[0].token_ids))


def chat_text(folder: Path, messages: list[dict[str, Any]]) -> str:
    prepared = read(folder, ReadChat(4096, TENANT), messages=messages)
    return load_tokenizer(str(folder)).decode(prompt_ids(prepared), skip_special_tokens=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint")
    write_tokenizer(made, 512)
    path = made / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return made


@pytest.mark.parametrize("asked", [None, True, False])
def test_special_tokens_are_added_as_asked(asked: bool | None) -> None:
    tokenizer = load_tokenizer(str(CHECKPOINT))
    prepared = read(
        CHECKPOINT, ReadCompletion(4096, TENANT), prompt="abc", add_special_tokens=asked
    )
    expected = tokenizer.encode("abc", add_special_tokens=asked is not False)
    assert prompt_ids(prepared) == list(expected)
    assert tokenizer.encode("abc") != tokenizer.encode("abc", add_special_tokens=False)


def test_a_document_begins_with_its_special_tokens() -> None:
    with pytest.raises(RequestError, match="add_special_tokens"):
        read(
            CHECKPOINT,
            ReadCompletion(4096, TENANT),
            prompt="abc",
            document_id="doc",
            add_special_tokens=False,
        )


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "first line"}, {"type": "text", "text": "second"}],
        [{"text": "first line"}, {"text": "second"}],
    ],
)
def test_parts_are_lines(folder: Path, parts: list[dict[str, str]]) -> None:
    text = chat_text(folder, [{"role": "user", "content": parts}])
    assert text == "<user>|first line\nsecond\n<assistant>"


def test_the_reasoning_of_an_earlier_answer_is_the_templates(folder: Path) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "since"},
        {"role": "user", "content": "c"},
    ]
    assert "<assistant>since|b\n" in chat_text(folder, messages)


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "refusal": "I cannot."},
        {"content": [{"type": "refusal", "refusal": "I cannot."}]},
        {"content": "I cannot.", "refusal": None, "annotations": []},
    ],
)
def test_what_an_earlier_answer_refused_with_is_what_it_said(
    folder: Path, message: dict[str, Any]
) -> None:
    messages = [{"role": "assistant", **message}, {"role": "user", "content": "a"}]
    assert "<assistant>|I cannot.\n<user>" in chat_text(folder, messages)


@pytest.mark.parametrize("seed", [-1, None])
def test_no_seed_is_another_one_each_time(seed: int | None) -> None:
    task = ReadCompletion(4096, TENANT)
    seeds = {read(CHECKPOINT, task, prompt="a", seed=seed).samplings[0].seed for _ in range(3)}
    assert len(seeds) == 3
    assert read(CHECKPOINT, task, prompt="a", seed=-2).samplings[0].seed == 2**63 - 2


def test_either_name_of_the_limit_is_honoured() -> None:
    for task, prompt in (
        (ReadCompletion(4096, TENANT), {"prompt": "a"}),
        (ReadChat(4096, TENANT), {"messages": [{"role": "user", "content": "a"}]}),
    ):
        for given, most in (
            ({"max_tokens": 5}, 5),
            ({"max_completion_tokens": 6}, 6),
            ({"max_completion_tokens": 7, "max_tokens": 7}, 7),  # as guidellm sends them
        ):
            assert read(CHECKPOINT, task, **prompt, **given).samplings[0].max_tokens == most


def test_an_echo_is_the_text_that_came(folder: Path) -> None:
    text = " a<|im_end|>b\u0301"
    task = ReadCompletion(4096, TENANT)
    prepared = read(folder, task, prompt=[text, "b"], echo=True)
    assert prepared.echoed == [text, "b"]
    token_ids = prompt_ids(prepared)
    assert read(folder, task, prompt=token_ids, echo=True).echoed == [" ab\u0301"]
    shown = read(folder, task, prompt=token_ids, echo=True, skip_special_tokens=False)
    assert shown.echoed == [text]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "x", "function_call": {"name": "f"}},
        {"role": "assistant", "content": "x", "prefix": True},
        {"role": "assistant", "content": "x", "partial": True},
        {"role": "user", "content": "x", "images": ["data:..."]},
        {"role": "assistant", "content": None, "refusal": 5},
        {"role": "user", "content": [{"type": "refusal", "refusal": "x"}]},
        {"role": "assistant", "content": "x", "reasoning_content": 5},
        {"role": "user", "content": [{"text": "x", "cache": 1}]},
    ],
)
def test_what_a_message_cannot_have_is_named(folder: Path, message: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        chat_text(folder, [message])
    assert caught.value.param == "messages"
