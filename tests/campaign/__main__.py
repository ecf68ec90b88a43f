"""A campaign of faults against local clusters: ``python -m tests.campaign``; 1 if one is wrong.

    python -m tests.campaign [--faults N] [--requests N] [--aborts N] [--late N] [--seed S]
                           [--minutes M] [--save DIR] [--allow-loss] [--stages A,B...]

The stages (stages.py, signals.py, loops.py, links.py) share what is asked for; each ends when it
has its part or when its part of ``--minutes`` is over. The same seed injects the same faults with
the same chances; what they meet depends on the machine's timing.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from bench.environment import headline
from tests.campaign import links, loops, report, signals, stages
from tests.campaign.cluster import ClusterLost
from tests.campaign.stages import Context
from tests.campaign.tally import FREE_WITHIN_S, Tally, percentile

# name -> share of the time
SHARES = {
    "abandon": 0.2,
    "landing": 0.2,
    "messages": 0.1,
    "drops": 0.05,
    "silence": 0.02,
    "bytes": 0.13,
    "unchecked": 0.05,
    "stops": 0.1,
    "kills": 0.1,
    "loop": 0.05,
    "links": 0.05,
}
MIN_UNCHECKED = 60
MIN_SILENCE = 40


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign")
    parser.add_argument("--faults", type=int, default=500, help="faults by signal and failpoint")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--aborts", type=int, default=1000, help="clients that go away")
    parser.add_argument("--late", type=int, default=100, help="rounds of the late-transfer test")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--save", type=Path, help="a folder to write faults.md into")
    parser.add_argument("--stages", default=",".join(SHARES), help=", ".join(SHARES))
    parser.add_argument("--allow-loss", action="store_true", help="requests may end with an error")
    parser.add_argument("--transport", choices=("nixl", "tcp"), default="nixl")
    parser.add_argument("--log", type=Path, help="a file for what the clusters write")
    parser.add_argument("--json", action="store_true", help="print the tally as JSON")
    parser.add_argument("--behind-slow-link", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.stages.split(",")) - SHARES.keys()
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    return arguments


async def campaign(arguments: argparse.Namespace, tally: Tally) -> None:
    """Every stage in turn, each with its part of what was asked for and of the time."""
    rng = random.Random(arguments.seed)
    loop = asyncio.get_running_loop()
    end = loop.time() + 60 * arguments.minutes
    context = Context(
        rng,
        tally,
        end,
        transport=arguments.transport,
        demand_survival=not arguments.allow_loss,
        log=arguments.log,
    )
    if arguments.behind_slow_link:
        await links.behind_slow_link(context, arguments.requests)
        return
    num_signals = max(4, arguments.faults // 5)
    rest = max(0, arguments.requests - arguments.aborts)
    parts: dict[str, Callable[[], Awaitable[None]]] = {
        "abandon": lambda: stages.abandon(context, arguments.aborts),
        "landing": lambda: stages.landing(context, arguments.late),
        "messages": lambda: stages.messages(context, rest // 2),
        "drops": lambda: stages.drops(context, rest // 8),
        "silence": lambda: stages.silence(context, max(MIN_SILENCE, rest // 100)),
        "bytes": lambda: stages.changed_bytes(context, rest // 2),
        "unchecked": lambda: stages.unchecked(context, MIN_UNCHECKED),
        "stops": lambda: signals.stops(context, 3 * num_signals // 4),
        "kills": lambda: signals.kills(context, num_signals // 4),
        "loop": lambda: loops.loop(context, max(1, num_signals // 40)),
        "links": lambda: asyncio.to_thread(
            links.run_in_namespace, context, rest // 8, arguments.seed, end - loop.time()
        ),
    }
    chosen = [name for name in parts if name in arguments.stages.split(",")]
    for index, name in enumerate(chosen):
        left = sum(SHARES[other] for other in chosen[index:])
        context.deadline = loop.time() + (end - loop.time()) * SHARES[name] / left
        before, started = tally.num_requests, loop.time()
        try:
            await parts[name]()
        except ClusterLost as error:
            tally.problem(f"{name}: {error}")
        print(
            f"{name}: {tally.num_requests - before} requests in {loop.time() - started:.0f} s, "
            f"{tally.faults.total()} faults and {len(tally.problems)} problems so far",
            file=sys.stderr,
            flush=True,
        )


def main() -> int:
    arguments, tally, started = parse(), Tally(), time.monotonic()
    print(headline(), file=sys.stderr)
    asyncio.run(campaign(arguments, tally))
    if percentile(tally.free_s, 0.99) > FREE_WITHIN_S:
        tally.problem(f"blocks were not free {FREE_WITHIN_S} s after an abort")
    if arguments.json:
        print(msgspec.json.encode(tally).decode())
        return 1 if tally.problems else 0
    asked = (
        f"{arguments.faults} faults, {arguments.requests} requests, {arguments.aborts} aborts, "
        f"{arguments.late} late-transfer rounds, in {arguments.minutes:g} minutes"
    )
    print("\n".join(report.lines(tally, asked)))
    if arguments.save is not None:
        command = " ".join(["python -m tests.campaign", *_shown(sys.argv[1:])])
        arguments.save.mkdir(parents=True, exist_ok=True)
        text = report.page(tally, asked, command, time.monotonic() - started)
        (arguments.save / "faults.md").write_text(text, encoding="utf-8")
    return 1 if tally.problems else 0


def _shown(argv: list[str]) -> list[str]:
    """What somebody else would type for the same campaign, without the folders of this machine."""
    pairs = zip(["", *argv], argv, strict=False)
    return [word for before, word in pairs if not {"--log", "--save"} & {before, word}]


if __name__ == "__main__":
    sys.exit(main())
