"""Log-probabilities in the two shapes that OpenAI has for them."""

from collections.abc import Callable, Sequence
from typing import Any

from coordinator.text.tokens import ShownToken
from protocol.request import TokenLogprobs

LOWEST = -9999.0  # JSON has no infinity

BytesOf = Callable[[int], bytes]  # of one token by itself


def _number(logprob: float) -> float:
    return max(logprob, LOWEST)


def _name(token_bytes: bytes) -> str:
    """A token in the lists of completions: its text, or ``bytes:\\xe2\\x80``.

    The latter is how OpenAI writes a part of a character: different parts have different names.
    """
    try:
        return token_bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def completion_logprobs(
    tokens: Sequence[ShownToken], bytes_of: BytesOf, offset: int
) -> dict[str, Any]:
    """Of completions: parallel lists, with each token's offset in the choice's text.

    Args:
        tokens: with their offsets in the answer.
        bytes_of: see there.
        offset: where in the text the answer begins (after an echoed prompt).
    """
    entries = [shown.token.logprobs for shown in tokens]
    return {
        "tokens": [_name(bytes_of(shown.token.token_id)) for shown in tokens],
        "token_logprobs": [_number(entry.chosen) if entry else None for entry in entries],
        "top_logprobs": [
            _alternatives(shown.token.token_id, entry, bytes_of) if entry else {}
            for shown, entry in zip(tokens, entries, strict=True)
        ],
        "text_offset": [offset + shown.offset for shown in tokens],
    }


def _alternatives(token_id: int, entry: TokenLogprobs, bytes_of: BytesOf) -> dict[str, float]:
    """The likeliest first, then the sampled token if it is not among them.

    A name is a key here: of tokens with the same text the likeliest has it, others go by their ids.
    """
    found: dict[str, float] = {}
    pairs = list(zip(entry.top_ids, entry.top, strict=True))
    if token_id not in entry.top_ids:
        pairs.append((token_id, entry.chosen))
    for alternative, logprob in pairs:
        name = _name(bytes_of(alternative))
        found[name if name not in found else f"token_id:{alternative}"] = _number(logprob)
    return found


def chat_logprobs(tokens: Sequence[ShownToken], bytes_of: BytesOf) -> dict[str, Any]:
    """Of chat: one entry per token, with its likeliest alternatives."""
    content = []
    for shown in tokens:
        entry = shown.token.logprobs
        if entry is None:
            continue
        top = zip(entry.top_ids, entry.top, strict=True)
        content.append(
            {
                **_chat_entry(bytes_of(shown.token.token_id), entry.chosen),
                "top_logprobs": [_chat_entry(bytes_of(i), value) for i, value in top],
            }
        )
    return {"content": content, "refusal": None}


def _chat_entry(token_bytes: bytes, logprob: float) -> dict[str, Any]:
    return {
        "token": token_bytes.decode("utf-8", "replace"),
        "logprob": _number(logprob),
        "bytes": list(token_bytes),  # what the token has of a character, when it has not all
    }
