"""A cluster without processes: the coordinator's node, the gangs, and the wires between them.

Its drivers are the clock: the experiments give each step the time that a model of a machine says,
the fault simulation (``tests/simulation``) has messages late, doubled and lost, and gangs die.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.simulate.event_loop import EventLoop
from bench.simulate.gangs import Gang, Site
from bench.simulate.ranks import Rank
from coordinator.config import CoordinatorConfig
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

ABOUT_POOLS = (Welcome, Topology, Shutdown)
MakeGang = Callable[[Site], Gang[Any]]


class Cluster:
    """Everything but the clients. All of its pools start at once.

    Args:
        world: clock, dice and faults.
        config: of the coordinator.
        make_gang: a gang of a pool.
        fingerprint: of the model that all ranks say they have.
        max_model_len: of that model.
    """

    def __init__(
        self,
        world: EventLoop,
        config: CoordinatorConfig,
        make_gang: MakeGang,
        *,
        fingerprint: str,
        max_model_len: int,
    ) -> None:
        self.world = world
        self.node = CoordinatorNode(config, fingerprint, epoch=1, wake=self._obey)
        self.gangs: dict[str, Gang[Any]] = {}
        self._make_gang = make_gang
        self._fingerprint = fingerprint
        self._max_model_len = max_model_len
        self._lives = {spec.pool_id: 0 for spec in config.pools}
        self._everyone: dict[str, Rank] = {}
        self._peers: dict[str, tuple[Gang[Any], Rank]] = {}
        for pool_id in self._lives:
            self.start(pool_id)

    def start(self, pool_id: str) -> None:
        """A gang comes up, for the first time or again, and says HELLO."""
        self._lives[pool_id] += 1
        life, spec = self._lives[pool_id], self.node.registry.pools[pool_id].spec
        self.world.note(f"{pool_id} starts for the {life}. time")

        def tell(message: ToCoordinator) -> None:
            leader = gang.ranks[0].identity
            self._to_node(("from", leader.incarnation), leader.routing_id, message)

        gang = self._make_gang(Site(self.world, self._everyone, spec, life, tell))
        self.gangs[pool_id] = gang
        for rank in gang.ranks:
            peer = rank.identity.routing_id
            self._peers[peer] = (gang, rank)
            hello = Hello(
                PROTOCOL_VERSION,
                spec.role,
                pool_id,
                spec.cp_size,
                spec.tp_size,
                rank.identity.endpoint(rank.memory.layout),
                self._fingerprint,
                self._max_model_len,
                GangAddress("", "") if rank.identity.is_leader else None,
                gang_start=life,
            )
            self.node.on_message(peer, hello, self.world.now)

    # -- to the ranks ------------------------------------------------------------------------------

    def _obey(self) -> None:
        for command in self.node.take_commands():
            if isinstance(command, Send):
                self._to_rank(command.peer, command.message)

    def _to_rank(self, peer: str, message: ToRank) -> None:
        """What is about pools is never lost: it comes with a new connection."""
        if isinstance(message, ABOUT_POOLS) or not self._is_lost(message):
            self.world.send(("to", peer), partial(self._at_rank, peer, message))

    def _at_rank(self, peer: str, message: ToRank) -> None:
        gang, rank = self._peers[peer]
        if not gang.is_alive:
            return
        match message:
            case Welcome():
                rank.node.welcomed(message.pool_epoch)
                gang.wake()  # what its leader has to say first of all
                speed = gang.tokens_per_s if rank.identity.is_leader else 0.0
                self._reply(peer, GangReady(speed))
            case Topology():
                rank.node.pools_changed(message.pools, self.world.now)
                if rank.identity.is_leader:
                    gang.on_event(PoolsChanged(message.pools))
                self._reply(peer, Connected(message.version))
            case _:
                gang.on_event(ControlReceived(message))

    # -- to the coordinator ------------------------------------------------------------------------

    def _reply(self, peer: str, message: GangReady | Connected) -> None:
        self.world.send(("from", peer), partial(self._at_node, peer, message))

    def _to_node(self, link: tuple[str, str], peer: str, message: ToCoordinator) -> None:
        if not self._is_lost(message):
            self.world.send(link, partial(self._at_node, peer, message))

    def _at_node(self, peer: str, message: ToCoordinator) -> None:
        with contextlib.suppress(PeerError):  # of a gang that is lost nothing is heard any more
            self.node.on_message(peer, message, self.world.now)

    def _is_lost(self, message: ToRank | ToCoordinator) -> bool:
        return self.world.happens(self.world.model.lost_control, f"lost {type(message).__name__}")
