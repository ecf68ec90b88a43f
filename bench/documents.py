"""What it is worth to ingest a document: first tokens from every tier, throughput, interference.

    python -m bench.documents [--tokens 32768] [--rounds 3] [--requests 640] [--rate 1.0]
                              [--skip tiers|interference|asked ...] [--save DIR]

*Tiers*, on ``--prefill cp2 --decode tp2`` with the embedded model, in each round two documents that
nobody has seen: one is asked about cold, with all of its text in the question; the other one is
ingested, and asked about twice, which finds its KV in the store's memory and then on the device.
Then everything is killed and started again, the kernel's page cache is dropped if that is allowed,
and the first question about each finds it on disk. Ratios are of medians of one run.

*Interference*, on ``--prefill cp1 --decode tp1``: an open loop of prompts with nothing beside it,
and the same load while documents are ingested without a pause, in turns.

*Asked*, on the same: how long it takes to ingest a document while nobody asks, and while somebody
asks for two tokens so often, in turns.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from baton_client import Client, WaitTimeout
from bench.environment import describe, headline
from bench.load.analysis.metrics import summarise
from bench.load.driving.target import discover
from bench.load.local_cluster import local_cluster
from bench.load.planning import Options, recipe_of
from bench.load.record import RequestRecord
from bench.load.run import execute
from bench.load.workload.prompts import Dialect
from modeling.embedded import CHECKPOINT
from modeling.embedded.grammar import Document, write_document
from modeling.text.tokenizer import load_tokenizer

MAX_ANSWER_TOKENS = 40
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
PAUSES_S = (0.0, 5.0, 1.0)  # between two questions; 0 is none at all
LIMITS = {"device": 0.03, "memory": 0.10, "disk": 0.25}


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured time; ``is_right`` when the answer was."""

    name: str
    seconds: float
    is_right: bool = True


class Documents:
    """Documents that nobody has seen, all of one length."""

    def __init__(self, num_tokens: int, seed: int) -> None:
        self._tokenizer = load_tokenizer(str(CHECKPOINT))
        self._random = Random(seed)
        self._num_tokens = num_tokens

    def new(self) -> Document:
        return write_document(self._random, self._num_tokens, self._count)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))


@contextlib.contextmanager
def served(flags: Sequence[str], log: Path) -> Iterator[tuple[str, Client]]:
    """(URL, client) of a cluster that runs while the block does."""
    with local_cluster(flags, log) as cluster, Client(cluster.url) as client:
        yield cluster.url, client


def ask(
    client: Client, name: str, document: Document, fact: int, document_id: str | None = None
) -> Figure:
    """The time to the first token of an answer about ``document``.

    Args:
        client: of the server.
        name: of the figure.
        document: what is asked about.
        fact: of the document, by its number.
        document_id: what it was ingested as; without one its text is part of the question.
    """
    stated = document.facts[fact]
    question = stated.question(Random(fact), paraphrase=False)
    if document_id is None:
        question = f"{document.text}\n\n{question}"
    answer = client.ask(
        question, document_id=document_id, temperature=0, max_tokens=MAX_ANSWER_TOKENS
    )
    is_right = answer.read().strip() == stated.answer
    return Figure(name, answer.outcome.first_token_s or 0.0, is_right)


def ingest(client: Client, document: Document) -> tuple[str, float]:
    """(its id, seconds until it is ready)."""
    started = time.perf_counter()
    document_id = client.documents.create(text=document.text).id
    client.documents.wait(document_id)
    return document_id, time.perf_counter() - started


def measure_tiers(arguments: argparse.Namespace, folder: Path) -> list[Figure]:
    """First tokens cold and from every tier, and ingestion beside a bare prefill."""
    source = Documents(arguments.tokens, arguments.seed)
    flags = ["--prefill", "cp2", "--decode", "tp2", "--kv-memory", "512MiB"]
    flags += ["--data-dir", str(folder / "data")]
    figures: list[Figure] = []
    kept: list[tuple[str, Document]] = []
    with served(flags, folder / "log") as (_, client):
        ask(client, "warm-up", source.new(), 0)
        for _ in range(arguments.rounds):
            document = source.new()
            figures.append(ask(client, "cold", document, 0))
            document = source.new()
            document_id, seconds = ingest(client, document)
            figures.append(Figure("ingest", seconds))
            figures.append(ask(client, "memory", document, 1, document_id))
            figures += [ask(client, "device", document, fact, document_id) for fact in (2, 3)]
            kept.append((document_id, document))
    drop_page_cache()
    with served(flags, folder / "log") as (_, client):
        for document_id, document in kept:
            figures.append(ask(client, "disk", document, 4, document_id))
    return figures


def drop_page_cache() -> bool:
    """Whether what is read next comes from the disk itself."""
    try:
        DROP_CACHES.write_text("1")
    except OSError:
        return False
    return True


def measure_interference(
    arguments: argparse.Namespace, folder: Path
) -> dict[str, list[RequestRecord]]:
    """The records of both, each over all of its turns."""
    flags = ["--prefill", "cp1", "--decode", "tp1", "--kv-memory", "512MiB"]
    flags += ["--data-dir", str(folder / "data2")]
    options = Options(
        workload=f"lengths:prompt={arguments.prompt},output=4",
        rate=arguments.rate,
        requests=arguments.requests // 2,
        timelines=False,
        processes=1,
    )
    recipe = recipe_of(options)
    found: dict[str, list[RequestRecord]] = {"alone": [], "ingesting": []}
    with local_cluster(flags, folder / "log2") as cluster:
        target = discover(cluster.url, Dialect(""), name="baton")
        for turn, name in enumerate(("alone", "ingesting", "ingesting", "alone")):
            # Each turn has prompts of its own: the same ones would be found in the cache.
            plan = recipe.plan(target, "bench.documents", recipe.schedule(turn), None)
            with background(cluster.url, arguments) if name == "ingesting" else nothing():
                manifest, records = execute(plan)
            if not manifest.valid:
                print(f"# a turn is not valid: {'; '.join(manifest.invalid_reasons)}")
            found[name] += records
    return found


def measure_asked(arguments: argparse.Namespace, folder: Path) -> dict[float, list[float]]:
    """Seconds of an ingestion, by the seconds between two short questions; 0 is none at all."""
    source = Documents(arguments.tokens, arguments.seed + 2)
    flags = ["--prefill", "cp1", "--decode", "tp1", "--kv-memory", "512MiB"]
    flags += ["--data-dir", str(folder / "data3")]
    found: dict[float, list[float]] = {pause_s: [] for pause_s in PAUSES_S}
    with served(flags, folder / "log3") as (url, client):
        ask(client, "warm-up", source.new(), 0)
        for _ in range(arguments.rounds):
            for pause_s, seconds in found.items():
                with asking(url, pause_s) if pause_s else nothing():
                    document_id, took_s = ingest(client, source.new())
                seconds.append(took_s)
                client.documents.delete(document_id)
    return found


class asking:
    """A question of a few tokens, answered with two, at once and after each pause."""

    def __init__(self, url: str, pause_s: float) -> None:
        self._url = url
        self._pause_s = pause_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        with Client(self._url, timeout_s=60.0) as client:
            is_over = False
            while not is_over:
                client.complete("Who is it?", max_tokens=2)
                is_over = self._is_over.wait(self._pause_s)


class nothing:
    """No load beside."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class background:
    """Documents are ingested one after the other until the block ends."""

    def __init__(self, url: str, arguments: argparse.Namespace) -> None:
        self._url = url
        self._source = Documents(arguments.tokens, arguments.seed + 1)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        with Client(self._url, timeout_s=60.0) as client:
            while not self._is_over.is_set():
                document_id = client.documents.create(text=self._source.new().text).id
                is_ready = False
                while not is_ready and not self._is_over.is_set():
                    with contextlib.suppress(WaitTimeout):
                        client.documents.wait(document_id, timeout_s=1.0)
                        is_ready = True
                client.documents.delete(document_id)


def tiers_report(figures: Sequence[Figure], num_tokens: int) -> list[str]:
    """Medians, and ratios to the cold one."""
    by_name: dict[str, list[float]] = {}
    for figure in figures:
        by_name.setdefault(figure.name, []).append(figure.seconds)
    median = {name: statistics.median(values) for name, values in by_name.items()}
    cold = median["cold"]
    lines = [f"{num_tokens} tokens; medians of one run", ""]
    lines += ["| first token | s | of cold | at most | n |", "| --- | ---: | ---: | ---: | ---: |"]
    for name in ("cold", "device", "memory", "disk"):
        limit = f"{LIMITS[name]:.0%}" if name in LIMITS else ""
        shown = f"{median[name]:.3f} | {median[name] / cold:.1%} | {limit}"
        lines.append(f"| {name} | {shown} | {len(by_name[name])} |")
    share = cold / median["ingest"]
    rate = num_tokens / median["ingest"]
    num_right = sum(figure.is_right for figure in figures)
    lines += [
        "",
        f"ingested in {median['ingest']:.2f} s, {rate:.0f} tokens/s: {share:.1%} of the bare "
        f"prefill's throughput (at least 95 %)",
        f"answers right: {num_right} of {len(figures)}",
    ]
    return lines


def interference_report(found: dict[str, list[RequestRecord]]) -> list[str]:
    """Both distributions and their ratio."""
    lines = ["| TTFT | p50 s | p99 s | interval of p99 | n |", "| --- | ---: | ---: | --- | ---: |"]
    p99: dict[str, float] = {}
    for name, records in found.items():
        ttft = summarise(records, None).metrics["ttft_s"]
        values = sorted(r.token_times_s[0] - r.intended_s for r in records if r.token_times_s)
        p99[name] = values[min(len(values) - 1, int(0.99 * len(values)))]
        low, high = ttft.interval.get("p99", (float("nan"), float("nan")))
        shown = f"{statistics.median(values):.3f} | {p99[name]:.3f} | {low:.3f} to {high:.3f}"
        lines.append(f"| {name} | {shown} | {len(values)} of {len(records)} |")
    ratio = p99["ingesting"] / p99["alone"]
    return [*lines, "", f"p99 while ingesting: {ratio:.2f} of that alone (at most 1.3)"]


def asked_report(found: dict[float, list[float]], num_tokens: int) -> list[str]:
    """Medians, and their speed as a share of that while nobody asks."""
    alone = statistics.median(found[0.0])
    lines = [f"{num_tokens} tokens; medians of {len(found[0.0])}", ""]
    lines += ["| a question | ingested in s | of the speed alone |", "| --- | ---: | ---: |"]
    for pause_s, seconds in found.items():
        name = f"every {pause_s:g} s" if pause_s else "never"
        median = statistics.median(seconds)
        lines.append(f"| {name} | {median:.2f} | {alone / median:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.documents")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each document")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=640, help="with, and without ingestion")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument("--prompt", default="uniform/1024/4096", help="lengths of the prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", nargs="*", default=(), choices=("tiers", "interference", "asked"))
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    print(headline())
    sections: list[tuple[str, list[str]]] = []
    raw: list[dict[str, Any]] = []
    parts: dict[str, Callable[[Path], list[str]]] = {}

    def tiers(folder: Path) -> list[str]:
        figures = measure_tiers(arguments, folder)
        raw.extend(asdict(figure) for figure in figures)
        return tiers_report(figures, arguments.tokens)

    def interference(folder: Path) -> list[str]:
        return interference_report(measure_interference(arguments, folder))

    def asked(folder: Path) -> list[str]:
        return asked_report(measure_asked(arguments, folder), arguments.tokens)

    parts = {"tiers": tiers, "interference": interference, "asked": asked}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            if name not in arguments.skip:
                lines = part(Path(folder))
                print("\n".join(["", *lines]))
                sections.append((name, lines))
    if arguments.save is not None:
        arguments.save.mkdir(parents=True, exist_ok=True)
        text = [f"# Documents\n\n`python -m bench.documents`; {headline()}"]
        text += [f"\n## {name}\n\n" + "\n".join(lines) for name, lines in sections]
        (arguments.save / "documents.md").write_text("\n".join(text) + "\n")
        rows = [json.dumps({"environment": describe()}), *(json.dumps(row) for row in raw)]
        (arguments.save / "documents.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
