"""The experiments as commands: ``python -m bench.simulate NAME|all [--seeds N] [--save DIR]``.

``add_arguments`` and ``run`` are what any other command line needs to offer them.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.environment import headline
from bench.simulate import (
    batching,
    blocks,
    budgets,
    disaggregation,
    overhead,
    predictor,
    ring,
    routing,
)
from bench.simulate.report import Report, Scale, save

EXPERIMENTS: dict[str, Callable[[Scale], Report]] = {
    batching.NAME: batching.run,
    blocks.NAME: blocks.run,
    ring.NAME: ring.run,
    budgets.NAME: budgets.run,
    disaggregation.NAME: disaggregation.run,
    routing.NAME: routing.run,
    predictor.NAME: predictor.run,
    overhead.NAME: overhead.run,
}
FOLDER = "experiments"  # below what is given to --save
MIN_SEEDS = 2  # fewer have no interval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be asked for."""
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"all, {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, default=5, help="of the traffic (default 5)")
    parser.add_argument("--size", type=float, default=1.0, help="share of the requests (1)")
    parser.add_argument("--no-live", action="store_true", help="leave out what runs a model")
    parser.add_argument("--save", type=Path, metavar="DIR", help=f"keep results in DIR/{FOLDER}")


def complaint(arguments: argparse.Namespace) -> str:
    """What is wrong with the arguments; empty if nothing is."""
    unknown = [name for name in arguments.names if name not in (*EXPERIMENTS, "all")]
    if unknown:
        return f"no such experiment: {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}, all"
    if arguments.seeds < MIN_SEEDS:
        return f"--seeds must be at least {MIN_SEEDS}: one seed has no interval"
    return "" if arguments.size > 0 else "--size must be above 0"


def run(arguments: argparse.Namespace) -> int:
    """Run what is asked for; 1 when a null case does not hold."""
    names = list(EXPERIMENTS) if "all" in arguments.names else arguments.names
    scale = Scale(arguments.seeds, arguments.size, not arguments.no_live)
    print(headline())
    reports = []
    for name in names:
        started = time.monotonic()
        report = EXPERIMENTS[name](scale)
        print(f"\n{report.text()}\n({time.monotonic() - started:.0f} s)", flush=True)
        reports.append(report)
        if arguments.save is not None:
            save(report, arguments.save / FOLDER, command_of(arguments, name), scale.num_seeds)
    if arguments.save is not None and "all" in arguments.names:
        (arguments.save / FOLDER / "README.md").write_text(index(reports), encoding="utf-8")
    return int(not all(null.holds for report in reports for null in report.nulls))


def command_of(arguments: argparse.Namespace, name: str) -> str:
    """What makes the same result again."""
    parts = ["python -m bench.simulate", name, f"--seeds {arguments.seeds}"]
    if arguments.size != 1.0:
        parts.append(f"--size {arguments.size:g}")
    if arguments.no_live:
        parts.append("--no-live")
    return " ".join([*parts, "--save", str(arguments.save)])


def index(reports: Sequence[Report]) -> str:
    """The folder's first page."""
    lines = [
        "# Experiments",
        "",
        "Each is one command, has a null case, and says what it does not show. Those on virtual",
        "time drive the production schedulers and router; their step times are a model's.",
        "",
        "| experiment | question | clock |",
        "| --- | --- | --- |",
    ]
    for report in reports:
        clock = report.clock.partition(":")[0].lower()
        clock += ", in part live" if report.live_part else ""
        lines.append(f"| [{report.name}]({report.name}.md) | {report.question} | {clock} |")
    return "\n".join(lines) + "\n"
