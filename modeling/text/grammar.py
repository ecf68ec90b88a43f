"""Grammars of answers: what a caller may ask an answer to be, and which token may come next.

A grammar is a text in llguidance's language (a Lark dialect with JSON schemas and regular
expressions inside). The coordinator makes it of a caller's ``response_format`` and the like and
checks it; it travels in :class:`~protocol.request.SamplingParams`; the rank that samples keeps a
matcher for each sequence (modeling/matchers.py).

What a grammar may cost is bounded twice. ``check`` compiles it with a budget of steps, in a process
that can be killed; a mask has a budget as well, and a matcher that passes it fails its own request.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from llguidance import LLMatcher, LLTokenizer, StructTag, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

# llguidance's type stubs leave the names of its limits out of the package.
from llguidance._lib import LLParserLimits  # isort: skip

from modeling.text.tokenizer import ByteTokenizer, Tokenizer
from protocol.errors import RequestError

MAX_GRAMMAR_BYTES = 256 * 1024
LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=200_000,  # of compiling: some 0.2 s
    step_lexer_fuel=50_000,
    step_max_items=10_000,  # of one mask: some 10 ms
    max_lexer_states=50_000,
    max_grammar_size=200_000,
)


def of_json_object() -> str:
    """Any JSON object."""
    return of_json_schema({"type": "object"})


def of_json_schema(schema: Mapping[str, Any] | bool) -> str:
    """JSON that a schema accepts, its members in the order of the schema."""
    return LLMatcher.grammar_from_json_schema(json.dumps(schema))


def of_regex(pattern: str) -> str:
    """Text that a regular expression matches as a whole."""
    return LLMatcher.grammar_from_regex(pattern)


def of_choice(choices: Sequence[str]) -> str:
    """One of some texts."""
    return "start: " + " | ".join(json.dumps(choice) for choice in choices)


def of_text(text: str) -> str:
    """A grammar that a caller has written, in Lark or in GBNF.

    Raises:
        RequestError: ``invalid_grammar``.
    """
    if "::=" not in text:
        return LLMatcher.grammar_from_lark(text)
    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # the converter raises whatever its parsing meets
        raise _invalid(f"not GBNF: {error}") from error


class Tag(msgspec.Struct, frozen=True):
    """Text that is free until ``trigger`` occurs; then ``begin`` (of which the trigger is the
    start), JSON of ``schema``, and ``end`` must follow."""

    trigger: str
    begin: str
    schema: dict[str, Any]
    end: str = ""


def of_tags(tags: Sequence[Tag]) -> str:
    """Free text in which each trigger begins a tag (structural tags)."""
    made = [
        StructTag(trigger=tag.trigger, begin=tag.begin, grammar=tag.schema, end=tag.end)
        for tag in tags
    ]
    return StructTag.to_grammar(made, assume_special=False)


def of_one_tag(tags: Sequence[Tag]) -> str:
    """Exactly one tag, from the first token on: how a call of a tool is forced."""
    rules = [
        f"tag_{i}: {_literal(tag.begin)} %json {json.dumps(tag.schema)} {_literal(tag.end)}"
        for i, tag in enumerate(tags)
    ]
    start = " | ".join(f"tag_{i}" for i in range(len(tags)))
    return "\n".join(["%llguidance {}", f"start: {start}", *rules])


def _literal(text: str) -> str:
    return json.dumps(text) if text else '""'


def check(grammar: str, param: str) -> None:
    """Compile a grammar, over single bytes as tokens, and see whether an answer can begin.

    Takes some 0.2 s at most by its budgets, but for what they do not count: call it where a clock
    watches.

    Args:
        grammar: of one of the functions above.
        param: the caller's field, for the message.

    Raises:
        RequestError: ``invalid_grammar``, ``grammar_too_large`` or ``grammar_too_complex``.
    """
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise RequestError(
            f"{param} is larger than {MAX_GRAMMAR_BYTES} bytes as a grammar: make it smaller",
            code="grammar_too_large",
            param=param,
        )
    matcher = LLMatcher(_bytes_as_tokens(), grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise _error(matcher.get_error(), param)
    if warnings := matcher.get_grammar_warnings():
        # What a schema asks for and the compiler does not know would be ignored: refuse it.
        raise _invalid("; ".join(warnings), param)


def _error(message: str, param: str) -> RequestError:
    first = message.strip().splitlines()[0] if message.strip() else "unknown"
    if any(word in message for word in ("too big", "too large", "too complex", "limit", "max is")):
        return RequestError(
            f"{param} is too complex to be followed ({first}): make it simpler",
            code="grammar_too_complex",
            param=param,
        )
    return _invalid(first, param)


def _invalid(text: str, param: str = "grammar") -> RequestError:
    return RequestError(
        f"{param} is not a grammar that can be followed: {text}",
        code="invalid_grammar",
        param=param,
    )


class Vocabulary:
    """A tokenizer's tokens as llguidance wants them: their bytes, and which of them are control.

    Building it looks at every token once: 0.3 s for 150,000.

    Args:
        tokenizer: of the model.
        eos_token_ids: the tokens that may follow where a grammar is complete; not empty.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> None:
        source = TokenizerWrapper(_Source(tokenizer, eos_token_ids))
        self.tokens = LLTokenizer(source, eos_token=list(eos_token_ids))
        self.size: int = self.tokens.vocab_size


class _Source:
    """What llguidance reads of a tokenizer; it wants these names."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = eos_token_ids[0]
        self.special_token_ids = [i for i in ids if tokenizer.is_special(i)]
        special = {*self.special_token_ids, *eos_token_ids}
        # A token without bytes, which a model may have as filler, can never be part of an answer.
        self.tokens = [_bytes_of(tokenizer, i, i in special) for i in ids]
        self._encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        return self._encode(text, add_special_tokens=False)


def _bytes_of(tokenizer: Tokenizer, token_id: int, is_special: bool) -> bytes:
    if is_special:
        return (tokenizer.token(token_id) or f"<|{token_id}|>").encode()
    return tokenizer.token_bytes(token_id)


@functools.cache
def _bytes_as_tokens() -> LLTokenizer:
    return Vocabulary(ByteTokenizer(260), (257,)).tokens
