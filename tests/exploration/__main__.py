"""Every order of events of small clusters: none may give a wrong byte, leak a block or get stuck.

    python -m tests.exploration [--prefill 3] [--decode 3] [--requests 4] [--only TEXT]

The coordinator's service, both schedulers, the block accounting and the hand-off logic of every
rank are the real ones. Prints, for each case, how many states there are, how many steps lead from
one to another, how many steps away the farthest is, how many ends there are, how many inputs were
given to real objects, and whether all of it has been seen. When something is wrong it tells the
shortest way there. Exit status 1 when anything is wrong or unseen.
"""

import argparse
import logging
import sys

from bench.environment import headline
from tests.exploration.cases import Named, cases
from tests.exploration.search import NO_LIMIT, Found, Search


def explore(named: Named, max_states: int) -> Found:
    """Explore a case and print what was found."""
    found = Search(named.case, max_states).run()
    verdict = "all seen" if found.is_complete else "NOT ALL SEEN"
    print(
        f"{named.name:46s} {found.num_states:11,d} {found.num_steps:12,d} {found.depth:5d} "
        f"{found.num_ends:6d} {found.num_computed:7,d} {found.seconds:6.1f} s  "
        f"{'WRONG' if found.problem else verdict}",
        flush=True,
    )
    if found.problem:
        print(f"  after {len(found.trace)} steps: {found.problem}")
        for number, step in enumerate(found.trace, 1):
            print(f"  {number:3d}. {step}")
    return found


def main() -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="tests.exploration", description=summary)
    parser.add_argument("--prefill", type=int, default=3, help="ranks of the largest prefill pool")
    parser.add_argument("--decode", type=int, default=3, help="ranks of the largest decode pool")
    parser.add_argument("--requests", type=int, default=4, help="of the case of many requests")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    parser.add_argument("--quick", action="store_true", help="the small cases alone")
    parser.add_argument("--max-states", type=int, default=NO_LIMIT, help="of a case; then give up")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # losses are what this is about
    chosen = [
        named
        for named in cases(arguments.prefill, arguments.decode, arguments.requests)
        if arguments.only in named.name and (named.is_quick or not arguments.quick)
    ]
    print(headline())
    print(f"{'case':46s} {'states':>11s} {'steps':>12s} depth   ends  inputs    time")
    found = [explore(named, arguments.max_states) for named in chosen]
    num_wrong = sum(bool(f.problem) for f in found)
    num_unseen = sum(not f.is_complete for f in found) - num_wrong
    print(
        f"{sum(f.num_states for f in found):,d} states, {sum(f.num_steps for f in found):,d} steps "
        f"in {sum(f.seconds for f in found):.0f} s: {num_wrong} cases wrong, {num_unseen} not seen "
        f"whole, odds of a missed state {sum(f.collision_odds for f in found):.0e}"
    )
    return int(num_wrong + num_unseen > 0)


if __name__ == "__main__":
    sys.exit(main())
