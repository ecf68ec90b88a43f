"""A message that a template passes over is refused; a developer is a system by its newer name."""

from typing import Any

import pytest

from modeling.text.chat_template import ChatTemplate, RenderedChat, encode_chat
from modeling.text.tokenizer import load_tokenizer
from protocol.errors import RequestError

TOKENIZER = load_tokenizer("arithmetic")
# As Qwen3 has it: roles are looked up one by one, and what is none of them is nothing.
QWEN3 = """
{%- if messages[0].role == 'system' %}{{- '[system]' + messages[0].content + '\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '[' + message.role + ']' + message.content + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '[assistant]' + message.content.split('</think>')[-1].lstrip('\\n') + '\\n' }}
    {%- endif %}
{%- endfor %}
"""
# As Llama 2 has it: one system message, in front; tool results are not known.
FIRST_ONLY = """
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}{{- '<<' + message.content|trim + '>>' }}
    {%- elif message.role in ['user', 'assistant'] %}{{- message.role[0] + ':' + message.content }}
    {%- endif %}
{%- endfor %}
"""
NAMES_DEVELOPER = """
{%- for message in messages %}
    {%- if message.role in ('system', 'developer') %}{{- '<|' ~ message.role ~ '|>' }}{%- endif %}
    {{- message.content }}
{%- endfor %}
"""
RAISES = "{% if messages[0].role == 'system' %}{{ raise_exception('No system here') }}{% endif %}x"
LOOKS_INSIDE = "{% for m in messages %}{{ 10 // (m.content|int) }}{% endfor %}"


def _text(source: str, *messages: tuple[str, str]) -> str:
    template = ChatTemplate(source, "test", {})
    return RenderedChat(template, TOKENIZER, _messages(*messages)).text


def _messages(*messages: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


def test_developer_becomes_system_where_it_is_not_named() -> None:
    said = (("developer", "Be brief."), ("user", "Hello"))
    assert _text(QWEN3, *said) == "[system]Be brief.\n[user]Hello\n"
    assert _text(NAMES_DEVELOPER, *said) == "<|developer|>Be brief.Hello"


@pytest.mark.parametrize(
    "source",
    [
        "{{ '[You answer a developer.]' }}" + QWEN3.lstrip(),
        "{# a developer #}{% if false %}{{ raise_exception('no developer here') }}{% endif %}"
        + QWEN3,
    ],
)
def test_a_template_names_a_role_by_the_word_itself(source: str) -> None:
    assert "[system]Be brief." in _text(source, ("developer", "Be brief."), ("user", "Hello"))


# As multi-modal models have it: a content that is text would be looked through letter by letter.
PARTS_ONLY = """
{%- for message in messages %}
    {{- '[' + message.role + ']' }}
    {%- for part in message.content %}
        {%- if part.type == 'text' %}{{- part.text }}{%- endif %}
    {%- endfor %}
{%- endfor %}
"""
FIRST_PART = "{% for m in messages %}<{{ m.role }}>{{ m.content[0]['text'] }}{% endfor %}"
EITHER = """
{%- for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}?{% endif %}
{%- endfor %}
"""


def test_a_template_that_looks_for_parts_is_given_parts() -> None:
    chat = (("system", "Be brief."), ("user", "Hello"), ("assistant", "Yes?"), ("user", "Why?"))
    assert _text(PARTS_ONLY, *chat) == "[system]Be brief.[user]Hello[assistant]Yes?[user]Why?"
    assert _text(FIRST_PART, *chat[:2]) == "<system>Be brief.<user>Hello"
    assert _text(EITHER, *chat[:2]) == "Be brief.Hello"


@pytest.mark.parametrize(
    ("source", "messages", "number", "role"),
    [
        (QWEN3, (("tool", "42"), ("user", "a")), 0, "tool"),
        (QWEN3, (("user", "a"), ("function", "b")), 1, "function"),
        (FIRST_ONLY, (("user", "a"), ("system", "b"), ("user", "c")), 1, "system"),
        (FIRST_ONLY, (("system", "a"), ("developer", "b"), ("user", "c")), 1, "system"),
        (FIRST_ONLY, (("system", "same"), ("system", "same"), ("user", "same")), 1, "system"),
        ("{{ messages[-1].content }}", (("system", "a"), ("user", "b")), 0, "system"),
    ],
)
def test_a_message_that_would_vanish_is_refused(
    source: str, messages: tuple[tuple[str, str], ...], number: int, role: str
) -> None:
    with pytest.raises(RequestError, match=rf"messages\[{number}\].*role '{role}'") as caught:
        encode_chat(ChatTemplate(source, "test", {}), TOKENIZER, _messages(*messages))
    assert (caught.value.code, caught.value.status) == ("role_not_supported", 400)


def test_what_is_shown_is_served() -> None:
    chat = (("system", " a "), ("user", "b"), ("assistant", "<think>x</think>\nc"), ("user", "d"))
    assert _text(QWEN3, *chat) == "[system] a \n[user]b\n[assistant]c\n[user]d\n"
    assert _text(FIRST_ONLY, *chat[:2]) == "<<a>>u:b"
    assert _text(FIRST_ONLY, ("system", ""), ("user", "b")) == "<<>>u:b"
    assert _text(LOOKS_INSIDE, ("system", "2"), ("user", "5")) == "52"


def test_a_template_that_raises_is_heard() -> None:
    with pytest.raises(RequestError, match="No system here") as caught:
        _text(RAISES, ("developer", "a"), ("user", "b"))
    assert caught.value.code == "template_error"
