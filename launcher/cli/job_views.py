"""Documents and batches for people: a bar while one is ingested, tables of many."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from baton_client import Batch, Document
from launcher.cli.live_view import can_redraw

STYLES = {
    "ready": "green",
    "completed": "green",
    "failed": "red",
    "expired": "red",
    "evicted": "yellow",
    "damaged": "red",
    "cancelled": "dim",
}
PLAIN_STEP = 0.1  # of a document, between two lines where there is no terminal


class IngestView:
    """A document that is being made: a bar on a terminal, else a line when there is news."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._has_bar = can_redraw(console)
        self._bar = Progress(
            TextColumn("{task.fields[status]:>10}"),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            console=console,
            transient=True,
            disable=not self._has_bar,
        )
        self._task = self._bar.add_task("ingest", total=None, status="queued", told="")
        self._last: tuple[str, float] = ("", 0.0)

    def show(self, document: Document) -> None:
        """How it stands now."""
        tokens = document.tokens
        told = _progress(document)
        if self._has_bar:
            self._bar.update(
                self._task,
                total=tokens.total,
                completed=tokens.done,
                status=document.status,
                told=told,
            )
            return
        status, fraction = self._last
        if document.status != status or document.fraction_done >= fraction + PLAIN_STEP:
            self._last = document.status, document.fraction_done
            line = f"{document.id} {document.status}" + (f" {told}" if told else "")
            self._console.print(line, soft_wrap=True, markup=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


def _progress(document: Document) -> str:
    tokens = document.tokens
    if not tokens.total:
        return ""
    parts = [f"{tokens.done}/{tokens.total} tokens"]
    if document.rate_tok_s and document.is_pending:
        parts.append(f"{document.rate_tok_s:.0f} tok/s")
    if document.eta_s is not None and document.is_pending:
        parts.append(f"{_duration(document.eta_s)} left")
    if document.ring_size:
        parts.append(f"ring of {document.ring_size}")
    return ", ".join(parts)


def draw_documents(documents: list[Document]) -> Table:
    """One row each."""
    table = _table("document", "status", "tokens", "done", "tok/s", "left", "ring", "pin", "name")
    for document in documents:
        tokens = document.tokens
        pin = document.pin
        is_running = document.is_pending
        table.add_row(
            document.id,
            _status(document.status),
            "" if tokens.total is None else str(tokens.total),
            f"{document.fraction_done:.0%}",
            f"{document.rate_tok_s:.0f}" if document.rate_tok_s else "",
            _duration(document.eta_s) if is_running and document.eta_s is not None else "",
            str(document.ring_size or ""),
            "" if pin.mode == "none" else pin.mode,
            _why(document) or Text(document.display_name or ""),
        )
    return table


def _why(document: Document) -> Text | None:
    if document.status != "failed" or document.error is None:
        return None
    return Text(f"{document.display_name or ''}: {document.error.message}", "red")


def draw_batches(batches: list[Batch]) -> Table:
    """One row each."""
    table = _table("batch", "status", "lines", "done", "failed", "for")
    for batch in batches:
        counts = batch.request_counts
        table.add_row(
            batch.id,
            _status(batch.status),
            str(counts.total) if counts else "",
            str(counts.completed) if counts else "",
            str(counts.failed) if counts else "",
            _why_batch(batch) or Text(batch.endpoint),
        )
    return table


def _why_batch(batch: Batch) -> Text | None:
    if batch.status != "failed" or batch.errors is None or not batch.errors.data:
        return None
    return Text(f"{batch.endpoint}: {batch.errors.data[0].message}", "red")


def _table(*columns: str) -> Table:
    """An id and a status, numbers, and a text at the end that gives way."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for number, column in enumerate(columns):
        is_text = number < 2 or number == len(columns) - 1
        is_last = number == len(columns) - 1
        table.add_column(
            column,
            justify="left" if is_text else "right",
            no_wrap=True,
            overflow="ellipsis" if is_last else "ignore",
        )
    return table


def _status(status: str) -> Text:
    return Text(status, STYLES.get(status, "cyan"))


def _duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{left:02}s" if minutes else f"{left}s"
