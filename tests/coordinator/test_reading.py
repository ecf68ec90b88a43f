"""What a body says about its prompt is what the prompt becomes."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.tokenizer_file import write_tokenizer
from coordinator.auth import Tenant
from coordinator.bodies import Body
from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.text.in_process import InProcessWorkers
from coordinator.text.tasks import Prepared, ReadChat, ReadCompletion, Settings
from modeling.config import load_config
from modeling.embedded import CHECKPOINT
from modeling.tokenizer import load_tokenizer
from protocol.errors import RequestError
from protocol.token_ids import TokenIds

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
        {"role": "assistant", "content": "x", "function_call": {"name": "f"}},
        {"role": "assistant", "content": "x", "prefix": True},
        {"role": "assistant", "content": "x", "reasoning_content": 5},
        {"role": "user", "content": [{"text": "x", "cache": 1}]},
    ],
)
def test_what_a_message_cannot_have_is_named(folder: Path, message: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        chat_text(folder, [message])
    assert caught.value.param == "messages"
