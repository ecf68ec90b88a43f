"""How often the embedded model answers rightly, by length of the document and depth of the fact.

    python -m bench.retrieval [--lengths 4096,16384,32768,65536] [--questions 200] [--documents 2]
                              [--prefill cp2] [--decode tp2] [--url URL] [--seed 0] [--save DIR]

Documents, values and questions are drawn anew from the seed (modeling/embedded/grammar.py). Each
document is asked in one chat session per question: a third in the document's words, a third in
other words, a third about what it does not say. An answer is right when it is exactly the expected
sentence. Intervals are Wilson's, 95 %. Without ``--url`` a cluster is started for it.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from baton_client import Client
from bench.environment import describe, headline
from bench.load.analysis.intervals import wilson
from bench.load.local_cluster import local_cluster
from modeling.embedded import CHECKPOINT
from modeling.embedded.grammar import Document, Fact, write_document
from modeling.text.tokenizer import load_tokenizer

NUM_DEPTHS = 10
MAX_ANSWER_TOKENS = 48
KINDS = ("stated", "paraphrased", "absent")


@dataclass(frozen=True, slots=True)
class Result:
    """One question and what came of it; ``depth`` is None when the fact is not there."""

    length: int
    kind: str
    depth: float | None
    question: str
    expected: str
    answer: str
    seconds: float

    @property
    def is_right(self) -> bool:
        return self.answer == self.expected


def ask(client: Client, document: Document, question: str, session: str) -> str:
    """The answer's text."""
    messages = [{"role": "user", "content": f"{document.text}\n\n{question}"}]
    answer = client.chat(messages, max_tokens=MAX_ANSWER_TOKENS, temperature=0, session_id=session)
    return answer.text


def questions(
    random: Random, document: Document, count: int
) -> list[tuple[str, Fact, float | None]]:
    """(kind, fact, depth) of ``count`` questions: a third of each kind, every depth in turn."""
    drawn: list[tuple[str, Fact, float | None]] = []
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        if kind == "absent":
            drawn.append((kind, document.absent[_below(random, len(document.absent))], None))
            continue
        aim = (index // len(KINDS) + random.random()) / NUM_DEPTHS % 1.0
        chosen = min(range(len(document.facts)), key=lambda i: abs(document.depths[i] - aim))
        drawn.append((kind, document.facts[chosen], document.depths[chosen]))
    return drawn


def evaluate(
    client: Client, length: int, num_documents: int, num_questions: int, seed: int
) -> list[Result]:
    """All questions about all documents of one length; prints as it goes."""
    tokenizer = load_tokenizer(str(CHECKPOINT))
    results: list[Result] = []
    for number in range(num_documents):
        random = Random(f"{seed}/{length}/{number}")
        document = write_document(
            random, length, lambda text: len(tokenizer.encode(text, add_special_tokens=False))
        )
        count = num_questions * (number + 1) // num_documents - len(results)
        for kind, fact, depth in questions(random, document, count):
            question = fact.question(random, paraphrase=kind != "stated")
            started = time.monotonic()
            answer = ask(client, document, question, f"retrieval-{seed}-{length}-{number}")
            seconds = time.monotonic() - started
            results.append(Result(length, kind, depth, question, fact.answer, answer, seconds))
        print(
            f"{length:7d} tokens, document {number + 1} of {num_documents}: "
            f"{share(results)}, first question {results[-count].seconds:.1f} s",
            flush=True,
        )
    return results


def share(results: Sequence[Result]) -> str:
    """How many of how many, with the 95 % interval (Wilson 1927)."""
    num_right, num = num_right_of(results), len(results)
    low, high = wilson(num_right, num)
    return f"{num_right}/{num} = {num_right / max(1, num):.1%} ({low:.1%} to {high:.1%})"


def num_right_of(results: Sequence[Result]) -> int:
    return sum(result.is_right for result in results)


def depth_of(result: Result) -> int | None:
    """Which tenth of the document holds the fact."""
    return None if result.depth is None else min(NUM_DEPTHS - 1, int(result.depth * NUM_DEPTHS))


def report(results: Sequence[Result]) -> str:
    """Tables by length and kind, and by length and depth, in Markdown."""
    lengths = sorted({result.length for result in results})
    lines = ["| tokens | all | in the document's words | in other words | not stated |"]
    lines += ["| ---: | --- | --- | --- | --- |"]
    for length in lengths:
        own = [result for result in results if result.length == length]
        cells = [share([r for r in own if r.kind == kind]) for kind in KINDS]
        lines.append(f"| {length} | {share(own)} | {' | '.join(cells)} |")
    head = " | ".join(f"{10 * depth}-{10 * depth + 10} %" for depth in range(NUM_DEPTHS))
    lines += ["", "Right answers by depth of the fact:", "", f"| tokens | {head} |"]
    lines += ["| ---: |" + " --- |" * NUM_DEPTHS]
    for length in lengths:
        own = [result for result in results if result.length == length]
        tenths = [[r for r in own if depth_of(r) == depth] for depth in range(NUM_DEPTHS)]
        cells = [f"{num_right_of(some)}/{len(some)}" if some else "-" for some in tenths]
        lines.append(f"| {length} | {' | '.join(cells)} |")
    wrong = [result for result in results if not result.is_right]
    lines += [""] + [f"wrong: {r.question!r} -> {r.answer!r}, not {r.expected!r}" for r in wrong]
    return "\n".join(lines)


def save(results: Sequence[Result], text: str, folder: Path, command: str) -> None:
    """retrieval.md and retrieval.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    body = f"# {headline()}\n\n`{command}`\n\n{text}\n"
    (folder / "retrieval.md").write_text(body)
    lines = [json.dumps({**asdict(r), "right": r.is_right}) for r in results]
    (folder / "retrieval.jsonl").write_text(
        "\n".join([json.dumps({"environment": describe()}), *lines]) + "\n"
    )


def _below(random: Random, bound: int) -> int:
    return int(random.random() * bound)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.retrieval", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--lengths", default="4096,16384,32768,65536")
    parser.add_argument("--questions", type=int, default=200, help="of each length")
    parser.add_argument("--documents", type=int, default=2, help="of each length")
    parser.add_argument("--prefill", default="cp2")
    parser.add_argument("--decode", default="tp2")
    parser.add_argument("--url", help="of a server of this model; else one is started")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="DIR")
    return parser


def main() -> None:
    """Evaluate, print, and save when asked to."""
    arguments = _parser().parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    flags = (str(CHECKPOINT), "--prefill", arguments.prefill, "--decode", arguments.decode)
    results: list[Result] = []
    print(headline())
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(local_cluster(flags)).url
        client = stack.enter_context(Client(url))
        for length in lengths:
            results += evaluate(
                client, length, arguments.documents, arguments.questions, arguments.seed
            )
    text = report(results)
    print(f"\n{text}")
    if arguments.save:
        command = (
            f"python -m bench.retrieval --lengths {arguments.lengths} --questions "
            f"{arguments.questions} --documents {arguments.documents} --seed {arguments.seed}"
        )
        save(results, text, arguments.save, command)


if __name__ == "__main__":
    main()
