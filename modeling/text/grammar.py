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
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from llguidance import LLMatcher, LLTokenizer, StructTag, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

# llguidance's type stubs leave the names of its limits out of the package.
from llguidance._lib import LLParserLimits  # isort: skip

from modeling.text.tokenizer import ByteTokenizer, Tokenizer
from protocol.errors import RequestError

_TOKEN = re.compile(r"<\[(\d{1,9})\]>")
MAX_BLANKS = 48  # in a row: a deep member on a line of its own
_VALUES = frozenset({"const", "enum", "default", "examples"})  # of a schema, not schemas
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
    """JSON that a schema accepts (True: any), its members in the order of the schema.

    White space is allowed where JSON has it, but not without end: a model that has nothing to say
    would go on with it up to its last token.
    """
    return LLMatcher.grammar_from_json_schema(
        json.dumps(_of_ascii(schema) if schema is not True else {}),
        defaults={"whitespace_pattern": rf"[ \t\n\r]{{1,{MAX_BLANKS}}}"},
    )


def of_regex(pattern: str) -> str:
    """Text that a regular expression matches as a whole."""
    return LLMatcher.grammar_from_regex(_ascii_classes(pattern))


def _of_ascii(schema: Any) -> Any:  # noqa: ANN401 - a schema is any JSON
    """A schema with the classes of its patterns as JSON Schema (ECMA-262) means them."""
    if isinstance(schema, list):
        return [_of_ascii(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: value
        if key in _VALUES
        else _ascii_classes(value)
        if key == "pattern" and isinstance(value, str)
        else _of_ascii(value)
        for key, value in schema.items()
    }


def _ascii_classes(pattern: str) -> str:
    r"""A pattern with ``\d`` and ``\w`` of ASCII alone, as callers mean them; Rust's are wider."""
    is_in_class = False

    def of(found: re.Match[str]) -> str:
        nonlocal is_in_class
        text = found[0]
        if text in ("[", "]"):
            is_in_class = text == "["
            return text
        inside = _CLASSES.get(text)
        if inside is None:
            return text
        return inside if is_in_class else f"[{inside}]"

    return re.sub(r"\\.|[\[\]]", of, pattern, flags=re.DOTALL)


_CLASSES = {r"\d": "0-9", r"\w": "0-9A-Za-z_"}


def of_choice(choices: Sequence[str]) -> str:
    """One of some texts."""
    return "start: " + " | ".join(json.dumps(choice) for choice in choices)


def of_text(text: str, param: str = "grammar") -> str:
    """A grammar that a caller has written, in Lark or in GBNF.

    Raises:
        RequestError: ``invalid_grammar``.
    """
    if "::=" not in text:
        return LLMatcher.grammar_from_lark(text)
    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # the converter raises whatever its parsing meets
        raise _invalid(f"not GBNF: {error}", param) from error


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


def after_reasoning(
    grammar: str, opens: Sequence[str], closes: Sequence[str], spell: "Spell", *, is_opened: bool
) -> str:
    """Reasoning of any text between two markers, then a text of ``grammar``.

    Args:
        grammar: of the answer itself.
        opens: the ways to write the opening marker.
        closes: the ways to write the closing one.
        spell: of the tokenizer.
        is_opened: the prompt has ended inside the reasoning; else there need be none.
    """
    lines, ends = ["%llguidance {}", "WS: /\\s+/"], []
    for number, close in enumerate(closes):
        first, *rest = spell(close)
        ends.append(f"end_{number}")
        if isinstance(first, int):
            lines.append(f"end_{number}: /(.|\\n)*/ {sequence([first, *rest])}")
        else:
            lines.append(f"close_{number}[lazy]: /(.|\\n)*/ {json.dumps(first)}")
            lines.append(f"end_{number}: close_{number} {sequence(rest)}")
    end = f"({' | '.join(ends)}) WS?"
    begin = f"({' | '.join(sequence(spell(text)) for text in opens)})"
    lines.append(f"start: {end if is_opened else f'(WS? {begin} {end})?'} @answer")
    answer, *others = _grammars(grammar)
    main = {"name": "main", "lark_grammar": "\n".join(lines)}
    return json.dumps({"grammars": [main, {**answer, "name": "answer"}, *others]})


Spell = Callable[[str], Sequence[str | int]]  # a text as plain texts, and ids of control tokens


def spell_as_text(text: str) -> Sequence[str | int]:
    """A text without control tokens: where only the cost of a grammar is looked at."""
    return [text] if text else []


def spell_with(tokenizer: Tokenizer) -> Spell:
    """A text as a tokenizer has it: what spells a control token is that token."""
    special = [text for text in tokenizer.special_texts() if text]
    if not special:
        return spell_as_text
    ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in special}
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))

    def spell(text: str) -> Sequence[str | int]:
        parts: list[str | int] = []
        end = 0
        for found in pattern.finditer(text):
            if found.start() > end:
                parts.append(text[end : found.start()])
            parts += ids[found[0]]
            end = found.end()
        return [*parts, text[end:]] if end < len(text) else parts

    return spell


def sequence(parts: Sequence[str | int]) -> str:
    """Texts and control tokens in a row, as the right side of a rule."""
    if not parts:
        return '""'
    return " ".join(f"<[{p}]>" if isinstance(p, int) else json.dumps(p) for p in parts)


def _grammars(grammar: str) -> list[dict[str, Any]]:
    """The named parts of what a function above has made."""
    if grammar.lstrip().startswith("{"):
        found: list[dict[str, Any]] = json.loads(grammar)["grammars"]
        return found
    return [{"lark_grammar": grammar}]


def check(grammar: str, param: str, num_tokens: int = 0) -> None:
    """Compile a grammar, over single bytes as tokens, and see whether an answer can begin.

    Whichever control tokens it names are one and the same here: it is about what it costs.

    Takes some 0.2 s at most by its budgets, but for what they do not count: call it where a clock
    watches.

    Args:
        grammar: of one of the functions above.
        param: the caller's field, for the message.
        num_tokens: of the model: what a grammar names by number is below; 0 does not look.

    Raises:
        RequestError: ``invalid_grammar``, ``grammar_too_large`` or ``grammar_too_complex``.
    """
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise RequestError(
            f"{param} is larger than {MAX_GRAMMAR_BYTES} bytes as a grammar: make it smaller",
            code="grammar_too_large",
            param=param,
        )
    largest = max((int(found[1]) for found in _TOKEN.finditer(grammar)), default=0)
    if num_tokens and largest >= num_tokens:
        raise _invalid(f"there is no token {largest}", param)
    over_bytes = _TOKEN.sub("<[258]>", grammar)
    matcher = LLMatcher(_bytes_as_tokens(), over_bytes, log_level=0, limits=LIMITS)
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
