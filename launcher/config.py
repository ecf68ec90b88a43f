"""What ``baton serve`` was asked for, and the one place where the environment is read.

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
# What the coordinator, and those that read strangers' texts for it, get of our environment.
_OF_COORDINATOR = re.compile(
    r"(PATH|HOME|USER|LOGNAME|LANG|TZ|TMPDIR|XDG_RUNTIME_DIR|VIRTUAL_ENV|RUST_BACKTRACE)"
    r"|(LC|LD|DYLD|PYTHON|GLIBC|MALLOC|OMP|MKL|OPENBLAS|RAYON|TOKENIZERS|COVERAGE)_?\w*"
)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_EXPONENT = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class ServeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every flag of ``baton serve``; ``None`` is "not said"."""

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
    shutdown_grace_s: float = 30.0  # what runs may take so long to end, after SIGTERM
    restart_budget: int = 5  # restarts of one gang, and of the coordinator, within the window
    restart_window_s: float = 600.0
    restart_backoff_s: float = 0.25  # before the first restart; doubled each time
    coordinator_silence_s: float = 5.0  # one that says and does nothing for longer is replaced
    coordinator_stall_s: float = 60.0  # one that says nothing for longer, however busy
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
        if isinstance(error.__cause__, ConfigError):  # it says already which flag is wrong
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
    """Keys that the server takes beside those of flags and file: several, or one."""
    several = os.environ.get(_KEYS, "").replace(",", " ").split()
    return tuple(several + os.environ.get(_KEY, "").split())


def key_file(name: str) -> Path:
    """Its path, not resolved: what it is a link to may change, as that of a mounted secret does."""
    return Path(name).expanduser().absolute()


def child_environment(num_threads: int, *, is_local: bool, device: str = "cpu") -> dict[str, str]:
    """The environment of a rank's process, complete before torch or UCX are loaded in it.

    Threads: each rank keeps to its own cores. GLIBC tunables: large buffers are taken from the heap
    and kept, since fresh pages from mmap cost more than the copy into them.

    On one host (``is_local``) no library may open a port that another machine reaches. UCX takes no
    message but through shared memory, which opens no port at all; for its transports of shared
    memory to be allowed where a peer's death has to be noticed, they must be told to notice it.
    Where a container forbids to read another process's memory, there is TCP on the loopback beside
    them: without either, a reader was seen to hang when its peer had died. So it is with CUDA
    memory, which needs more than these. None of it is left to what a container's image sets, but
    UCX_TLS, which cannot lead beyond the loopback.
    """
    environment = {name: value for name, value in os.environ.items() if name not in (_KEYS, _KEY)}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(num_threads)
    environment.setdefault("GLIBC_TUNABLES", _KEEPING)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("NIXL_LOG_LEVEL", "ERROR")
    environment.setdefault("UCX_LOG_LEVEL", "error")
    environment.setdefault("UCX_LOG_FILE", "stderr")  # its default is standard output
    environment["PYTHONUNBUFFERED"] = "1"
    environment.pop("NIXL_ETCD_ENDPOINTS", None)  # NIXL would publish every agent there
    if is_local:
        environment |= _kept_to("lo")
        if device == "cpu" and can_read_processes():
            environment.setdefault("UCX_TLS", "self,sm")
            environment |= {"UCX_POSIX_ERROR_HANDLING": "y", "UCX_SYSV_ERROR_HANDLING": "y"}
    return environment


def coordinator_environment(*, is_local: bool) -> dict[str, str]:
    """The same of the coordinator and its children, but that memory is given back.

    Nothing else of ours: the children read what strangers wrote, and a token for a model hub or a
    cloud is no concern of theirs.

    What callers send is large for a moment: ranks keep their buffers, the coordinator must not. So
    is what thousands of requests are made of. Python's own allocator gives back a MiB when nothing
    at all is left in it, that of the system each page, for some percent more time.
    """
    given = child_environment(1, is_local=is_local)
    environment = {name: given[name] for name in given if _OF_COORDINATOR.fullmatch(name)}
    environment.setdefault("PYTHONMALLOC", "malloc")
    if environment["GLIBC_TUNABLES"] == _KEEPING:
        environment["GLIBC_TUNABLES"] = _GIVING_BACK
    return environment


def _kept_to(interface: str) -> dict[str, str]:
    """Variables that have the libraries which open sockets of their own do so on one interface."""
    names = ("UCX_NET_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return dict.fromkeys(names, interface)


def keep_this_process_to(interface: str) -> None:
    """The same for a process that runs already, before it has loaded one of them."""
    os.environ.update(_kept_to(interface))


def runtime_root() -> Path:
    """Where a cluster keeps its sockets: short, private to the user, gone after a reboot."""
    return Path(os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("TMPDIR") or "/tmp")


def default_url() -> str:
    """The server that the client commands talk to."""
    return os.environ.get("BATON_URL") or "http://127.0.0.1:8000"


def default_api_key() -> str | None:
    """The key that the client commands show it; never a flag, which every process could see."""
    return os.environ.get(_KEY) or None


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
