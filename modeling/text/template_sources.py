"""Where a model's chat template comes from: the first of several files that has one.

1. the file of ``--chat-template``;
2. ``chat_template.jinja``, or ``additional_chat_templates/default.jinja`` before it;
3. ``chat_template`` in ``tokenizer_config.json``: text, or a list of named ones, of which
   ``default`` is taken;
4. ``chat_template.json``, as processors write it.

The arithmetic model has one of its own. A checkpoint without any has none: see NoChatTemplate.
"""

from collections.abc import Mapping
from pathlib import Path

from modeling.checkpoint.config import is_arithmetic
from modeling.checkpoint.json_fields import read_json, read_text
from modeling.text.chat_template import ChatTemplate, NoChatTemplate
from protocol.errors import ConfigError

PLAIN_TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n"
    '(call: <tool_call>{"name": ..., "arguments": ...}</tool_call>)\n{% endif %}'
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
JINJA_FILE, JINJA_FOLDER = "chat_template.jinja", "additional_chat_templates"
JSON_FILES = ("tokenizer_config.json", "chat_template.json")


def load_chat_template(
    path_or_name: str, special_tokens: Mapping[str, str], *, file: str = ""
) -> ChatTemplate:
    """The template of a checkpoint folder, of the arithmetic model, or of ``file`` for either.

    Args:
        path_or_name: the folder or the model's name.
        special_tokens: ``bos_token`` and so on to their text.
        file: of ``--chat-template``, which wins; "" is none.

    Raises:
        ConfigError: a template that cannot be read or does not compile.
    """
    folder = Path(path_or_name)
    if not file and is_arithmetic(path_or_name):
        return ChatTemplate(PLAIN_TEMPLATE, "built in", special_tokens)
    found = Path(file) if file else _jinja_file(folder)
    if found is not None:
        return ChatTemplate(read_text(found), str(found), special_tokens)
    for path in (folder / name for name in JSON_FILES):
        source = _source(path) if path.is_file() else None
        if source is not None:
            return ChatTemplate(source, str(path), special_tokens)
    return NoChatTemplate()


def _jinja_file(folder: Path) -> Path | None:
    more = folder / JINJA_FOLDER
    found = next((f for f in (more / "default.jinja", folder / JINJA_FILE) if f.is_file()), None)
    if found is None and next(more.glob("*.jinja"), None) is not None:
        raise ConfigError(f"{more}: has no template named default, and there is no {JINJA_FILE}")
    return found


def _source(path: Path) -> str | None:
    found = read_json(path).get("chat_template")
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        found = {entry.get("name"): entry.get("template") for entry in entries}
    if isinstance(found, dict):
        if found.get("default") is None:
            raise ConfigError(f"{path}: chat_template has no template named default: name one so")
        found = found["default"]
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"{path}: chat_template must be text")
    return found
