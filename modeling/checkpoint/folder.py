"""The files of a checkpoint folder: which safetensors there are and what their headers say.

Tensors go by the names that transformers gives them in a causal language model: a checkpoint that
was saved without ``model.`` in front of them, or with it in front of everything, reads the same.

Torch-free, so that the coordinator can fingerprint a model. A safetensors file is eight bytes of
header length, a JSON header ``name -> {dtype, shape, data_offsets}`` and the data; nothing in it is
ever executed. Pickled weights (.bin, .pt) are refused, whatever is in them.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import msgspec

from modeling.checkpoint.json_fields import GIT_LFS, git_lfs_pointer, read_json
from protocol.errors import ConfigError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_PARTS_OF_MODEL = ("embed_tokens.", "layers.", "norm.")
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library itself
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
SAMPLE_BYTES = 64


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    stored_name: str
    dtype: str  # as safetensors spells it: "F32", "BF16", ...
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int


def read_checkpoint(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint folder by its name in transformers, however it is stored.

    All tensors of the files that an index names are taken, as transformers does, whether the index
    names them or not.

    Raises:
        ConfigError: no safetensors, a missing, truncated or foreign file, an index that points
            outside its folder or at tensors that are not there, or a tensor that is there twice.
    """
    if (folder / SINGLE_FILE).is_file():
        return _by_name(read_header(folder / SINGLE_FILE).values())
    if not (folder / INDEX_FILE).is_file():
        _refuse(folder)
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: weight_map is missing or empty: download the index again")
    headers: dict[str, dict[str, TensorEntry]] = {}
    for name, file_name in weight_map.items():
        path = _shard_path(folder, index, file_name)
        if file_name not in headers:
            headers[file_name] = read_header(path)
        if name not in headers[file_name]:
            raise ConfigError(f"{index}: says that {file_name} holds {name}, but it does not")
    return _by_name(entry for header in headers.values() for entry in header.values())


def _by_name(entries: Iterable[TensorEntry]) -> dict[str, TensorEntry]:
    found: dict[str, TensorEntry] = {}
    for entry in entries:
        name = canonical_name(entry.stored_name)
        if name in found:
            first = found[name]
            raise ConfigError(
                f"{entry.file}: {entry.stored_name} is there twice, also as {first.stored_name} in "
                f"{first.file.name}: which one counts is not known"
            )
        found[name] = entry
    return found


def canonical_name(stored_name: str) -> str:
    """The name of a tensor in a whole causal language model.

    A base model is saved without ``model.``, a wrapped one with it twice: transformers adds and
    takes away one such prefix.
    """
    if stored_name.startswith(_PARTS_OF_MODEL):
        return f"model.{stored_name}"
    bare = stored_name.removeprefix("model.")
    is_wrapped = bare == HEAD or bare.startswith(tuple(f"model.{part}" for part in _PARTS_OF_MODEL))
    return bare if is_wrapped else stored_name


def _shard_path(folder: Path, index: Path, file_name: object) -> Path:
    plain = isinstance(file_name, str) and PurePosixPath(file_name).name == file_name
    if not plain or "\\" in str(file_name) or "\0" in str(file_name):
        raise ConfigError(
            f"{index}: {file_name!r:.120} is no plain file name: shards must lie beside the index"
        )
    path = folder / str(file_name)
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"{index}: {file_name} is not a .safetensors file, and nothing else loads"
        )
    if not path.is_file():
        raise ConfigError(f"{index}: names {file_name}, which is missing: complete the download")
    return path


def _refuse(folder: Path) -> NoReturn:
    names = sorted(path.name for path in folder.iterdir())
    for suffixes, problem in (
        (PICKLED_SUFFIXES, "has only pickled weights ({}), which can run code when loaded: convert "
         "them to safetensors first"),
        ((".gguf",), "has only GGUF weights ({}): use the checkpoint in Hugging Face's form"),
        (("adapter_model.safetensors",), "is an adapter ({}), not a model: merge it into its base "
         "model first"),
        ((".safetensors",), "has {} but no index that names it: complete the download"),
    ):  # fmt: skip
        found = next((name for name in names if name.endswith(suffixes)), None)
        if found is not None:
            raise ConfigError(f"{folder}: {problem.format(found)}")
    raise ConfigError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}: no weights to load")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, each checked to lie inside the file.

    Raises:
        ConfigError: the file is not safetensors, or is truncated.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(start := file.read(8), "little")
            if start == GIT_LFS[:8]:
                raise git_lfs_pointer(path)
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ConfigError(f"{path}: truncated or not a safetensors file: download it again")
            raw = file.read(length)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: its safetensors header is not JSON ({error})") from error
    header.pop("__metadata__", None)
    return {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}


class _HeaderEntry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def _entry(path: Path, name: str, value: object, base: int, size: int) -> TensorEntry:
    try:
        entry = msgspec.convert(value, _HeaderEntry)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: header entry {name!r:.120} is malformed ({error})") from error
    begin, end = entry.data_offsets
    if not 0 <= begin <= end or min(entry.shape, default=0) < 0:
        raise ConfigError(f"{path}: header entry {name!r:.120} has impossible offsets or shape")
    if base + end > size:
        raise ConfigError(f"{path}: truncated ({name} lies past its end): download it again")
    num_elements = 1
    for extent in entry.shape:
        num_elements *= extent
    item_bytes = ITEM_BYTES.get(entry.dtype)
    if item_bytes is not None and num_elements * item_bytes != end - begin:
        raise ConfigError(f"{path}: {name} has {end - begin} bytes, not what its shape needs")
    return TensorEntry(path, name, entry.dtype, tuple(entry.shape), base + begin, end - begin)


def fingerprint(entries: dict[str, TensorEntry], salt: bytes) -> str:
    """A short name for ``salt`` plus these weights, the same however they are sharded.

    Hashes every name, dtype and shape and a sample from the middle of each tensor: enough to tell a
    fine-tuned model from its base without reading the checkpoint through.
    """
    digest = hashlib.blake2b(salt, digest_size=16)
    by_file: dict[Path, list[str]] = {}
    for name, entry in entries.items():
        by_file.setdefault(entry.file, []).append(name)
    samples: dict[str, bytes] = {}
    for path, names in by_file.items():
        with path.open("rb") as file:
            for name in names:
                entry = entries[name]
                middle = max(0, entry.num_bytes // 2 - SAMPLE_BYTES)
                file.seek(entry.offset + middle)
                samples[name] = file.read(min(SAMPLE_BYTES, entry.num_bytes))
    for name in sorted(entries):
        entry = entries[name]
        digest.update(repr((name, entry.dtype, entry.shape)).encode())
        digest.update(samples[name])
    return digest.hexdigest()
