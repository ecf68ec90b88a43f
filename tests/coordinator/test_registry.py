"""Pools come and go: every order of hellos forms the gang, every wrong hello is refused."""

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.cluster.joining import HelloRefused, JoinRequirements
from coordinator.cluster.pools import PoolState
from coordinator.cluster.registry import EPOCH_BITS, Registry, Timeouts
from coordinator.config import ExpectedPool
from modeling.checkpoint.config import load_config
from protocol.errors import PeerError
from protocol.messages import (
    PROTOCOL_VERSION,
    Alive,
    Connected,
    GangReady,
    Heartbeat,
    Introduce,
    Shutdown,
    Topology,
    Welcome,
)

POOLS = (("prefill0", "prefill", 2, 2), ("decode0", "decode", 1, 2))
CONFIG = load_config("arithmetic")
PEERS = [(pool, rank) for pool in POOLS for rank in range(pool[2] * pool[3])]


COORDINATOR = 7
FIRST_EPOCH = (COORDINATOR << EPOCH_BITS) + 1


def registry(*rejoining: str, epoch: int = COORDINATOR) -> Registry:
    return Registry(
        [ExpectedPool(*pool) for pool in POOLS],
        JoinRequirements(CONFIG.fingerprint, 16),
        coordinator_epoch=epoch,
        timeouts=Timeouts(silent_s=5.0, starting_s=20.0, step_s=30.0, rejoin_s=10.0),
        rejoining=rejoining,
    )


def name(pool: tuple[str, str, int, int], rank: int) -> str:
    return f"{pool[0]}/{rank}"


def bring_up(helpers: Any, mine: Registry, now: float = 0.0) -> None:
    for pool, rank in PEERS:
        mine.on_hello(name(pool, rank), helpers.hello(pool, rank, CONFIG), now)
    for pool, rank in PEERS:
        mine.on_gang_ready(name(pool, rank), GangReady(10.0), now)
    for pool, rank in PEERS:
        mine.on_connected(name(pool, rank), Connected(mine.version), now)


@given(seed=st.integers(0, 1000))
def test_any_order_forms_the_gangs(helpers: Any, seed: int) -> None:
    mine, order = registry(), PEERS[:]
    random.Random(seed).shuffle(order)
    welcomed: list[str] = []
    for pool, rank in order:
        out = mine.on_hello(name(pool, rank), helpers.hello(pool, rank, CONFIG), 0.0)
        assert len(out) in (0, pool[2] * pool[3])
        assert all(isinstance(m, Welcome) and m.pool_epoch == FIRST_EPOCH for _, m in out)
        welcomed += [peer for peer, _ in out]
    assert sorted(welcomed) == sorted(name(*peer) for peer in PEERS)
    versions: dict[str, int] = {}
    for pool, rank in order:
        for peer, message in mine.on_gang_ready(name(pool, rank), GangReady(), 0.0):
            assert isinstance(message, Topology)
            versions[peer] = message.version
    assert not mine.is_complete
    for peer, version in versions.items():
        mine.on_connected(peer, Connected(version), 0.0)
    assert mine.is_complete
    assert mine.missing() == ""
    prefill, decode = mine.serving("prefill")[0], mine.serving("decode")[0]
    assert mine.can_hand_over(prefill, decode)


def spoil_layout(hello: Any, **changes: Any) -> Any:
    layout = msgspec.structs.replace(hello.endpoint.layout, **changes)
    endpoint = msgspec.structs.replace(hello.endpoint, layout=layout)
    return msgspec.structs.replace(hello, endpoint=endpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": PROTOCOL_VERSION + 1},
        {"pool_id": "nobody"},
        {"role": "prefill"},
        {"tp_size": 4},
        {"cp_size": 2},
        {"model_fingerprint": "other"},
        {"gang": None},
    ],
)
def test_wrong_hellos(helpers: Any, changes: dict[str, Any]) -> None:
    mine = registry()
    with pytest.raises(HelloRefused):
        mine.on_hello("x", helpers.hello(POOLS[1], 0, CONFIG, **changes), 0.0)
    assert not mine.pools["decode0"].ranks


def test_wrong_layouts_and_duplicates(helpers: Any) -> None:
    mine = registry()
    good = helpers.hello(POOLS[1], 0, CONFIG)
    for changes in ({"block_size": 32}, {"tp_rank": 1}):
        with pytest.raises(HelloRefused):
            mine.on_hello("x", spoil_layout(good, **changes), 0.0)
    mine.on_hello("x", good, 0.0)
    assert mine.on_hello("x", good, 0.0) == []
    with pytest.raises(HelloRefused):
        mine.on_hello("y", helpers.hello(POOLS[1], 0, CONFIG, incarnation="other"), 0.0)
    second = helpers.hello(POOLS[1], 1, CONFIG)
    with pytest.raises(HelloRefused):
        mine.on_hello("y", spoil_layout(second, dtype="bfloat16"), 0.0)
    moved = msgspec.structs.replace(second.endpoint, rank=2)
    with pytest.raises(HelloRefused):
        mine.on_hello("y", msgspec.structs.replace(second, endpoint=moved), 0.0)


def test_a_silent_rank_loses_its_pool_and_no_other(helpers: Any) -> None:
    mine = registry()
    bring_up(helpers, mine)
    beats = [peer for peer in PEERS if peer != (POOLS[0], 3)]
    for now in range(1, 6):
        for pool, rank in beats:
            mine.on_heartbeat(name(pool, rank), Heartbeat(1, 0.0), float(now))
        assert mine.expire(float(now)) == []
    mine.on_heartbeat("decode0/0", Heartbeat(1, 0.0), 5.5)
    ((pool_id, reason, is_over),) = mine.expire(5.5)
    assert (pool_id, is_over) == ("prefill0", False)
    assert "rank 3" in reason
    out = mine.lose(pool_id, reason)
    assert sorted(p for p, m in out if isinstance(m, Shutdown)) == [
        name(POOLS[0], rank) for rank in range(4)
    ]
    topologies = [m for _, m in out if isinstance(m, Topology)]
    assert len(topologies) == 2
    assert [pool.pool_id for pool in topologies[0].pools] == ["decode0"]
    assert mine.lose(pool_id, reason) == []
    assert mine.pools["prefill0"].state is PoolState.LOST
    assert not mine.is_complete
    assert mine.serving("prefill") == []
    with pytest.raises(PeerError):
        mine.on_heartbeat("prefill0/0", Heartbeat(1, 0.0), 6.0)


def test_a_lost_pool_may_come_back_at_a_higher_epoch(helpers: Any) -> None:
    mine = registry()
    bring_up(helpers, mine)
    mine.lose("decode0", "test")
    out: list[Any] = []
    for rank in range(2):
        again = helpers.hello(POOLS[1], rank, CONFIG, incarnation=f"new{rank}")
        out += mine.on_hello(f"new/{rank}", again, 9.0)
    assert [message.pool_epoch for _, message in out] == [FIRST_EPOCH + 1] * 2


def test_our_own_pause_is_nobodys_death(helpers: Any) -> None:
    mine = registry()
    bring_up(helpers, mine)
    assert mine.expire(1.0) == []
    assert mine.expire(60.0) == []
    assert [loss.pool_id for loss in mine.expire(62.0)] == []
    assert {loss.pool_id for loss in (*mine.expire(64.4), *mine.expire(66.5))} == {
        "prefill0",
        "decode0",
    }


def test_the_shortest_context_counts(helpers: Any) -> None:
    mine = registry()
    mine.on_hello("x", helpers.hello(POOLS[1], 0, CONFIG, max_model_len=100), 0.0)
    assert mine.max_model_len(4096) == 100
    assert mine.max_model_len(64) == 64


def test_no_more_is_promised_than_one_request_can_have_in_every_pool(helpers: Any) -> None:
    mine = registry()
    for number, pool in enumerate(POOLS):
        for rank in range(pool[2] * pool[3]):
            welcomes = mine.on_hello(
                f"{number}/{rank}",
                helpers.hello(pool, rank, CONFIG, num_blocks=20 + 7 * number + rank),
                0.0,
            )
        assert {message.num_blocks for _, message in welcomes} == {20 + 7 * number}, "the least"
    block_size = mine.pools[POOLS[0][0]].ranks[0].hello.endpoint.layout.block_size
    room = [(20 + 7 * n) * pool[2] * block_size for n, pool in enumerate(POOLS)]
    assert mine.max_model_len(100_000) == min(room) + 1, "the last token needs no slot"


def test_what_was_lost_stays_lost(helpers: Any) -> None:
    """A rank that was stopped when its gang was given up says HELLO too late."""
    mine = registry()
    bring_up(helpers, mine)
    mine.lose("decode0", "a rank was silent")
    with pytest.raises(HelloRefused, match="a rank was silent"):
        mine.on_hello("late", helpers.hello(POOLS[1], 0, CONFIG), 1.0)
    again = helpers.hello(POOLS[1], 0, CONFIG, incarnation="new", gang_start=2)
    mine.on_hello("new", again, 1.0)
    with pytest.raises(HelloRefused):
        mine.on_hello("x", helpers.hello(POOLS[1], 1, CONFIG, incarnation="o", gang_start=1), 1.0)


def test_the_launchers_next_gang_replaces_one_that_nobody_missed(helpers: Any) -> None:
    mine = registry()
    bring_up(helpers, mine)
    again = helpers.hello(POOLS[1], 1, CONFIG, incarnation="new", gang_start=2)
    displaced = mine.displaces("new", again)
    assert displaced is not None
    assert displaced.is_over
    with pytest.raises(HelloRefused):
        mine.on_hello("new", again, 1.0)
    out = mine.lose("decode0", displaced.reason)
    assert {type(message) for _, message in out} == {Shutdown, Topology}
    assert mine.displaces("new", again) is None
    mine.on_hello("new", again, 1.0)
    assert mine.pools["decode0"].gang_start == 2


def rejoin(helpers: Any, mine: Registry, number: int, now: float = 1.0) -> list[Any]:
    """Every rank of decode0 says HELLO on another line; what is sent."""
    out: list[Any] = []
    for rank in range(2):
        peer = f"{name(POOLS[1], rank)}+{number}"
        hello = helpers.hello(POOLS[1], rank, CONFIG, coordinator_epoch=COORDINATOR)
        displaced = mine.displaces(peer, hello)
        if displaced is not None:
            assert not displaced.is_over
            out += mine.lose("decode0", displaced.reason, is_over=False)
        out += mine.on_hello(peer, hello, now)
    for rank in range(2):
        out += mine.on_gang_ready(f"{name(POOLS[1], rank)}+{number}", GangReady(), now)
    return out


def test_a_gang_that_gave_us_up_comes_back_as_it_is(helpers: Any) -> None:
    """It is lost once, for all its ranks, without being ended; the others stay connected to it."""
    mine = registry()
    bring_up(helpers, mine)
    before = mine.version
    out = rejoin(helpers, mine, 1)
    assert sorted(peer for peer, m in out if isinstance(m, Introduce)) == ["decode0/0", "decode0/1"]
    assert not [m for _, m in out if isinstance(m, Shutdown)]
    welcomes = [m for _, m in out if isinstance(m, Welcome)]
    assert [m.pool_epoch for m in welcomes] == [FIRST_EPOCH + 1] * 2
    topologies = [m for _, m in out if isinstance(m, Topology)]
    assert {m.version for m in topologies} == {before + 1}, "not one without it in between"
    assert all(len(m.pools) == 2 for m in topologies)
    with pytest.raises(PeerError):
        mine.on_heartbeat("decode0/0", Heartbeat(1, 0.0), 1.0)
    assert {peer for peer, _ in mine.beat()} >= {"decode0/0+1", "decode0/1+1"}
    assert [m for _, m in mine.beat()] == [Alive(COORDINATOR)] * 6


def test_the_others_go_on_without_a_gang_that_does_not_come_back_soon(helpers: Any) -> None:
    mine = registry()
    bring_up(helpers, mine)
    assert mine.lose("decode0", "it had given us up", is_over=False)
    losses, sent = [], []
    for tenth in range(0, 150, 3):
        now = tenth / 10
        for rank in range(4):
            mine.on_heartbeat(name(POOLS[0], rank), Heartbeat(1, 0.0), now)
        losses += [(now, *loss) for loss in mine.expire(now)]
        sent += [(now, m) for _, m in mine.due() if isinstance(m, Topology)]
        for loss in [loss for loss in losses if loss[0] == now]:
            mine.lose("decode0", loss[2], is_over=loss[3])
    assert 2.9 < sent[0][0] < 3.5
    assert [pool.pool_id for pool in sent[0][1].pools] == ["prefill0"]
    ((when, *loss),) = losses
    assert loss == ["decode0", "it did not come back within 10 s", True]
    assert 9.9 < when < 10.7


def test_a_new_coordinator_waits_for_gangs_that_run(helpers: Any) -> None:
    """Epochs are higher than all of its predecessor's, and the topology is sent once."""
    old, mine = registry(), registry("prefill0", "decode0", epoch=COORDINATOR + 1)
    for _ in range(100):
        old.lose("decode0", "x")
        old.pools["decode0"].is_awaited = True
    mine.expire(0.0)
    out: list[Any] = []
    for pool, rank in PEERS:
        hello = helpers.hello(pool, rank, CONFIG, coordinator_epoch=COORDINATOR)
        out += mine.on_hello(name(pool, rank), hello, 1.0)
    assert all(m.pool_epoch > old.pools["decode0"].epoch for _, m in out)
    for pool, rank in PEERS:
        out += mine.on_gang_ready(name(pool, rank), GangReady(), 1.0)
    assert {m.version for _, m in out if isinstance(m, Topology)} == {1}
    # A gang that was started meanwhile is no running one: it has the time that a start takes.
    mine = registry("prefill0", "decode0", epoch=COORDINATOR + 1)
    mine.expire(0.0)
    new = helpers.hello(POOLS[1], 0, CONFIG, incarnation="new", gang_start=2)
    mine.on_hello("new", new, 5.0)
    for tenth in range(3, 150, 3):
        lost = mine.expire(tenth / 10)
        assert "decode0" not in [loss.pool_id for loss in lost]


def test_a_step_that_takes_too_long(helpers: Any) -> None:
    mine = registry()
    bring_up(helpers, mine)
    mine.on_heartbeat("prefill0/2", Heartbeat(1, 29.0), 1.0)
    assert mine.expire(1.0) == []
    mine.on_heartbeat("prefill0/0", Heartbeat(1, 30.5), 1.5)
    mine.on_heartbeat("prefill0/2", Heartbeat(1, 31.0), 1.5)
    assert mine.expire(1.5) == [("prefill0", "rank 2 has been in one step for 31.0 s", True)]


def test_a_rank_that_is_silent_while_it_starts(helpers: Any) -> None:
    mine = registry()
    mine.on_hello("x", helpers.hello(POOLS[1], 0, CONFIG), 0.0)
    lost = [mine.expire(tenth / 10) for tenth in range(0, 250, 3)]
    assert not any(lost[:60])
    assert lost[-1][0][0] == "decode0"


def test_a_gang_that_was_cut_off_comes_back_as_it_is(helpers: Any) -> None:
    """The others go on without it at once; its ranks, model and cache stay, under a new epoch."""
    mine = registry()
    bring_up(helpers, mine)
    gang_start = mine.pools["decode0"].gang_start
    mine.expire(0.0)
    out = mine.lose("decode0", "rank 1 was silent", is_over=False, holds_others=False)
    assert not [m for _, m in out if isinstance(m, Shutdown)]
    assert {m.coordinator_epoch for _, m in out if isinstance(m, Introduce)} == {COORDINATOR}
    topologies = [m for _, m in out if isinstance(m, Topology)]
    assert [[pool.pool_id for pool in m.pools] for m in topologies] == [["prefill0"]] * 4
    for pool, rank in PEERS[4:]:
        again = helpers.hello(pool, rank, CONFIG, coordinator_epoch=COORDINATOR)
        assert mine.displaces(f"{name(pool, rank)}+1", again) is None
        out = mine.on_hello(f"{name(pool, rank)}+1", again, 8.0)
    assert [m.pool_epoch for _, m in out] == [FIRST_EPOCH + 1] * 2
    for pool, rank in PEERS[4:]:
        out = mine.on_gang_ready(f"{name(pool, rank)}+1", GangReady(), 8.0)
    assert [pool.pool_id for pool in out[0][1].pools] == ["prefill0", "decode0"]
    assert mine.pools["decode0"].gang_start == gang_start
    assert not [loss for loss in mine.expire(8.1) if loss.pool_id == "decode0"]


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_gang_of_which_one_rank_stays_silent_must_end_after_the_grace(
    helpers: Any, is_stopped: bool
) -> None:
    mine = registry()
    bring_up(helpers, mine)
    mine.expire(0.0)
    mine.lose("decode0", "rank 1 was silent", is_over=False, holds_others=False)
    if not is_stopped:  # the other one says HELLO, and waits
        again = helpers.hello(POOLS[1], 0, CONFIG, coordinator_epoch=COORDINATOR)
        mine.on_hello("decode0/0+1", again, 1.0)
    losses = []
    for tenth in range(3, 120, 3):
        for peer in (*(name(POOLS[0], rank) for rank in range(4)), "decode0/0+1"):
            if mine.pool_of(peer):
                mine.on_heartbeat(peer, Heartbeat(1, 0.0), tenth / 10)
        losses += [(tenth / 10, loss) for loss in mine.expire(tenth / 10)]
        if losses:
            break
    ((when, loss),) = losses
    assert (loss.pool_id, loss.is_over) == ("decode0", True) and 9.9 < when < 10.9
    out = mine.lose(*loss[:2])
    assert [isinstance(m, Shutdown) for _, m in out] == [True] * (not is_stopped)


@pytest.mark.parametrize("who", [("prefill0", 3, "decode0"), ("decode0", 1, "prefill0")])
def test_pools_of_which_one_rank_misses_the_other_do_not_hand_over(
    helpers: Any, who: tuple[str, int, str]
) -> None:
    mine = registry()
    bring_up(helpers, mine)
    prefill, decode = mine.pools["prefill0"], mine.pools["decode0"]
    pool_id, rank, missed = who
    assert mine.can_hand_over(prefill, decode)
    mine.on_heartbeat(f"{pool_id}/{rank}", Heartbeat(1, 0.0, cut_off=(missed,)), 1.0)
    assert not mine.can_hand_over(prefill, decode)
    assert prefill.is_serving and decode.is_serving
    mine.on_heartbeat(f"{pool_id}/{rank}", Heartbeat(2, 0.0), 2.0)
    assert mine.can_hand_over(prefill, decode)
