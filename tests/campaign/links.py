"""The stage of slow links: a workload in a network of its own, whose loopback is slow.

A network namespace with ``tc`` needs rights and kernel modules that not every machine gives. Where
they are missing the stage is skipped, and its reason is part of the result. Control messages of a
cluster on one host are Unix sockets and stay fast: what is slow is KV and HTTP.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter

import msgspec

from tests.campaign.stages import SMALL, Context, until
from tests.campaign.tally import Tally
from tests.campaign.watch import audit
from tests.campaign.workload import Mix, Workload

# The delay of netem where the kernel has it; else a narrow pipe, which drops what does not fit.
SHAPES = ("netem delay 5ms 2ms loss 0.5%", "tbf rate 60mbit burst 128kb latency 100ms")
_RUN_S = 900.0


def find_shape() -> tuple[str, str]:
    """(what ``tc`` can do to a link here, why not): one of the two is empty."""
    reason = ""
    for tool in ("unshare", "tc", "ip"):
        if shutil.which(tool) is None:
            return "", f"{tool} is not installed"
    for shape in SHAPES:
        done = subprocess.run(
            _in_namespace(shape, ["true"]), capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return shape, ""
        reason = reason or (done.stderr.strip().splitlines() or ["it fails without a word"])[-1]
    return "", reason


def _in_namespace(shape: str, argv: list[str]) -> list[str]:
    script = f'ip link set lo up && tc qdisc add dev lo root {shape} && exec "$@"'
    return ["unshare", "--net", "sh", "-c", script, "sh", *argv]


def run_in_namespace(context: Context, num_requests: int, seed: int, left_s: float) -> None:
    """Run this stage alone in a process of its own, behind a slow link, and take in its tally."""
    shape, reason = find_shape()
    if not shape:
        context.tally.skipped.append(f"slow links: {reason}")
        return
    argv = [sys.executable, "-P", "-m", "tests.campaign", "--behind-slow-link", "--json"]
    argv += ["--requests", str(num_requests), "--seed", str(seed), "--minutes", f"{left_s / 60}"]
    argv += ["--transport", context.transport]
    done = subprocess.run(
        _in_namespace(shape, argv), stdout=subprocess.PIPE, text=True, timeout=_RUN_S, check=False
    )
    try:
        context.tally.add(msgspec.json.decode(done.stdout, type=Tally, dec_hook=_counter))
    except msgspec.DecodeError:
        context.tally.problem(f"the campaign behind a slow link ended with {done.returncode}")


def _counter(kind: type[Counter[str]], counts: object) -> Counter[str]:
    return kind(msgspec.convert(counts, dict[str, int]))


async def behind_slow_link(context: Context, num_requests: int) -> None:
    """The stage itself: everything must be exact, and packets must have been held back."""
    async with context.cluster(*SMALL) as (cluster, watch):
        mix = Mix(leave_share=0.2)
        load = Workload(cluster, context.oracle, context.rng, context.tally, mix)
        await load.run(until(context, load, num_requests))
        await audit(watch, context.tally)
    if held_back := _num_held_back():
        context.tally.faults[f"slow link ({held_back} packets held back)"] += 1
    else:
        context.tally.problem("the link was not slow: no packet was held back")


def _num_held_back() -> int:
    shown = subprocess.run(
        ["tc", "-s", "-j", "qdisc", "show", "dev", "lo"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (discipline,) = json.loads(shown.stdout)
    is_delay = discipline["kind"] == "netem"
    return int(discipline["packets"] if is_delay else discipline["overlimits"])
