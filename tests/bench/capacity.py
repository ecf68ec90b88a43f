"""What one driver core carries before it would spoil a run.

    python -m tests.bench.capacity [--rate 300] [--events-per-s 20000] [--duration 20]

A toy server on the other cores streams one token per event. The run is judged as every run is: the
figure stands only if the run is valid.
"""

import argparse
import subprocess
import sys

import msgspec

from bench.environment import headline
from bench.load.analysis.metrics import summarise
from bench.load.analysis.slo import Deadline, Objective, Slo
from bench.load.driving.target import discover
from bench.load.run import Plan, execute
from bench.load.workload.arrival import Poisson
from bench.load.workload.prompts import Dialect
from bench.load.workload.schedule import draw
from bench.load.workload.sessions import Lengths
from tests.bench.toy_server import ToyConfig

BASE_S = 0.02
TTFT_S = 0.2  # a tight chat objective: 5 % of it, 10 ms, is what p99 of the send lag may be


def measure(rate: float, events_per_s: float, duration_s: float, num_processes: int) -> int:
    """Print one figure; returns the exit code."""
    num_tokens = max(2, round(events_per_s / rate))
    toy = msgspec.json.encode(ToyConfig(BASE_S, prefill_s_per_1k=0.0, token_s=0.01)).decode()
    command = [sys.executable, "-P", "-m", "tests.bench.toy_server", toy]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        target = discover(server.stdout.readline().split()[1], Dialect(""))
        schedule = draw(Lengths("256", str(num_tokens)), Poisson(rate), 0, duration_s=duration_s)
        slo = Slo({"default": Objective(Deadline(TTFT_S), 0.02)})
        plan = Plan(
            target, schedule, {}, {}, slo, num_processes=num_processes, wants_timelines=False
        )
        manifest, records = execute(plan)
    finally:
        server.terminate()
        server.wait(10)
        server.stdout.close()
    summary = summarise(records, slo)
    num_events = sum(len(record.token_times_s) for record in records)
    ttft = summary.metrics["ttft_s"]
    print(headline())
    print(
        f"{num_processes} driver process(es): {len(records) / duration_s:.0f} requests/s, "
        f"{num_events / manifest.duration_s:.0f} events/s over {manifest.duration_s:.1f} s; "
        f"{manifest.driver['cpu_share']:.0%} of a core, send lag p99 "
        f"{manifest.send_lag['p99'] * 1e3:.2f} ms, TTFT mean {(ttft.mean or 0) * 1e3:.2f} ms "
        f"(true: {BASE_S * 1e3:.0f} ms), p99 {(ttft.p99 or 0) * 1e3:.2f} ms; {summary.outcomes}"
    )
    for reason in manifest.invalid_reasons:
        print(f"invalid: {reason}")
    return 0 if manifest.valid else 1


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="tests.bench.capacity")
    parser.add_argument("--rate", type=float, default=300.0, help="requests per second")
    parser.add_argument("--events-per-s", type=float, default=20_000.0)
    parser.add_argument("--duration", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    sys.exit(measure(given.rate, given.events_per_s, given.duration, given.processes))


if __name__ == "__main__":
    main()
