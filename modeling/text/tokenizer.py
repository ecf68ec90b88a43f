"""Text to token ids and back, without torch.

A prompt is encoded once, by the coordinator; a stream of generated ids is decoded by a
:class:`DetokenizeStream`. A checkpoint's ``tokenizer.json`` is the truth about both, and other
files may add special tokens to it (special_tokens.py). Tokenizers are immutable once loaded and may
be shared by threads; a stream belongs to one sequence.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from modeling.checkpoint.config import is_arithmetic, load_config
from modeling.checkpoint.json_fields import MAX_JSON_BYTES, read_text
from modeling.text.detokenize import BYTE_OF_CHARACTER, DecodeRule, DetokenizeStream, parse_decoder
from modeling.text.special_tokens import SpecialTokens, add_special_tokens, read_special_tokens
from protocol.errors import ConfigError, RequestError

_OTHER_TOKENIZERS = ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")


class Tokenizer(ABC):
    """What every tokenizer can do."""

    vocab_size: int  # ids are below; the model's own vocabulary may be larger (padding)
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]  # "bos_token" and so on to their text, for chat templates
    rule: DecodeRule
    digest: str  # of everything that decides which ids a text becomes

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; text that looks like a special token becomes that token.

        Args:
            text: any text.
            add_special_tokens: also what the checkpoint puts around a text, such as a leading bos.

        Raises:
            RequestError: ``invalid_unicode``: a lone surrogate, which is no text.
        """

    @abstractmethod
    def encode_guarded(self, text: str, guard: str) -> list[int]:
        """``encode`` without added tokens, of text from which each ``guard`` is dropped afterwards.

        A guard inside the text of a special token keeps it from becoming that token.

        Args:
            text: any text.
            guard: one character that occurs only as a guard.
        """

    @abstractmethod
    def token(self, token_id: int) -> str | None:
        """The token of an id as the vocabulary spells it; None when there is none."""

    @abstractmethod
    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token, not text."""

    @abstractmethod
    def special_texts(self) -> Sequence[str]:
        """The text of every control token."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id adds inside a text; empty for an unknown id."""
        token = self.token(token_id)
        return b"" if token is None else self.rule.token_bytes(token)

    def stream(
        self,
        *,
        skip_special_tokens: bool = True,
        continuing: bool = False,
        kept: Collection[str] = (),
    ) -> DetokenizeStream:
        """A detokenizer for one sequence.

        Args:
            skip_special_tokens: control tokens add no text.
            continuing: the ids continue a prompt, so a first word keeps its leading space.
            kept: control tokens that are shown nevertheless.
        """
        token_of = self._text_token if skip_special_tokens else self.token
        if kept and skip_special_tokens:
            token_of = partial(self._text_or, frozenset(kept))
        return DetokenizeStream(self.rule, token_of, continuing=continuing)

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        continuing: bool = False,
    ) -> str:
        """The text of a whole sequence: what ``stream`` gives in pieces."""
        stream = self.stream(skip_special_tokens=skip_special_tokens, continuing=continuing)
        return stream.push(token_ids) + stream.flush()

    def _text_token(self, token_id: int) -> str | None:
        return None if self.is_special(token_id) else self.token(token_id)

    def _text_or(self, kept: frozenset[str], token_id: int) -> str | None:
        token = self.token(token_id)
        return token if token in kept or not self.is_special(token_id) else None


class CheckpointTokenizer(Tokenizer):
    """The tokenizer.json of a checkpoint folder, through the tokenizers library."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            others = [name for name in _OTHER_TOKENIZERS if (folder / name).is_file()]
            only = f", only {others[0]}" if others else ""
            raise ConfigError(
                f"{folder}: has no tokenizer.json{only}: save the tokenizer in its fast form first"
            )
        text = read_text(path, 4 * MAX_JSON_BYTES)
        self.rule = parse_decoder(_parse_parts(text, path).decoder, str(path))
        self._tokenizer = _load(text, path)
        tokens = read_special_tokens(folder, self._tokenizer.get_added_tokens_decoder())
        self._special_texts = add_special_tokens(self._tokenizer, tokens, str(folder))
        added = self._tokenizer.get_added_tokens_decoder()
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.vocab_size = max([size, *(token_id + 1 for token_id in added)])  # ids may have gaps
        # The library spells some as the normalizer leaves them, and then shows them: so do we.
        self._special = {i for i in added if self.token(i) in self._special_texts}
        self.special_tokens = tokens.texts()
        eos = self._tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        self.eos_token_ids = () if eos is None else (eos,)
        self.digest = _digest(text, tokens, added)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self._encoding(text, add_special_tokens).ids)

    def encode_guarded(self, text: str, guard: str) -> list[int]:
        encoding = self._encoding(text, add_special_tokens=False)
        kept = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            covered = text[start:end]
            if guard not in covered:
                kept.append(token_id)
            elif covered.strip(guard):
                raise RequestError(
                    "a message contains the text of a special token in a form that this "
                    "tokenizer cannot take as text: leave it out",
                    code="special_token_in_content",
                    param="messages",
                )
        return kept

    def token(self, token_id: int) -> str | None:
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def special_texts(self) -> Sequence[str]:
        return sorted(self._special_texts)

    def _encoding(self, text: str, add_special_tokens: bool) -> Any:  # noqa: ANN401 - untyped library
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise invalid_unicode(error) from error
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)


class ByteTokenizer(Tokenizer):
    """The arithmetic model's: ids 0 to 255 are bytes, then four special tokens, then fillers.

    A filler, which encoding never gives, decodes to its own short lower-case word.
    """

    rule = DecodeRule(byte_level=True)
    digest = "bytes"
    NAMED = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = (257,)
        self.special_tokens = {"bos_token": self.NAMED[0], "eos_token": self.NAMED[1]}
        characters = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
        self._bytes = [characters[byte] for byte in range(256)]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:  # noqa: ARG002 - it adds none
        try:
            return list(text.encode())
        except UnicodeEncodeError as error:
            raise invalid_unicode(error) from error

    def encode_guarded(self, text: str, guard: str) -> list[int]:
        return self.encode(text.replace(guard, ""))

    def token(self, token_id: int) -> str | None:
        if token_id < 256:
            return self._bytes[token_id]
        if self.is_special(token_id):
            return self.NAMED[token_id - 256]
        if token_id >= self.vocab_size:
            return None
        filler = token_id - 260
        word = ""
        while filler >= 0:  # a, b ... z, aa, ab ...
            filler, letter = divmod(filler, 26)
            word = chr(97 + letter) + word
            filler -= 1
        return f"{self._bytes[32]}{word}"

    def is_special(self, token_id: int) -> bool:
        return 256 <= token_id < 260

    def special_texts(self) -> Sequence[str]:
        return ()  # encoding never gives one


def load_tokenizer(path_or_name: str) -> Tokenizer:
    """The tokenizer of a checkpoint folder or of the arithmetic model.

    Raises:
        ConfigError: no tokenizer.json, or one that the library or Baton cannot read.
    """
    if is_arithmetic(path_or_name):
        return ByteTokenizer(load_config(path_or_name).vocab_size)
    return CheckpointTokenizer(Path(path_or_name))


def invalid_unicode(error: UnicodeEncodeError) -> RequestError:
    """The caller's text holds half of a surrogate pair."""
    return RequestError(
        f"the text is not valid Unicode: a lone surrogate at character {error.start}",
        code="invalid_unicode",
    )


class _TokenizerFile(msgspec.Struct):
    """What we look at ourselves of a tokenizer.json, which may have tens of megabytes."""

    decoder: dict[str, Any] | None = None


def _parse_parts(text: str, path: Path) -> _TokenizerFile:
    try:
        return msgspec.json.decode(text, type=_TokenizerFile)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a tokenizer's JSON ({error})") from error


def _load(text: str, path: Path) -> Any:  # noqa: ANN401 - untyped library
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path}: the tokenizers library cannot read it ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _digest(text: str, tokens: SpecialTokens, added: Mapping[int, Any]) -> str:
    """Of tokenizer.json, and of what the other files have added to it."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    more = [tokens.texts(), tokens.splits_special, {str(i): repr(added[i]) for i in sorted(added)}]
    digest.update(msgspec.json.encode(more, order="sorted"))
    return digest.hexdigest()
