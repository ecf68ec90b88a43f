"""Which tokens are special, from the files that may say so, as ``AutoTokenizer`` reads them.

tokenizer.json comes first. tokenizer_config.json, special_tokens_map.json and added_tokens.json add
to it: a token that only they name is one token all the same, and not shown where special ones are
not. Where a file gives an id, the token has to get that id: the model was trained with it.

1. tokenizer_config.json: named tokens (``bos_token`` and any other ``..._token``), those of
   ``extra_special_tokens`` (``additional_special_tokens`` by its older name) and of
   ``added_tokens_decoder``, which has ids.
2. Without ``added_tokens_decoder`` the two older files count: special_tokens_map.json, whose names
   win, and added_tokens.json, which has ids.
3. Tokens with ids are added in the order of their ids, then named ones, then extra ones.

Source: transformers 5, ``PreTrainedTokenizerBase._from_pretrained`` and ``TokenizersBackend``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from modeling.checkpoint.json_fields import Fields, read_json
from protocol.errors import ConfigError

CONFIG, TOKENS_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, EXTRA_BEFORE = "extra_special_tokens", "additional_special_tokens"
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


@dataclass(slots=True)
class SpecialTokens:
    """What the files say, before the tokenizer knows of it."""

    named: dict[str, Any] = field(default_factory=dict)  # "bos_token" and so on: str or AddedToken
    extra: list[Any] = field(default_factory=list)  # str or AddedToken
    by_id: dict[int, AddedToken] = field(default_factory=dict)
    ids_from: str = ""  # the file that gives the ids
    splits_special: bool = False  # a special token in a text is taken as text

    def texts(self) -> dict[str, str]:
        """The named tokens, as chat templates refer to them."""
        return {name: _text(token) for name, token in self.named.items()}


def read_special_tokens(folder: Path, own: Mapping[int, AddedToken]) -> SpecialTokens:
    """What the files say together.

    Args:
        folder: of the checkpoint.
        own: the added tokens of tokenizer.json by id.

    Raises:
        ConfigError: a file cannot be read or a token in it is no token.
    """
    path = folder / CONFIG
    data = read_json(path) if path.is_file() else {}
    fields = Fields(data, str(path))
    tokens = SpecialTokens(splits_special=fields.boolean("split_special_tokens", False))
    _take_named(tokens, data, path)
    _take_extra(tokens, data, path)
    decoder = fields.section("added_tokens_decoder")
    if decoder is not None:
        tokens.ids_from = CONFIG
        for key in decoder.names():
            if not (key.isascii() and key.isdigit()) or not isinstance(decoder.raw(key), dict):
                decoder.fail(key, "must be an id with a token that is an object")
            tokens.by_id[int(key)] = _added(decoder.raw(key), f"{path}: added_tokens_decoder.{key}")
    else:
        _take_older_files(tokens, folder)
        tokens.by_id |= own  # a named one of them is special, whatever tokenizer.json says
    by_text = {token.content: token for token in tokens.by_id.values()}
    standard = {
        name: by_text.get(_text(tokens.named[name]), tokens.named[name])
        for name in NAMES
        if name in tokens.named
    }
    others = [item for item in tokens.named.items() if item[0] not in standard]
    others.sort(key=lambda item: isinstance(item[1], str))
    tokens.named = standard | dict(others)  # in the order in which new ones get ids
    return tokens


def add_special_tokens(tokenizer: Any, tokens: SpecialTokens, where: str) -> set[str]:  # noqa: ANN401 - untyped library
    """Have ``tokenizer`` know them. Changes it.

    Args:
        tokenizer: of the tokenizers library, as tokenizer.json has it.
        tokens: of the other files.
        where: the folder, for an error.

    Returns:
        The text of every special token. What was special once stays so for the library, whatever
        another file says.

    Raises:
        ConfigError: a token would get another id than its file gives it.
    """
    tokenizer.encode_special_tokens = tokens.splits_special
    own = tokenizer.get_added_tokens_decoder().values()
    adding = [token for _, token in sorted(tokens.by_id.items())]
    known = {token.content for token in (*own, *adding)}
    for token in (*tokens.named.values(), *tokens.extra):
        # The same text with other flags is added once more, and the last flags count.
        if _text(token) not in known and token not in adding:
            adding.append(token)
    named = set(tokens.texts().values())
    added = [
        AddedToken(token, special=True) if isinstance(token, str) else token for token in adding
    ]
    for token in added:
        token.special = token.special or token.content in named
    special = {token.content for token in (*own, *added) if token.special}
    if added:
        tokenizer.add_tokens(added)
    for token_id, token in sorted(tokens.by_id.items()):
        actual = tokenizer.token_to_id(token.content)
        if actual != token_id:
            raise ConfigError(
                f"{where}/{tokens.ids_from}: gives {token.content!r:.80} the id {token_id}, with "
                f"tokenizer.json it is {actual}: the two files are not of one tokenizer"
            )
    return special


def _take_named(tokens: SpecialTokens, data: Mapping[str, Any], path: Path) -> None:
    for name, value in data.items():
        is_token = isinstance(value, str) or (isinstance(value, dict) and "content" in value)
        if value is not None and (name in NAMES or (name.endswith("_token") and is_token)):
            tokens.named[name] = _token(value, f"{path}: {name}", path.name == TOKENS_MAP)


def _take_extra(tokens: SpecialTokens, data: Mapping[str, Any], path: Path) -> None:
    """A list of tokens, by its newer name or its older one, and an object of named ones."""
    extra = data.get(EXTRA)
    if isinstance(extra, dict):
        for name, value in extra.items():
            tokens.named[name] = _token(value, f"{path}: {EXTRA}.{name}", False)
        extra = None
    extra = extra or data.get(EXTRA_BEFORE) or []
    if not isinstance(extra, list):
        raise ConfigError(f"{path}: {EXTRA} must be a list or an object, found {extra!r:.80}")
    for value in extra:
        token = _token(value, f"{path}: {EXTRA}", path.name == TOKENS_MAP)
        if token not in tokens.extra:
            tokens.extra.append(token)


def _take_older_files(tokens: SpecialTokens, folder: Path) -> None:
    path = folder / TOKENS_MAP
    of_map = SpecialTokens()
    if path.is_file():
        data = read_json(path)
        _take_named(of_map, data, path)
        _take_extra(of_map, data, path)
        tokens.named |= of_map.named
        tokens.extra += [token for token in of_map.extra if token not in tokens.extra]
    path = folder / ADDED
    if path.is_file():
        tokens.ids_from = ADDED
        # Objects of tokenizer_config.json do not count here, those of the map do.
        sure = (*of_map.named.values(), *of_map.extra)
        everything = (*tokens.named.values(), *tokens.extra)
        special = {_text(t) for t in everything if isinstance(t, str) or t in sure}
        fields = Fields(read_json(path), str(path))
        for text in fields.names():
            is_special = text in special
            token_id = fields.integer(text, low=0)
            tokens.by_id[token_id] = AddedToken(text, normalized=not is_special, special=is_special)


def _text(token: Any) -> str:  # noqa: ANN401 - a str or an AddedToken
    return token if isinstance(token, str) else str(token.content)


def _token(value: Any, where: str, is_special: bool) -> Any:  # noqa: ANN401 - JSON in, a str or an AddedToken out
    if isinstance(value, str):
        return value
    # whether it is normalised follows from special, where the file does not say
    is_object = isinstance(value, dict)
    return _added({**value, "special": True} if is_object and is_special else value, where)


def _added(value: Any, where: str) -> AddedToken:  # noqa: ANN401 - JSON is anything
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str):
        raise ConfigError(f"{where} must be a token: text, or an object with content")
    flags = {name: value[name] for name in _FLAGS if value.get(name) is not None}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ConfigError(f"{where}.{name} must be true or false, found {flag!r:.80}")
    return AddedToken(content, **flags)
