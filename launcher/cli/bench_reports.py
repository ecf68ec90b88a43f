"""``baton bench report | compare | import | export``: their flags and what they start."""

import argparse
import contextlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.cli.bench_flags import (
    EXIT_INVALID,
    EXIT_MISSED,
    add_dialect_flags,
    add_load_flags,
    options_of,
    target_of,
)
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from bench.load.alternation import Contest
    from bench.load.analysis.compare import Comparison
    from bench.load.driving.driver import Target
    from bench.load.driving.watch import OnSample
    from bench.load.record import Manifest
    from bench.report.runs import Run

FORMATS = ("vllm", "aiperf")
TARGET_HELP = "[NAME=]URL, or [NAME=]'local:FLAGS of baton serve' for a cluster of its own"
_NAMED = re.compile(r"([\w.+-]+)=(?=local:|https?://)")


def add_reports(kinds: Any) -> None:  # noqa: ANN401 - argparse's class for this is private
    """Add the subcommands to ``baton bench``."""
    report = kinds.add_parser("report", help="one HTML file, its plots and a summary")
    add = report.add_argument
    add("folders", nargs="*", type=Path, metavar="FOLDER", help="of runs, sweeps, comparisons")
    add("--output", type=Path, metavar="DIR", help="default: the folder, if it is one")
    add("--from", dest="source", choices=FORMATS, help="the arguments are another harness's files")
    add("--no-plots", action="store_true", help="the HTML file alone, no plots/*.svg")
    add("--example", action="store_true", help="of simulated runs: how a report looks")
    add("--seed", type=int, default=0, metavar="N", help="of the example")
    report.set_defaults(start=_report)
    _add_compare(kinds)
    for name, words in (("import", "another harness's file as a run"), ("export", "a run for it")):
        parser = kinds.add_parser(name, help=words)
        what = "FILE" if name == "import" else "FOLDER"
        parser.add_argument("path", type=Path, metavar=what)
        flag = "--from" if name == "import" else "--to"
        parser.add_argument(flag, dest="format", choices=FORMATS, required=True)
        parser.add_argument("--output", type=Path, required=True, metavar="DIR")
        parser.set_defaults(start=_import if name == "import" else _export)


def _add_compare(kinds: Any) -> None:  # noqa: ANN401
    compare = kinds.add_parser("compare", help="targets in turns, with ratios and a verdict")
    add = compare.add_argument
    add("targets", nargs="+", metavar="TARGET", help=f"{TARGET_HELP}; the first is the base")
    add("--blocks", type=int, default=6, metavar="N", help="turns of each target")
    add("--gate", action="append", default=[], metavar="METRIC.STATISTIC=LIMIT", help="exit 4 if")
    add("--strict", action="store_true", help="exit 4 also where a gate is unclear")
    add("--output", type=Path, required=True, metavar="DIR", help="run, compare.json, report.html")
    add_dialect_flags(compare)
    add_load_flags(compare)
    compare.set_defaults(start=_compare)


# ---- report --------------------------------------------------------------------------------------


def _report(arguments: argparse.Namespace, _command: str) -> int:
    from rich.console import Console

    from bench.report.files import REPORT_FILE, write_report
    from bench.report.terminal import show

    console = Console()
    runs = _runs_of(arguments)
    folder = arguments.output or arguments.folders[0]
    report = write_report(runs, folder, plots=not arguments.no_plots)
    show(console, report)
    console.print(f"\n{folder / REPORT_FILE}", highlight=False, markup=False)
    return 0 if not report.verdict.reasons else EXIT_INVALID


def _runs_of(arguments: argparse.Namespace) -> "Sequence[Run]":
    from bench.report.runs import Run, load_runs
    from bench.simulate.example import example_runs

    if arguments.example == bool(arguments.folders):
        raise ConfigError("name folders of runs, or give --example")
    if arguments.output is None and (len(arguments.folders) != 1 or arguments.source):
        raise ConfigError("say with --output DIR where the report is to go")
    if arguments.example:
        return example_runs(arguments.seed)
    if arguments.source:
        return [Run(path, *_read(arguments.source, path)) for path in arguments.folders]
    return load_runs(arguments.folders)


# ---- import and export ---------------------------------------------------------------------------


def _read(source: str, path: Path) -> Any:  # noqa: ANN401 - a manifest and records
    from bench.load.interchange.aiperf import import_aiperf
    from bench.load.interchange.vllm import import_vllm

    return import_vllm(path) if source == "vllm" else import_aiperf(path)


def _import(arguments: argparse.Namespace, _command: str) -> int:
    from bench.load.record import write_run

    manifest, records = _read(arguments.format, arguments.path)
    write_run(arguments.output, manifest, records)
    sys.stdout.write(f"{len(records)} requests: {arguments.output}\n")
    return 0


def _export(arguments: argparse.Namespace, _command: str) -> int:
    import msgspec

    from bench.load.interchange.aiperf import export_aiperf
    from bench.load.interchange.vllm import export_vllm
    from bench.load.record import read_run
    from bench.report.runs import slo_of

    manifest, records = read_run(arguments.path)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for target in dict.fromkeys(record.target for record in records):
        own = [record for record in records if record.target == target]
        name = re.sub(r"[^\w.-]+", "-", target) or "target"
        if arguments.format == "vllm":
            path = arguments.output / f"vllm-{name}.json"
            path.write_bytes(msgspec.json.encode(export_vllm(manifest, own, slo_of(manifest))))
        else:
            path = arguments.output / f"profile_export-{name}.jsonl"
            lines = [msgspec.json.encode(row) for row in export_aiperf(manifest, own)]
            path.write_bytes(b"".join(line + b"\n" for line in lines))
        sys.stdout.write(f"{path}\n")
    return 0


# ---- compare -------------------------------------------------------------------------------------


def _compare(arguments: argparse.Namespace, command: str) -> int:
    from rich.console import Console

    from bench.load.alternation import alternate, conclusion
    from bench.load.analysis.compare import parse_gate
    from bench.load.record import write_run
    from bench.load.samples import ClusterSample
    from bench.report.files import write_report
    from bench.report.runs import load_runs, write_comparison
    from bench.report.terminal import show

    gates = [parse_gate(text) for text in arguments.gate]
    console = Console()
    samples: list[ClusterSample] = []
    with _contest(arguments, command, console, samples.append) as contest:
        manifest, records = alternate(contest)
    found = conclusion(contest, manifest, records, gates, strict=arguments.strict)
    write_run(arguments.output, manifest, records, samples)
    write_comparison(arguments.output, found)
    show(console, write_report(load_runs([arguments.output]), arguments.output, plots=False))
    _tell(console, found)
    return {"invalid": EXIT_INVALID, "fail": EXIT_MISSED}.get(found.verdict, 0)


def _tell(console: "Console", found: "Comparison") -> None:
    color = {"pass": "green", "fail": "red", "invalid": "red"}.get(found.verdict, "yellow")
    console.print(f"\n[bold {color}]{found.verdict}[/]")
    for reason in found.reasons:
        console.print(f"  {reason}", highlight=False, markup=False)


@contextlib.contextmanager
def _contest(
    arguments: argparse.Namespace, command: str, console: "Console", on_sample: "OnSample"
) -> "Iterator[Contest]":
    """The contest, for as long as the clusters run that it has started."""
    from bench.load.alternation import Contest
    from bench.load.driving.target import num_accelerators
    from bench.load.local_cluster import local_cluster
    from bench.load.planning import recipe_of
    from bench.report.terminal import watched

    recipe = recipe_of(options_of(arguments))
    arguments.output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        targets: list[Target] = []
        for number, text in enumerate(arguments.targets):
            name, where = _named(text)
            if where.startswith("local:"):
                console.print(f"starting {name}", style="dim", highlight=False, markup=False)
                flags = shlex.split(where.removeprefix("local:"))
                log = arguments.output / f"cluster-{number}.log"
                where = stack.enter_context(local_cluster(flags, log)).url
            targets.append(target_of(arguments, where, name))
        counts = {target.name: num_accelerators(target) for target in targets}

        def on_turn(block: int, name: str, manifest: "Manifest") -> None:
            told = "" if manifest.valid else f" invalid: {'; '.join(manifest.invalid_reasons)}"
            line = f"block {block + 1} of {arguments.blocks}: {name}{told}"
            console.print(line, style="dim", highlight=False, markup=False)

        yield Contest(
            targets,
            recipe,
            arguments.blocks,
            command,
            {name: count for name, count in counts.items() if count},
            on_progress=stack.enter_context(watched(console, "requests")),
            on_turn=on_turn,
            on_sample=on_sample if recipe.options.samples else None,
        )


def _named(text: str) -> tuple[str, str]:
    """(name, URL or local:...)"""
    match = _NAMED.match(text)
    if match is not None:
        return match[1], text[match.end() :]
    if text.startswith("local:"):
        return text.removeprefix("local:").replace("--", "").strip() or "local", text
    if not text.startswith(("http://", "https://")):
        raise ConfigError(f"target {text!r}: {TARGET_HELP}")
    return text.split("://")[1].rstrip("/"), text
