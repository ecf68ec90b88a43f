"""kill -9 at any moment and at every place: nothing acknowledged is lost, nothing is made twice,
nothing is stuck, nothing is left over."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.faults.jobs.campaign import RANDOM, Campaign, all_places
from bench.faults.jobs.lives import Lives

ROOT = Path(__file__).resolve().parents[3]
PLACES = all_places()
NUM_SPARE = 3  # lives that may be over before they come to their place
NUM_LEAST = 10  # of the long campaign, at each place


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    with Lives(ROOT) as lives:
        yield lives


@pytest.mark.parametrize("half", [0, 1])
def test_killed_at_every_place(lives: Lives, tmp_path: Path, half: int) -> None:
    places = PLACES[half::2]
    campaign = Campaign(tmp_path, lives, seed=half)
    campaign.run(len(places) + NUM_SPARE, places, random_share=0)
    tally = campaign.tally
    assert not tally.problems
    assert set(tally.kills) == set(places), tally.missed
    assert tally.num_acknowledged >= len(places)


def test_killed_at_random_moments(lives: Lives, tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, lives, seed=5)
    campaign.run(12, [], random_share=1)
    assert not campaign.tally.problems
    assert campaign.tally.kills == {RANDOM: 12}


@pytest.mark.parametrize(
    ("killed_at", "then_full_at"),
    [
        ("jobs.commit.after.batch_closed", "lines_removed"),
        ("jobs.commit.after.line_claimed", "owner_claimed"),
        ("jobs.commit.after.document_changed", "document_changed"),
        ("jobs.commit.after.line_answered", "line_claimed"),
    ],
)
def test_a_full_disk_at_a_start_delays_it(
    lives: Lives, tmp_path: Path, killed_at: str, then_full_at: str
) -> None:
    campaign = Campaign(tmp_path, lives, seed=7)
    campaign.kill_at(killed_at)
    campaign.finish(f"jobs.commit.before.{then_full_at}:fail@1")
    assert campaign.tally.kills == {killed_at: 1}
    assert not campaign.tally.problems


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_kills(lives: Lives, tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, lives, seed=6)
    campaign.run(2 * NUM_LEAST * len(PLACES) + 100, PLACES)
    kills = campaign.tally.kills
    assert not campaign.tally.problems
    assert {place for place in PLACES if kills[place] < NUM_LEAST} == set()
    assert kills[RANDOM] >= 500
