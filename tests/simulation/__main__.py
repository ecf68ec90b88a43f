"""Thousands of clusters on virtual time, each from a seed: none may give a wrong token.

    python -m tests.simulation [--seeds 1000] [--from 0] [--workers 2] [--trace]

The coordinator's service, both schedulers, the block accounting and the hand-off logic of every
rank are the real ones; time, links, reads and the model are simulated. Exit status 1 when any seed
has a problem; ``--from N --seeds 1 --trace`` shows what happened in one.
"""

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from bench.environment import headline
from tests.simulation.scenario import Outcome, quieten, run

MAX_SHOWN = 20


def outcomes(seeds: range, num_workers: int) -> Iterator[Outcome]:
    """Of all seeds, as they come."""
    if num_workers <= 1:
        yield from map(run, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(num_workers, quieten) as workers:
        yield from workers.imap_unordered(run, seeds, chunksize=8)


def report(found: Iterable[Outcome], started: float) -> int:
    """Print the totals; returns how many seeds have problems."""
    num_seeds = num_wrong = 0
    totals: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    virtual_s = 0.0
    for outcome in found:
        num_seeds += 1
        virtual_s += outcome.virtual_s
        faults.update(outcome.faults)
        totals["clients"] += outcome.num_clients
        totals["tokens compared"] += outcome.num_tokens
        totals.update({f"ended with {code}": n for code, n in outcome.errors.items()})
        totals["attempts lost and tried again"] += outcome.num_attempts_lost
        if outcome.problems:
            num_wrong += 1
            if num_wrong <= MAX_SHOWN:
                print(f"seed {outcome.seed}: {outcome.problems[0]}")
    took_s = time.monotonic() - started
    rate = num_seeds / took_s
    print(f"{num_seeds} seeds in {took_s:.0f} s, {rate:.1f}/s; {virtual_s:.0f} s of virtual time")
    for name, count in totals.items():
        print(f"  {name:32s} {count}")
    for name, count in sorted(faults.items()):
        print(f"  fault: {name:25s} {count}")
    print(f"seeds with lost, repeated or foreign tokens, leaks or hangs: {num_wrong}")
    return num_wrong


def main() -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="tests.simulation", description=summary)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--trace", action="store_true", help="what happened in each failing seed")
    arguments = parser.parse_args()
    quieten()
    print(headline())
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    if arguments.trace:
        for seed in seeds:
            outcome = run(seed)
            print("\n".join((*outcome.trace, *outcome.problems)))
        return 0
    return int(report(outcomes(seeds, arguments.workers), time.monotonic()) > 0)


if __name__ == "__main__":
    sys.exit(main())
