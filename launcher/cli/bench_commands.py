"""``baton bench``: its flags and what they start. The work itself is in ``bench.load``."""

import argparse
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.simulate.command import add_arguments, run_experiments
from launcher.cli.bench_flags import (
    EXIT_INVALID,
    EXIT_MISSED,
    add_load_flags,
    add_target_flags,
    options_of,
    target_of,
)
from launcher.cli.bench_reports import add_reports
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from bench.load.planning import Options


def add_bench(commands: Any) -> None:  # noqa: ANN401 - argparse's class for this is private
    """Add ``bench`` and its subcommands."""
    bench = commands.add_parser("bench", help="measure a server against latency objectives")
    kinds = bench.add_subparsers(dest="bench_command", required=True, parser_class=type(bench))
    run = kinds.add_parser("run", help="one run at one load")
    add_target_flags(run)
    add_load_flags(run)
    run.add_argument("--check", action="store_true", help="exit 4 if the SLO is missed")
    run.set_defaults(start=_run)
    sweep = kinds.add_parser("sweep", help="many rates, or a search for goodput")
    add_target_flags(sweep)
    add_load_flags(sweep)
    add = sweep.add_argument
    add("--rates", metavar="R,R,...", help="these rates; without them, search for goodput")
    add("--lowest", type=float, default=0.01, metavar="R", help="of the search")
    add("--highest", type=float, default=1000.0, metavar="R", help="of the search")
    add("--tolerance", type=float, default=0.05, metavar="SHARE", help="of the goodput found")
    add("--min-requests", type=int, default=300, metavar="N", help="of each rate")
    add("--rounds", type=int, default=3, metavar="N", help="seeds of each rate")
    add("--accelerators", type=int, metavar="N", help="all of them, prefill and decode")
    sweep.set_defaults(start=_sweep)
    add_reports(kinds)
    experiment = kinds.add_parser("experiment", help="what scheduling is worth, on virtual time")
    add_arguments(experiment)
    experiment.set_defaults(start=_experiment)


def run_bench(arguments: argparse.Namespace, argv: list[str] | None) -> int:
    """Whatever subcommand was asked for; returns the exit code."""
    command = shlex.join(["baton", *_without_secrets(sys.argv[1:] if argv is None else argv)])
    start: Callable[[argparse.Namespace, str], int] = arguments.start
    return start(arguments, command)


def _without_secrets(argv: list[str]) -> list[str]:
    """The command as it may be written down."""
    kept = list(argv)
    for number, word in enumerate(argv):
        if word == "--api-key" and number + 1 < len(argv):
            kept[number + 1] = "..."
        elif word.startswith("--api-key="):
            kept[number] = "--api-key=..."
    return kept


def _experiment(arguments: argparse.Namespace, _command: str) -> int:
    return run_experiments(arguments)


def _run(arguments: argparse.Namespace, command: str) -> int:
    from rich.console import Console

    from bench.load.analysis.metrics import summarise
    from bench.load.planning import recipe_of
    from bench.load.record import write_run
    from bench.load.run import execute
    from bench.load.samples import ClusterSample
    from bench.report.terminal import show_run, watched

    console = Console()
    recipe = recipe_of(options_of(arguments))
    schedule = recipe.schedule(recipe.options.seed)
    target = target_of(arguments)
    with watched(console, target.name) as on_progress:
        plan = recipe.plan(target, command, schedule, None)
        samples: list[ClusterSample] = []
        on_sample = samples.append if recipe.options.samples else None
        manifest, records = execute(plan, on_progress, on_sample)
    summary = summarise(records, recipe.slo)
    if arguments.output is not None:
        write_run(arguments.output, manifest, records, samples)
    show_run(console, manifest, records)
    if not manifest.valid:
        return EXIT_INVALID
    return EXIT_MISSED if arguments.check and summary.attains is False else 0


def _sweep(arguments: argparse.Namespace, command: str) -> int:
    from rich.console import Console

    from bench.load.analysis.goodput import Search
    from bench.load.driving.target import num_accelerators
    from bench.load.planning import recipe_of
    from bench.load.sweep import InvalidRunError, Sweep, search_goodput, sweep_rates
    from bench.report.terminal import show_goodput, show_points, watched

    if arguments.output is None:
        raise ConfigError("a sweep needs --output DIR")
    rates = _rates(arguments.rates)
    options = options_of(arguments)
    start = rates[0] if rates else options.rate or 1.0
    recipe = recipe_of(_with_rate(options, start, arguments.min_requests))
    if recipe.slo is None:
        raise ConfigError("a sweep needs --slo: a file, or the name of a preset")
    target = target_of(arguments)
    num = arguments.accelerators or num_accelerators(target) or 1
    console = Console()
    with watched(console, target.name) as on_progress:
        sweep = Sweep(
            target,
            recipe,
            recipe.slo,
            arguments.output,
            command,
            on_progress,
            num_rounds=arguments.rounds,
            min_requests=arguments.min_requests,
        )
        try:
            if rates:
                found = sweep_rates(sweep, rates, num)
                goodput = None
            else:
                search = Search(
                    start,
                    lowest=arguments.lowest,
                    highest=arguments.highest,
                    tolerance=arguments.tolerance,
                )
                goodput, found = search_goodput(sweep, search, num)
        except InvalidRunError as error:
            console.print(f"invalid run, the sweep ends: {error}", style="bold red", markup=False)
            return EXIT_INVALID
    show_points(console, found.points, num)
    if goodput is not None:
        show_goodput(console, goodput)
    return 0


def _rates(text: str | None) -> list[float]:
    try:
        rates = [float(rate) for rate in text.split(",")] if text else []
    except ValueError as error:
        raise ConfigError(f"--rates is R,R,..., not {text!r}") from error
    if any(rate <= 0 for rate in rates):
        raise ConfigError("--rates must be above 0")
    return rates


def _with_rate(options: "Options", rate: float, num_requests: int) -> "Options":
    """A sweep says itself how fast and how many; a trace keeps its own rate until then."""
    from msgspec.structs import replace

    if options.users:
        raise ConfigError("a sweep is an open loop: --users goes with run")
    return options if options.trace else replace(options, rate=rate, requests=num_requests)
