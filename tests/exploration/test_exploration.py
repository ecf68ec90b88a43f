"""Every order of events of a few small clusters, and that the search for them misses nothing."""

import functools
from collections import Counter, deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import decode.states
from decode.states import SequenceEvent
from kvtransfer.handoff.source import SourceHandoff
from prefill.scheduler import PrefillScheduler
from tests.exploration.automata import Network
from tests.exploration.callers import Calls
from tests.exploration.cases import SILENT, Named, cases
from tests.exploration.clusters import Case, Cluster
from tests.exploration.inputs import DONE, ReadEnds
from tests.exploration.leaders import Leader, rank_of
from tests.exploration.ranks import Rank
from tests.exploration.search import Found, Search
from tests.exploration.snapshots import clone, freeze
from tests.exploration.tables import Digests, PairTable, Visited

ALL = cases(3, 3, 4)
QUICK = [named for named in ALL if named.is_quick]
SPREAD = np.uint64(0x9E3779B97F4A7C15)
THOROUGH = [named for named in ALL if not named.is_quick]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


@functools.cache
def searched(named: Named) -> tuple[Search, Found]:
    """Each is explored once, whatever is asked of it."""
    search = Search(named.case)
    return search, search.run()


def assert_right(found: Found) -> None:
    assert not found.problem, "\n".join((found.problem, *found.trace))
    assert found.is_complete and found.num_ends and found.num_steps > found.num_states


@pytest.mark.parametrize("named", QUICK, ids=[named.name for named in QUICK])
def test_every_order_of_events(named: Named) -> None:
    assert_right(searched(named)[1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("named", THOROUGH, ids=[named.name for named in THOROUGH])
def test_every_order_of_many_events(named: Named) -> None:
    assert_right(Search(named.case).run())


# -- the search itself -----------------------------------------------------------------------------


def in_the_plain_way(case: Case) -> tuple[int, int]:
    """States and steps of a case, by a search that copies the whole cluster for each step."""
    cluster = Cluster(case)
    Network(cluster).started()
    links: dict[tuple[str, str], deque[Any]] = {link: deque() for link in cluster.links()}
    todo = deque([(cluster.nodes, links)])
    seen = {freeze(todo[0])}
    num_steps = 0
    while todo:
        for nodes, left in _every_step(cluster, *todo.popleft()):
            num_steps += 1
            frozen = freeze((nodes, left))
            if frozen not in seen:
                seen.add(frozen)
                todo.append((nodes, left))
    return len(seen), num_steps


def _every_step(cluster: Cluster, nodes: Any, links: Any) -> Any:
    for sender, receiver in [link for link, messages in links.items() if messages]:
        copies, left = clone((nodes, links))
        node = copies[cluster.node_of[receiver]]
        node.receive(sender, left[sender, receiver].popleft())
        yield copies, _said(node, left)
    for name, node in nodes.items():
        for option in node.options():
            found = None
            if isinstance(option, ReadEnds) and option.how != DONE:
                continue  # the case is without failures
            copies, left = clone((nodes, links))
            if isinstance(option, ReadEnds):
                source = copies[cluster.node_of[option.incarnation]]
                found = rank_of(source).memory.source_bytes(option.runs)
            copies[name].take(option, found)
            yield copies, _said(copies[name], left)


def _said(node: Any, links: Any) -> Any:
    for sender, receiver, message in node.outbox:
        links[sender, receiver].append(message)
    node.outbox.clear()
    return links


@pytest.mark.parametrize(
    "case",
    [
        Case(calls=Calls(max_tokens=1), setting=SILENT),
        Case(calls=Calls(max_tokens=1, may_leave=False), setting=SILENT, queues=True),
    ],
)
def test_it_finds_as_many_states_as_a_search_without_tables(case: Case) -> None:
    case = replace(case, reduces_order=False)
    found = Search(case).run()
    assert (found.num_states, found.num_steps) == in_the_plain_way(case)


def test_what_is_done_at_once_hides_no_end() -> None:
    named = next(named for named in QUICK if named.name == "2 ranks to 2")
    slow = Search(replace(named.case, reduces_order=False)).run()
    quick = searched(named)[1]
    assert slow.is_complete and quick.is_complete
    assert quick.num_states < slow.num_states and quick.num_ends == slow.num_ends


def test_a_search_that_gives_up_says_so() -> None:
    found = Search(Case(), max_states=100).run()
    assert not found.is_complete and not found.problem and found.num_states > 100


def test_what_is_wrong_is_told_in_the_fewest_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that closes without waiting for its readers."""
    monkeypatch.setattr(SourceHandoff, "is_read", property(lambda _: True))
    found = Search(Case(setting=SILENT)).run()
    assert not found.is_complete
    assert found.problem == "decode/0 reads from prefill/0, from block 0 that is free"
    assert found.trace == (
        "a caller comes",
        "decode/0 takes from coordinator: Reserve r0 1",
        "coordinator takes from decode/0: Ticket r0 1",
        "prefill/0 takes from coordinator: Prefill r0 1",
        "prefill/0: StepEnds",
        "decode/0 takes from prefill/0: Announce r0 1 "
        "SegmentKey(source_rank=0, chunk=1, layer_start=0, layer_end=1)",
    )


def test_an_end_that_is_none_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill pool that never says that it holds nothing."""
    monkeypatch.setattr(PrefillScheduler, "on_event", lambda *_: None)
    found = Search(Case()).run()
    assert found.problem == "nothing more happens, and coordinator is not done"
    assert found.trace[-1] == "prefill/0 takes from coordinator: Prefill r0 1"


def test_a_step_that_is_refused_is_wrong(remove_way: Any) -> None:
    remove_way(decode.states.TABLE, (decode.states.SequenceState.RESERVED, SequenceEvent.CLOSE))
    found = Search(Case()).run()
    assert found.problem == "IllegalTransition: r0: close while reserved"
    assert found.trace[-1] == "decode/0 takes from coordinator: Abort r0 1"


def test_all_kinds_of_messages_and_faults_occur() -> None:
    names: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    for named in QUICK:
        search, _ = searched(named)
        names.update(type(message).__name__ for message in search._network.messages)
        for automaton in search._network.automata:
            for node in automaton.states[1:]:
                if isinstance(node, Leader | Rank):
                    counted.update(rank_of(node).node.counters.keys())
    assert {"Announce", "ReadDone", "Confirm", "Commit", "ReadsEnded", "Died", "Abort"} <= set(
        names
    )
    assert {"OpenTarget", "TargetOpened", "TargetReady", "SourceDone", "Close"} <= set(names)
    assert {"handoffs_broken", "reads_landed_late", "leases_expired"} <= set(counted)


def test_a_pair_table_asks_once_for_each_pair() -> None:
    asked: list[tuple[int, int]] = []

    def find(first: int, second: int) -> int:
        asked.append((first, second))
        return 1000 * first + second

    table = PairTable(find)
    random = np.random.default_rng(1)
    for _ in range(3):
        first = random.integers(0, 200, 5000, np.int32)
        second = random.integers(0, 90, 5000, np.int32)
        assert (table.of(first, second) == 1000 * first + second).all()
    assert len(asked) == len(set(asked))


def test_the_visited_know_what_is_new() -> None:
    visited, known = Visited(), set[int]()
    random = np.random.default_rng(2)
    for _ in range(60):
        digests = random.integers(0, 1 << 18, 4000, np.uint64) * SPREAD
        new = visited.add(digests)
        expected = set(digests.tolist()) - known
        assert len(new) == len(expected) and set(digests[new].tolist()) == expected
        known |= expected
        assert len(visited) == len(known)


def test_rows_that_differ_have_other_digests() -> None:
    digests = Digests(3)
    rows = np.stack(np.meshgrid(*[np.arange(60, dtype=np.int32)] * 3), axis=-1).reshape(-1, 3)
    assert len(np.unique(digests.of(rows))) == len(rows)
