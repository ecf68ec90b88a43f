"""kill -9 at any moment and at every place: nothing acknowledged is lost, nothing is made twice,
nothing is stuck, nothing is left over."""

import json
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.config import JobLimits
from tests.campaign.jobs.campaign import RANDOM, READY_S, Campaign, all_places
from tests.campaign.jobs.lives import Lives

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
        ("jobs.commit.after.judged", "owner_claimed"),
        ("jobs.commit.after.document_changed", "document_changed"),
        ("jobs.commit.after.line_answered", "judged"),
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


def finished(lives: Lives, folder: Path, keys: list[str], poison: str) -> bool:
    """A life that is asked for documents, and then to do all that is left; whether it did."""
    lives.begin(folder, poison=poison)
    for key in keys:
        lives.ask(document=key, is_file=False)
    num_made = 0
    while (said := lives.next(READY_S)) is not None and "ended" not in said:
        num_made += "made" in said
        if num_made == len(keys):
            lives.ask(finish=True)
        if said.get("asked") == {"finish": True}:
            return True
    assert said == {"ended": -signal.SIGKILL}, lives.last_words()
    return False


def test_one_document_that_kills_each_time_is_set_aside(lives: Lives, tmp_path: Path) -> None:
    keys, poison = [str(number) for number in range(8, 16)], "12"
    num_deaths = 0
    while not finished(lives, tmp_path, keys, poison):
        num_deaths += 1
    assert num_deaths == JobLimits().max_crashes
    lives.ask(stop=True)
    assert lives.until_end(READY_S)[1]
    assert lives.code == 0
    connection = sqlite3.connect(tmp_path / "jobs.sqlite")
    try:
        found = connection.execute("SELECT body FROM job WHERE kind = 'document'").fetchall()
    finally:
        connection.close()
    rows = {row["display_name"]: row for row in (json.loads(body) for (body,) in found)}
    assert rows.pop(poison)["error"]["code"] == "set_aside"
    assert {row["state"] for row in rows.values()} == {"ready"}
    assert rows.keys() == set(keys) - {poison}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_kills(lives: Lives, tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, lives, seed=6)
    campaign.run(2 * NUM_LEAST * len(PLACES) + 100, PLACES)
    kills = campaign.tally.kills
    assert not campaign.tally.problems
    assert {place for place in PLACES if kills[place] < NUM_LEAST} == set()
    assert kills[RANDOM] >= 500
