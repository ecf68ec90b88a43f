"""Ranks as Ray actors: the same ranks, placed by Ray over the nodes of its cluster.

1. A Ray that runs is joined; where none does, one is started on this machine for our life time.
2. Each pool gets a placement group: a decode pool packed strictly on one node, since its ranks talk
   at every layer of every step; a prefill ring packed, or spread over nodes where that is asked.
3. Each rank is one actor whose process has the rank's environment before torch is imported. Its one
   method runs the rank until it ends.
4. A gang that is started again has new actors, in the placement that its pool has.
5. Ray may take long to find room for a gang, so a thread of its own waits for that. A gang that is
   killed meanwhile is not brought up any more.

Nothing of Ray is on the path of a request: ranks reach the coordinator and each other by ZMQ and
NIXL, as local processes do.
"""

import contextlib
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from coordinator.config import ExpectedPool
from launcher.config import ServeConfig, keep_this_process_to, rank_variables
from launcher.interfaces import address_of, interface_of
from launcher.resolved import Cluster
from launcher.supervise.processes import Exited, Report, StartFailed
from launcher.supervise.ranks import ROLES, RankStarter, rank_config
from protocol.errors import ConfigError

log = logging.getLogger(__name__)

PLACEMENT_BUDGET_S = 60.0
_LOOPBACK = "127.0.0.1"
STOP_BUDGET_S = 10.0
POLL_S = 0.5  # between two looks whether a gang is still wanted


class RankActor:
    """The process of one rank. Ray starts it; we run the rank in its main thread."""

    def node_ip(self) -> str:
        """The address at which other nodes reach this one."""
        return str(ray.util.get_node_ip_address())

    def pid(self) -> int:
        return os.getpid()

    def settle(self, interface: str | None) -> str:
        """Keep the rank's sockets to one interface, Ray's own by default; returns its address."""
        interface = interface or interface_of(self.node_ip())
        keep_this_process_to(interface)
        return address_of(interface)

    def run(self, role: str, config: bytes) -> int:
        """Run the rank until it ends; returns its exit code."""
        # Imported here: the actor's process has its environment now, the driver needs no torch.
        from engine.boot import run_here

        return run_here(config, ROLES[role].config, import_module(f"{role}.worker").serve)


def connect(address: str | None) -> None:
    """Join the Ray at ``address``, or one that runs here, or start one. Idempotent."""
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "auto", **options)
    except ConnectionError as error:
        if address is not None:
            raise ConfigError(f"ray_address {address}: no Ray answers there") from error
        log.info("no Ray is running: starting one on this machine")
        ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", **options)
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray's own ends this process in the midst of things


def head_address(serve: ServeConfig) -> str:
    """The address of this machine at which the ranks reach it.

    It is the loopback's if this is Ray's only node and no interface is named. Then all ranks are
    placed here, even if Ray gets more nodes.

    Raises:
        ConfigError: no Ray answers, or this machine has no such interface.
    """
    connect(serve.ray_address)
    node_ip = str(ray.util.get_node_ip_address())
    num_nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    if serve.transfer_interface is None and num_nodes == 1:
        return _LOOPBACK
    interface = serve.transfer_interface or interface_of(node_ip)
    address = address_of(interface)
    log.warning(
        "the ranks listen on the interface %s (here %s) of every node: KV is in clear there, and "
        "with NIXL whoever reaches it can write to their memory (SECURITY.md)", interface, address,
    )  # fmt: skip
    return address


@dataclass(frozen=True, slots=True)
class _Actor:
    handle: Any  # Ray's own type
    pid: int
    is_here: bool  # on the launcher's node


class RayRanks(RankStarter):
    """Starts one actor per rank and reports the end of each as a local process's is."""

    def __init__(self, cluster: Cluster, reports: "queue.SimpleQueue[Report]") -> None:
        self._cluster = cluster
        self._reports = reports
        self._lock = threading.Lock()  # of the following, which threads that bring up gangs share
        self._groups: dict[str, PlacementGroup] = {}  # by pool
        self._wanted: dict[str, int] = {}  # by pool: the start that is to run, if any
        self._actors: dict[str, list[_Actor]] = {}
        self._threads: list[threading.Thread] = []
        self._is_on_loopback = True

    def start(self, pool: ExpectedPool, start: int, control_address: str) -> None:
        connect(self._cluster.serve.ray_address)
        self._is_on_loopback = control_address.startswith(f"tcp://{_LOOPBACK}:")
        for actor in self._take_actors(pool, start):
            ray.kill(actor.handle)  # its rank has ended, its process need not have
        where = {"control_address": control_address, "gang_start": start}
        self._run_thread(self._bring_up, pool, where)

    def terminate(self, pool: ExpectedPool) -> None:
        """Nothing: an actor does not listen while its one method runs. The coordinator ends it."""

    def kill(self, pool: ExpectedPool) -> None:
        for actor in self._take_actors(pool, None):
            ray.kill(actor.handle)
            if actor.is_here:  # Ray asks the process, and one that is stopped does not hear it
                with contextlib.suppress(ProcessLookupError):
                    os.kill(actor.pid, signal.SIGKILL)

    def _take_actors(self, pool: ExpectedPool, start: int | None) -> list[_Actor]:
        """Take a pool's actors away, to be killed; ``start``: the one that may have new ones."""
        with self._lock:
            self._wanted.pop(pool.pool_id, None)
            if start is not None:
                self._wanted[pool.pool_id] = start
            return self._actors.pop(pool.pool_id, [])

    def _run_thread(self, work: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        thread.start()
        with self._lock:
            self._threads = [*(other for other in self._threads if other.is_alive()), thread]

    # -- bringing a gang up, in a thread -----------------------------------------------------------

    def _bring_up(self, pool: ExpectedPool, where: dict[str, Any]) -> None:
        start = int(where["gang_start"])
        try:
            group = self._groups.get(pool.pool_id) or self._place(pool, start)
            for rank in range(pool.num_ranks):
                self._start_rank(pool, rank, group, where)
        except ConfigError as error:
            reason = str(error)
        except ray.exceptions.RayError as error:
            reason = f"Ray cannot start {pool.pool_id}: {str(error).splitlines()[0]}"
        except Exception as error:  # the thread's outermost frame: a bug must not pass in silence
            log.exception("starting %s ended by a bug", pool.pool_id)
            reason = f"{pool.pool_id} cannot be started: {error}"
        else:
            return
        if self._wanted.get(pool.pool_id) == start:
            self.kill(pool)
        self._reports.put(StartFailed(pool.pool_id, start, reason))

    def _check_wanted(self, pool: ExpectedPool, start: int) -> None:
        if self._wanted.get(pool.pool_id) != start:
            raise ConfigError(f"{pool.pool_id} was ended before Ray had started it")

    def _place(self, pool: ExpectedPool, start: int) -> PlacementGroup:
        strategy = (
            "STRICT_PACK" if pool.role == "decode" else self._cluster.serve.ray_prefill_strategy
        )
        bundle = {"CPU": self._num_cpus(pool)}
        if self._num_gpus(pool):
            bundle["GPU"] = self._num_gpus(pool)
        if pool.role == "store" or self._is_on_loopback:  # where the folder of --data-dir is
            bundle[f"node:{ray.util.get_node_ip_address()}"] = 0.001
        group: PlacementGroup = placement_group([bundle] * pool.num_ranks, strategy=strategy)
        deadline = time.monotonic() + PLACEMENT_BUDGET_S
        try:
            while not group.wait(timeout_seconds=POLL_S):
                self._check_wanted(pool, start)
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"Ray has no room for {pool.pool_id}: {pool.num_ranks} ranks of {bundle}, "
                        f"{strategy}; add nodes or choose smaller pools"
                    )
        except ConfigError:
            remove_placement_group(group)
            raise
        with self._lock:
            self._groups[pool.pool_id] = group
        return group

    def _num_gpus(self, pool: ExpectedPool) -> float:
        return 1.0 if self._cluster.device == "cuda" and pool.role != "store" else 0.0

    def _num_cpus(self, pool: ExpectedPool) -> float:
        if pool.role == "store":
            return 0.01  # it copies now and then
        # On a machine with fewer cores than ranks they share; Ray counts, it does not pin.
        total = float(ray.cluster_resources().get("CPU", 1.0))
        num_ranks = sum(pool.num_ranks for pool in self._cluster.pools)
        return min(float(self._cluster.threads), total / (num_ranks + 1))

    def _start_rank(
        self, pool: ExpectedPool, rank: int, group: PlacementGroup, where: dict[str, Any]
    ) -> None:
        variables = rank_variables(self._cluster.threads, is_local=self._is_on_loopback)
        options = {
            "num_cpus": self._num_cpus(pool),
            "num_gpus": self._num_gpus(pool),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=rank
            ),
            "runtime_env": {"env_vars": variables},
        }
        name = f"{pool.pool_id}/{rank}"
        start = int(where["gang_start"])
        handle = ray.remote(RankActor).options(**options).remote()
        try:
            actor = self._wait_for_actor(pool, start, handle)
            named = "lo" if self._is_on_loopback else self._cluster.serve.transfer_interface
            host = ray.get(handle.settle.remote(named))
            config = rank_config(self._cluster, pool, rank, where | {"listen": f"tcp://{host}"})
            with self._lock:
                self._check_wanted(pool, start)
                self._actors.setdefault(pool.pool_id, []).append(actor)
        except BaseException:
            ray.kill(handle)
            raise
        self._run_thread(self._watch, name, start, handle.run.remote(pool.role, config))

    def _wait_for_actor(self, pool: ExpectedPool, start: int, handle: Any) -> _Actor:  # noqa: ANN401
        asked = [handle.node_ip.remote(), handle.pid.remote()]
        deadline = time.monotonic() + PLACEMENT_BUDGET_S
        while ray.wait(asked, num_returns=len(asked), timeout=POLL_S)[1]:
            self._check_wanted(pool, start)
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"Ray has not started a rank of {pool.pool_id} in {PLACEMENT_BUDGET_S:.0f} s: "
                    "is there a node with this version of Baton and room?"
                )
        node_ip, pid = ray.get(asked)
        return _Actor(handle, pid, node_ip == ray.util.get_node_ip_address())

    def _watch(self, name: str, start: int, running: Any) -> None:  # noqa: ANN401 - Ray's own
        try:
            code = int(ray.get(running))
            error = None
        except ray.exceptions.RayError as failure:
            code = 1
            error = f"{name} died: {str(failure).splitlines()[0]}"
        self._reports.put(Exited(name, code, error, start))

    def stop(self) -> None:
        with self._lock:
            self._wanted.clear()
            threads = self._threads
        for thread in threads:  # the coordinator has ended the ranks
            thread.join(STOP_BUDGET_S / max(1, len(threads)))
        with self._lock:
            actors = [actor for pool in self._actors.values() for actor in pool]
            groups = list(self._groups.values())
            self._actors.clear()
            self._groups.clear()
        for actor in actors:
            ray.kill(actor.handle)
        for group in groups:
            remove_placement_group(group)
        if ray.is_initialized():
            ray.shutdown()
