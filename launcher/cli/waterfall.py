"""Where one request's time went, drawn from its time line: of the coordinator's clock."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from baton_client import SequenceTimeline

BAR_WIDTH = 40
SPANS = (  # of a request's life, each from one event to the next that happened
    ("tokenized", "tokenize"),
    ("reserved", "reserve decode blocks"),
    ("prefill_sent", "place"),
    ("first_token", "prefill on the ring"),
    ("committed", "KV not hidden"),
    ("first_decode", "first decode step"),
    ("finished", "decode"),
)


def draw_waterfall(console: Console, timeline: SequenceTimeline) -> None:
    """One bar for each span, and what moved meanwhile."""
    table = Table(show_header=False, box=None, padding=(0, 1))
    total = max((at for at in timeline.events.values()), default=0.0)
    last = 0.0
    total = timeline.events.get("finished", total) or 1.0  # one that arrives is at 0 of nothing
    for event, name in SPANS:
        at = timeline.events.get(event)
        if at is None or at < last:
            continue
        start = round(BAR_WIDTH * last / total)
        bar = " " * start + "━" * max(1, round(BAR_WIDTH * at / total) - start)
        table.add_row(f"   {name}", show_seconds(at - last), f"[cyan]{bar}[/]")
        last = at
    console.print(table)
    transfer = timeline.transfer
    if transfer is not None:
        console.print(
            f"   moved {transfer.num_bytes / 1e6:.0f} MB by {transfer.transport} in "
            f"{transfer.num_segments} segments, {transfer.num_layers_overlapped} of "
            f"{transfer.num_layers} layers while the prompt was still being computed"
        )


def draw_sequence(console: Console, timeline: SequenceTimeline) -> None:
    """The same below a line of what it was, and what went wrong on its way."""
    ended = timeline.error_code or timeline.finish_reason or timeline.state
    console.print(
        f"[bold]{escape(timeline.request_id)}[/]: {timeline.num_prompt_tokens} tokens in, "
        f"{timeline.num_output_tokens} out, {escape(ended)}; {escape(timeline.path)}"
    )
    for lost in timeline.lost_attempts:
        console.print(
            f"   [yellow]attempt {lost.get('attempt')} was lost[/] "
            f"({escape(str(lost.get('reason')))}) on {escape(str(lost.get('decode_pool')))}, "
            f"after {lost.get('num_output_tokens')} tokens"
        )
    draw_waterfall(console, timeline)


def show_seconds(seconds: float) -> str:
    """A duration for people."""
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
