"""What becomes of gangs: every way down, and the way back up."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.supervise.gangs import (
    COORDINATOR,
    GRACE_S,
    Action,
    End,
    Fail,
    Gangs,
    Kill,
    Look,
    Phase,
    RestartTimeouts,
    Say,
    Start,
)
from launcher.supervise.restarts import RestartBudget, RestartPolicy
from launcher.supervise.silence import LOOK_AFTER_S, LOOK_INTERVAL_S, WORK_SHARE, Silence, Vitals
from protocol.errors import ConfigError

POOLS = (("prefill0", "prefill", 2), ("decode0", "decode", 2), ("decode1", "decode", 1))
POLICY = RestartPolicy(max_restarts=2, window_s=100.0, backoff_s=1.0)
WAITS = RestartTimeouts(
    start_s=60.0, coordinator_start_s=30.0, coordinator_silent_s=5.0, coordinator_stall_s=60.0
)
IDLE = Vitals(cpu_s=1.0, is_running=False)


def gangs(policy: RestartPolicy = POLICY) -> Gangs:
    mine = Gangs(POOLS, policy, WAITS, 0.0)
    mine.on_alive(1, 1e9)  # these tests have no coordinator that speaks, but for its own
    return mine


def told(actions: list[Action]) -> list[Action]:
    """Without what is only said."""
    return [action for action in actions if not isinstance(action, Say)]


def test_a_gang_that_loses_a_rank_comes_back() -> None:
    mine = gangs()
    assert told(mine.on_exit("decode0", 1, 1, "decode0/1 ended with code -9", 10.0)) == [
        End("decode0")
    ]
    assert "decode0" not in mine.serving_pools
    assert told(mine.tick(10.0 + GRACE_S)) == [Kill("decode0")]
    assert told(mine.tick(10.0 + 2 * GRACE_S)) == [Kill("decode0")], "until it is gone"
    (said,) = mine.on_exit("decode0", 0, 1, "killed", 11.5)
    assert isinstance(said, Say)
    assert told(mine.tick(12.0)) == []
    assert mine.wait_s(12.0) == pytest.approx(0.5)
    assert mine.tick(12.5) == [Start("decode0", 2)]
    assert mine.on_serving("decode0", 1, 13.0) == [], "an old start's line"
    (said,) = mine.on_serving("decode0", 2, 14.0)
    assert said == Say("decode0 is serving again after 4.0 s")
    assert mine.serving_pools == ["prefill0", "decode0", "decode1"]


def test_one_loss_told_by_many() -> None:
    """The coordinator, and the exit of every rank, tell of the same loss."""
    mine = gangs()
    first = mine.on_lost("prefill0", 1, "rank 1 was silent for 4.0 s", 10.0)
    assert first == [Say("prefill0 is lost: rank 1 was silent for 4.0 s"), End("prefill0")]
    assert mine.on_lost("prefill0", 1, "again", 10.1) == []
    assert mine.on_exit("prefill0", 0, 1, "code 0", 10.2) == []
    assert told(mine.on_exit("prefill0", 1, 1, "code -9", 10.3)) == []
    assert mine.tick(11.4) == [Start("prefill0", 2)]
    assert mine.on_lost("prefill0", 1, "late news of the old gang", 11.5) == []
    assert mine.on_lost("prefill0", 0, "one never seen", 11.5) == [], "it is only starting"
    assert mine.on_exit("prefill0", 0, 1, "late", 11.6) == []
    assert mine.phase("prefill0") is Phase.STARTING


def test_a_gang_that_a_new_coordinator_never_saw() -> None:
    mine = gangs()
    assert told(mine.on_lost("decode1", 0, "it did not come back", 10.0)) == [End("decode1")]


def test_a_start_that_takes_too_long_or_fails_counts() -> None:
    mine = gangs()
    mine.on_exit("decode1", 0, 1, "dead", 1.0)
    assert told(mine.tick(2.0)) == [Start("decode1", 2)]
    for second in range(3, 62):
        assert mine.tick(float(second)) == []
    assert told(mine.tick(62.0)) == [End("decode1")]
    assert told(mine.on_exit("decode1", 0, 2, "killed", 62.1)) == []
    mine = gangs()
    mine.on_exit("decode1", 0, 1, "dead", 1.0)
    mine.tick(2.0)
    assert mine.on_start_failed("decode1", 1, "late news", 2.4) == []
    assert told(mine.on_start_failed("decode1", 2, "no room", 2.5)) == []
    assert mine.phase("decode1") is Phase.WAITING


def test_a_gang_that_is_ended_before_it_was_started_has_nobody_left_to_exit() -> None:
    mine = gangs()
    mine.on_exit("decode1", 0, 1, "dead", 1.0)
    mine.tick(2.0)
    assert told(mine.on_lost("decode1", 2, "it did not come up", 3.0)) == [End("decode1")]
    assert mine.phase("decode1") is Phase.ENDING
    assert told(mine.on_start_failed("decode1", 2, "it was ended before", 3.1)) == []
    assert mine.phase("decode1") is Phase.WAITING


def lose_for_good(mine: Gangs, name: str, now: float) -> tuple[list[Action], float]:
    """Kill every rank of a gang until nothing starts it any more."""
    size = {pool: size for pool, _, size in POOLS}.get(name, 1)
    start, actions = 1, []
    while mine.phase(name) is not Phase.GIVEN_UP:
        for rank in range(size):
            actions = mine.on_exit(name, rank, start, "dead", now)
        while mine.phase(name) is Phase.WAITING:
            now += 0.5
            if mine.tick(now):
                start += 1
    return actions, now


def test_the_cluster_goes_on_while_one_decode_pool_can_serve() -> None:
    mine = gangs()
    actions, now = lose_for_good(mine, "prefill0", 1.0)
    assert told(actions) == []
    assert "prefill0 is given up after 2 restarts within 100 s" in str(actions)
    actions, now = lose_for_good(mine, "decode1", now)
    assert told(actions) == []
    actions, _ = lose_for_good(mine, "decode0", now)
    (failed,) = told(actions)
    assert isinstance(failed, Fail)
    assert "decode0 is given up" in failed.reason


def test_a_coordinator_that_dies_or_is_silent() -> None:
    mine = Gangs(POOLS, POLICY, WAITS, 0.0)
    for second in range(1, 9):
        mine.on_alive(1, float(second))
        assert mine.tick(float(second)) == []
    assert mine.tick(9.0) == []
    for second in range(10, 13):
        assert mine.tick(float(second)) == [Look(COORDINATOR, 1)]
        assert mine.on_vitals(1, IDLE, float(second)) == []
    assert mine.on_vitals(2, IDLE, 13.0) == [], "not this one"
    assert mine.tick(13.0) == [Look(COORDINATOR, 1)]
    assert mine.on_vitals(1, IDLE, 13.0) == [
        Say("coordinator is lost: it was silent for 5 s"),
        Kill(COORDINATOR),
    ], "without grace: if it woke up it would end the ranks"
    assert mine.on_vitals(1, IDLE, 13.0) == []
    mine.on_alive(1, 13.1)
    assert told(mine.on_exit(COORDINATOR, 0, 1, "code -9", 13.2)) == []
    assert told(mine.tick(14.2)) == [Start(COORDINATOR, 2)]
    mine.on_serving(COORDINATOR, 2, 15.0)
    assert mine.phase(COORDINATOR) is Phase.SERVING
    actions, _ = lose_for_good_coordinator(mine)
    assert isinstance(told(actions)[0], Fail)


def lose_for_good_coordinator(mine: Gangs) -> tuple[list[Action], float]:
    now, start, actions = 16.0, 2, mine.on_exit(COORDINATOR, 0, 2, "dead", 16.0)
    while mine.phase(COORDINATOR) is not Phase.GIVEN_UP:
        now += 0.5
        if told(mine.tick(now)):
            start += 1
            actions = mine.on_exit(COORDINATOR, 0, start, "dead", now)
    return actions, now


def test_our_own_pause_is_no_silence() -> None:
    mine = Gangs(POOLS, POLICY, WAITS, 0.0)
    assert mine.tick(1.0) == []
    assert mine.tick(60.0) == []
    assert mine.tick(60.6) == [Look(COORDINATOR, 1)]
    assert mine.on_vitals(1, IDLE, 60.6) == []
    mine.on_alive(1, 60.7)
    assert mine.tick(61.7) == []


def watch(silence: Silence, works: Callable[[float], Vitals], end: float) -> float | None:
    """Look when it asks to, a little late; when it was given up, or None until ``end``."""
    now = silence.look_at
    while now < end:
        if silence.look(works(now), now) is not None:
            return now
        now = silence.look_at
    return None


@given(
    share=st.floats(WORK_SHARE * 1.5, 8.0),
    silent_s=st.floats(2.0, 20.0),
    stall_s=st.floats(20.0, 100.0),
    started=st.floats(0.0, 1.0),
)
def test_a_busy_process_has_all_its_patience(
    share: float, silent_s: float, stall_s: float, started: float
) -> None:
    """Work shows as the use of a processor, whenever it is looked at; and it has an end."""
    silence = Silence(silent_s, stall_s, 0.0)
    given_up = watch(silence, lambda now: Vitals(share * max(0.0, now - started), False), 200.0)
    assert given_up == pytest.approx(stall_s)


@given(silent_s=st.floats(2.0, 20.0), stall_s=st.floats(20.0, 100.0))
def test_a_process_that_is_given_no_processor_works(silent_s: float, stall_s: float) -> None:
    silence = Silence(silent_s, stall_s, 0.0)
    assert watch(silence, lambda _: Vitals(1.0, True), 200.0) == pytest.approx(stall_s)


@given(
    silent_s=st.floats(2.0, 20.0),
    worked_s=st.floats(0.0, 40.0),
    share=st.floats(0.0, WORK_SHARE / 2),
)
def test_a_hung_process_is_given_up_when_its_work_is_over(
    silent_s: float, worked_s: float, share: float
) -> None:
    """One that has not worked since its last line, as soon as if nobody had looked."""
    silence = Silence(silent_s, 60.0, 0.0)

    def works(now: float) -> Vitals:
        return Vitals(min(now, worked_s) + share * now, is_running=now < worked_s)

    given_up = watch(silence, works, 200.0)
    assert given_up is not None
    if worked_s < min(silent_s, LOOK_AFTER_S):
        assert given_up == pytest.approx(silent_s)
    assert given_up <= worked_s + LOOK_INTERVAL_S + silent_s + 1e-6


def test_a_process_that_cannot_be_looked_at_is_only_silent() -> None:
    silence = Silence(5.0, 60.0, 0.0)
    for now in (1.5, 2.5, 3.5, 4.5):
        assert silence.look(None, now) is None
    assert silence.look(None, 5.0) == "it was silent for 5 s"


def test_the_budget_is_of_a_window() -> None:
    budget = RestartBudget(RestartPolicy(3, 10.0, 1.0, max_backoff_s=3.0))
    assert [budget.take(now) for now in (0.0, 1.0, 2.0, 3.0)] == [1.0, 2.0, 3.0, None]
    assert budget.take(10.5) == 3.0, "the first is forgotten"
    assert budget.take(100.0) == 1.0
    for bad in ({"max_restarts": -1}, {"window_s": 0.0}, {"backoff_s": -1.0}):
        with pytest.raises(ConfigError):
            RestartPolicy(**bad)


def test_once_the_cluster_ends_nothing_is_started_again() -> None:
    mine = gangs()
    mine.on_exit("decode1", 0, 1, "dead", 1.0)
    mine.close()
    assert mine.tick(2.0) == [], "it was to be"
    assert mine.on_lost("prefill0", 1, "rank 1 was silent for 4.0 s", 3.0) == [End("prefill0")]
    assert mine.tick(3.0 + GRACE_S) == [Kill("prefill0")]
    for rank in (0, 1):
        assert mine.on_exit("prefill0", rank, 1, "killed", 4.0) == []
        assert told(mine.on_exit("decode0", rank, 1, "dead", 4.0)) in ([], [End("decode0")])
    assert mine.tick(60.0) == []
    assert all(mine.phase(name) is Phase.GIVEN_UP for name, _, _ in POOLS), "nor does that fail"


def test_a_coordinator_that_hangs_while_it_ends_is_killed() -> None:
    mine = Gangs(POOLS, POLICY, WAITS, 0.0)
    mine.close()
    for second in (1.5, 2.5, 3.5, 4.5):
        assert mine.tick(second) == [Look(COORDINATOR, 1)]
        assert mine.on_vitals(1, IDLE, second) == []
    assert mine.on_vitals(1, IDLE, 5.0) == [Kill(COORDINATOR)]
    assert mine.on_exit(COORDINATOR, 0, 1, "code -9", 5.1) == []


class Processes:
    """The processes of all gangs, as the actions start and kill them."""

    def __init__(self, mine: Gangs) -> None:
        self.mine = mine
        self.now = 0.0
        self.alive = {name: (1, set(range(size))) for name, _, size in POOLS}

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Start):
                start, ranks = self.alive[action.name]
                assert not ranks, "a rank of it still runs"
                assert action.start == start + 1
                size = next(size for name, _, size in POOLS if name == action.name)
                self.alive[action.name] = (action.start, set(range(size)))
            elif isinstance(action, Kill):
                for rank in list(self.alive[action.name][1]):
                    self.exit(action.name, rank)

    def exit(self, name: str, rank: int) -> None:
        start, ranks = self.alive[name]
        ranks.discard(rank)
        self.do(self.mine.on_exit(name, rank, start, "died", self.now))

    def disturb(self, what: str, name: str, rank: int) -> None:
        start, ranks = self.alive[name]
        if what == "exit" and rank in ranks:
            self.exit(name, rank)
        elif what == "lost":
            self.do(self.mine.on_lost(name, start, "hung", self.now))
        elif what == "late":
            self.do(self.mine.on_lost(name, start - 1, "old", self.now))
        elif what == "serving":
            self.do(self.mine.on_serving(name, start, self.now))
        self.do(self.mine.tick(self.now))

    def calm_down(self) -> None:
        for _ in range(200):
            self.now += 1.0
            self.do(self.mine.tick(self.now))
            for name, (start, ranks) in self.alive.items():
                if ranks:
                    self.do(self.mine.on_serving(name, start, self.now))


@given(
    faults=st.lists(
        st.tuples(
            st.sampled_from(("exit", "lost", "late", "serving", "tick")),
            st.sampled_from([name for name, _, _ in POOLS]),
            st.integers(0, 1),
            st.sampled_from((0.1, 1.0, 5.0)),
        ),
        max_size=40,
    )
)
def test_whatever_happens_every_gang_ends_serving_or_given_up(
    faults: list[tuple[str, str, int, float]],
) -> None:
    """Random exits, losses and pauses; then peace. No gang is started while a rank of it lives."""
    mine = gangs(RestartPolicy(max_restarts=3, window_s=1e9, backoff_s=0.5))
    processes = Processes(mine)
    for what, name, rank, pause_s in faults:
        processes.now += pause_s
        processes.disturb(what, name, rank)
    processes.calm_down()
    assert all(mine.phase(name) in (Phase.SERVING, Phase.GIVEN_UP) for name, _, _ in POOLS)
