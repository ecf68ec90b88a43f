"""The experiments as commands: ``python -m bench.simulate NAME|all [--seeds N] [--save DIR]``.

``add_arguments`` and ``run_experiments`` are what any other command line needs to offer them.
"""

import argparse
import time
from importlib import import_module
from pathlib import Path

from bench.environment import headline
from protocol.errors import ConfigError

NAMES = ("ring", "budgets", "disaggregation", "routing", "overhead")
FOLDER = "experiments"  # below what is given to --save
MIN_SEEDS = 2  # fewer have no interval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be asked for."""
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"all, {', '.join(NAMES)}")
    parser.add_argument("--seeds", type=int, default=5, help="of the traffic (default 5)")
    parser.add_argument("--size", type=float, default=1.0, help="share of the requests (1)")
    parser.add_argument("--no-live", action="store_true", help="leave out what runs a model")
    parser.add_argument("--save", type=Path, metavar="DIR", help=f"keep results in DIR/{FOLDER}")


def run_experiments(arguments: argparse.Namespace) -> int:
    """Run what is asked for.

    Returns:
        1 when a null case does not hold, else 0.

    Raises:
        ConfigError: it cannot be run.
    """
    from bench.simulate.report import Scale, save

    names = NAMES if "all" in arguments.names else arguments.names
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ConfigError(
            f"no such experiment: {', '.join(unknown)}; there are {', '.join(NAMES)}, all"
        )
    if arguments.seeds < MIN_SEEDS:
        raise ConfigError(f"--seeds must be at least {MIN_SEEDS}: one seed has no interval")
    if arguments.size <= 0:
        raise ConfigError("--size must be above 0")
    scale = Scale(arguments.seeds, arguments.size, not arguments.no_live)
    print(headline())
    holds = True
    for name in names:
        started = time.monotonic()
        report = import_module(f"bench.simulate.experiments.{name}").run(scale)
        command = command_of(arguments, name)
        print(f"\n{report.markdown(command, scale.num_seeds)}", flush=True)
        print(f"({time.monotonic() - started:.0f} s)", flush=True)
        holds = holds and all(null.holds for null in report.nulls)
        if arguments.save is not None:
            save(report, arguments.save / FOLDER, command, scale.num_seeds)
    return int(not holds)


def command_of(arguments: argparse.Namespace, name: str) -> str:
    """What makes the same result again."""
    parts = ["python -m bench.simulate", name, f"--seeds {arguments.seeds}"]
    if arguments.size != 1.0:
        parts.append(f"--size {arguments.size:g}")
    if arguments.no_live:
        parts.append("--no-live")
    return " ".join([*parts, *(["--save", str(arguments.save)] if arguments.save else [])])
