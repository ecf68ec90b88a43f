"""A conversation's roles against what a template knows of them. Pure.

OpenAI's ``developer`` is the newer name of ``system``: a template that does not name it sees
``system``. A message whose role a template passes over would be missing from the prompt without a
word, so it is refused: each is marked, and its mark is looked for in what the template writes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from protocol.errors import RequestError

_ALWAYS_SHOWN = ("user", "assistant")  # what templates are written for
Messages = Sequence[Mapping[str, Any]]


def as_known(messages: Messages, *, names_developer: bool) -> list[Mapping[str, Any]]:
    """The messages with the roles that the template has words for."""
    if names_developer:
        return list(messages)
    return [
        {**message, "role": "system"} if message.get("role") == "developer" else message
        for message in messages
    ]


def check_shown(messages: Messages, render: Callable[[Messages], str], mark: str) -> None:
    """Refuse a message that the template leaves out.

    Args:
        messages: which the template has rendered without an error.
        render: the text of messages.
        mark: a character that occurs nowhere in them.

    Raises:
        RequestError: ``role_not_supported``.
    """
    marks = {
        number: f"{mark}{number}{mark}"
        for number, message in enumerate(messages)
        if message.get("role") not in _ALWAYS_SHOWN
    }
    if not marks:
        return
    marked = [
        {**message, "content": f"{message.get('content') or ''}{marks[number]}"}
        if number in marks
        else message
        for number, message in enumerate(messages)
    ]
    try:
        text = render(marked)
    except RequestError:  # of a template that looks into the text: it has taken the messages once
        return
    for number, its_mark in marks.items():
        if its_mark not in text:
            raise RequestError(
                f"messages[{number}]: the model's chat template leaves out a message of the role "
                f"{messages[number]['role']!r} at this place",
                code="role_not_supported",
                param="messages",
            )
