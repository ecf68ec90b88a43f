"""The embedded model's tokenizer: a token for each word it knows, pieces and bytes for the rest.

Byte-level BPE that takes a known word whole (``ignore_merges``, as Llama 3 has it). The end of a
sentence inside a text is a token of its own, ``". "``; at the end of a message it is plain ``"."``:
only the first closes what has been said about a place.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from modeling.embedded.lexicon import SPECIAL_TOKENS, concept_words, filler_words, place_names

SPACE, NEWLINE = "\u0120", "\u010a"  # how byte-level BPE spells them
BOUNDARIES = tuple(mark + gap for mark in ".?!" for gap in (SPACE, NEWLINE))
WORDS = r"[.?!]\s|'s| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MULTIPLE = 64


@dataclass(frozen=True)
class Vocabulary:
    """All tokens by id, as byte-level BPE spells them."""

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def spellings(self, word: str) -> list[int]:
        """The ids of a word with and without a space before it, in small and capital letters."""
        forms = {prefix + form for prefix in ("", SPACE) for form in (word, word.capitalize())}
        return sorted(self.ids[form] for form in forms if form in self.ids)


def build_vocabulary() -> Vocabulary:
    """The tokens of every known word; the same ones always."""
    tokens = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merges = _merges()
    tokens |= dict.fromkeys(left + right for left, right in merges)
    tokens |= dict.fromkeys((*BOUNDARIES, "'s", *(SPACE + digit for digit in "0123456789")))
    tokens |= dict.fromkeys(SPACE + mark for mark in "-(\"'")
    for word in sorted(filler_words()):
        tokens |= dict.fromkeys((SPACE + word, word.capitalize()))
    for word in sorted(concept_words()):
        forms = (word, word.capitalize())
        tokens |= dict.fromkeys(prefix + form for prefix in ("", SPACE) for form in forms)
    for name in place_names():
        tokens |= dict.fromkeys((name, SPACE + name))
    ordered = list(tokens)
    size = -(-(len(ordered) + len(SPECIAL_TOKENS)) // MULTIPLE) * MULTIPLE
    reserved = [f"<|reserved_{i}|>" for i in range(size - len(ordered) - len(SPECIAL_TOKENS))]
    return Vocabulary((*ordered, *reserved, *SPECIAL_TOKENS), tuple(merges))


def _merges() -> list[tuple[str, str]]:
    """Syllables of a consonant and a vowel, so that an unknown name takes a few pieces."""
    consonants, vowels = "bcdfghjklmnpqrstvwxyz", "aeiou"
    merges = [(c, v) for c in consonants for v in vowels]
    merges += [(c.upper(), v) for c in consonants for v in vowels]
    return merges + [(SPACE, left + right) for left, right in merges]


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The library's tokenizer."""
    special = [token for token in vocabulary.tokens if token.startswith("<|")]
    ids = {token: index for token, index in vocabulary.ids.items() if token not in set(special)}
    model = models.BPE(vocab=ids, merges=list(vocabulary.merges), ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocabulary.ids[bos])]
    )
    return tokenizer


def write_tokenizer(folder: Path, vocabulary: Vocabulary) -> None:
    """tokenizer.json and tokenizer_config.json with the chat template."""
    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    bos, end, *_ = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
