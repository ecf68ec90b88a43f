"""Special tokens, named in whatever file: the same ids and the same text as AutoTokenizer's."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from modeling.text.tokenizer import load_tokenizer
from protocol.errors import ConfigError

MARK = "\u2581"
WORDS = ["he", "hel", "lo", "or", "wor", "ld", "end"]
LETTERS = "abcdehilnorstwHW,.<>|_"


def _byte_level() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, "he", "lo", "\u0120w"])}
    merges = [("h", "e"), ("l", "o"), ("\u0120", "w")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece() -> tokenizers.Tokenizer:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in [MARK, *LETTERS, "he", "lo"]:
        vocab.setdefault(piece, len(vocab))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[("h", "e"), ("l", "o")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
    )
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


def _unigram() -> tokenizers.Tokenizer:
    pieces = ["<unk>", MARK, *LETTERS, *WORDS]
    vocab = [(piece, -float(len(pieces) - number)) for number, piece in enumerate(pieces)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK)
    tokenizer.decoder = decoders.Metaspace(MARK)
    return tokenizer


def _words() -> tokenizers.Tokenizer:
    vocab = {word: number for number, word in enumerate(["[UNK]", *WORDS, *LETTERS])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte-level": _byte_level,
    "sentencepiece": _sentencepiece,
    "unigram": _unigram,
    "words": _words,
}
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "image_token")
TEXTS = ["<|im_start|>", "<|im_end|>", "<|x|>", "<s>", "</s>", "[END]", "End", "<T>", "lo"]
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


@st.composite
def _tokens(draw: st.DrawFn) -> dict[str, Any]:
    content = draw(st.sampled_from(TEXTS))
    flags = draw(st.dictionaries(st.sampled_from(FLAGS), st.booleans()))
    return {"content": content, **flags}


@st.composite
def _named(draw: st.DrawFn, marker: dict[str, str]) -> Any:
    """A token by itself, or as an object the way the file has it."""
    token = draw(_tokens())
    return draw(st.sampled_from([token["content"], {**marker, **token}]))


@st.composite
def _files(draw: st.DrawFn) -> dict[str, Any]:
    """Which tokens stand where; ``decoder`` and ``added`` are given the ids that they will get."""
    marked = _named({"__type": "AddedToken"})
    config = draw(st.dictionaries(st.sampled_from(NAMED), marked, max_size=3))
    lists = st.lists(marked, max_size=3, unique_by=str)
    where = draw(st.sampled_from(["", "extra_special_tokens", "additional_special_tokens"]))
    if where:
        config[where] = draw(lists)
    if draw(st.booleans()) and where != "extra_special_tokens":
        named = st.dictionaries(st.sampled_from(["boi_token", "eoi_token"]), marked, max_size=2)
        config["extra_special_tokens"] = draw(named)
    distinct = st.lists(_tokens(), max_size=3, unique_by=lambda token: token["content"])
    older = st.dictionaries(st.sampled_from(NAMED[:5]), _named({}), max_size=2)
    return {
        "in_json": draw(distinct),
        "config": config,
        "decoder": draw(st.none() | distinct),
        "map": draw(st.none() | older),
        "added": draw(st.none() | st.lists(st.sampled_from(TEXTS), max_size=3, unique=True)),
        "split": draw(st.sampled_from([None, None, None, True, False])),
    }


def _write(folder: Path, kind: str, files: dict[str, Any]) -> None:
    for path in folder.iterdir():
        path.unlink()
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens([AddedToken(**token) for token in files["in_json"]])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", **files["config"]}
    if files["split"] is not None:
        config["split_special_tokens"] = files["split"]
    if files["decoder"] is not None:
        tokenizer.add_tokens([AddedToken(**token) for token in files["decoder"]])
        ids = {str(tokenizer.token_to_id(token["content"])): token for token in files["decoder"]}
        config["added_tokens_decoder"] = ids
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if files["map"] is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(files["map"]))
    if files["added"] is not None and files["decoder"] is None:
        tokenizer.add_tokens(files["added"])
        added = {text: tokenizer.token_to_id(text) for text in files["added"]}
        (folder / "added_tokens.json").write_text(json.dumps(added))


def _reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(files=_files(), data=st.data())
def test_ids_and_text_are_autotokenizers(
    kind: str, files: dict[str, Any], data: st.DataObject, tmp_path: Path
) -> None:
    note(json.dumps(files))
    _write(tmp_path, kind, files)
    reference, ours = _reference(tmp_path), load_tokenizer(str(tmp_path))
    pieces = st.sampled_from([*TEXTS, "hello", " ", "  ", "world", ".", "end", "\n"])
    text = "".join(data.draw(st.lists(pieces, max_size=8)))
    for adds in (True, False):
        ids = ours.encode(text, add_special_tokens=adds)
        assert ids == reference(text, add_special_tokens=adds)["input_ids"]
    drawn = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=6))
    drawn += reference.added_tokens_decoder
    for skips in (True, False):
        for sequence in (ids, [i for i in drawn if not _is_byte(ours.token(i))]):
            expected = reference.decode(sequence, skip_special_tokens=skips)
            assert ours.decode(sequence, skip_special_tokens=skips) == expected
    named = {name: str(token) for name, token in reference.special_tokens_map.items()}
    assert {name: ours.special_tokens.get(name) for name in named} == named


def _is_byte(token: str | None) -> bool:
    """Bad UTF-8 is shown otherwise than by the library: see test_tokenizer.py."""
    return token is None or token.startswith("<0x") or (len(token) == 1 and ord(token) > 126)


def _folder(folder: Path, **files: Any) -> Path:
    plain: dict[str, Any] = {
        "in_json": [],
        "config": {},
        "decoder": None,
        "map": None,
        "added": None,
    }
    _write(folder, "byte-level", {**plain, "split": None, **files})
    return folder


def test_an_id_that_belongs_to_another_token_is_refused(tmp_path: Path) -> None:
    _folder(tmp_path)
    config = {"added_tokens_decoder": {"3": {"content": "<|x|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"gives '<\|x\|>' the id 3, with tokenizer\.json it is"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|x|>": 5000}))
    with pytest.raises(ConfigError, match=r"added_tokens\.json: gives '<\|x\|>' the id 5000"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"eos_token": 5}, "eos_token must be a token"),
        ({"eos_token": {"content": "x", "lstrip": "no"}}, "eos_token.lstrip must be true"),
        ({"extra_special_tokens": [["x"]]}, "extra_special_tokens must be a token"),
        ({"extra_special_tokens": "x"}, "extra_special_tokens must be a list"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, "added_tokens_decoder.x must be an id"),
        ({"added_tokens_decoder": {"1": "y"}}, "added_tokens_decoder.1 must be an id"),
        ({"split_special_tokens": "no"}, "split_special_tokens must be true or false"),
    ],
)
def test_what_is_no_token_is_refused(config: dict[str, Any], problem: str, tmp_path: Path) -> None:
    _folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=problem):
        load_tokenizer(str(tmp_path))
