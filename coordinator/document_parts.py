"""Documents in requests: a content part of a chat, a field of a completion."""

from collections.abc import Callable, Sequence
from typing import Any

from coordinator.frontend import Asker, Frontend
from coordinator.jobs.context import Jobs
from coordinator.jobs.document import CHAT, TEXT
from coordinator.jobs.questions import Attached, chat_tokens, check_system, completion_tokens
from coordinator.tokenizing import TextTools
from protocol.errors import RequestError

MESSAGES = "messages"
Encoder = Callable[[TextTools], Sequence[int]]


def jobs_of(frontend: Frontend, param: str | None = None) -> Jobs:
    """Documents, files and batches.

    Raises:
        RequestError: this cluster offers none.
    """
    if frontend.jobs is None:
        code = "unsupported_content" if param == MESSAGES else "unsupported_parameter"
        raise RequestError("documents are not offered by this server", code=code, param=param)
    return frontend.jobs


def take_document(given: Any) -> tuple[str | None, Any]:  # noqa: ANN401 - a caller's JSON value
    """(the document that a conversation begins with, the messages without it).

    Only the first part of the first user message is looked at; one that stands elsewhere is refused
    where the content is read.

    Raises:
        RequestError: a document part without an id.
    """
    if not isinstance(given, list):
        return None, given
    for number, message in enumerate(given):
        if not isinstance(message, dict) or message.get("role") != "user":
            continue
        content = message.get("content")
        if not isinstance(content, list) or not content:
            return None, given
        part = content[0]
        if not isinstance(part, dict) or part.get("type") != "document":
            return None, given
        document_id = part.get("document_id")
        if not isinstance(document_id, str) or not 0 < len(document_id) <= 64:
            raise RequestError(
                f"messages[{number}].content[0].document_id must be the id of a document",
                code="invalid_type",
                param=MESSAGES,
            )
        shown = {**message, "content": content[1:] or ""}
        return document_id, [*given[:number], shown, *given[number + 1 :]]
    return None, given


async def chat_encoder(
    frontend: Frontend, asker: Asker, document_id: str, messages: list[dict[str, Any]]
) -> tuple[Encoder, Attached]:
    """How to make the prompt of a conversation about a document.

    Raises:
        RequestError: the document cannot be used so.
    """
    questions = jobs_of(frontend, MESSAGES).questions
    opened = await questions.open(asker.tenant.name, document_id, CHAT, MESSAGES)
    check_system(opened.document, messages, MESSAGES)
    return lambda tools: chat_tokens(tools, opened, messages), opened.attached


async def completion_encoder(
    frontend: Frontend, asker: Asker, document_id: str
) -> tuple[Callable[[str | list[Any]], Encoder], Attached]:
    """How to make a prompt that goes on behind a document, of each text or list of token ids.

    Raises:
        RequestError: the document cannot be used so.
    """
    param = "document_id"
    questions = jobs_of(frontend, param).questions
    opened = await questions.open(asker.tenant.name, document_id, TEXT, param)
    return lambda prompt: lambda tools: completion_tokens(tools, opened, prompt), opened.attached
