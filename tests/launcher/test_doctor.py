"""What ``baton doctor`` says of a cluster: whether its pools serve, and whether anything leaks."""

import msgspec
import pytest

from baton_client import BlockCounts, ClusterState
from launcher.doctor.cluster_health import SETTLE_S, Finding, judge, settled_state
from launcher.doctor.doctor import doctor
from tests.coordinator.client.fake_state import cluster_state

IDLE = BlockCounts(total=100, free=70, cached=30)


def state_with(counts: BlockCounts, **changes: object) -> ClusterState:
    """The fake's cluster, whose decode pool has these blocks."""
    state = msgspec.convert(cluster_state(), ClusterState)
    prefill, decode = state.pools
    pools = [prefill, msgspec.structs.replace(decode, blocks=[counts])]
    return msgspec.structs.replace(state, **{"pools": pools, "num_active_requests": 0, **changes})


def found(state: ClusterState) -> dict[str, Finding]:
    return {finding.name: finding for finding in judge(state)}


def test_a_cluster_at_rest_is_well() -> None:
    assert [finding.line() for finding in judge(state_with(IDLE))] == [
        "  ok pools          2 of 2 pools serve",
        "  ok requests       0 active, 0 ended but still held",
        "  ok blocks         all 100 accounted for, 0 held",
    ]


@pytest.mark.parametrize("kind", ["owned", "in_flight"])
def test_blocks_that_nobody_asked_for_are_a_leak(kind: str) -> None:
    counts = msgspec.structs.replace(IDLE, free=67, **{kind: 3})
    blocks = found(state_with(counts))["blocks"]
    assert not blocks.is_well
    assert blocks.line().startswith("  NO blocks         all 100 accounted for, 3 held (with no")
    assert found(state_with(counts, num_active_requests=1))["blocks"].is_well


def test_a_block_that_is_nowhere_is_named_by_its_pool() -> None:
    blocks = found(state_with(msgspec.structs.replace(IDLE, free=69)))["blocks"]
    assert (blocks.is_well, blocks.found) == (False, "decode0 accounts for 99 of 100")


def test_an_ended_request_that_is_still_held_is_a_leak() -> None:
    assert not found(state_with(IDLE, num_leaked=1))["requests"].is_well


def test_a_lost_pool_is_named_with_its_reason() -> None:
    state = state_with(IDLE)
    lost = msgspec.structs.replace(
        state.pools[0], serving=False, state="lost", lost_reason="rank 1 was silent"
    )
    pools = found(msgspec.structs.replace(state, pools=[lost, state.pools[1]]))["pools"]
    assert (pools.is_well, pools.found) == (
        False, "1 of 2 pools serve; prefill0 is lost: rank 1 was silent",
    )  # fmt: skip


class Settling:
    """A cluster that is clean after a few looks."""

    def __init__(self, num_looks: int) -> None:
        self._num_looks = num_looks
        self.paused_s = 0.0

    def cluster(self) -> ClusterState:
        self._num_looks -= 1
        held = msgspec.structs.replace(IDLE, free=60, owned=10)
        return state_with(IDLE if self._num_looks < 0 else held)

    def pause(self, seconds: float) -> None:
        self.paused_s += seconds


@pytest.mark.parametrize(("num_looks", "is_well"), [(0, True), (3, True), (1000, False)])
def test_what_was_just_given_back_is_waited_for(num_looks: int, is_well: bool) -> None:
    cluster = Settling(num_looks)
    findings = {f.name: f for f in judge(settled_state(cluster, cluster.pause))}
    assert findings["blocks"].is_well == is_well
    assert cluster.paused_s == (SETTLE_S if not is_well else 0.5 * num_looks)


def test_a_cluster_that_is_not_there_is_said_only_if_it_was_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_URL", "http://127.0.0.1:9")
    assert doctor(as_json=False) == 0
    assert "cluster" not in capsys.readouterr().out
    assert doctor(as_json=False, url="http://127.0.0.1:9") == 1
    assert "  NO cluster        no server at http://127.0.0.1:9" in capsys.readouterr().out
