"""More than there is room for, in every way: ``python -m tests.stress``; 1 if a promise breaks.

    python -m tests.stress [--stages A,B...] [--scale F] [--seed S] [--save FILE]

Each stage (stages.py) runs against one local cluster of the arithmetic model. Promised is that
every request is answered, or refused in time with a Retry-After; that ``/health`` answers within
100 ms (p99) meanwhile; that no process dies; and that the coordinator's memory comes back.
"""

import argparse
import asyncio
import random
import resource
import sys
import time
from pathlib import Path

from uvloop import run

from bench.environment import headline
from protocol.process.limits import raise_open_files
from tests.campaign.cluster import ClusterLost, RunningCluster, run_cluster
from tests.stress.beside import Beside, rss_bytes, watching
from tests.stress.client import Tally
from tests.stress.stages import STAGES, Context, active, burst

FLAGS = ("arithmetic", "--prefill", "cp1", "--decode", "tp1")
LIMITS = "coordinator.limits={max_connections=5000}"
MAX_HEALTH_S = 0.1  # p99
MAX_RSS_GROWTH = 1.2
SETTLE_S = 60.0
USUAL_SOFT_LIMIT = 1024  # of open files, as most systems have it: the server has to raise it


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress")
    parser.add_argument("--stages", default=",".join(STAGES), help=", ".join(STAGES))
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", type=Path, help="a file that the report is added to")
    parser.add_argument("--log", type=Path, help="a file for what the cluster writes")
    arguments = parser.parse_args()
    unknown = set(arguments.stages.split(",")) - STAGES.keys()
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    return arguments


def verdict(
    name: str, tally: Tally, seen: Beside, rss_after: int, *, has_restarted: bool
) -> list[str]:
    """The promises that a stage has broken."""
    problems = [
        f"{name}: {count} requests ended with {outcome}"
        for outcome, count in tally.outcomes.items()
        if outcome not in STAGES[name].allowed
    ]
    if seen.p99_s > MAX_HEALTH_S:
        problems.append(f"{name}: /health took {seen.p99_s:.3f} s (p99)")
    if rss_after > MAX_RSS_GROWTH * seen.rss_before:
        problems.append(
            f"{name}: the coordinator keeps {_mib(rss_after)} MiB, before {_mib(seen.rss_before)}"
        )
    if has_restarted:
        problems.append(f"{name}: a process has died")
    return problems


def report(name: str, context: Context, seen: Beside, rss_after: int, seconds: float) -> list[str]:
    """A stage in a few lines."""
    tally = context.tally
    at_scale = f", at {context.scale:g} of that" if context.scale != 1 else ""
    slowest = f", the slowest in {max(tally.seconds):.1f} s" if tally.seconds else ""
    lines = [
        f"{name}: {STAGES[name].shown}{at_scale}; {seconds:.0f} s{slowest}",
        f"  requests     {', '.join(tally.lines())}",
        *(f"  {note}" for note in context.notes),
        f"  /health      p50 {1000 * seen.p50_s:.0f} ms, p99 {1000 * seen.p99_s:.0f} ms, "
        f"max {1000 * seen.max_s:.0f} ms, of {len(seen.health_s)}",
        f"  loop lag     {1000 * seen.lag_s:.0f} ms at most, its own step "
        f"{1000 * seen.step_s:.0f} ms (without waiting for a core)",
        f"  coordinator  {_mib(seen.rss_before)} MiB before, {_mib(seen.rss_peak)} at most, "
        f"{_mib(rss_after)} after",
    ]
    if tally.retry_after_s:
        low, high = min(tally.retry_after_s), max(tally.retry_after_s)
        lines.insert(2, f"  Retry-After  {low} to {high} s")
    return lines


def _mib(num_bytes: int) -> int:
    return num_bytes >> 20


async def _settled(cluster: RunningCluster) -> None:
    """Wait until nothing is at work any more."""
    for _ in range(int(2 * SETTLE_S)):
        if active(await cluster.state()) == 0:
            break
        await asyncio.sleep(0.5)
    await asyncio.sleep(2.0)  # what is freed a moment later


async def stress(arguments: argparse.Namespace, lines: list[str], problems: list[str]) -> None:
    """Every stage in turn on one cluster; ``lines`` and ``problems`` are added to."""
    flags = (*FLAGS, "--set", LIMITS)
    async with run_cluster(*flags, log=arguments.log, is_forked=False) as cluster:
        raise_open_files()  # for our own clients; the cluster has had to do so itself
        rng = random.Random(arguments.seed)
        warm = Context(cluster.address, rng, 0.05 * arguments.scale)
        await burst(warm)  # code and connections that are needed once
        await _settled(cluster)
        for name in arguments.stages.split(","):
            before = cluster.processes()
            context = Context(cluster.address, rng, arguments.scale)
            started = time.monotonic()
            async with watching(cluster.address, before["coordinator"]) as seen:
                await STAGES[name].run(context)
            seconds = time.monotonic() - started
            await _settled(cluster)
            rss_after = rss_bytes(before["coordinator"])
            has_restarted = cluster.processes() != before
            shown = report(name, context, seen, rss_after, seconds)
            print("\n".join(shown), flush=True)
            lines += shown
            problems += verdict(name, context.tally, seen, rss_after, has_restarted=has_restarted)


def main() -> int:
    arguments = parse()
    hard = raise_open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(USUAL_SOFT_LIMIT, hard), hard))
    command = f"python -m tests.stress --stages {arguments.stages} --scale {arguments.scale:g}"
    lines, problems = [command, time.strftime("%Y-%m-%d"), headline(), ""], list[str]()
    print("\n".join(lines))
    try:
        run(stress(arguments, lines, problems))
    except ClusterLost as error:
        problems.append(f"the cluster is lost: {error}")
    lines += [f"BROKEN {problem}" for problem in problems]
    print("\n".join(f"BROKEN {problem}" for problem in problems) or "every promise was kept")
    if arguments.save is not None:
        with arguments.save.open("a", encoding="utf-8") as file:
            file.write("\n".join([*lines, "", ""]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
