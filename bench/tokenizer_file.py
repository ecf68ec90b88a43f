"""A byte-level BPE tokenizer of any size, made from nothing but a rule.

Ids 0 to 255 are bytes, the last four are special tokens, and between them lie merges of English
letters in the order of their frequency, so ordinary text takes two to three characters a token.
"""

import json
from itertools import product
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
SPACE = "\u0120"  # how byte-level BPE spells a space
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json with a ChatML template.

    Args:
        folder: exists.
        vocab_size: at least :data:`MIN_VOCAB`; every id below it is some token.
    """
    num_merges = vocab_size - MIN_VOCAB
    merges = _merges(num_merges)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos, _, turn_end = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": turn_end,
        "pad_token": eos,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def special_token_ids(vocab_size: int) -> dict[str, int]:
    """The ids of the special tokens: the last of the vocabulary."""
    return {text: vocab_size - len(SPECIAL_TOKENS) + i for i, text in enumerate(SPECIAL_TOKENS)}


def _merges(count: int) -> list[tuple[str, str]]:
    """Pairs, then pairs behind a space, then triples and so on; frequent letters first."""
    merges: list[tuple[str, str]] = []
    words = [""]
    for _ in range(6):
        grown = product(words, LETTERS)
        level = sorted(grown, key=lambda pair: sum(LETTERS.index(c) for c in "".join(pair)))
        if words != [""]:
            merges += level
        if len(merges) >= count:
            break
        words = [left + right for left, right in level][:2048]
        merges += [(SPACE, word) for word in words]
    assert len(merges) >= count, "no vocabulary is that large"
    return merges[:count]
