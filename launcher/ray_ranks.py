"""Ranks as Ray actors: the same ranks, placed by Ray over the nodes of its cluster.

1. A Ray that runs is joined; where none does, one is started on this machine for our life time.
2. Each pool gets a placement group: a decode pool packed strictly on one node, since its ranks talk
   at every layer of every step; a prefill ring packed, or spread over nodes where that is asked.
3. Each rank is one actor whose process has the rank's environment before torch is imported. Its one
   method runs the rank until it ends.

Nothing of Ray is on the path of a request: ranks reach the coordinator and each other by ZMQ and
NIXL, as local processes do.
"""

import logging
import queue
import threading
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from decode.config import DecodeConfig
from launcher.config import child_environment
from launcher.processes import Exited, Report
from launcher.ranks import RankStarter, rank_config
from launcher.resolved import Cluster
from launcher.topology import PoolSpec
from prefill.config import PrefillConfig
from protocol.errors import ConfigError

log = logging.getLogger(__name__)

PLACEMENT_BUDGET_S = 60.0
STOP_BUDGET_S = 10.0
_ENVIRONMENT_OF_A_RANK = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "GLIBC_TUNABLES",
    "TOKENIZERS_PARALLELISM",
    "NIXL_LOG_LEVEL",
    "UCX_LOG_LEVEL",
    "UCX_LOG_FILE",
    "UCX_TLS",
    "GLOO_SOCKET_IFNAME",
)


class RankActor:
    """The process of one rank. Ray starts it; we run the rank in its main thread."""

    def node_ip(self) -> str:
        """The address at which other nodes reach this one."""
        return str(ray.util.get_node_ip_address())

    def run(self, role: str, config: bytes) -> int:
        """Run the rank until it ends; returns its exit code."""
        # Imported here: the actor's process has its environment now, the driver needs no torch.
        from kvtransfer.boot import run_here

        if role == "prefill":
            from prefill.worker import serve as serve_prefill

            return run_here(config, PrefillConfig, serve_prefill)
        from decode.worker import serve as serve_decode

        return run_here(config, DecodeConfig, serve_decode)


def connect(address: str | None) -> None:
    """Join the Ray at ``address``, or one that runs here, or start one. Idempotent."""
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    try:
        ray.init(address=address or "auto", **options)
    except ConnectionError as error:
        if address is not None:
            raise ConfigError(f"ray_address {address}: no Ray answers there") from error
        log.info("no Ray is running: starting one on this machine")
        ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", **options)


def head_address(address: str | None) -> str:
    """The address of this machine that the ranks can reach."""
    connect(address)
    return str(ray.util.get_node_ip_address())


class RayRanks(RankStarter):
    """Starts one actor per rank and reports the end of each as a local process's is."""

    def __init__(self, cluster: Cluster, reports: "queue.SimpleQueue[Report]") -> None:
        self._cluster = cluster
        self._reports = reports
        self._groups: list[PlacementGroup] = []
        self._actors: list[Any] = []
        self._watchers: list[threading.Thread] = []

    def start(self, control_address: str) -> None:
        connect(self._cluster.serve.ray_address)
        for pool in self._cluster.pools:
            group = self._place(pool)
            for rank in range(pool.num_ranks):
                self._start_rank(pool, rank, group, control_address)

    def _place(self, pool: PoolSpec) -> PlacementGroup:
        strategy = (
            "STRICT_PACK" if pool.role == "decode" else self._cluster.serve.ray_prefill_strategy
        )
        bundle: dict[str, float] = {"CPU": self._num_cpus()}
        if self._cluster.device == "cuda":
            bundle["GPU"] = 1
        group: PlacementGroup = placement_group([bundle] * pool.num_ranks, strategy=strategy)
        self._groups.append(group)
        if not group.wait(timeout_seconds=PLACEMENT_BUDGET_S):
            raise ConfigError(
                f"Ray has no room for {pool.pool_id}: {pool.num_ranks} ranks of {bundle}, "
                f"{strategy}; add nodes or choose smaller pools"
            )
        return group

    def _num_cpus(self) -> float:
        # On a machine with fewer cores than ranks they share; Ray counts, it does not pin.
        total = float(ray.cluster_resources().get("CPU", 1.0))
        num_ranks = sum(pool.num_ranks for pool in self._cluster.pools)
        return min(float(self._cluster.threads), total / (num_ranks + 1))

    def _start_rank(
        self, pool: PoolSpec, rank: int, group: PlacementGroup, control_address: str
    ) -> None:
        environment = child_environment(self._cluster.threads, is_local=self._is_one_node())
        options = {
            "num_cpus": self._num_cpus(),
            "num_gpus": 1 if self._cluster.device == "cuda" else 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=rank
            ),
            "runtime_env": {
                "env_vars": {
                    name: environment[name]
                    for name in _ENVIRONMENT_OF_A_RANK
                    if name in environment
                }
            },
        }
        actor = ray.remote(RankActor).options(**options).remote()
        self._actors.append(actor)
        node_ip = ray.get(actor.node_ip.remote(), timeout=PLACEMENT_BUDGET_S)
        where = {"control_address": control_address, "listen": f"tcp://{node_ip}"}
        config = rank_config(self._cluster, pool, rank, where)
        running = actor.run.remote(pool.role, config)
        watcher = threading.Thread(
            target=self._watch, args=(f"{pool.pool_id}/{rank}", running), daemon=True
        )
        watcher.start()
        self._watchers.append(watcher)

    def _watch(self, name: str, running: Any) -> None:  # noqa: ANN401 - Ray's own reference type
        try:
            code, error = int(ray.get(running)), None
        except ray.exceptions.RayError as failure:
            code, error = 1, f"{name} died: {str(failure).splitlines()[0]}"
        self._reports.put(Exited(name, code, error))

    @staticmethod
    def _is_one_node() -> bool:
        return len([node for node in ray.nodes() if node["Alive"]]) == 1

    def stop(self) -> None:
        for watcher in self._watchers:  # the coordinator has told the ranks to end
            watcher.join(STOP_BUDGET_S / max(1, len(self._watchers)))
        for actor in self._actors:
            ray.kill(actor)
        for group in self._groups:
            remove_placement_group(group)
        self._actors.clear()
        self._groups.clear()
        if ray.is_initialized():
            ray.shutdown()
