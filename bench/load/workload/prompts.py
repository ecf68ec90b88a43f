"""From segments to what is sent: token ids or words, and the bytes of a request.

Tokens are BLAKE2b of (seed, segment's name), so every process, host and year gets the same ones.
"""

import enum
import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from bench.load.workload.sessions import Segment, Turn

DEFAULT_VOCABULARY = (32, 256)  # single bytes in nearly every tokenizer, special in none

# Short words that most tokenizers know, each with the blank before it, as one token.
_TEXT = (
    "time year people way day man thing woman life child world school state family student "
    "group country problem hand part place case week company system program question work "
    "government number night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city name"
)
_WORDS = _TEXT.split()
_ENCODER = msgspec.json.Encoder()


class Api(enum.StrEnum):
    """How a prompt travels."""

    TOKENS = "tokens"  # /v1/completions with token ids: lengths and shared prefixes are exact
    TEXT = "text"  # /v1/completions with words
    CHAT = "chat"  # /v1/chat/completions with words

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self is Api.CHAT else "/v1/completions"


class Dialect(msgspec.Struct, frozen=True):
    """What a server is asked and how.

    Args:
        extensions: fields beyond OpenAI's: exact answer lengths, token ids of answers, session.
        vocabulary: token ids of prompts are at least the first and below the second.
    """

    model: str
    api: Api = Api.TOKENS
    extensions: bool = True
    vocabulary: tuple[int, int] = DEFAULT_VOCABULARY


def tokens_of(seed: int, segment: Segment, vocabulary: tuple[int, int]) -> list[int]:
    """The token ids of a segment."""
    low, high = vocabulary
    key = hashlib.blake2b(f"{seed}/{segment.key}".encode(), digest_size=32).digest()
    num_digests = -(-4 * segment.num_tokens // 64)
    stream = b"".join(
        hashlib.blake2b(number.to_bytes(8, "little"), key=key).digest()
        for number in range(num_digests)
    )
    drawn = np.frombuffer(stream, dtype="<u4", count=segment.num_tokens)
    found: list[int] = (drawn.astype(np.int64) % (high - low) + low).tolist()
    return found


def words_of(seed: int, segment: Segment) -> str:
    """As many words, each with a blank before it."""
    return "".join(f" {_WORDS[number]}" for number in tokens_of(seed, segment, (0, len(_WORDS))))


class Conversation:
    """What was said in one session so far, in the form in which it is sent again."""

    def __init__(self, dialect: Dialect, seed: int) -> None:
        self._dialect = dialect
        self._seed = seed
        self._tokens: list[int] = []
        self._texts: list[str] = []  # the user's and the answers, in turn

    def ask(self, turn: Turn, session: str) -> bytes:
        """The body of the next turn's request."""
        if not turn.keeps_history:
            self._tokens, self._texts = [], []
        api = self._dialect.api
        if api is Api.TOKENS:
            for segment in turn.segments:
                self._tokens += tokens_of(self._seed, segment, self._dialect.vocabulary)
            return self._body({"prompt": self._tokens}, turn, session)
        self._texts.append("".join(words_of(self._seed, segment) for segment in turn.segments))
        if api is Api.TEXT:
            return self._body({"prompt": "".join(self._texts)}, turn, session)
        messages = [
            {"role": "assistant" if number % 2 else "user", "content": text}
            for number, text in enumerate(self._texts)
        ]
        return self._body({"messages": messages}, turn, session)

    def answer(self, token_ids: Sequence[int], text: str, num_tokens: int, name: str) -> None:
        """What came back. A server that tells no token ids is taken to have said something else."""
        if self._dialect.api is not Api.TOKENS:
            self._texts.append(text)
        elif token_ids:
            self._tokens += token_ids
        else:
            unknown = Segment(f"answer/{name}", num_tokens)
            self._tokens += tokens_of(self._seed, unknown, self._dialect.vocabulary)

    def _body(self, prompt: dict[str, Any], turn: Turn, session: str) -> bytes:
        fields: dict[str, Any] = {
            "model": self._dialect.model,
            **prompt,
            "max_tokens": turn.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._dialect.extensions:
            fields |= {"ignore_eos": True, "return_token_ids": True, "session_id": session}
        return _ENCODER.encode(fields)
