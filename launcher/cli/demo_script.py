"""What ``baton demo`` tells: one long document, five questions about it, and where the time went.

The document is generated, so nobody has seen it before; the questions are about facts at different
depths of it, in its own words and in others, and about one that it does not state. The answers come
from the embedded model: had one block of KV been lost on the way, they would be wrong.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from coordinator.client.state import RequestTimeline, SequenceTimeline
from launcher.cli.waterfall import draw_waterfall, show_seconds
from launcher.supervise.supervisor import ClusterFailed
from modeling.embedded import CHECKPOINT
from modeling.embedded.grammar import Document, Fact, write_document
from modeling.text.tokenizer import load_tokenizer

MAX_ANSWER_TOKENS = 48
DEPTHS = (0.5, 0.1, 0.9, 0.3)  # of the facts that are asked for


@dataclass(slots=True)
class Answer:
    """What one streamed chat completion brought."""

    request_id: str = ""
    text: str = ""
    first_token_s: float = 0.0
    timeline: SequenceTimeline = field(default_factory=SequenceTimeline)

    @property
    def num_computed_tokens(self) -> int:
        return self.timeline.num_prompt_tokens - self.timeline.num_cached_tokens


def tell(console: Console, client: httpx.Client, num_tokens: int, seed: int) -> bool:
    """Run the story on a cluster that serves the embedded model; returns whether all went well."""
    random = Random(seed)
    tokenizer = load_tokenizer(str(CHECKPOINT))
    document = write_document(
        random, num_tokens, lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    )
    console.print(
        f"\n[bold]1. A document that nobody has seen[/]: {document.num_tokens} tokens, "
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
    held = held_blocks(client)
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


def _ask(
    console: Console, client: httpx.Client, messages: list[dict[str, str]], num_new: int
) -> Answer:
    """Stream one answer; with ``num_new`` tokens to compute, below a progress bar."""
    body = {
        "messages": messages,
        "max_tokens": MAX_ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
        "session_id": "demo",
    }
    answer = Answer()
    bar = Progress(
        TextColumn("   ring prefill"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} tokens"),
        TimeElapsedColumn(),
        console=console,
        disable=not num_new,
    )
    started = time.monotonic()
    with bar, client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise ClusterFailed(reply.read().decode(), is_config=False)
        answer.request_id = reply.headers["x-request-id"]
        task = bar.add_task("prefill", total=num_new)
        for event in _events(reply, bar, task):
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                if piece and not answer.first_token_s:
                    answer.first_token_s = time.monotonic() - started
                    bar.update(task, completed=bar.tasks[task].total)
                    bar.stop()
                    console.print("   ", end="")
                answer.text += piece
                console.print(piece, end="", style="cyan")
    console.print()
    trace = client.get(f"/v1/requests/{answer.request_id}/timeline")
    answer.timeline = msgspec.json.decode(trace.content, type=RequestTimeline).requests[0]
    return answer


def _events(reply: httpx.Response, bar: Progress, task: TaskID) -> Iterator[dict[str, Any]]:
    """The data events of the stream; comments move the progress bar."""
    for line in reply.iter_lines():
        if line.startswith(": prefill "):
            done, total = line.removeprefix(": prefill ").split("/")
            bar.update(task, completed=int(done), total=int(total))
        elif line.startswith("data: ") and line != "data: [DONE]":
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ClusterFailed(event["error"]["message"], is_config=False)
            yield event


def _compare(console: Console, answers: list[Answer]) -> None:
    cold = answers[0].first_token_s
    warm = sorted(answer.first_token_s for answer in answers[1:])[(len(answers) - 1) // 2]
    console.print(
        f"\n[bold]3. Cold and warm[/]: first token after {show_seconds(cold)} with the document "
        f"to compute, {show_seconds(warm)} (median) without: [bold]{cold / warm:.0f}x[/]"
    )


def held_blocks(client: httpx.Client) -> int:
    """Blocks that are neither free nor cached, once the pools have reported an idle state."""
    deadline = time.monotonic() + 10.0
    while True:
        pools = client.get("/v1/cluster").json()["pools"]
        spaces = [space for pool in pools for space in pool["blocks"]]
        held: int = sum(space["total"] - space["free"] - space["cached"] for space in spaces)
        if (held == 0 and spaces) or time.monotonic() > deadline:
            return held
        time.sleep(0.2)  # heartbeats carry the counts, one each second
