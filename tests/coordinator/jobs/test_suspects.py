"""What ends the process is set aside, what was only there is not, and the process lives on."""

import asyncio
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.config import CoordinatorConfig, ExpectedPool, JobLimits
from coordinator.jobs.engine import suspects
from coordinator.jobs.engine.database import Database
from coordinator.jobs.engine.gate import Budget, Gate
from coordinator.jobs.engine.marks import Marks
from coordinator.jobs.engine.suspects import Name, Suspect, Work
from coordinator.jobs.schema import prepare
from protocol.errors import ConfigError, RequestError

BOOT, DOCUMENT = "boot", "document"


def test_what_died_alone_twice_is_set_aside() -> None:
    work = Work(DOCUMENT, "a")
    (once,) = suspects.after_death([work], {}, 1.0, 2)
    assert (once.num_deaths, once.is_set_aside) == (1, False)
    (twice,) = suspects.after_death([work], {work.name: once}, 2.0, 2)
    assert twice == Suspect(work, 2, 1.0, 2.0, is_set_aside=True)


def test_two_that_died_together_twice_are_both_still_tried() -> None:
    works = [Work(DOCUMENT, "a"), Work(DOCUMENT, "b")]
    known: dict[Name, Suspect] = {}
    for now in (1.0, 2.0):
        known = {s.work.name: s for s in suspects.after_death(works, known, now, 2)}
    assert [s.is_set_aside for s in known.values()] == [False, False]
    (condemned,) = suspects.after_death(works[:1], known, 3.0, 2)
    assert condemned.is_set_aside


def test_a_death_further_on_is_the_first_of_another_cause() -> None:
    (early,) = suspects.after_death([Work(DOCUMENT, "a", 3)], {}, 1.0, 2)
    (late,) = suspects.after_death([Work(DOCUMENT, "a", 4)], {early.work.name: early}, 2.0, 2)
    assert (late.num_deaths, late.is_set_aside) == (1, False)
    (again,) = suspects.after_death([Work(DOCUMENT, "a", 2)], {late.work.name: late}, 3.0, 2)
    assert (again.num_deaths, again.work.position) == (2, 2)
    assert not suspects.is_cleared(late, Work(DOCUMENT, "a", 3))
    assert suspects.is_cleared(late, Work(DOCUMENT, "a", 4))


def test_work_is_held_while_it_has_cost_too_many_deaths() -> None:
    assert suspects.held_until([10.0, 20.0], 3, 600.0) == 0.0
    assert suspects.held_until([10.0, 20.0, 30.0], 3, 600.0) == 610.0
    assert suspects.held_until([10.0, 20.0, 30.0, 40.0], 3, 600.0) == 620.0
    assert suspects.held_until([10.0] * 9, 0, 600.0) == 0.0


def test_marks_outlive_the_process_but_not_the_machine(tmp_path: Path) -> None:
    dead = Marks(tmp_path, BOOT)
    slots = [dead.put(Work(DOCUMENT, name, 7)) for name in "abc"]
    dead.take(slots[1])
    dead.put(Work(DOCUMENT, "d"))
    Marks(tmp_path, "an earlier boot").put(Work(DOCUMENT, "e"))
    orderly = Marks(tmp_path, BOOT)
    orderly.put(Work(DOCUMENT, "f"))
    orderly.close()
    torn = tmp_path / "torn.marks"
    torn.write_bytes(b'"boot"')
    alive = Marks(tmp_path, BOOT)
    alive.put(Work(DOCUMENT, "g"))
    found = {work.key: work.position for life in alive.earlier() for work in life.on_board}
    assert found == {"a": 7, "c": 7, "d": 0}
    for life in list(alive.earlier()):
        alive.forget(life)
    assert list(alive.earlier()) == []


class Died(Exception):
    """With the process."""


class Cluster:
    """Lives of a process on one folder: documents are worked on until all are done or set aside.

    Args:
        folder: what outlives each life.
        poison: the step at which a document ends the process.
        num_steps: of each document.
        budget: of the gate.
    """

    def __init__(
        self, folder: Path, poison: dict[str, int], num_steps: dict[str, int], budget: Budget
    ) -> None:
        self.folder = folder
        self.poison = poison
        self.num_steps = num_steps
        self.budget = budget
        self.done: Counter[str] = Counter()  # steps
        self.deaths: list[float] = []
        self.now = 0.0
        self.is_dead = False

    @contextmanager
    def life(self) -> Iterator[Gate]:
        database = Database(self.folder / "jobs.sqlite", prepare)
        marks = Marks(self.folder / "marks", BOOT)
        gate = Gate(database, marks, self.budget, lambda: self.now)
        try:
            yield gate
        finally:
            gate.close()
            database.close()

    def kill(self) -> None:
        """What is on the disk at this moment is what the next life finds; nothing more happens."""
        self.is_dead = True
        self.deaths.append(self.now)
        shutil.copytree(self.folder / "marks", self.folder / "at-death", dirs_exist_ok=True)

    def run(self, num_at_once: int) -> set[str]:
        """Until nothing is left; what is set aside then."""
        while True:
            self.now += 1.0
            self.is_dead = False
            with self.life() as gate:
                aside = asyncio.run(self._live(gate, num_at_once))
            if not self.is_dead:
                return aside
            shutil.rmtree(self.folder / "marks")
            (self.folder / "at-death").rename(self.folder / "marks")

    async def _live(self, gate: Gate, num_at_once: int) -> set[str]:
        await gate.recover()
        if gate.held_s:
            self.now += gate.held_s
        slots = asyncio.Semaphore(num_at_once)
        tasks = [asyncio.create_task(self._document(gate, slots, name)) for name in self.num_steps]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return set(gate.set_aside(DOCUMENT))

    async def _document(self, gate: Gate, slots: asyncio.Semaphore, name: str) -> None:
        async with slots:
            while (step := self.done[name]) < self.num_steps[name]:
                try:
                    async with gate.work(Work(DOCUMENT, name, step)):
                        await asyncio.sleep(0)
                        if self.poison.get(name) == step and not self.is_dead:
                            self.kill()
                        if self.is_dead:
                            raise Died
                except RequestError as error:
                    assert error.code == "set_aside"
                    return
                self.done[name] += 1


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    num_steps=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 3), min_size=1),
    data=st.data(),
)
def test_the_poisonous_is_set_aside_and_all_else_is_done(
    tmp_path_factory: pytest.TempPathFactory, num_steps: dict[str, int], data: st.DataObject
) -> None:
    poison = data.draw(
        st.dictionaries(st.sampled_from(sorted(num_steps)), st.integers(0, 2), max_size=4)
    )
    poison = {name: step for name, step in poison.items() if step < num_steps[name]}
    budget = Budget(2, 3, 600.0)
    cluster = Cluster(tmp_path_factory.mktemp("lives"), poison, num_steps, budget)
    aside = cluster.run(data.draw(st.integers(1, 8)))
    assert aside == poison.keys()
    for name, steps in num_steps.items():
        assert cluster.done[name] == poison.get(name, steps)
    # Each costs two deaths; and never too many in a window, whatever there is of it.
    assert len(cluster.deaths) <= 2 * len(poison)
    for first, later in zip(cluster.deaths, cluster.deaths[3:], strict=False):
        assert later - first >= budget.window_s


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"restart_budget": 2}, "jobs.max_crashes 2 and restart_budget 2"),
        ({"restart_budget": 5, "jobs": JobLimits(max_crashes=5)}, "jobs.max_crashes 5 and"),
        ({"restart_budget": 3, "poison_deaths": 4}, "poison_deaths 4 and restart_budget 3"),
        ({"jobs": JobLimits(max_crashes=0)}, "jobs.max_crashes 0"),
    ],
)
def test_a_crash_budget_lies_below_the_restart_budget(fields: dict, named: str) -> None:
    pools = (ExpectedPool("decode0", "decode", 1, 1),)
    with pytest.raises(ConfigError, match=named):
        CoordinatorConfig(token="t", model="arithmetic", pools=pools, **fields)


def test_budgets_that_go_together() -> None:
    pools = (ExpectedPool("decode0", "decode", 1, 1),)
    for restart_budget in (0, 3, 5):
        CoordinatorConfig(token="t", model="arithmetic", pools=pools, restart_budget=restart_budget)
