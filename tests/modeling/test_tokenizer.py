"""Token ids to text in pieces: nothing lost, nothing split, whatever the ids are."""

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from bench.tokenizer_file import write_tokenizer
from modeling.text.tokenizer import Tokenizer, load_tokenizer
from protocol.errors import ConfigError, RequestError
from tests.sizes import some_of

MARK = "\u2581"
REPLACEMENT = "\ufffd"
TEXTS = [
    "",
    " ",
    "  two  spaces  ",
    "Hello, world",
    "line\nline\r\n\ttab",
    "Übergröße, naïve café",
    "漢字かな交じり文",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, e\u0301 combining",
    "\u0000\ufeff\u202e\ufffe\u2028",
    'data: [DONE]\n\n{"json": true}',
]


def _sentencepiece(folder: Path, metaspace: bool) -> None:
    """Llama-2 style: words with U+2581, bytes as <0x..>, a leading space that decoding drops."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = [MARK, *"abcdehilnorstwHW,.é漢字"]
    words = [f"{MARK}h", f"{MARK}he", "lo", "or", "wor", f"{MARK}wor", f"{MARK}{MARK}", "ld"]
    for piece in letters + words:
        vocab.setdefault(piece, len(vocab))
    merges = [(MARK, "h"), (f"{MARK}h", "e"), ("l", "o"), ("o", "r"), ("w", "or")]
    merges += [(MARK, "wor"), (MARK, MARK), ("l", "d")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme="first")
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
        )
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    specials = [AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")]
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))


def _metaspace_decoder(folder: Path) -> None:
    _sentencepiece(folder, metaspace=True)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["decoder"] = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "always"}
    (folder / "tokenizer.json").write_text(json.dumps(data))


def _words(folder: Path) -> None:
    vocab = {"<unk>": 0, "the": 1, "mayor": 2, "of": 3, "Ghent": 4, "is": 5}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def _word_pieces(folder: Path) -> None:
    words = ["[UNK]", "the", "mayor", "##s", "##or", "of", ".", ",", "?", "'", "'s", "n't", "' "]
    more = ["do not", "a . b", " ' ", "##", "##,", "'re", "\u00e9", "##\u00e9"]
    vocab = {word: number for number, word in enumerate([*words, *more])}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))


KINDS: dict[str, Callable[[Path], None]] = {
    "byte-level": lambda folder: write_tokenizer(folder, 700),
    "metaspace": lambda folder: _sentencepiece(folder, metaspace=True),
    "prepend": lambda folder: _sentencepiece(folder, metaspace=False),
    "metaspace-decoder": _metaspace_decoder,
    "words": _words,
    "word-pieces": _word_pieces,
}
ALL = [*KINDS, "arithmetic"]


@pytest.fixture(scope="session")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """A function: the tokenizer of a kind, and for library kinds its folder."""
    loaded: dict[str, Tokenizer] = {}

    def load(kind: str) -> Tokenizer:
        if kind not in loaded:
            if kind == "arithmetic":
                loaded[kind] = load_tokenizer("arithmetic:vocab=300")
            else:
                folder = tmp_path_factory.mktemp(kind)
                KINDS[kind](folder)
                loaded[kind] = load_tokenizer(str(folder))
        return loaded[kind]

    return load


def _stream(tokenizer: Tokenizer, pieces: list[list[int]], **options: Any) -> list[str]:
    stream = tokenizer.stream(**options)
    return [stream.push(piece) for piece in pieces] + [stream.flush()]


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=some_of(150))
@given(data=st.data())
def test_the_pieces_add_up(kind: str, tokenizer_of: Any, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    ids = st.integers(0, tokenizer.vocab_size + 3)  # a padded vocabulary has ids without tokens
    pieces = data.draw(st.lists(st.lists(ids, max_size=4), max_size=12))
    options = {
        "skip_special_tokens": data.draw(st.booleans()),
        "continuing": data.draw(st.booleans()),
    }
    whole = tokenizer.decode([i for piece in pieces for i in piece], **options)
    assert "".join(_stream(tokenizer, pieces, **options)) == whole
    whole.encode()  # no half of a surrogate pair


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=some_of(150))
@given(data=st.data())
def test_decode_equals_the_library(kind: str, tokenizer_of: Any, data: st.DataObject) -> None:
    """Byte-level always; byte fallback wherever the library found no bad byte."""
    tokenizer = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    skip = data.draw(st.booleans())
    expected = tokenizer._tokenizer.decode(ids, skip_special_tokens=skip)
    if kind != "byte-level" and REPLACEMENT in expected:
        return
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("kind", [kind for kind in ALL if "word" not in kind])
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(kind: str, text: str, tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    decoded = "".join(_stream(tokenizer, [[token_id] for token_id in ids]))
    if kind == "metaspace-decoder":
        return  # it knows no byte fallback
    if kind == "metaspace" and text.startswith(" "):
        text = text[1:]  # the library takes it for the space that it would have put there
    assert decoded == text


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "arithmetic"])
def test_bad_bytes_come_out_in_a_bounded_window(kind: str, tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(kind)
    lead, end = (
        next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == byte)
        for byte in (b"\xf0", b"\x9f")
    )
    stream = tokenizer.stream()
    waiting = 0
    for number in range(1, 2000):
        waiting = 0 if stream.push([lead if number % 3 else end]) else waiting + 1
        assert waiting <= 3
    assert stream.flush().strip(REPLACEMENT) == ""


def test_a_character_is_held_until_complete(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("arithmetic")
    emoji = list("😀".encode())
    assert _stream(tokenizer, [[i] for i in emoji]) == ["", "", "", "😀", ""]
    assert _stream(tokenizer, [emoji[:3]]) == ["", REPLACEMENT]
    assert _stream(tokenizer, [[*emoji[:3], 65]]) == [f"{REPLACEMENT}A", ""]


def test_a_continuation_keeps_its_leading_space(tokenizer_of: Any) -> None:
    for kind in ("metaspace", "prepend", "metaspace-decoder"):
        tokenizer = tokenizer_of(kind)
        ids = tokenizer.encode("he")
        assert tokenizer.decode(ids) == "he"
        assert tokenizer.decode(ids, continuing=True) == " he"
    words = tokenizer_of("words")
    ids = words.encode("the mayor of Ghent")
    assert words.decode(ids) == "the mayor of Ghent"
    assert words.decode(ids[1:], continuing=True) == " mayor of Ghent"
    pieces = tokenizer_of("word-pieces")
    ids = pieces.encode("the mayors of")
    assert pieces.decode(ids) == "the mayors of"
    assert pieces.decode(ids[2:], continuing=True) == "s of"
    assert [pieces.token_bytes(i) for i in ids] == [b" the", b" mayor", b"s", b" of"]


def test_special_tokens(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("<|im_start|>a<|im_end|>")
    assert ids == [698, tokenizer.encode("a")[0], 699]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a<|im_end|>"
    assert tokenizer.eos_token_ids == (699,)
    assert tokenizer.special_tokens["bos_token"] == "<|bos|>"
    assert tokenizer_of("metaspace").eos_token_ids == (2,)


def test_a_guarded_special_token_is_text(tokenizer_of: Any) -> None:
    guard = "\U0010ff00"
    for kind, special in (("byte-level", "<|im_end|>"), ("metaspace", "</s>")):
        tokenizer = tokenizer_of(kind)
        text = f"he {special[0]}{guard}{special[1:]} lo"
        ids = tokenizer.encode_guarded(text, guard)
        assert not any(tokenizer.is_special(token_id) for token_id in ids)
        assert tokenizer.decode(ids) == f"he {special} lo"


@pytest.mark.parametrize("kind", ALL)
def test_a_lone_surrogate_is_the_callers_error(kind: str, tokenizer_of: Any) -> None:
    with pytest.raises(RequestError) as caught:
        tokenizer_of(kind).encode("half \ud83d of a pair")
    assert (caught.value.code, caught.value.status) == ("invalid_unicode", 400)


def test_threads_share_a_tokenizer(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("byte-level")
    texts = ["".join(random.Random(n).choices("the cat sat\u00e9 ", k=400)) for n in range(32)]
    expected = [tokenizer.encode(text) for text in texts]
    results: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        results[number] = [tokenizer.encode(text) for text in texts]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [results[number] for number in range(4)] == [expected] * 4


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model": {"type": "Magic"}}'])
def test_a_tokenizer_that_does_not_load(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_an_unknown_decoder_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 300)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["decoder"] = {"type": "CTC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="decoder 'CTC' is not supported"):
        load_tokenizer(str(tmp_path))
