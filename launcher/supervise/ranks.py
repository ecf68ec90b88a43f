"""Starting the ranks of a cluster: one interface, with local processes or Ray actors behind it.

The configuration of a rank is the same for both.
"""

import os
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from coordinator.config import CoordinatorConfig, ExpectedPool
from decode.config import DecodeConfig
from kvcache.host_memory import total_bytes
from launcher.config import child_environment, environment_api_keys, key_file
from launcher.memory import body_bytes, text_worker_bytes
from launcher.resolved import Cluster
from launcher.supervise.processes import ProcessGroup
from prefill.config import PrefillConfig
from protocol.errors import ConfigError
from store.config import StoreConfig


class Role(NamedTuple):
    """A kind of pool. Its ranks run ``serve`` of the module ``ROLE.worker``."""

    table: str  # of the configuration file and of --set
    config: type[PrefillConfig | DecodeConfig | StoreConfig]


ROLES = {
    "prefill": Role("prefill_pool", PrefillConfig),
    "decode": Role("decode_pool", DecodeConfig),
    "store": Role("store", StoreConfig),
}


class RankStarter(ABC):
    """Starts the gangs of a cluster and ends them. Exits are reported to the supervisor's queue."""

    def prepare(self) -> bool:
        """Do the work that needs no coordinator yet.

        Returns:
            Whether ``start`` has to wait until FORK_SERVER has reported.
        """
        return False

    @abstractmethod
    def start(self, pool: ExpectedPool, start: int, control_address: str) -> None:
        """Start every rank of a pool, as its gang's start number ``start``. Does not wait.

        Failures that show only later are reported as ``StartFailed``.

        Raises:
            ConfigError: not all of them can be started.
        """

    @abstractmethod
    def terminate(self, pool: ExpectedPool) -> None:
        """Ask a pool's ranks to end. Does not wait."""

    @abstractmethod
    def kill(self, pool: ExpectedPool) -> None:
        """End a pool's ranks, whatever they are doing. Does not wait."""

    @abstractmethod
    def stop(self) -> None:
        """End what was started. Idempotent."""


class LocalRanks(RankStarter):
    """Ranks as child processes of the launcher; sockets are files in the run folder."""

    def __init__(self, cluster: Cluster, run_dir: Path, group: ProcessGroup) -> None:
        self._cluster = cluster
        self._run_dir = run_dir
        self._group = group
        self._environment = child_environment(cluster.threads, is_local=True, device=cluster.device)

    def prepare(self) -> bool:
        # Forks would share what a library has opened of a GPU before them. No library is known to
        # open nothing.
        if sys.platform != "linux" or self._cluster.device != "cpu":
            return False
        modules = sorted({f"{pool.role}.worker" for pool in self._cluster.pools})
        self._group.start_fork_server(modules, self._environment)
        return True

    def start(self, pool: ExpectedPool, start: int, control_address: str) -> None:
        where = {
            "control_address": control_address,
            "listen": f"ipc://{self._run_dir}",
            "parent_pid": os.getpid(),
            "gang_start": start,
        }
        for rank, name in enumerate(_names(pool)):
            config = rank_config(self._cluster, pool, rank, where)
            file = self._run_dir / f"{pool.pool_id}.{rank}.json"
            write_config(file, config)
            self._group.start(name, pool.role, file, self._environment, start)

    def terminate(self, pool: ExpectedPool) -> None:
        for name in _names(pool):
            self._group.terminate(name)

    def kill(self, pool: ExpectedPool) -> None:
        for name in _names(pool):
            self._group.kill(name)

    def stop(self) -> None:
        """Nothing to do: the supervisor ends the whole process group."""


def _names(pool: ExpectedPool) -> list[str]:
    return [f"{pool.pool_id}/{rank}" for rank in range(pool.num_ranks)]


def write_config(file: Path, content: bytes) -> None:
    """Write a process's configuration, which has secrets in it, unreadable for other users.

    Raises:
        ConfigError: it cannot be written, as on a full disk.
    """
    try:
        file.touch(mode=0o600)
        file.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error


def rank_config(cluster: Cluster, pool: ExpectedPool, rank: int, where: dict[str, Any]) -> bytes:
    """The configuration of one rank, as JSON; ``where`` holds the starter's fields of it.

    Raises:
        ConfigError: ``[prefill_pool]``, ``[decode_pool]`` or ``[store]`` names an unknown field or
            a bad value.
    """
    serve = cluster.serve
    fields: dict[str, Any] = {
        "model": cluster.model,
        "pool_id": pool.pool_id,
        "rank": rank,
        "cp_size": pool.cp_size,
        "tp_size": pool.tp_size,
        "dtype": cluster.dtype,
        "device": cluster.device,
        "block_size": serve.block_size,
        "kv_memory_bytes": cluster.memory.kv_bytes,
        "memory_budget_bytes": cluster.memory.budget_bytes,
        "device_sharers": _device_sharers(cluster),
        "max_model_len": cluster.max_model_len,
        "threads": cluster.threads,
        "token": cluster.token,
        "transport": serve.transport,
        "checksum": serve.checksum,
        "shutdown_grace_s": serve.shutdown_grace_s,
        "log_level": serve.log_level,
        **where,
    }
    if pool.role == "store":
        fields |= _store_fields(cluster)
    role = ROLES[pool.role]
    return _encode(role.table, role.config, fields | getattr(serve, role.table))


def _device_sharers(cluster: Cluster) -> list[int]:
    """The sizes of the pools whose ranks share this machine's GPUs; Ray gives each rank its own."""
    if cluster.serve.launcher != "local":
        return []
    return [pool.num_ranks for pool in cluster.pools if pool.role != "store"]


def _store_fields(cluster: Cluster) -> dict[str, Any]:
    """The fields in which a store differs from a rank that computes."""
    assert cluster.data is not None, "a store needs a folder"
    return {
        "folder": str(cluster.data.kv),
        "kv_memory_bytes": cluster.store_memory_bytes,
        "memory_budget_bytes": 0,
        "disk_quota_bytes": cluster.disk_quota_bytes,
        "disk_io": cluster.serve.disk_io,
        "device": "cpu",
        "threads": 1,
    }


def coordinator_config(cluster: Cluster, where: dict[str, Any]) -> bytes:
    """The coordinator's configuration, as JSON; ``where`` holds the supervisor's fields of it.

    Raises:
        ConfigError: ``[coordinator]`` names an unknown field or a bad value.
    """
    serve = cluster.serve
    given = serve.coordinator
    fields: dict[str, Any] = {
        "host": serve.host,
        "port": serve.port,
        "token": cluster.token,
        "model": cluster.model,
        "served_model_names": list(cluster.model_names),
        "chat_template": cluster.chat_template,
        "tool_call_parser": serve.tool_call_parser,
        "reasoning_parser": serve.reasoning_parser,
        "default_chat_template_kwargs": cluster.template_kwargs,
        "generation_config": serve.generation_config,
        "block_size": serve.block_size,
        "kv_dtype": cluster.dtype,
        "kv_memory_from": cluster.kv_memory_from,
        "max_model_len": cluster.max_model_len,
        "pools": [msgspec.structs.asdict(pool) for pool in cluster.pools],
        "allowed_hosts": serve.allowed_host,
        "cors_origins": serve.cors_origin,
        "api_keys": [*serve.api_key, *environment_api_keys()],
        "api_key_file": "" if serve.api_key_file is None else str(key_file(serve.api_key_file)),
        "ready_timeout_s": serve.ready_timeout_s,
        "shutdown_grace_s": serve.shutdown_grace_s,
        "log_level": serve.log_level,
        "parent_pid": os.getpid(),
        "restart_budget": serve.restart_budget,
        "restart_window_s": serve.restart_window_s,
        "secret": "" if cluster.data is None else cluster.data.secret,
        "data_dir": "" if cluster.data is None else str(cluster.data.folder),
        "text_memory_bytes": text_worker_bytes(total_bytes()),
        "jobs": {"disk_quota_bytes": cluster.disk_quota_bytes} | given.get("jobs", {}),
        "limits": {"max_total_body_bytes": body_bytes(total_bytes())} | given.get("limits", {}),
    }
    settings = {name: given[name] for name in given if name not in ("jobs", "limits")}
    return _encode("coordinator", CoordinatorConfig, fields | settings | where)


def _encode(table: str, kind: type[Any], fields: dict[str, Any]) -> bytes:
    unknown = fields.keys() - set(kind.__struct_fields__)
    if unknown:
        raise ConfigError(f"[{table}] has no setting {', '.join(sorted(unknown))}")
    try:
        return msgspec.json.encode(msgspec.convert(fields, kind))
    except msgspec.ValidationError as error:
        raise ConfigError(f"[{table}]: {error}") from error
