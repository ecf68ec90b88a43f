"""What a coordinator decides: which pools there are, and the life of every request. Pure.

It is to the coordinator's process what ``engine/leader_node.py`` is to a pool's leader: whoever
drives it tells it what has come, and when, and does what it commands. A process, the simulations,
the exhaustive search and the tests are such drivers.

1. ``on_message``: a rank has said something; ``on_unreachable``: one could not be sent to.
2. ``tick`` every ``CHECK_INTERVAL_S``, ``sweep`` every ``SWEEP_INTERVAL_S``.
3. Whoever asks for tokens uses ``service``; whoever looks at pools, ``registry``.
4. ``take_commands``, after any of these.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from coordinator.cluster.joining import HelloRefused, JoinRequirements
from coordinator.cluster.registry import Outgoing, Registry, Timeouts
from coordinator.config import CoordinatorConfig
from coordinator.requests.service import PLAIN, Ports, Service
from protocol.messages import (
    Connected,
    GangReady,
    Heartbeat,
    Hello,
    Introduce,
    Refused,
    ToCoordinator,
    ToRank,
)

SWEEP_INTERVAL_S = 1.0
News = dict[str, str | int]  # one line for the launcher

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Send:
    """Say something to a rank, by its routing id."""

    peer: str
    message: ToRank


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the launcher, which ends and starts processes, about a pool or a sign of life."""

    news: News


@dataclass(frozen=True, slots=True)
class Complete:
    """The cluster can answer, for the first time."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """A rank of the cluster was turned away before it was complete."""

    reason: str


@dataclass(frozen=True, slots=True)
class StepDown:
    """Another coordinator has taken over: end, and put nothing away."""

    reason: str


Command = Send | Report | Complete | GiveUp | StepDown


class CoordinatorNode:
    """Everything that a coordinator knows of its cluster.

    Args:
        config: checked.
        model_fingerprint: of the model that every rank must have loaded.
        epoch: higher each time a coordinator starts.
        ports: of the service; the registry keeps its budgets by the same clock.
        wake: called when there is a first command to take, for drivers that wait.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        model_fingerprint: str,
        *,
        epoch: int,
        ports: Ports = PLAIN,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.registry = Registry(
            config.pools,
            JoinRequirements(model_fingerprint, config.block_size),
            coordinator_epoch=epoch,
            timeouts=Timeouts(
                silent_s=config.heartbeat_timeout_s,
                starting_s=config.start_silence_s,
                step_s=config.step_budget_s,
                rejoin_s=config.rejoin_timeout_s,
            ),
            rejoining=config.rejoining,
        )
        self.service = Service(config, self.registry, self.send, ports)
        self.is_complete = False  # whether the cluster has been able to answer
        self._is_restart = config.is_restart
        self._observed = ports.observed
        self._wake = wake
        self._commands: list[Command] = []
        self._unreachable: dict[str, str] = {}  # peers, and why; to be lost at the next tick
        self._serving: set[tuple[str, int]] = set()  # pools and their epochs

    def take_commands(self) -> list[Command]:
        """What is to be done since the last call, in order."""
        commands, self._commands = self._commands, []
        return commands

    def send(self, pool_id: str, message: ToRank) -> None:
        """Say something to a pool's leader. A lost pool is told nothing."""
        pool = self.registry.pools[pool_id]
        if 0 in pool.ranks:
            self._command(Send(pool.leader, message))

    # -- what has come -----------------------------------------------------------------------------

    def on_message(self, peer: str, message: ToCoordinator, now: float) -> None:
        """A rank has said something.

        Args:
            peer: its routing id.

        Raises:
            PeerError: it is a stranger, or of a gang that is lost; nothing has changed.
            IllegalTransition: it cannot be so; nothing has changed.
        """
        at = self._observed(now)
        if isinstance(message, Hello):
            self._on_hello(peer, message, now)
        elif isinstance(message, GangReady):
            self._send_all(self.registry.on_gang_ready(peer, message, at))
        elif isinstance(message, Connected):
            self.registry.on_connected(peer, message, at)
            self._note_serving(now)
        elif isinstance(message, Heartbeat):
            self._on_heartbeat(peer, message, at)
        else:
            pool, is_leader = self.registry.on_other(peer, at)
            if is_leader:
                self.service.on_message(pool.pool_id, message, now)

    def _on_hello(self, peer: str, hello: Hello, now: float) -> None:
        try:
            displaced = self.registry.displaces(peer, hello)
            if hello.coordinator_epoch > self.registry.coordinator_epoch:
                reason = f"{peer} has seen coordinator {hello.coordinator_epoch}"
                self._command(StepDown(reason))
                return
            if displaced is not None:
                self.lose_pool(hello.pool_id, displaced.reason, now, is_over=displaced.is_over)
            self._send_all(self.registry.on_hello(peer, hello, self._observed(now)))
        except HelloRefused as error:
            _log.error("refused %s: %s", peer[:80], error)
            self._command(Send(peer, Refused(str(error))))
            if not self._is_restart and not self.is_complete:
                self._command(GiveUp(str(error)))

    def _on_heartbeat(self, peer: str, message: Heartbeat, at: float) -> None:
        if self.registry.pool_of(peer) is None:  # of our predecessor's, or of a gang that is lost
            self._command(Send(peer, Introduce(self.registry.coordinator_epoch)))
        else:
            self.registry.on_heartbeat(peer, message, at)

    def _note_serving(self, now: float) -> None:
        """Whoever serves now and did not before: tell the service, and the launcher."""
        pools = [pool for pool in self.registry.pools.values() if pool.is_serving]
        for pool in pools:
            if (pool.pool_id, pool.epoch) in self._serving:
                continue
            _log.info("%s serves, epoch %d", pool.pool_id, pool.epoch)
            self.service.on_pool_serving(pool.pool_id, now)
            if self._is_restart or self.is_complete:
                self._command(Report({"serving": pool.pool_id, "start": pool.gang_start}))
        self._serving = {(pool.pool_id, pool.epoch) for pool in pools}
        can_answer = self._is_restart and any(pool.spec.role == "decode" for pool in pools)
        if not self.is_complete and (can_answer or self.registry.is_complete):
            self.is_complete = True
            self._command(Complete())

    def on_unreachable(self, peer: str, reason: str) -> None:
        """A rank could not be sent to."""
        if self.registry.pool_of(peer) is not None:
            self._unreachable.setdefault(peer, reason)

    # -- what has not come -------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Lose who is gone or silent for too long; tell the others that we live."""
        self._lose_unreachable(now)
        for loss in self.registry.expire(self._observed(now)):
            self.lose_pool(loss.pool_id, loss.reason, now, is_over=loss.is_over, holds_others=False)
        self._send_all(self.registry.due())
        self._send_all(self.registry.beat())

    def sweep(self, now: float) -> None:
        """Look after every request, and tell the launcher that we live."""
        if self._is_restart or self.is_complete:
            self._command(Report({"alive": self.registry.coordinator_epoch}))
        for pool_id, reason in self.service.sweep(now):
            self.lose_pool(pool_id, reason, now)

    def _lose_unreachable(self, now: float) -> None:
        """Who could not be sent to a tick ago, and has not said HELLO on another line since."""
        unreachable, self._unreachable = self._unreachable, {}
        for peer, reason in unreachable.items():
            found = self.registry.pool_of(peer)
            # Dead, or starved until libzmq gave its connection up. Of the dead the launcher knows
            # by itself; a gang that lives may come back, like one that is only silent.
            if found is not None:
                self.lose_pool(found[0].pool_id, reason, now, is_over=False, holds_others=False)

    def lose_pool(
        self,
        pool_id: str,
        reason: str,
        now: float,
        *,
        is_over: bool = True,
        holds_others: bool = True,
    ) -> None:
        """A pool is gone; see :meth:`Registry.lose`."""
        _log.error("lost %s: %s", pool_id, reason)
        pool = self.registry.pools[pool_id]
        if is_over:
            self._command(Report({"lost": pool_id, "start": pool.gang_start, "reason": reason}))
        self._serving.discard((pool_id, pool.epoch))
        self._send_all(
            self.registry.lose(pool_id, reason, is_over=is_over, holds_others=holds_others)
        )
        self.service.on_pool_lost(pool_id, now)

    def shut_down(self, reason: str) -> None:
        """The cluster ends: tell every rank."""
        self._send_all(self.registry.shut_down(reason))

    def _send_all(self, outgoing: Iterable[Outgoing]) -> None:
        for peer, message in outgoing:
            self._command(Send(peer, message))

    def _command(self, command: Command) -> None:
        self._commands.append(command)
        if len(self._commands) == 1:
            self._wake()
