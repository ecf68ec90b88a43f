"""Kills the job engine again and again, and looks each time what it has kept.

1. A life begins on what the one before has left, and is asked for documents, batches, files,
   deletions, more than it can do in its time.
2. It is killed at a random moment, or ends at a place (``protocol.process.failpoints``): the one
   that has been met least. That it did is seen by its exit code, and by the last line it wrote.
3. When the next life has recovered, everything acknowledged must be there, and no stray file.
4. After some lives one is left alone until nothing is to be done: now everything must be done,
   once, and right. Then it goes on in another folder.
"""

import random
import shutil
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from protocol.process.crash_points import EXIT_FAILPOINT
from protocol.process.failpoints import ACTIONS, EXIT, FAIL, KINDS
from tests.campaign.jobs import checks
from tests.campaign.jobs.asked import is_shared
from tests.campaign.jobs.checks import Ledger
from tests.campaign.jobs.lives import Lives

KILLS_PER_FOLDER = 60
READY_S, REACH_S, FINISH_S = 60.0, 30.0, 60.0
SETTLE_S, STRAY_S = 0.1, 10.0
MOST_MISSES = 4
ENOUGH_PROBLEMS = 20
RANDOM_S = 0.35  # within which a random moment lies
EARLY_SHARE = 0.3  # of the random moments; these may come before the engine is ready
FULL_SHARE, FULL_CHANCE = 0.4, 0.08  # of the random lives some have a disk that is full at times
RANDOM = "a random moment"
BUG = "by a bug"  # the engine's own words
PREFIXES = ("jobs.", "pack.")
# The places that are met often in a life: it ends at any one of the first so many.
OFTEN = {
    "jobs.commit.before.document_changed": 12,
    "jobs.commit.after.document_changed": 12,
    "jobs.commit.before.line_answered": 10,
    "jobs.commit.after.line_answered": 10,
    "jobs.commit.before.batch_changed": 2,
    "jobs.commit.after.batch_changed": 2,
    "jobs.result.answered": 10,
    "jobs.segment.before": 2,
    "jobs.segment.after": 2,
    "pack.written": 2,
    "pack.synced": 2,
    "pack.renamed": 2,
}
READS_FILES = ("jobs.parse", ".source", ".text")  # these are met if a document is a file
DELETES = ("document_deleted", "pack.deleted", ".removed.t")


def all_places() -> list[str]:
    """Every place of jobs and packs, by kind where it has kinds."""
    names = [name for name in ACTIONS if name.startswith(PREFIXES)]
    return [f"{n}.{k}" for n in names for k in sorted(KINDS.get(n, ()))] + [
        name for name in names if name not in KINDS
    ]


@dataclass
class Tally:
    """What a campaign has seen."""

    kills: Counter[str] = field(default_factory=Counter)  # by place
    missed: Counter[str] = field(default_factory=Counter)  # lives that did not come to their place
    num_acknowledged: int = 0
    num_refused: int = 0  # for want of room, on purpose
    num_checks: int = 0
    problems: list[str] = field(default_factory=list)

    def count(self, what: str) -> int:
        """Problems of a kind: "lost", "duplicated", "stuck", "stray"..."""
        twice = "made twice"
        return sum(
            what in problem or (what == "duplicated" and twice in problem)
            for problem in self.problems
        )


class Campaign:
    """See the module's docstring.

    Args:
        folder: on a real disk; folders are made in it, and removed when they are right.
        lives: the process that has them.
        seed: of what is asked for, and of the moments.
    """

    def __init__(self, folder: Path, lives: Lives, seed: int) -> None:
        self.tally = Tally()
        self._parent = folder
        self._lives = lives
        self._rng = random.Random(seed)
        self._number = 0  # of the next document
        self._next_folder()

    def run(self, num_kills: int, places: Iterable[str], random_share: float = 0.5) -> None:
        """So many kills, and a last look."""
        least = {place: self._rng.random() for place in places}  # in any order, but the same
        for number in range(num_kills):
            if self._rng.random() < random_share:
                self._at_random()
            else:
                self.kill_at(self._least_seen(least))
            if len(self.tally.problems) >= ENOUGH_PROBLEMS:
                break  # each may cost a deadline
            if (number + 1) % KILLS_PER_FOLDER == 0:
                self.finish()
                self._next_folder()
                print(
                    f"{number + 1} lives, {len(self.tally.problems)} problems",
                    file=sys.stderr,
                    flush=True,
                )
        self.finish()

    def finish(self, faults: str = "") -> None:
        """A life that is not killed, until nothing is to be done; then everything is looked at.

        Args:
            faults: failpoints that it has to get over.
        """
        self._begin(faults)
        self._lives.ask(finish=True)
        deadline = time.monotonic() + FINISH_S
        while (said := self._lives.next(deadline - time.monotonic())) is not None:
            self._hear([said])
            if "ended" in said or said.get("asked") == {"finish": True}:
                break
        if said is None:
            self._problem("stuck: something is not done after all")
        self._lives.ask(stop=True)
        heard, has_ended = self._lives.until_end(READY_S)
        self._hear(heard)
        if not has_ended:
            self._problem("stuck: the engine does not stop")
            self._lives.kill()
        elif self._lives.code:
            self._problem(f"a life ended with {self._lives.code}: {self._lives.last_words()}")
        self._look_for_bugs()
        self.tally.num_checks += 1
        wrong = list(checks.ended(self._folder, self._ledger))
        for problem in wrong:
            self._problem(problem)
        self.tally.num_acknowledged += self._ledger.num_acknowledged
        if not self.tally.problems:
            shutil.rmtree(self._folder)

    # -- one life ----------------------------------------------------------------------------------

    def _at_random(self) -> None:
        faults = ""
        if self._rng.random() < FULL_SHARE:
            faults = ",".join(self._full_disk())
        is_early = self._rng.random() < EARLY_SHARE
        self._lives.begin(self._folder, faults)
        if is_early or self._is_ready():
            self._ask()
            self._hear(self._lives.until_end(self._rng.uniform(0, RANDOM_S))[0])
        self._hear(self._lives.kill())
        if self._lives.code == -9:
            self.tally.kills[RANDOM] += 1
            self._look_for_bugs()
        else:
            self._problem(f"a life ended with {self._lives.code}: {self._lives.last_words()}")

    def _look_for_bugs(self) -> None:
        """What the engine got over, and should not have met."""
        if BUG in (words := self._lives.last_words()):
            self._problem(words)

    def _full_disk(self) -> Iterator[str]:
        for name, actions in ACTIONS.items():
            if name.startswith(PREFIXES) and FAIL in actions:
                yield f"{name}:{FAIL}%{self._rng.randrange(1 << 30)}:{FULL_CHANCE}"

    def kill_at(self, place: str) -> None:
        """A life that ends at a place."""
        trigger = self._rng.randint(1, OFTEN.get(place, 1))
        self._begin(f"{place}:{EXIT}@{trigger}")
        self._ask(place)
        heard, has_ended = self._lives.until_end(REACH_S)
        self._hear(heard)
        if not has_ended:
            self._lives.kill()
        words = self._lives.last_words()
        if self._lives.code == EXIT_FAILPOINT and f"failpoint {place}: exit" in words:
            self.tally.kills[place] += 1
            return
        self.tally.missed[place] += 1
        if self._lives.code not in (0, -9, EXIT_FAILPOINT):
            self._problem(f"{place}: a life ended with {self._lives.code}: {words}")

    def _least_seen(self, places: Mapping[str, float]) -> str:
        """The place that is next; one that was not met is tried again, but not forever."""
        tally, cannot = self.tally, not self._free()

        def rank(place: str) -> tuple[bool, int, float]:
            seen = tally.kills[place] + tally.missed[place] // MOST_MISSES
            return cannot and any(part in place for part in DELETES), seen, places[place]

        return min(places, key=rank)

    def _begin(self, faults: str) -> None:
        self._lives.begin(self._folder, faults)
        self._is_ready()

    def _is_ready(self) -> bool:
        """Wait until the engine has recovered, and look at what it has found; False if it died."""
        said = self._lives.next(READY_S)
        if said is None:
            self._problem(f"stuck: not ready after {READY_S:.0f} s")
            return False
        self._hear([said])
        if "ready" not in said:
            return False
        self.tally.num_checks += 1
        try:
            wrong = list(checks.kept(checks.read_rows(self._folder), self._ledger))
            wrong += self._strays()
        except (OSError, sqlite3.Error) as error:
            wrong = [f"the folder cannot be looked at: {error}"]
        for problem in wrong:
            self._problem(problem)
        return True

    def _strays(self) -> set[str]:
        """Files that nothing refers to. One whose document is being made is known soon, one that a
        life was about to remove when it died does not count."""
        found = set(checks.strays(self._folder))
        deadline = time.monotonic() + STRAY_S
        while found and time.monotonic() < deadline:
            said = self._lives.next(SETTLE_S)
            if said is not None:
                self._hear([said])
                if "ended" in said:
                    return set()
            found &= set(checks.strays(self._folder))
        return found

    def _free(self) -> list[str]:
        """Keys of documents that may be deleted: no other begins alike."""
        ledger = self._ledger
        return sorted(k for k in ledger.documents if not is_shared(k) and k not in ledger.dropped)

    def _ask(self, place: str = "") -> None:
        """More than can be done at once; some of it again, as a client does that has no answer."""
        needs_parser = any(part in place for part in READS_FILES)
        deletes = any(part in place for part in DELETES)
        rng, ledger, lives = self._rng, self._ledger, self._lives
        known = [] if deletes else sorted(ledger.asked - ledger.dropped)
        again = rng.sample(known, min(1, len(known)))
        keys = [str(self._number), str(self._number + 1), *again]
        self._number += 2
        for key in keys:
            is_file = needs_parser or int(key) % 7 == 0
            ledger.asked.add(key)
            lives.ask(document=key, is_file=is_file)
        lives.ask(file=f"kept {self._number}", expires=False)
        lives.ask(file=f"gone {self._number}", expires=True)
        lives.ask(batch=rng.randrange(10**9))
        free = [key for key in self._free() if key not in keys]
        for key in rng.sample(free, min(1, len(free))):
            ledger.dropped.add(key)
            ledger.doomed.add(ledger.documents[key])
            lives.ask(delete=ledger.documents[key], ready=deletes)

    def _hear(self, heard: Iterable[dict[str, object]]) -> None:
        for said in heard:
            if "bug" in said:
                self._problem(f"a bug: {said['bug']}")
            self.tally.num_refused += "refused" in said
            if wrong := self._ledger.take(said):
                self._problem(wrong)

    def _problem(self, text: str) -> None:
        self.tally.problems.append(f"{self._folder.name}: {text}")
        print(self.tally.problems[-1], file=sys.stderr, flush=True)

    def _next_folder(self) -> None:
        self._folder = self._parent / f"site-{self._number}"
        self._folder.mkdir()
        self._ledger = Ledger()
