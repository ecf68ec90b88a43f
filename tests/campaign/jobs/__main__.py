"""Kills the job engine: ``python -m tests.campaign.jobs``; 1 if anything was lost or is wrong.

    python -m tests.campaign.jobs [--kills N] [--seed S] [--folder DIR] [--places TEXT]

Documents and batches on a disk of this machine, in real processes: half of them are killed at
random moments, half end at a failpoint, each of them in turn. What is looked at is in campaign.py.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from bench.environment import headline
from tests.campaign.jobs.campaign import RANDOM, Campaign, Tally, all_places
from tests.campaign.jobs.lives import Lives

ROOT = Path(__file__).resolve().parents[3]
KINDS = ("lost", "duplicated", "stuck", "stray")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.jobs")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="on a real disk; a temporary one by default")
    parser.add_argument("--places", default="", metavar="TEXT", help="only those with this in it")
    parser.add_argument("--random-share", type=float, default=0.5, help="of the kills")
    parser.add_argument("--least", type=int, default=0, help="kills that each place must have seen")
    return parser.parse_args()


def lines(tally: Tally, took_s: float) -> list[str]:
    """The table."""
    at_places = tally.kills.total() - tally.kills[RANDOM]
    found = [
        f"kills                {tally.kills.total()}",
        f"  {'at random moments':<44} {tally.kills[RANDOM]}",
        f"  {'at places, seen by exit code and last line':<44} {at_places}",
        *(f"    {name:<42} {tally.kills[name]}" for name in sorted(tally.kills) if name != RANDOM),
        f"not reached          {tally.missed.total()}",
        *(f"  {name:<44} {count}" for name, count in sorted(tally.missed.items())),
        f"folders looked at    {tally.num_checks}",
        f"jobs acknowledged    {tally.num_acknowledged}",
        f"refused: disk full   {tally.num_refused}",
        *(f"{kind:<20} {tally.count(kind)}" for kind in KINDS),
        f"seconds              {took_s:.0f}",
        f"problems             {len(tally.problems)}",
    ]
    return found + [f"  {problem}" for problem in tally.problems[:20]]


def main() -> int:
    arguments, started = parse(), time.monotonic()
    places = [place for place in all_places() if arguments.places in place]
    print(headline(), file=sys.stderr)
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder, prefix="baton-kills-") as folder,
        Lives(ROOT) as lives,
    ):
        campaign = Campaign(Path(folder), lives, arguments.seed)
        campaign.run(arguments.kills, places, arguments.random_share)
    tally = campaign.tally
    for place in places:
        if tally.kills[place] < arguments.least:
            tally.problems.append(f"{place}: {tally.kills[place]} kills, not {arguments.least}")
    print("\n".join(lines(tally, time.monotonic() - started)))
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
