"""The JSON of an answer: completions and chat differ in nothing but this."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from coordinator.http.answers.growing_json import GrowingLists
from coordinator.http.answers.logprobs import chat_logprobs, completion_logprobs
from coordinator.http.frontend import Choice
from coordinator.records.records import Record
from coordinator.text.tokens import ChoiceText, ShownToken
from protocol.request import FinishReason


@dataclass(slots=True)
class ChoiceState:
    """How far one choice has got; ``unsent`` are tokens whose text is not complete yet."""

    choice: Choice
    record: Record
    text: ChoiceText
    num_tokens: int = 0
    is_started: bool = False
    unsent: list[ShownToken] = field(default_factory=list)
    stop_reason: int | str | None = None
    token_ids: GrowingLists = field(default_factory=GrowingLists)  # these two of a whole answer
    logprobs: GrowingLists = field(default_factory=GrowingLists)


@dataclass(frozen=True, slots=True)
class Header:
    """What every object of one answer repeats."""

    request_id: str
    created: int
    model: str


class Shape(ABC):
    """Makes objects; keeps nothing. ``bytes_of`` are the bytes of one token by itself."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    continues_prompt: bool  # the answer goes on where the prompt's text ends

    def __init__(
        self, *, return_token_ids: bool, with_logprobs: bool, bytes_of: Callable[[int], bytes]
    ) -> None:
        self.return_token_ids = return_token_ids
        self.with_logprobs = with_logprobs
        self._bytes_of = bytes_of

    def chunk(self, header: Header, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self._object(header, self.chunk_object, choices)

    def whole(
        self, header: Header, choices: Sequence[msgspec.Raw], usage: dict[str, Any]
    ) -> dict[str, Any]:
        """A complete answer, of its ``whole_choice``s."""
        return {**self._object(header, self.whole_object, choices), "usage": usage}

    def gather(self, state: ChoiceState) -> None:
        """Put the unsent tokens into what a whole answer shows of them."""
        logprobs = self._shape_logprobs(state)
        if logprobs is not None:
            state.logprobs.add(logprobs)
        state.token_ids.add({"token_ids": [shown.token.token_id for shown in state.unsent]})
        state.unsent.clear()

    def content(self, state: ChoiceState, text: str) -> dict[str, Any]:
        """A choice of a chunk: ``text`` and the unsent tokens."""
        choice = {
            "index": state.choice.index,
            **self._delta(state, text),
            "logprobs": self._shape_logprobs(state),
            "finish_reason": None,
        }
        if self.return_token_ids:
            choice["token_ids"] = [shown.token.token_id for shown in state.unsent]
            if not state.is_started:
                choice["prompt_token_ids"] = state.choice.prompt_json
        return choice

    def final(self, state: ChoiceState) -> dict[str, Any]:
        """A choice of a chunk that says why it ended."""
        choice = {
            "index": state.choice.index,
            **self._empty_delta(),
            "logprobs": None,
            "finish_reason": _finish_reason(state),
            "stop_reason": state.stop_reason,
        }
        if self.return_token_ids:
            choice["token_ids"] = []
        return choice

    def whole_choice(self, state: ChoiceState, text: str) -> msgspec.Raw:
        """A choice that has ended, and whose tokens have all been gathered."""
        choice = {
            "index": state.choice.index,
            **self._whole_text(text),
            "logprobs": state.logprobs.whole() if self.with_logprobs else None,
            "finish_reason": _finish_reason(state),
            "stop_reason": state.stop_reason,
        }
        if self.return_token_ids:
            choice.update(state.token_ids.whole())
            choice["prompt_token_ids"] = state.choice.prompt_json
        return msgspec.Raw(msgspec.json.encode(choice))

    def _object(
        self, header: Header, name: str, choices: Sequence[dict[str, Any] | msgspec.Raw]
    ) -> dict[str, Any]:
        return {
            "id": f"{self.id_prefix}{header.request_id}",
            "object": name,
            "created": header.created,
            "model": header.model,
            "choices": list(choices),
        }

    @abstractmethod
    def _delta(self, state: ChoiceState, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _empty_delta(self) -> dict[str, Any]: ...

    @abstractmethod
    def _whole_text(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _shape_logprobs(self, state: ChoiceState) -> dict[str, Any] | None: ...


class CompletionShape(Shape):
    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    continues_prompt = True

    def _delta(self, state: ChoiceState, text: str) -> dict[str, Any]:
        return {"text": text if state.is_started else state.choice.echoed + text}

    def _empty_delta(self) -> dict[str, Any]:
        return {"text": ""}

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _shape_logprobs(self, state: ChoiceState) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return completion_logprobs(state.unsent, self._bytes_of, len(state.choice.echoed))


class ChatShape(Shape):
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    continues_prompt = False

    def _delta(self, state: ChoiceState, text: str) -> dict[str, Any]:
        if state.is_started:
            return {"delta": {"content": text}}
        return {"delta": {"role": "assistant", "content": text}}

    def _empty_delta(self) -> dict[str, Any]:
        return {"delta": {}}

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _shape_logprobs(self, state: ChoiceState) -> dict[str, Any] | None:
        return chat_logprobs(state.unsent, self._bytes_of) if self.with_logprobs else None


def _finish_reason(state: ChoiceState) -> str:
    reason = state.text.finish_reason
    return "stop" if reason is None else reason.value if reason in _SAID else "stop"


def cache_miss_of(states: Sequence[ChoiceState]) -> dict[str, Any]:
    """``cache_miss``, when less of a document was found than it promised; else nothing."""
    for state in states:
        attached, record = state.choice.attached, state.record
        if attached is not None:
            miss = attached.cache_miss(record.num_cached_tokens, is_retried=bool(record.lost))
            return {} if miss is None else {"cache_miss": miss}
    return {}


_SAID = (FinishReason.STOP, FinishReason.LENGTH)


def usage_of(states: Sequence[ChoiceState]) -> dict[str, Any]:
    """Tokens so far: each prompt once, each choice's output."""
    prompts = {state.choice.prompt_number: state.record for state in reversed(states)}
    num_prompt = sum(record.num_prompt_tokens for record in prompts.values())
    num_output = sum(state.num_tokens for state in states)
    num_cached = sum(record.num_cached_tokens for record in prompts.values())
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
