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

import httpx

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
Before = str | dict[str, str]  # a document's text, or the part of a message that names it
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
def served(flags: Sequence[str], log: Path) -> Iterator[httpx.Client]:
    """A client of a cluster that runs while the block does."""
    with (
        local_cluster(flags, log) as cluster,
        httpx.Client(base_url=cluster.url, timeout=600) as client,
    ):
        yield client


def ask(client: httpx.Client, name: str, document: Document, fact: int, before: Before) -> Figure:
    """The time to the first token of an answer about ``document``; ``before`` stands for it."""
    stated = document.facts[fact]
    question = stated.question(Random(fact), paraphrase=False)
    content = (
        f"{before}\n\n{question}"
        if isinstance(before, str)
        else [before, {"type": "text", "text": question}]
    )
    body = {
        "messages": [{"role": "user", "content": content}],
        "stream": True,
        "temperature": 0,
        "max_tokens": MAX_ANSWER_TOKENS,
    }
    started, first, text = time.perf_counter(), 0.0, ""
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                if choice["delta"].get("content"):
                    first = first or time.perf_counter() - started
                    text += choice["delta"]["content"]
    return Figure(name, first, text.strip() == stated.answer)


def ingest(client: httpx.Client, document: Document) -> tuple[str, float]:
    """(its id, seconds until it is ready)."""
    started = time.perf_counter()
    reply = client.post("/v1/documents", json={"source": {"text": document.text}})
    reply.raise_for_status()
    found = reply.json()
    while found["status"] != "ready":
        assert found["status"] != "failed", found
        found = client.get(f"/v1/documents/{found['id']}", params={"wait": 30}).json()
    return found["id"], time.perf_counter() - started


def measure_tiers(arguments: argparse.Namespace, folder: Path) -> list[Figure]:
    """First tokens cold and from every tier, and ingestion beside a bare prefill."""
    source = Documents(arguments.tokens, arguments.seed)
    flags = ["--prefill", "cp2", "--decode", "tp2", "--kv-memory", "512MiB"]
    flags += ["--data-dir", str(folder / "data")]
    figures: list[Figure] = []
    kept: list[tuple[str, Document]] = []
    with served(flags, folder / "log") as c:
        ask(c, "warm-up", (first := source.new()), 0, first.text)
        for _ in range(arguments.rounds):
            document = source.new()
            figures.append(ask(c, "cold", document, 0, document.text))
            document = source.new()
            document_id, seconds = ingest(c, document)
            figures.append(Figure("ingest", seconds))
            part = {"type": "document", "document_id": document_id}
            figures.append(ask(c, "memory", document, 1, part))
            figures += [ask(c, "device", document, fact, part) for fact in (2, 3)]
            kept.append((document_id, document))
    drop_page_cache()
    with served(flags, folder / "log") as c:
        for document_id, document in kept:
            part = {"type": "document", "document_id": document_id}
            figures.append(ask(c, "disk", document, 4, part))
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
    with served(flags, folder / "log3") as c:
        ask(c, "warm-up", (first := source.new()), 0, first.text)
        for _ in range(arguments.rounds):
            for pause_s, seconds in found.items():
                with asking(str(c.base_url), pause_s) if pause_s else nothing():
                    document_id, took_s = ingest(c, source.new())
                seconds.append(took_s)
                c.delete(f"/v1/documents/{document_id}")
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
        with httpx.Client(base_url=self._url, timeout=60) as client:
            is_over = False
            while not is_over:
                body = {"prompt": "Who is it?", "max_tokens": 2}
                client.post("/v1/completions", json=body).raise_for_status()
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
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._is_over.is_set():
                body = {"source": {"text": self._source.new().text}}
                found = client.post("/v1/documents", json=body).json()
                path = f"/v1/documents/{found['id']}"
                while found["status"] != "ready" and not self._is_over.is_set():
                    found = client.get(path, params={"wait": 1}).json()
                client.delete(path)


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
