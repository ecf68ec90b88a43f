"""Which nodes a case has, which of them speak to each other, and how they come up."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from coordinator.config import ExpectedPool
from decode.facts import DecodeFacts
from kvcache.blocks import BlockPool
from kvtransfer.identity import RankIdentity
from prefill.facts import PrefillFacts
from prefill.manifest import layer_groups
from prefill.placement import Geometry
from tests.exploration.callers import Calls, Coordinator, hello
from tests.exploration.inputs import COORDINATOR, LAUNCHER
from tests.exploration.leaders import Leader, Node
from tests.exploration.mains import (
    FINGERPRINT,
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    DecodeMain,
    Main,
    PrefillMain,
)
from tests.exploration.memory import BLOCK_SIZE, layout
from tests.exploration.ranks import Rank, Setting


@dataclass(frozen=True, slots=True)
class Gang:
    """A pool of a case. ``num_blocks`` is of each rank."""

    role: str
    cp_size: int = 1
    tp_size: int = 1
    num_blocks: int = 2


@dataclass(frozen=True, slots=True)
class Case:
    """What is explored.

    ``queues``: a leader's main and transfer thread say everything to each other in queues, and are
    nodes of their own. ``reduces_order``: partial-order reduction; what commutes with everything
    else is done at once (steps.py).
    ``num_deaths`` and ``num_repeats`` are how many gangs may die and how many messages between
    processes may come twice.
    """

    prefill: Gang = field(default_factory=lambda: Gang("prefill"))
    decode: Gang = field(default_factory=lambda: Gang("decode"))
    calls: Calls = field(default_factory=Calls)
    setting: Setting = field(default_factory=Setting)
    num_heads: int = 1
    num_layers: int = 1
    queues: bool = False
    reduces_order: bool = True
    num_repeats: int = 0
    num_deaths: int = 0
    may_die: tuple[str, ...] = ("prefill", "decode")
    restarts: bool = True

    @property
    def can_fail(self) -> bool:
        """Whether anything may befall it that can cost an attempt."""
        setting = self.setting
        costs = (setting.reads_fail, setting.reads_corrupt, setting.leases_end, self.num_deaths)
        return any(costs)

    @property
    def gangs(self) -> tuple[Gang, ...]:
        return (self.prefill, self.decode)


@dataclass(frozen=True, slots=True)
class Life:
    """One life of a pool: the names of its nodes."""

    pool_id: str
    number: int
    main: str
    ranks: tuple[str, ...]


class Cluster:
    """The nodes of a case, by name, before anything has happened."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.pools = tuple(
            ExpectedPool(gang.role, gang.role, gang.cp_size, gang.tp_size) for gang in case.gangs
        )
        self.lives = [
            _life(pool, number)
            for pool in self.pools
            for number in range(1, 2 + self._num_restarts(pool.pool_id))
        ]
        self.nodes: dict[str, Node] = {COORDINATOR: Coordinator(self.pools, case.calls)}
        self.node_of: dict[str, str] = {COORDINATOR: COORDINATOR}  # address -> name of its node
        for life in self.lives:
            self._add(life)

    def _num_restarts(self, pool_id: str) -> int:
        case = self.case
        return case.num_deaths if case.restarts and pool_id in case.may_die else 0

    def life_after(self, life: Life) -> Life | None:
        """What is started when a gang has died."""
        following = (life.pool_id, life.number + 1)
        return next((o for o in self.lives if (o.pool_id, o.number) == following), None)

    def _add(self, life: Life) -> None:
        gang = next(gang for gang in self.case.gangs if gang.role == life.pool_id)
        main = self._main(gang, life)
        ranks = [self._rank(gang, life, number) for number in range(len(life.ranks))]
        for rank in ranks[1:]:
            self._place(rank.name, rank, rank.name)
        if self.case.queues:
            self._place(life.ranks[0], ranks[0], life.ranks[0])
            self._place(life.main, main, life.main)
        else:
            self._place(life.ranks[0], Leader(ranks[0], main), life.ranks[0], life.main)

    def _place(self, name: str, node: Node, *addresses: str) -> None:
        self.nodes[name] = node
        self.node_of.update(dict.fromkeys(addresses, name))

    def _rank(self, gang: Gang, life: Life, number: int) -> Rank:
        case = self.case
        identity = RankIdentity(
            gang.role, life.pool_id, number, gang.cp_size, gang.tp_size, life.ranks[number]
        )
        place = (identity.tp_rank, gang.tp_size)
        kv = layout(gang.num_blocks, case.num_layers, case.num_heads, place)
        rank = Rank(identity, kv, life.main, case.setting)
        pool = next(pool for pool in self.pools if pool.pool_id == life.pool_id)
        rank.hello = hello(pool, rank.endpoint, life.number)
        return rank

    def _main(self, gang: Gang, life: Life) -> Main[Any]:
        if gang.role == "decode":
            decode_facts = DecodeFacts(
                model_fingerprint=FINGERPRINT,
                max_model_len=MAX_MODEL_LEN,
                token_budget=8,
                max_num_sequences=8,
                watermark_blocks=0,
            )
            blocks = BlockPool(gang.num_blocks, BLOCK_SIZE)
            return DecodeMain(life.main, life.ranks, decode_facts, blocks)
        facts = PrefillFacts(
            pool_id=life.pool_id,
            geometry=Geometry(gang.cp_size, BLOCK_SIZE, 2 * BLOCK_SIZE),
            tp_size=gang.tp_size,
            num_blocks=gang.num_blocks,
            layer_groups=layer_groups(self.case.num_layers, 1),
            model_fingerprint=FINGERPRINT,
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_sequences=4,
            step_target_s=1.0,
        )
        return PrefillMain(life.main, life.ranks, facts)

    # -- who speaks to whom ------------------------------------------------------------------------

    def links(self) -> list[tuple[str, str]]:
        """Every (sender, receiver), by address, of different nodes."""
        found = [(LAUNCHER, COORDINATOR)]
        for life in self.lives:
            for rank in life.ranks:
                found += [(COORDINATOR, rank), (rank, COORDINATOR)]
                found += [(life.main, rank), (rank, life.main)]
            for rank in life.ranks[1:]:
                found += [(life.ranks[0], rank), (rank, life.ranks[0])]
            for other in self.lives:
                if other.pool_id != life.pool_id:
                    found += [(ours, theirs) for ours in life.ranks for theirs in other.ranks]
        node_of = {**self.node_of, LAUNCHER: LAUNCHER}
        return [link for link in found if node_of[link[0]] != node_of[link[1]]]

    def first_lives(self) -> Iterator[Life]:
        """The gangs that are there from the beginning."""
        return (life for life in self.lives if life.number == 1)


def _life(pool: ExpectedPool, number: int) -> Life:
    name = pool.pool_id + "'" * (number - 1)
    ranks = tuple(f"{name}/{rank}" for rank in range(pool.num_ranks))
    return Life(pool.pool_id, number, f"{name}.main", ranks)
