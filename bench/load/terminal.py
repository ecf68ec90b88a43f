"""A run as one watches it and as one reads it, in a terminal."""

import math
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.load.analysis.goodput import Goodput, Point
from bench.load.analysis.intervals import min_samples, percentile
from bench.load.analysis.metrics import Distribution, Summary
from bench.load.driving.driver import Progress as RunProgress
from bench.load.driving.process import OnProgress
from bench.load.record import Manifest

_SHOWN = ("ttft_s", "ttft_sent_s", "tpot_s", "itl_s", "max_gap_s", "e2e_s", "send_lag_s")
_RECENT = 200


@contextmanager
def watched(console: Console, title: str) -> Iterator[OnProgress]:
    """Shows a bar while a run goes on. The first interrupt ends the run early, keeping its records.

    Yields:
        What the run is to call with its progress.
    """
    is_asked = False

    def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal's form
        nonlocal is_asked
        is_asked = True
        signal.signal(signal.SIGINT, before)  # the second one interrupts

    before = signal.signal(signal.SIGINT, ask)
    recent: deque[float] = deque(maxlen=_RECENT)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=1, state="preparing")

        def show(progress: RunProgress) -> bool:
            recent.extend(progress.ttfts_s)
            num_ended = sum(progress.outcomes.values())
            state = _state(progress, sorted(recent))
            bar.update(task, total=progress.num_planned, completed=num_ended, state=state)
            return is_asked

        try:
            yield show
        finally:
            signal.signal(signal.SIGINT, before)


def _state(progress: RunProgress, ttfts_s: Sequence[float]) -> str:
    parts = [f"{progress.num_in_flight} in flight", f"{progress.num_tokens} tokens"]
    if ttfts_s:
        parts.append(
            f"TTFT {seconds(percentile(ttfts_s, 0.5))}, p90 {seconds(percentile(ttfts_s, 0.9))}"
        )
    failed = {name: n for name, n in progress.outcomes.items() if name not in ("ok", "cancelled")}
    parts += [f"[red]{count} {name}[/red]" for name, count in sorted(failed.items())]
    return ", ".join(parts)


def seconds(value: float | None) -> str:
    """With a unit that suits it."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "?"
    return f"{value:.2f} s" if abs(value) >= 1 else f"{value * 1e3:.1f} ms"


def show_run(console: Console, manifest: Manifest, summary: Summary) -> None:
    """The summary of one run; what makes it invalid comes first and last."""
    if not manifest.valid:
        console.print("[bold red]INVALID RUN[/bold red]")
    console.print(_headline(manifest, summary))
    parts = list(summary.by_kind.items())  # only of a kind it can be said whether it was met
    for name, part in [("all", summary), *parts] if len(parts) > 1 else parts:
        console.print(_table(name, part))
    for reason in manifest.invalid_reasons:
        console.print(f"[bold red]invalid:[/bold red] {escape(reason)}")


def _headline(manifest: Manifest, summary: Summary) -> str:
    rates = summary.throughput
    loop = manifest.driver.get("loop", "open")
    is_closed = loop == "closed"
    label = f"CLOSED loop of {manifest.driver.get('num_users')} users" if is_closed else "open loop"
    outcomes = ", ".join(f"{n} {name}" for name, n in sorted(summary.outcomes.items()))
    target = manifest.targets[0]
    cached = ""
    if rates.cached_share is not None:
        ideal = manifest.driver.get("ideal_cached_share", math.nan)
        cached = f", cached {rates.cached_share:.1%} of prompts (shared {ideal:.1%})"
    return (
        f"{escape(str(target['name']))} at {target['url']}, {label}, seed {manifest.seed}, "
        f"{manifest.duration_s:.1f} s\n"
        f"{outcomes}\n"
        f"offered {rates.offered_requests:.2f}/s, completed {rates.completed_requests:.2f}/s, "
        f"prompt {rates.prompt_tokens:.0f} tok/s, output {rates.output_tokens:.0f} tok/s{cached}; "
        f"send lag p99 {seconds(manifest.send_lag['p99'])}"
    )


def _table(name: str, summary: Summary) -> Table:
    table = Table(title=name, title_justify="left", box=None, pad_edge=False)
    for column in ("", "n", "mean", "p50", "p90", "p99", "95 % of p99"):
        table.add_column(column, justify="left" if not column else "right")
    for metric in _SHOWN:
        if metric in summary.metrics:
            table.add_row(*_row(metric, summary.metrics[metric]))
    for label, share in (
        ("attainment", summary.attainment),
        ("  TTFT alone", summary.attainment_ttft),
        ("  TPOT alone", summary.attainment_tpot),
    ):
        if share is not None and share.num:
            table.add_row(
                label,
                str(share.num),
                f"{share.share:.2%}",
                *_verdict(summary, is_joint=label == "attainment"),
                f"{share.low:.2%} - {share.high:.2%}",
            )
    return table


def _verdict(summary: Summary, *, is_joint: bool) -> tuple[str, str, str]:
    if not is_joint or summary.target is None or summary.by_kind:
        return "", "", ""
    verdict = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}
    return f"of {summary.target:.0%}", verdict[summary.attains], ""


def _row(name: str, values: Distribution) -> tuple[str, ...]:
    low, high = values.interval.get("p99", (math.nan, math.nan))
    refused = values.refused.get("p99", "")
    if refused.startswith("n too small"):
        refused = f"n < {min_samples(0.99)}"
    return (
        name.removesuffix("_s"),
        str(values.count + values.num_failed),
        seconds(values.mean),
        seconds(values.p50),
        seconds(values.p90),
        seconds(values.p99),
        refused or f"{seconds(low)} - {seconds(high)}",
    )


def show_points(console: Console, points: Sequence[Point], num_accelerators: int) -> None:
    """A sweep's rates in order."""
    table = Table(box=None, pad_edge=False)
    for column in ("rate /s", "per accelerator", "kind", "n", "attainment", "95 %", "verdict"):
        table.add_column(column, justify="right")
    for point in sorted(points, key=lambda point: point.rate):
        word = "[green]pass[/green]" if point.verdict.passed else "[red]fail[/red]"
        word += "" if point.verdict.is_sure else " (undecided)"
        for kind, share in point.verdict.shares.items():
            per = f"{point.rate / num_accelerators:.3g}"
            interval = f"{share.low:.2%} - {share.high:.2%}"
            attained = f"{share.share:.2%}" if share.num else "-"
            table.add_row(f"{point.rate:.4g}", per, kind, str(share.num), attained, interval, word)
    console.print(table)


def show_goodput(console: Console, goodput: Goodput) -> None:
    """Where a search ended."""
    low, high = goodput.per_accelerator
    if goodput.low is None:
        found = f"below {goodput.high:.4g} requests/s, the lowest rate tried"
    elif goodput.high is None:
        found = f"above {goodput.low:.4g} requests/s, the highest rate tried"
    else:
        found = f"between {goodput.low:.4g} and {goodput.high:.4g} requests/s"
    ends = " to ".join("?" if end is None else f"{end:.4g}" for end in (low, high))
    console.print(
        f"[bold]goodput {found}[/bold]; per accelerator, of {goodput.num_accelerators}: {ends}"
    )
