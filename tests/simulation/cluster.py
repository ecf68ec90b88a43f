"""The in-memory cluster with accidents: gangs that are killed, paused, and come back."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from bench.simulate.cluster import Cluster
from bench.simulate.event_loop import EventLoop
from bench.simulate.gangs import Gang, Site
from coordinator.config import CoordinatorConfig, ExpectedPool
from protocol.messages import ToRank
from tests.simulation.decoding import DecodeGang
from tests.simulation.gangs import FINGERPRINT, MAX_MODEL_LEN
from tests.simulation.model import BLOCK_SIZE, layout
from tests.simulation.prefilling import PrefillGang
from tests.simulation.storing import SimulatedDisk, StoreGang

TICK_S = 0.25
SWEEP_S = 1.0


class MortalCluster(Cluster):
    """Everything but the clients.

    Args:
        world: clock and dice.
        pools: what it consists of, with the blocks of each rank.
    """

    def __init__(self, world: EventLoop, pools: Sequence[tuple[ExpectedPool, int]]) -> None:
        self.num_blocks = {spec.pool_id: count for spec, count in pools}
        self.disk = SimulatedDisk(quota_blocks=world.random.randint(6, 40))
        config = CoordinatorConfig(
            token="simulated",
            model="arithmetic",
            pools=tuple(spec for spec, _ in pools),
            block_size=BLOCK_SIZE,
            local_prefill_threshold=BLOCK_SIZE,
            stall_timeout_s=2.0,
            handoff_timeout_s=8.0,
            failover_wait_s=20.0,
            max_attempts=8,
            poison_deaths=100,  # deaths here are nobody's fault
        )
        super().__init__(
            world, config, self._gang, fingerprint=FINGERPRINT, max_model_len=MAX_MODEL_LEN
        )
        world.at(TICK_S, self._tick)
        world.at(SWEEP_S, self._sweep)

    def _gang(self, site: Site) -> Gang[Any]:
        spec = site.spec
        layouts = [
            layout(self.num_blocks[spec.pool_id], rank % spec.tp_size, spec.tp_size)
            for rank in range(spec.num_ranks)
        ]
        if spec.role == "store":
            return StoreGang(self.disk, site, layouts)
        return DecodeGang(site, layouts) if spec.role == "decode" else PrefillGang(site, layouts)

    def _tick(self) -> None:
        for gang in self.gangs.values():
            if gang.is_alive and gang.paused_until <= self.world.now:
                for rank in gang.ranks:
                    rank.node.tick(self.world.now)
                gang.wake()
        self.world.at(TICK_S, self._tick)

    def _sweep(self) -> None:
        self.node.sweep(self.world.now)
        self.world.at(SWEEP_S, self._sweep)

    def tell_store(self, message: ToRank) -> None:
        """What its keeper of documents has to say."""
        for pool in self.node.registry.serving("store"):
            self.node.send(pool.pool_id, message)

    # -- accidents ---------------------------------------------------------------------------------

    def kill(self, pool_id: str) -> None:
        """All processes of a gang are gone; the coordinator notices later."""
        gang = self.gangs[pool_id]
        if not gang.is_alive:
            return
        self.world.faults["killed"] += 1
        self.world.note(f"{pool_id} is killed")
        gang.kill()
        notices_s = 0.02 + self.world.random.random()
        self.world.at(notices_s, partial(self._lose, pool_id))
        self.world.at(notices_s + 3 * self.world.random.random(), partial(self.start, pool_id))

    def _lose(self, pool_id: str) -> None:
        self.world.note(f"{pool_id} is lost")
        self.node.lose_pool(pool_id, "killed", self.world.now)

    def pause(self, pool_id: str, seconds: float) -> None:
        """Its leader does nothing for a while."""
        self.world.faults["paused"] += 1
        self.gangs[pool_id].paused_until = self.world.now + seconds
