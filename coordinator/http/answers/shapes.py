"""The JSON of an answer: completions and chat differ in nothing but this."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from coordinator.http.answers.logprobs import chat_logprobs, completion_logprobs
from coordinator.jobs.questions.prompts import Attached
from coordinator.request import Request
from coordinator.text.tokens import ChoiceText, ShownToken
from modeling.text.parsers.deltas import (
    Arguments,
    Content,
    Delta,
    Reasoning,
    ToolCall,
    collect,
)
from modeling.text.parsers.formats import OutputParser
from protocol.request import FinishReason

_ENCODER = msgspec.json.Encoder()


class GrowingLists:
    """An object whose lists grow by parts; what is no list stays as the first part has it. JSON is
    made as the parts come: the end of a long answer costs no more than a join."""

    def __init__(self) -> None:
        self._parts: dict[str, list[bytes]] = {}
        self._others: dict[str, Any] = {}

    def add(self, part: dict[str, Any]) -> None:
        """Each list of ``part`` goes on where that of the parts before has ended."""
        for name, value in part.items():
            if not isinstance(value, list):
                self._others.setdefault(name, value)
                continue
            parts = self._parts.setdefault(name, [])
            if value:
                parts.append(_ENCODER.encode(value)[1:-1])

    def whole(self) -> dict[str, Any]:
        """The object, for an encoder of msgspec's."""
        lists = {
            name: msgspec.Raw(b"".join((b"[", b",".join(parts), b"]")))
            for name, parts in self._parts.items()
        }
        return {**lists, **self._others}


@dataclass(slots=True)
class Choice:
    """One request of an answer, and how much of it its caller has seen.

    ``unsent`` are tokens whose text is not complete yet.
    """

    request: Request
    text: ChoiceText
    prompt_number: int  # among those of the HTTP request
    echoed: str = ""
    attached: Attached | None = None  # the document that its prompt begins with
    prompt_json: msgspec.Raw | None = None  # its prompt's ids, if they are to be shown
    num_tokens: int = 0
    is_started: bool = False
    unsent: list[ShownToken] = field(default_factory=list)
    stop_reason: int | str | None = None
    parser: OutputParser | None = None  # None: the answer is its text
    deltas: list[Delta] = field(default_factory=list)  # of a whole answer
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

    def gather(self, choice: Choice) -> None:
        """Put the unsent tokens into what a whole answer shows of them."""
        logprobs = self._shape_logprobs(choice)
        if logprobs is not None:
            choice.logprobs.add(logprobs)
        choice.token_ids.add({"token_ids": [shown.token.token_id for shown in choice.unsent]})
        choice.unsent.clear()

    def content(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """A choice of a chunk: a part of the answer, and the unsent tokens."""
        shown = {
            "index": choice.request.choice,
            **self._delta(choice, delta),
            "logprobs": self._shape_logprobs(choice),
            "finish_reason": None,
        }
        if self.return_token_ids:
            shown["token_ids"] = [shown.token.token_id for shown in choice.unsent]
            if not choice.is_started:
                shown["prompt_token_ids"] = choice.prompt_json
        return shown

    def final(self, choice: Choice) -> dict[str, Any]:
        """A choice of a chunk that says why it ended."""
        shown = {
            "index": choice.request.choice,
            **self._empty_delta(),
            "logprobs": None,
            "finish_reason": _finish_reason(choice),
            "stop_reason": choice.stop_reason,
        }
        if self.return_token_ids:
            shown["token_ids"] = []
        return shown

    def whole_choice(self, choice: Choice, text: str) -> msgspec.Raw:
        """A choice that has ended, and whose tokens have all been gathered."""
        shown = {
            "index": choice.request.choice,
            **self._whole_text(choice, text),
            "logprobs": choice.logprobs.whole() if self.with_logprobs else None,
            "finish_reason": _finish_reason(choice),
            "stop_reason": choice.stop_reason,
        }
        if self.return_token_ids:
            shown.update(choice.token_ids.whole())
            shown["prompt_token_ids"] = choice.prompt_json
        return msgspec.Raw(msgspec.json.encode(shown))

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
    def _delta(self, choice: Choice, delta: Delta) -> dict[str, Any]: ...

    @abstractmethod
    def _empty_delta(self) -> dict[str, Any]: ...

    @abstractmethod
    def _whole_text(self, choice: Choice, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _shape_logprobs(self, choice: Choice) -> dict[str, Any] | None: ...


class CompletionShape(Shape):
    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    continues_prompt = True

    def _delta(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        assert isinstance(delta, Content), "a completion is its text"
        return {"text": delta.text if choice.is_started else choice.echoed + delta.text}

    def _empty_delta(self) -> dict[str, Any]:
        return {"text": ""}

    def _whole_text(self, choice: Choice, text: str) -> dict[str, Any]:  # noqa: ARG002
        return {"text": text}

    def _shape_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return completion_logprobs(choice.unsent, self._bytes_of, len(choice.echoed))


class ChatShape(Shape):
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    continues_prompt = False

    def _delta(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        match delta:
            case Content(text):
                shown: dict[str, Any] = {"content": text}
            case Reasoning(text):
                shown = _reasoning(text)
            case ToolCall(index, call_id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
                shown = {"tool_calls": [call]}
            case Arguments(index, text):
                shown = {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        return {"delta": shown if choice.is_started else {"role": "assistant", **shown}}

    def _empty_delta(self) -> dict[str, Any]:
        return {"delta": {}}

    def _whole_text(self, choice: Choice, text: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.parser is not None:
            read = collect(choice.deltas)
            message["content"] = read.content or (None if read.calls or read.reasoning else "")
            if read.reasoning:
                message |= _reasoning(read.reasoning)
            if read.calls:
                message["tool_calls"] = [
                    {
                        "id": call.call_id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in read.calls
                ]
        return {"message": message}

    def _shape_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        return chat_logprobs(choice.unsent, self._bytes_of) if self.with_logprobs else None


def _reasoning(text: str) -> dict[str, str]:
    """Under both of the names that clients look for."""
    return {"reasoning_content": text, "reasoning": text}


def _finish_reason(choice: Choice) -> str:
    reason = choice.text.finish_reason
    if reason is FinishReason.STOP and choice.parser is not None and choice.parser.num_calls:
        return "tool_calls"
    return "stop" if reason is None else reason.value if reason in _SAID else "stop"


def cache_miss_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """``cache_miss``, when less of a document was found than it promised; else nothing."""
    for choice in choices:
        attached, request = choice.attached, choice.request
        if attached is not None:
            miss = attached.cache_miss(request.num_cached_tokens, is_retried=bool(request.lost))
            return {} if miss is None else {"cache_miss": miss}
    return {}


_SAID = (FinishReason.STOP, FinishReason.LENGTH)


def usage_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens so far: each prompt once, each choice's output."""
    prompts = {choice.prompt_number: choice.request for choice in reversed(choices)}
    num_prompt = sum(request.num_prompt_tokens for request in prompts.values())
    num_output = sum(choice.num_tokens for choice in choices)
    num_cached = sum(request.num_cached_tokens for request in prompts.values())
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
