"""``baton demo``: a small disaggregated cluster at work, from nothing to an answer.

1. A checkpoint with random weights is written: nothing is downloaded, so the answers are babble,
   but every byte of KV takes the way that a real model's would.
2. A cluster ``--prefill cp2 --decode tp2`` starts on this machine's CPU.
3. A long text, Baton's own source, goes through the ring; its KV through NIXL, layer by layer.
4. The answer streams. Then the same session asks again, and only what is new is computed.
5. What happened is shown: ring size, bytes moved, layers overlapped, blocks still held.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import kvtransfer
from bench.checkpoint import SHAPES, write_llama
from launcher.config import ServeConfig
from launcher.resolved import resolve_cluster
from launcher.serve import run_directory, signals_to
from launcher.supervisor import ClusterFailed, Supervisor
from protocol.errors import ConfigError

NUM_PROMPT_TOKENS = 8192
NUM_ANSWER_TOKENS = 48
QUESTION = "\n# What does the code above promise?\n"


@dataclass
class Answer:
    """What one streamed completion brought."""

    request_id: str = ""
    path: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    first_token_s: float = 0.0
    total_s: float = 0.0


def demo(*, keep: bool) -> int:
    """Run the demonstration; returns the process's exit code."""
    console = Console(highlight=False)
    try:
        with run_directory() as run_dir:
            return _run(console, run_dir, keep=keep)
    except (ConfigError, ClusterFailed) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def _run(console: Console, run_dir: Path, *, keep: bool) -> int:
    console.rule("[bold]Baton[/]: one cluster, two legs")
    checkpoint = run_dir / "demo-model"
    with console.status("writing a checkpoint (random weights, Llama shape) ..."):
        write_llama(checkpoint, SHAPES["demo"])
    config = ServeConfig(
        model=str(checkpoint),
        prefill=("cp2",),
        decode=("tp2",),
        dtype="bfloat16",
        kv_memory="256MiB",
        port=8000 if keep else 0,
        checksum="always",
        transport="auto",
    )
    cluster = resolve_cluster(config)
    with (
        Supervisor(cluster, run_dir, run_dir / "logs") as supervisor,
        signals_to(supervisor.reports),
    ):
        started = time.monotonic()
        with console.status("starting a coordinator, a ring of 2 prefills, a decode pool of 2 ..."):
            supervisor.start()
        console.print(f"ready {supervisor.url} after {time.monotonic() - started:.1f} s")
        with httpx.Client(base_url=supervisor.url, timeout=600.0) as client:
            _tell_the_story(console, client)
        if keep:
            console.print(f"\nstill serving at {supervisor.url}; Ctrl-C ends it")
            supervisor.supervise()
    console.print("every process has ended")
    return 0


def _tell_the_story(console: Console, client: httpx.Client) -> None:
    prompt = _long_prompt(client)
    console.print(f"\n[bold]1. A long text[/]: {len(prompt)} tokens of Baton's own source")
    cold = _ask(console, client, prompt)
    _show(console, client, cold)
    question = client.post("/tokenize", json={"prompt": QUESTION}).json()["tokens"]
    console.print(f"\n[bold]2. The same session asks again[/]: {len(question)} new tokens")
    warm = _ask(console, client, prompt + cold.token_ids + question)
    _show(console, client, warm)
    ratio = cold.first_token_s / warm.first_token_s
    console.print(f"\ntime to first token, cold over warm: [bold]{ratio:.1f}x[/]")
    held = _held_blocks(client)
    console.print(f"blocks still held by anyone: [bold]{held}[/]")


def _long_prompt(client: httpx.Client) -> list[int]:
    folder = Path(kvtransfer.__file__).parent.parent
    packages = ("protocol", "kvcache", "kvtransfer", "ring_attention", "prefill", "decode")
    files = [file for package in packages for file in sorted((folder / package).glob("*.py"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)[: 6 * NUM_PROMPT_TOKENS]
    tokens: list[int] = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    return tokens[:NUM_PROMPT_TOKENS]


def _ask(console: Console, client: httpx.Client, prompt: list[int]) -> Answer:
    body = {
        "prompt": prompt,
        "max_tokens": NUM_ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "session_id": "demo",
        "return_token_ids": True,
    }
    answer = Answer()
    bar = Progress(
        TextColumn("prefill"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} tokens"),
        TimeElapsedColumn(),
        console=console,
    )
    started = time.monotonic()
    with bar, client.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            raise ClusterFailed(reply.read().decode(), is_config=False)
        answer.request_id = reply.headers["x-request-id"]
        answer.path = reply.headers["x-baton-path"]
        task = bar.add_task("prefill", total=len(prompt))
        for event in _events(reply, bar, task):
            if not answer.first_token_s:
                answer.first_token_s = time.monotonic() - started
                bar.update(task, completed=len(prompt))
            for choice in event["choices"]:
                answer.text += choice["text"]
                answer.token_ids += choice.get("token_ids") or []
    answer.total_s = time.monotonic() - started
    return answer


def _events(reply: httpx.Response, bar: Progress, task: TaskID) -> Iterator[dict[str, Any]]:
    """The data events of the stream; comments move the progress bar."""
    for line in reply.iter_lines():
        if line.startswith(": prefill "):
            bar.update(task, completed=int(line.removeprefix(": prefill ").split("/")[0]))
        elif line.startswith("data: ") and line != "data: [DONE]":
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ClusterFailed(event["error"]["message"], is_config=False)
            yield event


def _show(console: Console, client: httpx.Client, answer: Answer) -> None:
    shown = " ".join(answer.text.split())
    console.print(f"   streamed {len(answer.token_ids)} tokens: [dim]{shown[:70]!r} ...[/]")
    trace = client.get(f"/v1/requests/{answer.request_id}/timeline").json()
    timeline = trace["requests"][0]
    path, transfer = timeline["prefill"], timeline["transfer"]
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("first token", f"{answer.first_token_s * 1000:.0f} ms")
    table.add_row("all tokens", f"{answer.total_s * 1000:.0f} ms")
    table.add_row("x-baton-path", timeline["path"])
    if path is not None:
        table.add_row("ring size", str(path["ring_size"]))
        table.add_row("chunks", str(path["num_chunks"]))
    if transfer is not None:
        overlapped = f"{transfer['num_layers_overlapped']} of {transfer['num_layers']}"
        table.add_row("transport", transfer["transport"])
        table.add_row("moved", f"{transfer['num_bytes'] / 1e6:.1f} MB")
        table.add_row("in", f"{transfer['num_segments']} segments")
        table.add_row("layers overlapped", overlapped)
        table.add_row("not hidden", f"{transfer['exposed_s'] * 1000:.1f} ms after the prefill")
    console.print(table)


def _held_blocks(client: httpx.Client) -> int:
    """Blocks that are neither free nor cached, once the pools have reported an idle state."""
    deadline = time.monotonic() + 10.0
    while True:
        pools = client.get("/v1/cluster").json()["pools"]
        spaces = [space for pool in pools for space in pool["blocks"]]
        held: int = sum(space["total"] - space["free"] - space["cached"] for space in spaces)
        if (held == 0 and spaces) or time.monotonic() > deadline:
            return held
        time.sleep(0.2)  # heartbeats carry the counts, one each second
