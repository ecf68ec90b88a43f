"""Hours of mixed traffic, and whether anything grows: ``python -m tests.campaign.soak``.

    python -m tests.campaign.soak [--minutes 60] [--warm-up MINUTES] [--pause S] [--seed S]
                                [--save DIR] [--log FILE]

One cluster, cp1 to tp1 with a data folder, is asked for everything that traffic.py names. Its
processes are looked at every few seconds. It exits with 1 when a token is wrong, a request is lost,
a block is held at the end, a process was restarted, or the resident memory of one grows by more
than 0.1 MiB a minute after the warm-up.
"""

import argparse
import asyncio
import datetime
import random
import sys
import tempfile
import time
from pathlib import Path

from bench.environment import headline
from modeling.checkpoint.config import load_config
from tests.campaign.cluster import RunningCluster, run_cluster
from tests.campaign.oracle import MODEL, Oracle, mixed_lengths
from tests.campaign.soak.memory import History, look, table
from tests.campaign.soak.traffic import NUM_CONVERSATIONS, Conversation, Traffic
from tests.campaign.stages import BASE_FLAGS, NUM_PROMPTS, SETTINGS
from tests.campaign.tally import Tally
from tests.campaign.watch import audit, watching
from tests.campaign.workload import Mix, Workload

MAX_SLOPE = 0.1  # MiB a minute
LOOK_EVERY_S = 5.0
FLAGS = ("--kv-memory", "2MiB", "--store-memory", "16MiB", "--disk-quota", "64MiB")
STREAMS = Mix(concurrency=6, leave_share=0.33, cold_share=0.8)
SETTLE_S = 5.0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.soak")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--warm-up", type=float, help="minutes; a fifth of them by default")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two of a kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", type=Path, help="a folder to write soak.txt into")
    parser.add_argument("--log", type=Path, help="a file for what the cluster writes")
    return parser.parse_args()


async def _watch_memory(
    cluster: RunningCluster, histories: dict[str, History], tally: Tally, started: float
) -> None:
    pids = cluster.processes()
    while True:
        found = cluster.processes()
        for name, pid in found.items():
            if pids.setdefault(name, pid) != pid:
                tally.problem(f"{name} was restarted")
                pids[name] = pid
            sample = look(pid, time.monotonic() - started)
            if sample is not None:
                histories.setdefault(name, History()).samples.append(sample)
        await asyncio.sleep(LOOK_EVERY_S)


async def soak(arguments: argparse.Namespace, tally: Tally) -> list[str]:
    """The lines of the report."""
    rng, config = random.Random(arguments.seed), load_config(MODEL)
    oracle = Oracle(rng, mixed_lengths(rng, NUM_PROMPTS))
    conversations = [Conversation.draw(rng, config) for _ in range(NUM_CONVERSATIONS)]
    histories: dict[str, History] = {}
    pools = ("--prefill", "cp1", "--decode", "tp1")
    with tempfile.TemporaryDirectory() as folder:
        flags = (*pools, *BASE_FLAGS, *SETTINGS, *FLAGS, "--data-dir", folder)
        async with (
            run_cluster(MODEL, *flags, log=arguments.log, is_forked=False) as cluster,
            watching(cluster, interval_s=LOOK_EVERY_S) as watch,
        ):
            started = time.monotonic()
            end = started + 60 * arguments.minutes

            def goes_on() -> bool:
                return time.monotonic() < end and cluster.is_running

            url = "http://{}:{}".format(*cluster.address)
            traffic = Traffic(url, rng, tally, goes_on, arguments.pause)
            streams = Workload(cluster, oracle, rng, tally, STREAMS)
            memory = asyncio.create_task(_watch_memory(cluster, histories, tally, started))
            async with asyncio.TaskGroup() as kinds:
                kinds.create_task(traffic.run(conversations))
                kinds.create_task(streams.run(goes_on, pause_s=arguments.pause / 4))
            memory.cancel()
            await audit(watch, tally)
    warm_s = 60 * (arguments.warm_up or arguments.minutes / 5)
    for name, history in histories.items():
        settled = history.after(warm_s)
        if settled.slope > MAX_SLOPE:
            tally.problem(f"{name} grows by {settled.slope:.3f} MiB a minute")
        if settled.samples and settled.most_files[1] > 2 * settled.most_files[0]:
            tally.problem(f"{name} opens more and more files: {settled.most_files}")
    return [
        *table(histories, warm_s),
        "",
        f"streams          {tally.num_requests}, of which their clients left {tally.ends['left']}",
        *(f"{kind:<16} {count}" for kind, count in sorted(traffic.done.items())),
        f"tokens compared  {tally.num_tokens}; lost, repeated or foreign {tally.lies.total()}",
        f"blocks leaked    {tally.num_leaked_blocks}",
        f"problems         {len(tally.problems)}",
        *(f"  {problem}" for problem in tally.problems[:20]),
    ]


def main() -> int:
    arguments, tally, started = parse(), Tally(), time.monotonic()
    print(headline(), file=sys.stderr)
    lines = asyncio.run(soak(arguments, tally))
    today = datetime.datetime.now(tz=datetime.UTC).date()
    flags = f"--minutes {arguments.minutes:g} --seed {arguments.seed}"
    command = f"python -m tests.campaign.soak {flags}"
    took = f"# {today}, {time.monotonic() - started:.0f} s on {headline()}"
    text = "\n".join([f"$ {command}", took, "", *lines])
    print(text)
    if arguments.save is not None:
        arguments.save.mkdir(parents=True, exist_ok=True)
        (arguments.save / "soak.txt").write_text(text + "\n", encoding="utf-8")
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
