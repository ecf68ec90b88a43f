"""What one request brought, read from its bytes as they come. No sockets here: see client.py.

1. ``Reply.take_head`` gets the status and the headers, ``take_body`` each piece of the body.
2. Every event with tokens leaves its time and its count; the last ones bring usage and ``[DONE]``.
3. ``Reply.close`` says how it ended; what did not end as it should never counts as ``ok``.
"""

from dataclasses import dataclass, field

import msgspec

from baton_client import BatonConnectionError, Choice, ErrorInfo, EventParser, ServerEvent, Usage
from baton_client.reading import ANSWER_DECODER
from baton_client.sse import DONE
from bench.load.record import OK

_MAX_PLAIN_BYTES = 1 << 16  # of an answer that is no stream


@dataclass(slots=True)
class Reply:
    """One answer so far. Times are of CLOCK_MONOTONIC.

    Args:
        keeps_answer: whether its text and token ids will be needed for the next turn.
    """

    keeps_answer: bool = False
    headers_at: float | None = None
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    finished_at: float | None = None
    status: int | None = None
    request_id: str = ""
    path: str = ""
    finish_reason: str = ""
    outcome: str = ""
    error_code: str = ""
    num_prompt_tokens: int = 0
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    is_exact: bool = True
    """Whether every event said how many tokens it carried."""
    last_byte_at: float = 0.0
    _parser: EventParser = field(default_factory=EventParser)
    _plain: bytes = b""
    _is_done: bool = False

    def take_head(self, status: int, headers: dict[str, str], now: float) -> None:
        self.status = status
        self.headers_at = now
        self.request_id = headers.get("x-request-id", self.request_id)
        self.path = headers.get("x-baton-path", "")

    def take_body(self, data: bytes, now: float) -> bool:
        """The next piece of the body; whether the answer is complete with it."""
        if self.status != 200:
            self._plain = (self._plain + data)[:_MAX_PLAIN_BYTES]
            return False
        try:
            events = self._parser.feed(data)
        except BatonConnectionError:  # one without an end
            return self._is_malformed()
        for event in events:
            if isinstance(event, ServerEvent) and self._take_event(event.data, now):
                return True
        return False

    def _is_malformed(self) -> bool:
        self.outcome, self.error_code = "incomplete", "malformed_event"
        return True

    def _take_event(self, data: bytes, now: float) -> bool:
        if data == DONE:
            self._is_done = True
            return True
        try:
            chunk = ANSWER_DECODER.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return self._is_malformed()
        if chunk.error is not None:
            self.outcome, self.error_code = "http_error", _code(chunk.error)
            return True
        for choice in chunk.choices:
            self._take_choice(choice, now, chunk.usage)
        if chunk.usage is not None:
            self.num_prompt_tokens = chunk.usage.prompt_tokens
            self.num_output_tokens = chunk.usage.completion_tokens
            details = chunk.usage.prompt_tokens_details
            if details is not None and details.cached_tokens is not None:
                self.num_cached_tokens = details.cached_tokens
        return False

    def _take_choice(self, choice: Choice, now: float, usage: Usage | None) -> None:
        if choice.finish_reason:
            self.finish_reason = choice.finish_reason
        if choice.token_ids == []:
            return  # the rest of a text, held back until no stop string could begin in it
        delta = choice.delta
        text = choice.text or delta.content or delta.reasoning_content or delta.reasoning
        if not (choice.token_ids or text or delta.tool_calls):
            return  # a role, an end, nothing at all: no token
        if choice.token_ids:
            count = len(choice.token_ids)
        elif usage is not None:  # the server tells the running sum
            count = usage.completion_tokens - (self.num_output_tokens or 0)
        else:
            count, self.is_exact = 1, False
        self.times.append(now)
        self.counts.append(max(1, count))
        if self.keeps_answer:
            self.token_ids += choice.token_ids or ()
            self.texts.append(text or "")

    def close(self, outcome: str, now: float, error_code: str = "") -> None:
        """It has ended: as ``outcome`` says unless the stream said something worse before."""
        self.finished_at = now
        if self.outcome:
            return
        self.outcome, self.error_code = outcome, error_code
        if outcome == "disconnect" and self.status not in (None, 200):
            self.outcome, self.error_code = "http_error", self._plain_code()

    def end(self, now: float) -> None:
        """The server has ended its answer."""
        if self.status != 200:
            self.close("http_error", now, self._plain_code())
        elif not self._is_done:
            self.close("disconnect", now, "no_end_marker")
        else:
            self.close(OK, now)

    def settle_counts(self, must_have: int | None) -> None:
        """Compare the tokens that were seen with usage, once it has ended well.

        Args:
            must_have: tokens that were forced, if they were.
        """
        seen, told = sum(self.counts), self.num_output_tokens
        if not self.is_exact and told is not None and seen != told:
            # The token that ends an answer has no text. What is left has unknown counts.
            is_unseen_end = seen == told - 1 and self.finish_reason == "stop"
            self.counts = self.counts if is_unseen_end else []
        if self.outcome != OK:
            return
        num = seen if told is None else told
        if not seen:
            self.outcome, self.error_code = "incomplete", "no_tokens"
        elif self.is_exact and told is not None and seen != told:
            self.outcome, self.error_code = "incomplete", f"usage_says_{told}_not_{seen}"
        elif told is not None and told < len(self.times):  # each event had a token at least
            code = f"usage_says_{told}_of_{len(self.times)}_events"
            self.outcome, self.error_code = "incomplete", code
        elif must_have is not None and num != must_have:
            self.outcome, self.error_code = "incomplete", f"{num}_of_{must_have}_tokens"

    def _plain_code(self) -> str:
        try:
            error = ANSWER_DECODER.decode(self._plain).error
        except (msgspec.DecodeError, UnicodeDecodeError):
            return f"http_{self.status}"
        return _code(error) if error is not None else f"http_{self.status}"


def _code(error: ErrorInfo | str) -> str:
    if isinstance(error, str):
        return error[:64]
    return str(error.code or error.type or "error")[:64]
