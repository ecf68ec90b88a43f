"""A JSON file of a checkpoint, read as data: each field is checked where it is taken.

A checkpoint is written by strangers. Its JSON is size-bounded, never executed, and a wrong field
becomes one line for the operator that names the file and the field.
"""

import codecs
import json
import re
from pathlib import Path
from typing import Any, NoReturn

from protocol.errors import ConfigError

MAX_JSON_BYTES = 64 << 20
GIT_LFS = b"version https://git-lfs.github.com/spec"
REQUIRED: Any = object()
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_FLOATS = ("Infinity", "-Infinity", "NaN")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in ``path``, as Python writes JSON: with NaN and infinities.

    transformers tags those (``{"__float__": "Infinity"}``); they are floats here in either form,
    for :class:`Fields` to refuse by name where they have an effect.

    Raises:
        ConfigError: the file is missing, too large, not UTF-8, not JSON, not an object, has a name
            twice with different values, or text that is half of a surrogate pair.
    """
    text = read_text(path, max_bytes)

    def take_object(pairs: list[tuple[str, Any]]) -> Any:  # noqa: ANN401 - JSON is anything
        taken = dict(pairs)
        if len(taken) < len(pairs):
            _refuse_contradiction(path, pairs)
        tagged = taken.get("__float__")
        return float(tagged) if len(taken) == 1 and tagged in _FLOATS else taken

    try:
        data = json.loads(text, object_pairs_hook=take_object)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {_explained(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid JSON: nested too deeply") from error
    except ConfigError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise ConfigError(f"{path}: holds an integer of thousands of digits") from error
    if _SURROGATE_ESCAPE.search(text):
        _check_unicode(path, data)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _check_unicode(path: Path, data: object) -> None:
    """JSON can spell half of a pair, which is no text that a tokenizer takes."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{path}: has a text with half of a surrogate pair") from error


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The text of a file of a checkpoint.

    Raises:
        ConfigError: the file is missing, empty, too large, a Git LFS pointer or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > max_bytes:
        raise ConfigError(f"{path}: larger than {max_bytes} bytes, which no such file is")
    if not raw:
        raise ConfigError(f"{path}: is empty: download it again")
    if raw.startswith(GIT_LFS):
        raise git_lfs_pointer(path)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"{path}: is UTF-16: save it as UTF-8")
    if raw.startswith(codecs.BOM_UTF8):
        raise ConfigError(f"{path}: begins with a byte order mark: save it as UTF-8 without one")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 at byte {error.start}") from error


def git_lfs_pointer(path: Path) -> ConfigError:
    """A clone without Git LFS has a few lines of text in the place of each large file."""
    return ConfigError(f"{path}: is a Git LFS pointer, not the file itself: run git lfs pull")


def _explained(error: json.JSONDecodeError) -> str:
    where = f"line {error.lineno} column {error.colno}: "
    rest = error.doc[error.pos :].lstrip()
    if rest.startswith(("//", "/*", "#")):
        return f"{where}JSON has no comments, take it out"
    if rest.startswith(("}", "]")) and error.doc[: error.pos].rstrip().endswith(","):
        return f"{where}a comma without anything behind it, take it out"
    if not rest:
        return f"{where}the file ends too early, download it again"
    return f"{where}{error.msg}"


def _refuse_contradiction(path: Path, pairs: list[tuple[str, Any]]) -> None:
    first: dict[str, Any] = {}
    for name, value in pairs:
        if first.setdefault(name, value) != value:
            raise ConfigError(
                f"{path}: {name:.80} is there twice, once as {first[name]!r:.80} and once as "
                f"{value!r:.80}: take one out"
            )


class Fields:
    """Typed access to one JSON object; every complaint names the file and the field.

    A field that is present but null counts as absent when a default is given.
    """

    def __init__(self, data: dict[str, Any], where: str, prefix: str = "") -> None:
        self._data = data
        self._where = where
        self._prefix = prefix

    def fail(self, name: str, problem: str) -> NoReturn:
        raise ConfigError(f"{self._where}: {self._prefix}{name} {problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._data.get(name) is not None

    def raw(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - JSON is anything
        return self._data.get(name, default)

    def _take(self, name: str, default: Any) -> Any:  # noqa: ANN401
        value = self._data.get(name)
        if value is None:
            if default is REQUIRED:
                self.fail(name, "is missing: the checkpoint's configuration is incomplete")
            return default
        return value

    def integer(
        self, name: str, default: int = REQUIRED, *, low: int = 1, high: int = 2**31
    ) -> int:
        value = self._take(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            self.fail(name, f"must be an integer, found {value!r:.80}")
        if not low <= value <= high:
            self.fail(name, f"must lie in {low} to {high}, found {value}")
        return value

    def number(self, name: str, default: float = REQUIRED, *, above: float = 0.0) -> float:
        value = self._take(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.fail(name, f"must be a number, found {value!r:.80}")
        if not above < value < 1e30:
            self.fail(name, f"must be above {above:g} and finite, found {value}")
        return float(value)

    def boolean(self, name: str, default: bool = REQUIRED) -> bool:
        value = self._take(name, default)
        if not isinstance(value, bool):
            self.fail(name, f"must be true or false, found {value!r:.80}")
        return value

    def string(self, name: str, default: str = REQUIRED) -> str:
        value = self._take(name, default)
        if not isinstance(value, str):
            self.fail(name, f"must be a string, found {value!r:.80}")
        return value

    def strings(self, name: str) -> list[str]:
        value = self._take(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(name, f"must be a list of strings, found {value!r:.80}")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; absent gives none."""
        value = self._take(name, [])
        ids = value if isinstance(value, list) else [value]
        for item in ids:
            if not isinstance(item, int) or isinstance(item, bool):
                self.fail(name, f"must be token ids, found {value!r:.80}")
        return tuple(ids)

    def section(self, name: str) -> "Fields | None":
        """A nested object, or None when absent or null."""
        value = self._data.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(name, f"must be an object, found {value!r:.80}")
        return Fields(value, self._where, f"{self._prefix}{name}.")

    def names(self) -> list[str]:
        return list(self._data)
