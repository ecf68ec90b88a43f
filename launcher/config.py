"""The configuration of ``baton serve``, and the one place where the environment is read.

Later wins: defaults, the file of ``--config`` (TOML), flags, then ``--set a.b=c``. A file has the
flags' names with underscores (``kv_memory = "1GiB"``, ``prefill = ["cp2"]``) and one table for each
process kind, whose keys are the fields of that process's configuration:

    [coordinator]
    session_ttl_s = 600.0
    [prefill_pool]
    layers_per_group = 2

``--set prefill_pool.layers_per_group=2`` is the same from the command line.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from launcher.cross_memory import can_read_processes
from protocol.errors import ConfigError

_KEEPING = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592"
_GIVING_BACK = (
    "glibc.malloc.arena_max=2:glibc.malloc.mmap_threshold=131072:glibc.malloc.trim_threshold=131072"
)
# Variables of a rank, unless this process's environment has them.
_DEFAULTS = {
    "GLIBC_TUNABLES": _KEEPING,
    "TOKENIZERS_PARALLELISM": "false",
    "NIXL_LOG_LEVEL": "ERROR",
    "UCX_LOG_LEVEL": "error",
    "UCX_LOG_FILE": "stderr",  # its own default is standard output
}
# The part of our environment that the coordinator and its text workers get.
_OF_COORDINATOR = re.compile(
    r"(PATH|HOME|USER|LOGNAME|LANG|TZ|TMPDIR|XDG_RUNTIME_DIR|VIRTUAL_ENV|RUST_BACKTRACE)"
    r"|(LC|LD|DYLD|PYTHON|GLIBC|MALLOC|OMP|MKL|OPENBLAS|RAYON|TOKENIZERS|COVERAGE)_?\w*"
)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_EXPONENT = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class ServeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every flag of ``baton serve``; ``None``: not given."""

    model: str | None = None
    revision: str | None = None  # of a model on the Hub: a branch, a tag or a commit
    served_model_name: tuple[str, ...] = ()
    chat_template: str | None = None
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    default_chat_template_kwargs: str = "{}"  # a JSON object
    generation_config: str = "auto"
    quiet: bool = False
    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    launcher: str = "local"
    transport: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    block_size: int = 32
    kv_memory: str = "auto"  # of each rank, or a size
    store_memory: str = "1GiB"  # host memory of the store, which is there with --data-dir
    disk_quota: str = "64GiB"  # of the KV in --data-dir
    disk_io: str = "vectored"  # how that is read and written
    max_model_len: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: tuple[str, ...] = ()
    allowed_host: tuple[str, ...] = ()
    cors_origin: tuple[str, ...] = ()
    api_key_file: str | None = None
    threads_per_rank: int | None = None
    data_dir: str | None = None
    checksum: str = "sampled"
    log_level: str = "INFO"
    log_dir: str | None = None
    log_max_bytes: str = "64MiB"  # of a file in log_dir, which is then renamed
    log_files: int = 5  # of one process, the current one included; older ones are removed
    ready_timeout_s: float = 600.0
    shutdown_grace_s: float = 30.0  # for running requests to end, after SIGTERM
    restart_budget: int = 5  # restarts of one gang, and of the coordinator, within the window
    restart_window_s: float = 600.0
    restart_backoff_s: float = 0.25  # before the first restart; doubled each time
    coordinator_silence_s: float = 5.0  # one that is silent and idle for longer is replaced
    coordinator_stall_s: float = 60.0  # one that is silent for longer, however busy, too
    ray_prefill_strategy: str = "PACK"
    ray_address: str | None = None
    transfer_interface: str | None = None  # between hosts; None: the one of Ray's own address
    coordinator: dict[str, Any] = {}
    prefill_pool: dict[str, Any] = {}
    decode_pool: dict[str, Any] = {}
    store: dict[str, Any] = {}

    def __post_init__(self) -> None:
        _choice("--launcher", self.launcher, ("local", "ray"))
        _choice("--transport", self.transport, ("auto", "nixl", "tcp"))
        _choice("--device", self.device, ("auto", "cpu", "cuda"))
        _choice("--disk-io", self.disk_io, ("vectored", "nixl-posix", "nixl-gds"))
        _choice("--dtype", self.dtype, ("auto", "bfloat16", "float16", "float32"))
        _choice("--generation-config", self.generation_config, ("auto", "none"))
        _choice("--checksum", self.checksum, ("off", "sampled", "always"))
        _choice("--log-level", self.log_level, ("DEBUG", "INFO", "WARNING", "ERROR"))
        _choice("ray_prefill_strategy", self.ray_prefill_strategy, ("PACK", "SPREAD"))
        if not 1 <= self.block_size <= 1024:
            raise ConfigError(f"--block-size {self.block_size}: must be between 1 and 1024 tokens")
        if self.transfer_interface is not None and self.launcher == "local":
            raise ConfigError(
                f"--transfer-interface {self.transfer_interface}: the processes of --launcher "
                f"local share one machine and use no network"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: must be between 0 (any free one) and 65535")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"--max-model-len {self.max_model_len}: must be at least 2 tokens")
        if self.threads_per_rank is not None and self.threads_per_rank < 1:
            raise ConfigError(f"--threads-per-rank {self.threads_per_rank}: must be at least 1")
        if self.shutdown_grace_s < 0:
            raise ConfigError(f"shutdown_grace_s {self.shutdown_grace_s}: must be at least 0")
        if not 0 < self.coordinator_silence_s <= self.coordinator_stall_s:
            raise ConfigError(
                f"coordinator_silence_s {self.coordinator_silence_s}: must be above 0, and at most "
                f"coordinator_stall_s {self.coordinator_stall_s}"
            )
        if self.kv_memory != "auto":
            parse_size("--kv-memory", self.kv_memory)
        parse_size("--store-memory", self.store_memory)
        parse_size("--disk-quota", self.disk_quota)
        parse_size("log_max_bytes", self.log_max_bytes)
        if self.log_files < 1:
            raise ConfigError(f"log_files {self.log_files}: must be at least 1")


def _choice(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{flag} {value}: choose one of {', '.join(allowed)}")


def parse_size(flag: str, text: str) -> int:
    """Bytes from ``1GiB``, ``512MB`` or a plain number.

    Raises:
        ConfigError: not a size, or not at least one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{flag} {text}: write a size such as 1GiB, 512MiB or 2000000000")
    base = 1024 if match[3] else 1000
    size = int(float(match[1]) * base ** _EXPONENT[match[2].upper()])
    if size < 1:
        raise ConfigError(f"{flag} {text}: must be more than nothing")
    return size


def resolve(file: str | None, flags: Mapping[str, Any], sets: tuple[str, ...]) -> ServeConfig:
    """The configuration that file, flags and ``--set`` make together.

    Args:
        file: path of a TOML file, or None.
        flags: fields of ServeConfig that were given on the command line.
        sets: ``a=value``, ``a.b=value`` or deeper; the value is TOML, else a plain string.

    Raises:
        ConfigError: an unreadable file, an unknown name or a value of the wrong type or range.
    """
    values: dict[str, Any] = _read_file(file) if file is not None else {}
    values.update(flags)
    for setting in sets:
        _apply(values, setting)
    try:
        return msgspec.convert(values, ServeConfig, strict=False)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):  # it names the wrong flag already
            raise error.__cause__ from None
        raise ConfigError(f"configuration: {error}") from error


def _read_file(file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: not TOML: {error}") from error


def _apply(values: dict[str, Any], setting: str) -> None:
    name, equals, text = setting.partition("=")
    *tables, field = name.strip().split(".")
    if not equals or not all((*tables, field)):
        raise ConfigError(
            f"--set {setting}: write --set name=value, --set table.name=value or deeper"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = values
    for part in tables:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {setting}: {part} is not a table")
    table[field] = value


_KEYS, _KEY = "BATON_API_KEYS", "BATON_API_KEY"


def environment_api_keys() -> tuple[str, ...]:
    """The API keys in the environment, beside those of flags and file."""
    several = os.environ.get(_KEYS, "").replace(",", " ").split()
    return tuple(several + os.environ.get(_KEY, "").split())


def key_file(name: str) -> Path:
    """The path of --api-key-file, links unresolved: a mounted secret is a link that changes."""
    return Path(name).expanduser().absolute()


def rank_variables(num_threads: int, *, is_local: bool, device: str = "cpu") -> dict[str, str]:
    """The variables of a rank's process that decide how its libraries behave.

    They must be set before torch or UCX are loaded. Threads: each rank keeps to its own cores.
    GLIBC tunables: large buffers are taken from the heap and kept, since fresh pages from mmap cost
    more than the copy into them.

    On one host (``is_local``) no library may open a port that another machine reaches. So UCX is
    confined to shared memory, which opens no port at all. Its shared-memory transports are used
    only if their error handling is on, because a rank must notice that its peer has died. Where a
    container forbids to read another process's memory, UCX also gets TCP on the loopback: without
    either, a reader hung when its peer had died. So does CUDA memory, which needs more than shared
    memory. A container's image cannot override this, but for UCX_TLS, which cannot lead beyond the
    loopback.
    """
    variables = {name: os.environ.get(name, default) for name, default in _DEFAULTS.items()}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        variables[name] = str(num_threads)
    if "UCX_TLS" in os.environ:
        variables["UCX_TLS"] = os.environ["UCX_TLS"]
    if is_local:
        variables |= _kept_to("lo")
        if device == "cpu" and can_read_processes():
            variables.setdefault("UCX_TLS", "self,sm")
            variables |= {"UCX_POSIX_ERROR_HANDLING": "y", "UCX_SYSV_ERROR_HANDLING": "y"}
    return variables


def child_environment(num_threads: int, *, is_local: bool, device: str = "cpu") -> dict[str, str]:
    """The whole environment of a local rank's process: this one's, and :func:`rank_variables`."""
    environment = {name: value for name, value in os.environ.items() if name not in (_KEYS, _KEY)}
    environment |= rank_variables(num_threads, is_local=is_local, device=device)
    environment["PYTHONUNBUFFERED"] = "1"
    environment.pop("NIXL_ETCD_ENDPOINTS", None)  # NIXL would publish every agent there
    return environment


def coordinator_environment(*, is_local: bool) -> dict[str, str]:
    """The environment of the coordinator and its text workers.

    Only a few of our variables: the text workers read strangers' input, and must not hold a token
    for a model hub or a cloud.

    Memory is given back: bodies and requests are large for a moment, and unlike a rank's buffers
    they must not be kept. Python's own allocator gives a MiB back only when nothing at all is left
    in it; the system's gives back each page, for some percent more time.
    """
    given = child_environment(1, is_local=is_local)
    environment = {name: given[name] for name in given if _OF_COORDINATOR.fullmatch(name)}
    environment.setdefault("PYTHONMALLOC", "malloc")
    if environment["GLIBC_TUNABLES"] == _KEEPING:
        environment["GLIBC_TUNABLES"] = _GIVING_BACK
    return environment


def _kept_to(interface: str) -> dict[str, str]:
    """The variables that keep the sockets of UCX, gloo and NCCL to one network interface."""
    names = ("UCX_NET_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return dict.fromkeys(names, interface)


def keep_this_process_to(interface: str) -> None:
    """The same for this process, before it has loaded one of these libraries."""
    os.environ.update(_kept_to(interface))


def runtime_root() -> Path:
    """The folder for a cluster's sockets: short, private to the user, gone after a reboot."""
    return Path(os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("TMPDIR") or "/tmp")


def default_url() -> str:
    """The server that the client commands talk to."""
    return os.environ.get("BATON_URL") or "http://127.0.0.1:8000"


def default_api_key() -> str | None:
    """The key of the client commands; not a flag, which every process could see."""
    return os.environ.get(_KEY) or None
