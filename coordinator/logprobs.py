"""Log-probabilities in the two shapes that OpenAI has for them."""

from collections.abc import Callable, Sequence
from typing import Any

from protocol.messages import NewToken

LOWEST = -9999.0  # JSON has no infinity


def _number(logprob: float) -> float:
    return max(logprob, LOWEST)


def _text(token_bytes: bytes) -> str:
    return token_bytes.decode("utf-8", "replace")


class CompletionLogprobs:
    """Of completions: parallel lists, with each token's offset in the choice's text.

    Args:
        bytes_of: the bytes of one token by itself.
        offset: where in the text the first token begins (after an echoed prompt).
    """

    def __init__(self, bytes_of: Callable[[int], bytes], offset: int = 0) -> None:
        self._bytes_of = bytes_of
        self._offset = offset

    def shape(self, tokens: Sequence[NewToken]) -> dict[str, Any]:
        shaped: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in tokens:
            text = _text(self._bytes_of(token.token_id))
            shaped["tokens"].append(text)
            shaped["text_offset"].append(self._offset)
            self._offset += len(text)
            entry = token.logprobs
            shaped["token_logprobs"].append(_number(entry.chosen) if entry else None)
            top = zip(entry.top_ids, entry.top, strict=True) if entry else ()
            shaped["top_logprobs"].append(
                {_text(self._bytes_of(i)): _number(value) for i, value in top}
            )
        return shaped


def chat_logprobs(tokens: Sequence[NewToken], bytes_of: Callable[[int], bytes]) -> dict[str, Any]:
    """Of chat: one entry per token, with its likeliest alternatives."""
    content = []
    for token in tokens:
        entry = token.logprobs
        if entry is None:
            continue
        top = zip(entry.top_ids, entry.top, strict=True)
        content.append(
            {
                **_chat_entry(bytes_of(token.token_id), entry.chosen),
                "top_logprobs": [_chat_entry(bytes_of(i), value) for i, value in top],
            }
        )
    return {"content": content, "refusal": None}


def _chat_entry(token_bytes: bytes, logprob: float) -> dict[str, Any]:
    return {
        "token": _text(token_bytes),
        "logprob": _number(logprob),
        "bytes": list(token_bytes),  # what the token has of a character, when it has not all
    }
