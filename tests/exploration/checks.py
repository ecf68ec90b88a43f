"""What must hold in every state, and what else at an end.

Each check looks at a main thread and one rank, or at two ranks; it is made once for each pair of
their states.

1. A block that a read in flight touches is counted as in transfer by both pools,
   so it is nobody's to hand out.
2. KV that a pool may compute with, or find in its cache, is byte by byte what it should be.
3. What is computed with has been handed over in full, on every rank.
4. Whoever has an open hand-off on a rank is known to the main thread, which holds its blocks.
5. A block space refuses what its table does not have, and references to earlier generations, and
   is then what it was.
6. Every view of a block space agrees, and all blocks are accounted for (in mains.py, at each step).
"""

import contextlib
from collections.abc import Callable, Hashable

import numpy as np

from kvcache.blocks import TABLE, BlockEvent, BlockPool, BlockState
from kvcache.prefix import block_salt, hash_blocks
from protocol.errors import IllegalTransition, StaleError
from protocol.kv import BlockRef, RankEndpoint
from tests.exploration.automata import Network
from tests.exploration.callers import Coordinator
from tests.exploration.clusters import Life
from tests.exploration.leaders import Leader, Node, main_of, rank_of
from tests.exploration.mains import FINGERPRINT, Main, prompt_of
from tests.exploration.memory import BLOCK_SIZE, blocks_of, tag
from tests.exploration.ranks import Rank
from tests.exploration.snapshots import freeze
from tests.exploration.tables import Ints, PairTable

MOVING = (BlockState.IN_FLIGHT, BlockState.DRAINING)
Check = Callable[[Node, Node], str]


class Checks:
    """Of one case.

    Args:
        network: its automata.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._tags = self._tags_of_hashes()
        self._tables: list[tuple[int, int, PairTable]] = []
        self._problems = [""]
        self._spaces: set[Hashable] = (
            set()
        )  # in these states they have refused all that they should
        lives = network.cluster.lives
        for life in lives:
            main = network.node_at(life.main)
            self._add(main, life.ranks[0], self._refuses)
            for name in life.ranks:
                self._add(main, name, self._holds_what_it_should)
                self._add(main, name, _is_kept_from_reuse)
                self._add(main, name, _is_as_the_ranks_say)
            for other in lives:
                if other.pool_id != life.pool_id and not network.cluster.case.setting.leases_end:
                    for reader in other.ranks:
                        self._add(main, reader, _is_kept_for_readers(life))

    def _tags_of_hashes(self) -> dict[bytes, int]:
        calls = self._network.cluster.case.calls
        found = {}
        for request in range(calls.num_requests):
            prompt = prompt_of(request, calls.num_tokens)
            hashes = hash_blocks(prompt, BLOCK_SIZE, block_salt(FINGERPRINT, ""))
            found.update({h: tag(request, logical) for logical, h in enumerate(hashes)})
        return found

    def _add(self, first: int, name: str, check: Check) -> None:
        second = self._network.node_at(name)
        automata = self._network.automata

        def find(state: int, other: int) -> int:
            node, peer = automata[first].states[state], automata[second].states[other]
            text = "" if node is None or peer is None else check(node, peer)
            if not text:
                return 0
            self._problems.append(text)
            return len(self._problems) - 1

        self._tables.append((first, second, PairTable(find)))

    def first_wrong(self, rows: Ints) -> tuple[int, str] | None:
        """The place and the words of the first row in which something is wrong."""
        for first, second, table in self._tables:
            problems = table.of(rows[:, first], rows[:, second])
            if problems.any():
                place = int(np.argmax(problems != 0))
                return place, self._problems[problems[place]]
        return None

    def _holds_what_it_should(self, node: Node, rank_node: Node) -> str:
        """The blocks that a rank computes with, now or later."""
        main, rank = main_of(node), rank_of(rank_node)
        cp_rank = rank.identity.cp_rank
        promised = [(block, t) for of_rank, block, t in main.promised() if of_rank == cp_rank]
        for block_hash, block in main.spaces()[cp_rank]._by_hash.items():
            if block_hash in self._tags:
                promised.append((block, self._tags[block_hash]))
        for block, content in promised:
            if not rank.memory.holds(block, content):
                return f"{rank.name}: block {block} does not hold what it should"
        return ""

    def _refuses(self, node: Node, _: Node) -> str:
        for space in main_of(node).spaces():
            frozen = freeze(space)
            if frozen in self._spaces:
                continue
            self._spaces.add(frozen)
            for block_id in range(space.num_blocks):
                text = _accepted(space, block_id)
                if text or freeze(space) != frozen:
                    return text or f"a refusal has changed block {block_id}"
        return ""

    # -- at an end ---------------------------------------------------------------------------------

    def wrong_end(self, row: Ints, is_something_under_way: bool) -> str:
        """What is wrong with a state in which nothing more happens by itself."""
        if is_something_under_way:
            return "messages are left that nobody takes"
        for automaton, state in zip(self._network.automata, row, strict=False):
            node = automaton.states[state]
            if node is None:
                continue  # it is dead
            if not node.is_quiet:
                return f"nothing more happens, and {automaton.name} is not done"
            text = self._what_is_left(node)
            if text:
                return f"{automaton.name}: {text}"
        return ""

    def _what_is_left(self, node: Node) -> str:
        if isinstance(node, Coordinator):
            return "; ".join(node.problems(self._network.cluster.case.can_fail))
        if isinstance(node, Leader | Main):
            for space in main_of(node).spaces():
                counts = space.counts()
                if counts.free + counts.cached != counts.total:
                    return f"blocks are left: {counts}"
        return ""


def _is_kept_from_reuse(node: Node, rank_node: Node) -> str:
    """The blocks that a rank reads into."""
    main, rank = main_of(node), rank_of(rank_node)
    space = main.spaces()[rank.identity.cp_rank if len(main.spaces()) > 1 else 0]
    for reading in rank.reads.values():
        spans = [(run.target_offset, run.num_bytes) for run in reading.runs]
        text = _are_moving(space, blocks_of(rank.memory.layout, spans))
        if text:
            return f"{rank.name} reads into {text}"
    return ""


def _is_as_the_ranks_say(node: Node, rank_node: Node) -> str:
    """Checks 3 and 4."""
    main, rank = main_of(node), rank_of(rank_node)
    incoming, outgoing = rank.node.target._handoffs, rank.node.source._handoffs
    for key in main.computed_with():
        if key in incoming:
            return f"{key} is computed with, and {rank.name} does not hold all of it"
    for key in (*incoming, *outgoing):
        if not main.holds(key):
            return f"nothing is held for {key}, of which {rank.name} has an open hand-off"
    return ""


def _is_kept_for_readers(life: Life) -> Check:
    """The blocks of a pool that a rank of another one reads from."""

    def check(node: Node, reader_node: Node) -> str:
        main, reader = main_of(node), rank_of(reader_node)
        for reading in reader.reads.values():
            if reading.incarnation not in life.ranks:
                continue
            spans = [(run.source_offset, run.num_bytes) for run in reading.runs]
            endpoint = _endpoint(reader, reading.incarnation)
            if endpoint is None:
                continue
            space = main.spaces()[endpoint.cp_rank if len(main.spaces()) > 1 else 0]
            text = _are_moving(space, blocks_of(endpoint.layout, spans))
            if text:
                return f"{reader.name} reads from {reading.incarnation}, from {text}"
        return ""

    return check


def _endpoint(reader: Rank, incarnation: str) -> RankEndpoint | None:
    endpoints = (rank for pool in reader.node.around.pools.values() for rank in pool.ranks)
    return next((rank for rank in endpoints if rank.incarnation == incarnation), None)


def _are_moving(space: BlockPool, blocks: set[int]) -> str:
    for block_id in blocks:
        state = space.state(block_id)
        if state not in MOVING:
            return f"block {block_id} that is {state.value}"
    return ""


def _accepted(space: BlockPool, block_id: int) -> str:
    """What a block should have refused."""
    now = space._blocks[block_id].generation
    ways = {
        BlockEvent.SHARE: space.share,
        BlockEvent.RELEASE: space.release,
        BlockEvent.BEGIN_TRANSFER: space.begin_transfer,
        BlockEvent.END_TRANSFER: space.end_transfer,
    }
    state = space.state(block_id)
    for event, apply in ways.items():
        for generation in (now - 1, now, now + 1):
            if generation == now and (state, event) in TABLE:
                continue
            with contextlib.suppress(IllegalTransition, StaleError):
                apply([BlockRef(block_id, generation)])
                return f"{event.value} of block {block_id}/{generation} that is {state.value}/{now}"
    return ""
