"""The real coordinator's logic, the gangs, the wires between them, and deaths."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.node import CoordinatorNode, Send
from kvtransfer.events import ControlReceived, PoolsChanged
from protocol.errors import PeerError
from protocol.messages import (
    PROTOCOL_VERSION,
    Connected,
    GangAddress,
    GangReady,
    Hello,
    Shutdown,
    ToCoordinator,
    Topology,
    ToRank,
    Welcome,
)
from tests.simulation.decoding import DecodeGang
from tests.simulation.gangs import FINGERPRINT, MAX_MODEL_LEN, Gang
from tests.simulation.model import BLOCK_SIZE, layout
from tests.simulation.prefilling import PrefillGang
from tests.simulation.ranks import Rank
from tests.simulation.storing import SimulatedDisk, StoreGang
from tests.simulation.world import EventLoop

TICK_S = 0.25
SWEEP_S = 1.0
ABOUT_POOLS = (Welcome, Topology, Shutdown)


class Cluster:
    """Everything but the clients.

    Args:
        world: clock and dice.
        pools: what it consists of, with the blocks of each rank.
    """

    def __init__(self, world: EventLoop, pools: Sequence[tuple[ExpectedPool, int]]) -> None:
        self.world = world
        self.num_blocks = {spec.pool_id: count for spec, count in pools}
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
        self.node = CoordinatorNode(config, FINGERPRINT, epoch=1, wake=self._obey)
        self.registry, self.service = self.node.registry, self.node.service
        self.disk = SimulatedDisk(quota_blocks=world.random.randint(6, 40))
        self.gangs: dict[str, Gang[Any]] = {}
        self._lives = dict.fromkeys(self.num_blocks, 0)
        self._everyone: dict[str, Rank] = {}
        self._peers: dict[str, tuple[Gang[Any], Rank]] = {}
        for pool_id in self.num_blocks:
            self.start(pool_id)
        world.at(TICK_S, self._tick)
        world.at(SWEEP_S, self._sweep)

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

    # -- gangs come and go -------------------------------------------------------------------------

    def start(self, pool_id: str) -> None:
        """A gang comes up, for the first time or again, and says HELLO."""
        self._lives[pool_id] += 1
        spec = self.registry.pools[pool_id].spec
        kind = self._kind(spec)
        gang: Gang[Any] = kind(
            self.world, self._everyone, spec, self._lives[pool_id],
            [
                layout(self.num_blocks[pool_id], rank % spec.tp_size, spec.tp_size)
                for rank in range(spec.num_ranks)
            ],
            lambda message: self._from_leader(gang, message),
        )  # fmt: skip
        self.gangs[pool_id] = gang
        self.world.note(f"{pool_id} starts for the {self._lives[pool_id]}. time")
        for rank in gang.ranks:
            peer = _peer(rank)
            self._peers[peer] = (gang, rank)
            hello = Hello(
                PROTOCOL_VERSION, spec.role, pool_id, spec.cp_size, spec.tp_size,
                rank.identity.endpoint(rank.memory.layout), FINGERPRINT, MAX_MODEL_LEN,
                GangAddress("", "") if rank.identity.is_leader else None,
                gang_start=self._lives[pool_id],
            )  # fmt: skip
            self.node.on_message(peer, hello, self.world.now)

    def _kind(self, spec: ExpectedPool) -> Callable[..., Gang[Any]]:
        if spec.role == "store":
            return partial(StoreGang, self.disk)
        return DecodeGang if spec.role == "decode" else PrefillGang

    def tell_store(self, message: ToRank) -> None:
        """What its keeper of documents has to say."""
        for pool in self.registry.serving("store"):
            self.node.send(pool.pool_id, message)

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

    # -- the control plane -------------------------------------------------------------------------

    def _obey(self) -> None:
        for command in self.node.take_commands():
            if isinstance(command, Send):
                self._send(command.peer, command.message)

    def _send(self, peer: str, message: ToRank) -> None:
        """What is about pools is never lost: it comes with a new connection."""
        is_safe = isinstance(message, ABOUT_POOLS)
        name = type(message).__name__
        if is_safe or not self.world.happens(self.world.model.lost_control, f"lost {name}"):
            self.world.send(("to", peer), partial(self._at_rank, peer, message))

    def _at_rank(self, peer: str, message: ToRank) -> None:
        gang, rank = self._peers[peer]
        if not gang.is_alive:
            return
        match message:
            case Welcome():
                rank.node.welcomed(message.pool_epoch)
                gang.wake()  # what its leader has to say first of all
                self._reply(peer, GangReady())
            case Topology():
                rank.node.pools_changed(message.pools, self.world.now)
                if rank.identity.is_leader:
                    gang.on_event(PoolsChanged(message.pools))
                self._reply(peer, Connected(message.version))
            case _:
                gang.on_event(ControlReceived(message))

    def _reply(self, peer: str, message: GangReady | Connected) -> None:
        self.world.send(("from", peer), partial(self._at_node, peer, message))

    def _from_leader(self, gang: Gang[Any], message: ToCoordinator) -> None:
        name = type(message).__name__
        if not self.world.happens(self.world.model.lost_control, f"lost {name}"):
            leader = gang.ranks[0]
            link = ("from", leader.identity.incarnation)
            self.world.send(link, partial(self._at_node, _peer(leader), message))

    def _at_node(self, peer: str, message: ToCoordinator) -> None:
        with contextlib.suppress(PeerError):  # of a gang that is lost nothing is heard any more
            self.node.on_message(peer, message, self.world.now)


def _peer(rank: Rank) -> str:
    """As the coordinator's socket knows it."""
    return rank.identity.routing_id
