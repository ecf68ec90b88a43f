"""From tokens to the text that a caller sees, the same whether it streams or not.

1. Tokens are detokenized incrementally: a character is held until its last byte is there.
2. Text passes the stop matcher, which holds back what might become a stop string and nothing else.
3. A stop string ends the text right before it; the token that ended a sequence gives no text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol.messages import NewToken
from protocol.request import FinishReason


class DetokenizeStream(Protocol):
    """The tokenizer's incremental decoder of one sequence."""

    def push(self, token_ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token, and how many characters of the answer's text stand before it.

    Tokens that are parts of one character share its offset.
    """

    token: NewToken
    offset: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What some new tokens of one choice add for its caller."""

    text: str
    tokens: tuple[ShownToken, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or stop string of the caller's that hit


class StopMatcher:
    """Finds the stop string that is complete first, however the text is cut into pieces.

    Args:
        stops: none of them empty.
        include_stop: whether the text shows the stop string itself.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """(text that may be shown, the stop string that ended it or None).

        A stop string that is complete while ``may_stop`` is False is text like any other, but one
        that only begins there may still be completed by what follows.
        """
        if not self._stops:
            return text, None
        num_held = len(self._held)
        text = self._held + text
        hit = self._first_hit(text, num_held) if may_stop else None
        if hit is not None:
            start, stop = hit
            self._held = ""
            return text[: start + len(stop)] if self._include_stop else text[:start], stop
        keep = self._num_held(text)
        shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return shown, None

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held

    def _first_hit(self, text: str, after: int) -> tuple[int, str] | None:
        """The stop string that is complete first, of those that end beyond ``after`` characters:
        what was held back may hold one that was complete when it did not count."""
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop, max(0, after - len(stop) + 1))) >= 0
        ]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _num_held(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        longest = 0
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while start >= 0 and len(text) - start > longest:
                if stop.startswith(text[start:]):
                    longest = len(text) - start
                start = text.find(stop[0], start + 1)
        return longest


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How a caller wants to see text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0  # a stop string that is complete by then does not end the answer
    caller_stop_token_ids: frozenset[int] = frozenset()
    is_empty: bool = False  # no token was asked for: max_tokens is 0


class ChoiceText:
    """The text of one choice, as its tokens come in."""

    def __init__(self, stream: DetokenizeStream, options: TextOptions) -> None:
        self._stream = stream
        self._options = options
        self._matcher = StopMatcher(options.stops, include_stop=options.include_stop)
        self._num_tokens = 0
        self._num_chars = 0  # of the text so far, what is held back included
        self.finish_reason: FinishReason | None = None

    def push(self, tokens: Sequence[NewToken]) -> TextDelta:
        """What ``tokens`` add. After a stop string the rest is dropped, and so is what follows."""
        if self._options.is_empty and tokens:
            self.finish_reason = FinishReason.LENGTH
            return TextDelta("", (), self.finish_reason)
        text, taken = [], []
        stop_reason: int | str | None = None
        for token in tokens:
            if self.finish_reason is not None:
                break
            self._num_tokens += 1
            taken.append(ShownToken(token, self._num_chars))
            shown, stop_reason = self._take(token)
            text.append(shown)
        return TextDelta("".join(text), tuple(taken), self.finish_reason, stop_reason)

    def _take(self, token: NewToken) -> tuple[str, int | str | None]:
        ends_by_token = token.finish_reason is FinishReason.STOP
        is_shown = not ends_by_token or self._options.include_stop
        raw = self._stream.push([token.token_id]) if is_shown else ""
        if token.finish_reason is not None:
            raw += self._stream.flush()
        self._num_chars += len(raw)
        may_stop = self._num_tokens > self._options.min_tokens
        shown, stop = self._matcher.push(raw, may_stop=may_stop)
        if stop is not None:
            self.finish_reason = FinishReason.STOP
            return shown, stop
        if token.finish_reason is None:
            return shown, None
        self.finish_reason = token.finish_reason
        by_caller = ends_by_token and token.token_id in self._options.caller_stop_token_ids
        return shown + self._matcher.flush(), token.token_id if by_caller else None
