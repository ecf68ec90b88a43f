"""Token ids back to text, whole or as they come, by one path: a stream's pieces add up to decode.

Every id stands for some bytes. The bytes are joined and decoded as UTF-8 incrementally, so a
character is never split, at most three bytes wait, and bytes that are no UTF-8 become U+FFFD as
soon as that is certain (one for each maximal subpart, Unicode 3.9). Which bytes an id stands for
follows the ``decoder`` of tokenizer.json; results equal the tokenizers library's, except that its
ByteFallback blanks a whole run of byte tokens for one bad byte, which no stream could know in time.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.errors import ConfigError

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# What the library's WordPiece decoder takes the blank from, token by token.
_TIDIED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


@dataclass(frozen=True, slots=True)
class DecodeRule:
    """How tokens become bytes, reduced from the decoder of a tokenizer.json."""

    byte_level: bool = False  # GPT-2: each character stands for a byte
    replacements: tuple[tuple[str, str], ...] = ()  # in a token's text, such as U+2581 to a space
    byte_fallback: bool = False  # "<0xE2>" is that byte
    first_drops: str = ""  # removed from the first token (Metaspace)
    strip: str = ""  # removed from the start of the text, at most num_strip times
    num_strip: int = 0
    joiner: str = ""  # in front of a token that is not the first
    goes_on: str = ""  # WordPiece: a token that begins with it follows without the joiner, or it
    tidies: bool = False  # WordPiece: no blank before a full stop

    def token_bytes(self, token: str, *, is_first: bool = False) -> bytes:
        """The bytes that a token stands for, at the start of a text or anywhere else."""
        if is_first:
            token = token.replace(self.first_drops, "") if self.first_drops else token
        elif self.goes_on and token.startswith(self.goes_on):
            token = token.removeprefix(self.goes_on)
        else:
            token = self.joiner + token
        if self.tidies:
            for old, new in _TIDIED:
                token = token.replace(old, new)
        if self.byte_level:
            try:
                return bytes(BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token with other characters stands for its text
                return token.encode()
        for old, new in self.replacements:
            token = token.replace(old, new)
        match = BYTE_TOKEN.fullmatch(token) if self.byte_fallback else None
        return bytes([int(match[1], 16)]) if match else token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself, or 256 + n for the n-th unprintable."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(unprintable)}


BYTE_OF_CHARACTER = _byte_alphabet()


def parse_decoder(decoder: dict[str, Any] | None, where: str) -> DecodeRule:
    """The rule of a tokenizer.json's ``decoder``.

    Raises:
        ConfigError: a decoder that language models of the supported families do not have.
    """
    if decoder is None:
        return DecodeRule(joiner=" ")
    kind = decoder.get("type")
    if kind == "ByteLevel":
        return DecodeRule(byte_level=True)
    if kind == "Metaspace":
        mark = decoder.get("replacement", "\u2581")
        scheme = decoder.get("prepend_scheme", "always")
        first = "" if scheme == "never" or decoder.get("add_prefix_space") is False else mark
        return DecodeRule(replacements=((mark, " "),), first_drops=first)
    if kind == "Fuse":
        return DecodeRule()
    if kind == "WordPiece":
        mark = decoder.get("prefix", "##")
        tidies = decoder.get("cleanup", True)
        return DecodeRule(joiner=" ", goes_on=mark, tidies=tidies)
    if kind != "Sequence":
        raise ConfigError(f"{where}: decoder {kind!r} is not supported: use ByteLevel or Metaspace")
    return _parse_sequence(decoder.get("decoders", []), where)


def _parse_sequence(steps: Sequence[dict[str, Any]], where: str) -> DecodeRule:
    if len(steps) == 1:
        return parse_decoder(steps[0], where)
    replacements: list[tuple[str, str]] = []
    byte_fallback = is_fused = False
    strip = ""
    num_strip = 0
    for step in steps:
        kind = step.get("type")
        pattern = step.get("pattern")
        if kind == "Replace" and not is_fused and isinstance(pattern, dict) and "String" in pattern:
            replacements.append((pattern["String"], step["content"]))
        elif kind == "ByteFallback" and not is_fused:
            byte_fallback = True
        elif kind == "Fuse":
            is_fused = True
        elif kind == "Strip" and is_fused and not step.get("stop"):
            strip = step["content"]
            num_strip = step["start"]
        else:
            raise ConfigError(f"{where}: decoder step {kind!r} is not supported at its place")
    return DecodeRule(
        replacements=tuple(replacements),
        byte_fallback=byte_fallback,
        strip=strip,
        num_strip=num_strip,
    )


class DetokenizeStream:
    """The text of one growing sequence of token ids.

    Args:
        rule: how the tokenizer decodes.
        token_of: the token of an id, None for an id that adds nothing (special, unknown).
        continuing: the ids continue a text: the first token keeps its leading space.
    """

    def __init__(
        self, rule: DecodeRule, token_of: Callable[[int], str | None], *, continuing: bool
    ) -> None:
        self._rule = rule
        self._token_of = token_of
        self._is_first = not continuing
        self._num_strip = 0 if continuing else rule.num_strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these ids; may be empty."""
        data = bytearray()
        for token_id in token_ids:
            token = self._token_of(token_id)
            if token is None:
                continue
            data += self._rule.token_bytes(token, is_first=self._is_first)
            self._is_first = False
        return self._stripped(self._utf8.decode(bytes(data)))

    def flush(self) -> str:
        """What still waits: an unfinished character as U+FFFD. The sequence has ended."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._num_strip and text:
            if not text.startswith(self._rule.strip):
                self._num_strip = 0
                break
            text = text[len(self._rule.strip) :]
            self._num_strip -= 1
        return text
