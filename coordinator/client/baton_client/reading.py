"""What the events of a stream say: chunks of an answer, or what happened to a document. Pure."""

from dataclasses import dataclass
from typing import Any

import msgspec

from baton_client.errors import BatonConnectionError, ErrorInfo, stream_error
from baton_client.sse import Comment, ServerEvent
from baton_client.types import CacheMiss, Completion, DocumentEvent, Usage

ANSWER_DECODER = msgspec.json.Decoder(Completion)
_PREFILL = "prefill "


@dataclass(slots=True)
class Outcome:
    """What has come with the text of a streamed answer; complete when the stream has ended.

    Args:
        started: when the request was sent, on the monotonic clock.
        request_id: the server's log has more under it.
        path: x-baton-path: which pools, what was cached, computed and moved; may be partial.
    """

    started: float
    request_id: str
    path: str
    answer_id: str = ""  # what ``timeline`` takes
    usage: Usage | None = None
    cache_miss: CacheMiss | None = None
    finish_reason: str | None = None
    first_token_s: float | None = None  # from ``started``
    total_s: float = 0.0

    def take(self, chunk: Completion, at: float) -> None:
        """The next chunk, which has arrived at that time."""
        self.answer_id = chunk.id
        self.usage = chunk.usage or self.usage
        self.cache_miss = chunk.cache_miss or self.cache_miss
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.total_s = at - self.started
        if chunk.text and self.first_token_s is None:
            self.first_token_s = self.total_s


def read_answer(data: bytes, request_id: str = "") -> Completion:
    """An answer, or a chunk of one.

    Raises:
        BatonAPIError: the answer has failed on its way.
        BatonConnectionError: this is none; most likely it is not a Baton that answers.
    """
    try:
        answer = ANSWER_DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BatonConnectionError(f"not an answer: {error}") from error
    if answer.error is not None:
        raise stream_error(answer.error, request_id)
    if not answer.id:
        raise BatonConnectionError("not an answer: it has no id")
    return answer


def read_progress(comment: Comment) -> tuple[int, int] | None:
    """Prompt tokens (computed, of all), if the comment tells of them."""
    done, _, total = comment.text.removeprefix(_PREFILL).partition("/")
    is_progress = comment.text.startswith(_PREFILL) and done.isdigit() and total.isdigit()
    return (int(done), int(total)) if is_progress else None


def read_document_event(event: ServerEvent) -> DocumentEvent:
    """An event of a document.

    Raises:
        BatonAPIError: the server has given up on this stream.
        BatonConnectionError: this is none.
    """
    try:
        data: dict[str, Any] = msgspec.json.decode(event.data, type=dict[str, Any])
        if "sequence_number" not in data and "error" in data:
            raise stream_error(msgspec.convert(data["error"], ErrorInfo))
        return msgspec.convert({"type": event.event, **data, "data": data}, DocumentEvent)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BatonConnectionError(f"not an event of a document: {error}") from error
