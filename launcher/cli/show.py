"""``baton config show``: the configuration as given, or that of every process."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import msgspec

from coordinator.config import CoordinatorConfig
from coordinator.http.start_report import PoolMemory, StartReport, make_report
from coordinator.text.tokenizing import load_tools, read_model
from launcher.config import ServeConfig
from launcher.data_folder import DataFolder
from launcher.resolved import Cluster, block_layout, resolve_cluster
from launcher.supervise.ranks import ROLES, coordinator_config, rank_config
from launcher.topology import store_pool

_OF_A_RUN = ("control_address", "control_listen", "listen", "parent_pid", "gang_start", "rank")
_SECRET = ("token", "secret")


def asked(serve: ServeConfig) -> dict[str, Any]:
    """Flags, file and ``--set`` together, with the defaults of ``baton serve``."""
    shown = msgspec.structs.asdict(serve)
    shown["api_key"] = ["hidden"] * len(serve.api_key)
    return shown


def resolved(serve: ServeConfig) -> dict[str, Any]:
    """Every field of every process: "auto" is a value here, and no default is left out.

    The tables have the names that ``--set`` and ``--config`` know. Pools of one kind share a table,
    so what differs between them stands under ``pools``. Nothing is started, made or locked.

    Raises:
        ConfigError: whatever would keep the cluster from starting.
    """
    cluster = _without_side_effects(serve)
    where = {"control_address": "", "listen": "ipc://", "parent_pid": 0, "gang_start": 1}
    coordinator = msgspec.json.decode(coordinator_config(cluster, {}))
    shown: dict[str, Any] = {"coordinator": coordinator}
    serving = msgspec.to_builtins(_report(cluster))
    for pool in cluster.pools:
        shown[ROLES[pool.role].table] = msgspec.json.decode(rank_config(cluster, pool, 0, where))
    for table in shown.values():
        for name in (*_OF_A_RUN, *_SECRET, "pool_id", "cp_size", "tp_size"):
            table.pop(name, None)
    shown["pools"] = coordinator.pop("pools")
    shown["serving"] = serving
    coordinator["api_keys"] = ["hidden"] * len(coordinator["api_keys"])
    return shown


def _report(cluster: Cluster) -> StartReport:
    """The report that ``baton serve`` would print at its start."""
    config = msgspec.json.decode(coordinator_config(cluster, {}), type=CoordinatorConfig)
    _, checkpoint = read_model(config, load_tools(config))
    memory = []
    for pool in cluster.pools:
        size = cluster.store_memory_bytes if pool.role == "store" else cluster.memory.kv_bytes
        if size == 0:  # --kv-memory auto: known when the ranks have loaded the model
            continue
        one = block_layout(pool, cluster.model_config, cluster.serve.block_size, cluster.dtype)
        num_blocks = size // one.num_bytes
        num_tokens = num_blocks * one.block_size * pool.cp_size
        memory.append(PoolMemory(pool.pool_id, pool.role, num_blocks * one.num_bytes, num_tokens))
    return make_report(config, checkpoint, memory, cluster.max_model_len)


def _without_side_effects(serve: ServeConfig) -> Cluster:
    """The cluster of ``serve``, whose folder is not opened."""
    cluster = resolve_cluster(msgspec.structs.replace(serve, data_dir=None))
    if serve.data_dir is None:
        return cluster
    folder = DataFolder(Path(serve.data_dir).expanduser().resolve(), "", io.StringIO())
    return dataclasses.replace(cluster, pools=(*cluster.pools, store_pool()), data=folder)
