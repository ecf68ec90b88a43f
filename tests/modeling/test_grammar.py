"""Grammars: what is generated under a mask is a text of the grammar, wherever the mask is made."""

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from modeling.matchers import Matcher, Matchers
from modeling.sampling import SamplingRow, sample
from modeling.text import grammar as grammars
from modeling.text.grammar import Tag, Vocabulary, check
from modeling.text.tokenizer import ByteTokenizer, CheckpointTokenizer, Tokenizer
from protocol.errors import RequestError
from protocol.request import NoToken, SamplingParams

EOS = 257
POINT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["big", "small"]},
        "at": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
    },
    "required": ["name", "kind", "at"],
    "additionalProperties": False,
}
CALL = Tag(
    trigger="<call>",
    begin='<call>{"name": "locate", "arguments": ',
    schema={
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    },
    end="}</call>",
)


@pytest.fixture(scope="module")
def by_bytes() -> Vocabulary:
    return Vocabulary(ByteTokenizer(300), (EOS,))


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE tokenizer with merges over JSON's punctuation and words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = ['{"name": "Ada", "kind": "big", "at": [1, 22, 333]}, {"name": null}, "größer"'] * 20
    trained.train_from_iterator(texts, trainer)
    trained.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return CheckpointTokenizer(folder)


def allowed(mask: bytes | None) -> list[int]:
    assert mask is not None
    return [8 * i + bit for i, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]


def generate(vocabulary: Vocabulary, grammar: str, eos: int, seed: int) -> list[int] | None:
    """An answer drawn from the masks alone; None when it did not end within 400 tokens."""
    matcher, draw, found = Matcher(vocabulary, grammar), random.Random(seed), list[int]()
    while len(found) < 400:
        choices = allowed(matcher.mask(found))
        # Text has no end by itself: end as soon as that is allowed.
        token_id = eos if eos in choices else draw.choice(choices)
        if token_id == eos:
            return found
        found.append(token_id)
    return None


def is_point(value: Any) -> bool:
    return (
        {"name", "kind", "at"} <= value.keys() <= {"name", "kind", "at", "next"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and value["kind"] in ("big", "small")
        and 2 <= len(value["at"]) <= 3
        and all(type(number) is int for number in value["at"])
        and (value.get("next") is None or is_point(value["next"]))
    )


def test_whatever_is_drawn_from_the_masks_follows_the_schema(
    by_bytes: Vocabulary, merged: Tokenizer
) -> None:
    grammar = grammars.of_json_schema(POINT)
    of_merged = Vocabulary(merged, merged.eos_token_ids)
    num_ended = 0
    for seed in range(20):
        for vocabulary, tokenizer, eos in (
            (by_bytes, ByteTokenizer(300), EOS),
            (of_merged, merged, merged.eos_token_ids[0]),
        ):
            found = generate(vocabulary, grammar, eos, seed)
            if found is not None:
                num_ended += 1
                assert is_point(json.loads(tokenizer.decode(found, continuing=True)))
    assert num_ended >= 10


def test_a_mask_is_a_function_of_the_output_alone(by_bytes: Vocabulary) -> None:
    """One matcher goes along, others are built in the middle, or went along with another text."""
    grammar, output = grammars.of_json_schema(POINT), list(b'{"name": "a\\n", "kind": "big", "at"')
    along, other = Matcher(by_bytes, grammar), Matcher(by_bytes, grammar)
    other.mask(list(b'{"name": "b'))
    for end in range(len(output) + 1):
        mask = along.mask(output[:end])
        assert mask == Matcher(by_bytes, grammar).mask(output[:end])
        assert mask == other.mask(output[:end])


@pytest.mark.parametrize(
    ("grammar", "texts", "others"),
    [
        (grammars.of_json_object(), ["{}", '{"a": [1, null]}'], ["[]", "a", '{"a" 1}']),
        (grammars.of_json_schema(True), ["1", '"a"', "[]"], ["a"]),
        (grammars.of_choice(["yes", 'a "no"', "jä"]), ["yes", 'a "no"', "jä"], ["ye", "yesno"]),
        (grammars.of_regex(r"\d{3}-[a-c]+"), ["123-abc"], ["12-a", "123-"]),
        (grammars.of_text('start: "a" /b+/'), ["ab", "abbb"], ["a", "b"]),
        (grammars.of_text('root ::= "x" | "y" root'), ["x", "yyx"], ["y", "xx"]),
        (
            grammars.of_tags([CALL]),
            ["only text", f'so <call>{CALL.begin[6:]}{{"x": 1}}}}</call>'],
            ["<call>", f"<call>{CALL.begin[6:]}{{}}}}</call>"],
        ),
    ],
)
def test_a_grammar_takes_its_texts_and_no_others(
    by_bytes: Vocabulary, grammar: str, texts: Sequence[str], others: Sequence[str]
) -> None:
    check(grammar, "it")

    def is_taken(text: str) -> bool:
        matcher, output = Matcher(by_bytes, grammar), list(text.encode())
        for end, token_id in enumerate(output):
            if token_id not in allowed(matcher.mask(output[:end])):
                return False
        return EOS in allowed(matcher.mask(output))

    assert [is_taken(text) for text in texts] == [True] * len(texts)
    assert [is_taken(text) for text in others] == [False] * len(others)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: grammars.of_json_schema({"type": "strin"}), "invalid_grammar"),
        (lambda: grammars.of_json_schema({"not": {"type": "string"}}), "invalid_grammar"),
        (lambda: grammars.of_json_schema({"$ref": "https://example.com/x"}), "invalid_grammar"),
        (lambda: grammars.of_json_schema({"$ref": "#/$defs/gone"}), "invalid_grammar"),
        (lambda: grammars.of_regex("(?=a)b"), "invalid_grammar"),
        (lambda: grammars.of_regex("("), "invalid_grammar"),
        (lambda: grammars.of_text("start: ("), "invalid_grammar"),
        (lambda: grammars.of_text("root ::= ("), "invalid_grammar"),
        (lambda: grammars.of_choice(["x" * 300_000]), "grammar_too_large"),
        (
            lambda: grammars.of_json_schema(
                {"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": 9}]} for i in range(16)]}
            ),
            "grammar_too_complex",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(make: Any, code: str) -> None:
    started = time.process_time()
    with pytest.raises(RequestError) as refused:
        check(make(), "response_format")
    assert refused.value.code == code
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    "grammar",
    [
        grammars.of_regex("(a|aa)+(a|aa)+(a|b)*[ab]{500}c"),
        grammars.of_regex("(((a{1,1000}){1,1000}){1,1000}){1,1000}"),
        grammars.of_json_schema({"enum": [f"v{i}" for i in range(15_000)]}),
        grammars.of_json_schema({"properties": {f"p{i}": {} for i in range(1000)}}),
        grammars.of_text('start: e\ne: e e | "a" | e e e'),
    ],
)
def test_a_hard_grammar_costs_a_bounded_time_and_fails_alone(
    by_bytes: Vocabulary, grammar: str
) -> None:
    """Whether it is refused, gives up on the way or works: no step takes long."""
    started = time.process_time()
    try:
        check(grammar, "it")
    except RequestError as refused:
        assert refused.code == "grammar_too_complex"
    assert time.process_time() - started < 2.0
    matcher, longest = Matcher(by_bytes, grammar), 0.0
    for length in range(100):
        started = time.process_time()
        mask = matcher.mask([97] * length)
        longest = max(longest, time.process_time() - started)
        if mask is None or 97 not in allowed(mask):
            break
    assert longest < 0.5


def test_the_token_is_the_best_of_those_that_the_mask_allows(by_bytes: Vocabulary) -> None:
    grammar = grammars.of_choice(["yes", "no"])
    matchers = Matchers(lambda: by_bytes)
    logits = torch.zeros(1, 512)  # more than the tokenizer has: a model's padding
    logits[0, 511], logits[0, ord("n")], logits[0, ord("y")] = 9.0, 1.0, 2.0
    params = SamplingParams(max_tokens=4, temperature=0.0, grammar=grammar)
    output = list[int]()
    while True:
        row = SamplingRow(params, len(output), (), tuple(output))
        [chosen] = sample(logits, [matchers.constrain(("r", 1), row)])
        assert not isinstance(chosen, NoToken)
        if chosen[0] == EOS:
            break
        output.append(chosen[0])
    assert bytes(output) == b"yes"
    matchers.forget(("r", 1))
    assert len(matchers) == 0


def test_an_answer_that_is_none_of_the_grammar_has_no_next_token(by_bytes: Vocabulary) -> None:
    matchers = Matchers(lambda: by_bytes)
    params = SamplingParams(max_tokens=4, grammar=grammars.of_choice(["yes"]))
    row = matchers.constrain(("r", 1), SamplingRow(params, 1, (), (ord("n"),)))
    assert sample(torch.zeros(1, 300), [row]) == [NoToken.OFF_GRAMMAR]
    assert sample(torch.full((1, 300), torch.nan), [row]) == [NoToken.NON_FINITE]
    good = SamplingRow(SamplingParams(max_tokens=1, temperature=0.0), 0)
    found = sample(torch.zeros(2, 300), [row, good])
    assert found == [NoToken.OFF_GRAMMAR, (0, None)]  # the other row goes on


def test_masks_are_kept_for_so_many_sequences_and_built_again(by_bytes: Vocabulary) -> None:
    matchers, grammar = Matchers(lambda: by_bytes, max_matchers=2), grammars.of_regex("a*b")
    for name in "xyz":
        matchers.mask((name, 1), grammar, [97])
    assert len(matchers) == 2
    assert matchers.mask(("x", 1), grammar, [97, 97]) == Matcher(by_bytes, grammar).mask([97, 97])


def test_control_tokens_are_no_text(tmp_path: Path, by_bytes: Vocabulary) -> None:
    del tmp_path
    mask = allowed(Matcher(by_bytes, grammars.of_regex(r"(.|\n)*")).mask([]))
    assert 256 not in mask  # <|bos|>, though its spelling is a text of the grammar
    assert EOS in mask
