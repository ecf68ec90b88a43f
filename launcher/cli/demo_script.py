"""The script of ``baton demo``: one long document, five questions about it, and their time lines.

The document is generated. The questions are about facts at different depths of it, in its own words
and in others, and about one that it does not state. The answers come from the embedded model: if
one block of KV had been lost on the way, they would be wrong.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from baton_client import Client, SequenceTimeline
from launcher.cli.waterfall import draw_waterfall, show_seconds
from launcher.doctor.cluster_health import num_held, settled_state
from modeling.embedded import CHECKPOINT
from modeling.embedded.grammar import Document, Fact, write_document
from modeling.text.tokenizer import load_tokenizer

MAX_ANSWER_TOKENS = 48
DEPTHS = (0.5, 0.1, 0.9, 0.3)  # of the facts that are asked for


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed chat completion."""

    text: str
    first_token_s: float
    timeline: SequenceTimeline

    @property
    def num_computed_tokens(self) -> int:
        return self.timeline.num_prompt_tokens - self.timeline.num_cached_tokens


def tell(console: Console, client: Client, num_tokens: int, seed: int) -> bool:
    """Run the script on a cluster that serves the embedded model.

    Returns:
        Whether all answers were right, and no block is held afterwards.
    """
    random = Random(seed)
    tokenizer = load_tokenizer(str(CHECKPOINT))
    document = write_document(
        random, num_tokens, lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    )
    console.print(
        f"\n[bold]1. A new document[/]: {document.num_tokens} tokens, "
        f"{len(document.facts)} facts among {document.text.count('. ')} sentences"
    )
    console.print(f"   [dim]{document.text[:180]} ...[/]")
    console.print("\n[bold]2. Five questions in one session[/]; the first one brings the document")
    messages: list[dict[str, str]] = []
    answers: list[Answer] = []
    num_right = 0
    for number, (fact, question, note) in enumerate(_questions(random, document)):
        asked = question if messages else f"{document.text}\n\n{question}"
        messages.append({"role": "user", "content": asked})
        console.print(f"\n   [bold]{question}[/]  [dim]{note}[/]")
        num_new = 0 if number else document.num_tokens
        answer = _ask(console, client, messages, num_new)
        messages.append({"role": "assistant", "content": answer.text})
        answers.append(answer)
        is_right = answer.text == fact.answer
        num_right += is_right
        mark = "[green]right[/]" if is_right else f"[red]wrong, expected {fact.answer!r}[/]"
        console.print(
            f"   {mark}; first token {show_seconds(answer.first_token_s)}, "
            f"computed {answer.num_computed_tokens} tokens"
        )
    _compare(console, answers)
    first = answers[0].timeline
    console.print(f"\n[bold]4. The first question's time[/]: {first.path}")
    draw_waterfall(console, first)
    held = num_held(settled_state(client))
    console.print(f"\n{num_right} of {len(answers)} answers right; blocks still held: {held}")
    return num_right == len(answers) and held == 0


def _questions(random: Random, document: Document) -> Iterator[tuple[Fact, str, str]]:
    """(fact, question, where it stands)"""
    for index, depth in enumerate(DEPTHS):
        distances = [abs(depth - at) for at in document.depths]
        chosen = distances.index(min(distances))
        fact = document.facts[chosen]
        paraphrase = index % 2 == 1
        words = "in other words" if paraphrase else "in its words"
        note = f"stated {document.depths[chosen]:.0%} into the document, asked {words}"
        yield fact, fact.question(random, paraphrase=paraphrase), note
    absent = document.absent[0]
    yield absent, absent.question(random, paraphrase=False), "the document does not say"


def _ask(console: Console, client: Client, messages: list[dict[str, str]], num_new: int) -> Answer:
    """Stream one answer; with ``num_new`` tokens to compute, below a progress bar."""
    bar = Progress(
        TextColumn("   ring prefill"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} tokens"),
        TimeElapsedColumn(),
        console=console,
        disable=not num_new,
    )
    task = bar.add_task("prefill", total=num_new)
    text = ""
    with (
        bar,
        client.chat_stream(
            messages,
            max_tokens=MAX_ANSWER_TOKENS,
            temperature=0,
            session_id="demo",
            on_prefill=lambda done, total: bar.update(task, completed=done, total=total),
        ) as stream,
    ):
        for chunk in stream:
            if chunk.text and not text:
                bar.update(task, completed=bar.tasks[task].total)
                bar.stop()
                console.print("   ", end="")
            text += chunk.text
            console.print(chunk.text, end="", style="cyan")
    console.print()
    outcome = stream.outcome
    timeline = client.timeline(outcome.request_id).requests[0]
    return Answer(text, outcome.first_token_s or 0.0, timeline)


def _compare(console: Console, answers: list[Answer]) -> None:
    cold = answers[0].first_token_s
    warm = sorted(answer.first_token_s for answer in answers[1:])[(len(answers) - 1) // 2]
    console.print(
        f"\n[bold]3. Cold and warm[/]: first token after {show_seconds(cold)} with the document "
        f"to compute, {show_seconds(warm)} (median) without: [bold]{cold / warm:.0f}x[/]"
    )
