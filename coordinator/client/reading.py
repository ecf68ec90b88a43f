"""A streamed answer, read chunk by chunk. Pure but for the clock that is given.

1. ``feed`` takes bytes and gives the chunks in them; comments tell of the prefill.
2. ``outcome`` is what is known so far, and all of it once ``is_done``.
3. ``end`` is told that no more bytes come: half an answer is an error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from coordinator.client.budget import Clock
from coordinator.client.errors import BatonConnectionError, ErrorBody, stream_error
from coordinator.client.sse import Comment, EventParser
from coordinator.client.types import CacheMiss, ChatChunk, Completion, Usage

ChunkT = TypeVar("ChunkT", Completion, ChatChunk)
DONE = "[DONE]"
_PREFILL = "prefill "


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came with the text."""

    answer_id: str  # what ``timeline`` takes
    request_id: str
    path: str  # x-baton-path: which pools, what was cached, computed and moved; may be partial
    usage: Usage | None
    cache_miss: CacheMiss | None
    finish_reason: str | None
    first_token_s: float | None  # from the moment that the request was sent
    total_s: float


class Reading(Generic[ChunkT]):
    """
    Args:
        chunk_type: of the chunks.
        started: when the request was sent.
        clock: monotonic seconds.
        on_prefill: called with prompt tokens (computed, of all) while there is no text yet.
    """

    def __init__(
        self,
        chunk_type: type[ChunkT],
        started: float,
        clock: Clock,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> None:
        self._decoder: msgspec.json.Decoder[ChunkT] = msgspec.json.Decoder(chunk_type)
        self._parser = EventParser()
        self._started = started
        self._clock = clock
        self._on_prefill = on_prefill
        self._path = self._request_id = self._answer_id = ""
        self._usage: Usage | None = None
        self._cache_miss: CacheMiss | None = None
        self._finish_reason: str | None = None
        self._first_token_s: float | None = None
        self._total_s = 0.0
        self.is_done = False

    def begin(self, request_id: str, path: str) -> None:
        """What the headers said."""
        self._request_id, self._path = request_id, path

    def feed(self, data: bytes) -> list[ChunkT]:
        """
        Raises:
            BatonAPIError: the answer failed on its way.
            BatonConnectionError: these are not the events of an answer.
        """
        chunks = []
        for item in self._parser.feed(data):
            if isinstance(item, Comment):
                self._take_comment(item.text)
            elif item.data == DONE:
                self.is_done = True
            elif not self.is_done:
                chunks.append(self._take(item.data))
        self._total_s = self._clock() - self._started
        return chunks

    def end(self) -> None:
        """
        Raises:
            BatonConnectionError: something was still to come.
        """
        if not self.is_done:
            raise BatonConnectionError("the answer broke off before its end")

    @property
    def outcome(self) -> Outcome:
        return Outcome(
            self._answer_id,
            self._request_id,
            self._path,
            self._usage,
            self._cache_miss,
            self._finish_reason,
            self._first_token_s,
            self._total_s,
        )

    def _take(self, data: str) -> ChunkT:
        try:
            chunk = self._decoder.decode(data)
        except msgspec.ValidationError as error:
            raise self._failure(data) from error
        except msgspec.DecodeError as error:
            raise BatonConnectionError(f"the stream is not JSON: {error}") from error
        self._answer_id = chunk.id
        self._usage = chunk.usage or self._usage
        self._cache_miss = chunk.cache_miss or self._cache_miss
        self._finish_reason = chunk.finish_reason or self._finish_reason
        if chunk.text and self._first_token_s is None:
            self._first_token_s = self._clock() - self._started
        return chunk

    def _failure(self, data: str) -> Exception:
        try:
            info = msgspec.json.decode(data, type=ErrorBody).error
        except msgspec.ValidationError:
            return BatonConnectionError("the stream is not that of an answer")
        return stream_error(info, self._request_id)

    def _take_comment(self, text: str) -> None:
        done, slash, total = text.removeprefix(_PREFILL).partition("/")
        is_progress = text.startswith(_PREFILL) and slash and done.isdigit() and total.isdigit()
        if is_progress and self._on_prefill is not None:
            self._on_prefill(int(done), int(total))
