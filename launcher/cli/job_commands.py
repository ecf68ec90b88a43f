"""``baton ingest``, ``jobs``, ``ask``, ``trace`` and ``top``: the commands of a user of a server.

Results go to standard output, progress and errors to standard error. A server that is not there, or
a wrong id or key, is one line and exit code 2. A job that failed, or was not done in time, is one
line and exit code 1.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable

import msgspec
from rich.console import Console, Group, RenderableType

from baton_client import (
    Batch,
    BatonAPIError,
    BatonConnectionError,
    Client,
    ClientError,
    Document,
    DocumentOptions,
    JobFailed,
    Outcome,
    Stream,
    WaitTimeout,
)
from launcher.cli.job_views import IngestView, draw_batches, draw_documents
from launcher.cli.live_view import INTERVAL_S, watch
from launcher.cli.top import draw_cluster
from launcher.cli.waterfall import draw_sequence, show_seconds
from launcher.config import default_api_key
from protocol.errors import ConfigError

PIPE_WIDTH = 160  # of tables that are not for a terminal
POLL_S = 0.5
MAX_JOBS = 50  # of each kind that are shown
STDIN = "-"
FAILED, MISTAKE, INTERRUPTED = 1, 2, 130


def run(arguments: argparse.Namespace, poll_s: float = POLL_S) -> int:
    """Run one of the commands; returns the process's exit code.

    Args:
        arguments: as client_flags.py has them.
        poll_s: between two looks at a job that is waited for.
    """
    commands: dict[str, Callable[[Client, argparse.Namespace], int]] = {
        "ingest": _ingest,
        "jobs": _jobs,
        "ask": _ask,
        "trace": _trace,
        "top": _top,
    }
    try:
        with Client(arguments.url, api_key=default_api_key(), poll_s=poll_s) as client:
            return commands[arguments.command](client, arguments)
    except (JobFailed, WaitTimeout) as error:
        return _say(str(error), FAILED)
    except (ClientError, ConfigError) as error:
        return _say(f"{error}{_way_out(error)}", MISTAKE)
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _say(message: str, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code


def _way_out(error: Exception) -> str:
    if isinstance(error, BatonAPIError) and error.status == 401:
        return ": set BATON_API_KEY"
    return ": set BATON_URL or --url" if isinstance(error, BatonConnectionError) else ""


def _output() -> Console:
    is_terminal = sys.stdout.isatty()
    return Console(highlight=False, width=None if is_terminal else PIPE_WIDTH)


# -- ingest ----------------------------------------------------------------------------------------


def _ingest(client: Client, arguments: argparse.Namespace) -> int:
    document = _create(client, arguments)
    if arguments.no_wait:
        sys.stdout.write(f"{document.id}\n")
        return 0
    started = time.monotonic()
    try:
        with IngestView(Console(stderr=True, highlight=False)) as view:
            ready = client.documents.wait(document.id, arguments.timeout, view.show)
    except KeyboardInterrupt:
        sys.stderr.write(f"{document.id} goes on by itself: see baton jobs\n")
        return INTERRUPTED
    took = show_seconds(time.monotonic() - started)
    sys.stderr.write(
        f"{ready.status} after {took}: {ready.tokens.total or 0} tokens, "
        f"{ready.usage.cache_creation_tokens} computed, {ready.usage.cache_read_tokens} found\n"
    )
    sys.stdout.write(f"{ready.id}\n")
    return 0


def _create(client: Client, arguments: argparse.Namespace) -> Document:
    options: DocumentOptions = {}
    if arguments.file == STDIN:
        options["file"] = sys.stdin.buffer.read()
        options["filename"] = arguments.name or "stdin.txt"
    else:
        options["file"] = arguments.file
    if arguments.name is not None:
        options["name"] = arguments.name
    if arguments.pin is not None:
        options["pin"] = arguments.pin
    if arguments.ttl is not None:
        options["pin"], options["ttl"] = arguments.pin or "soft", arguments.ttl
    try:
        return client.documents.create(**options)
    except OSError as error:
        if error.filename is None:
            raise
        raise ConfigError(f"{arguments.file}: {error.strerror}") from error


# -- jobs ------------------------------------------------------------------------------------------


def _jobs(client: Client, arguments: argparse.Namespace) -> int:
    if arguments.action == "retry":
        return _retry(client, arguments.id)
    if arguments.json:
        return _jobs_as_json(client, is_watched=arguments.watch)
    console = _output()

    def draw() -> RenderableType:
        documents, batches = _look(client)
        tables = [draw_documents(documents)] if documents else []
        tables += [draw_batches(batches)] if batches else []
        return Group(*tables) if tables else "no documents and no batches"

    if arguments.watch:
        watch(console, draw)
    else:
        console.print(draw())
    return 0


def _retry(client: Client, job_id: str | None) -> int:
    if job_id is None:
        raise ConfigError("baton jobs retry: give the ID of a document or a batch")
    is_batch = job_id.startswith("batch_")
    job = client.batches.retry(job_id) if is_batch else client.documents.resume(job_id)
    sys.stdout.write(f"{job.id} {job.status}\n")
    return 0


def _look(client: Client) -> tuple[list[Document], list[Batch]]:
    documents = client.documents.list(limit=MAX_JOBS).data
    try:
        return documents, client.batches.list(limit=MAX_JOBS).data
    except BatonAPIError as error:
        if error.status != 404:
            raise
        return documents, []  # this server does not offer batches


def _jobs_as_json(client: Client, *, is_watched: bool) -> int:
    """One object; with ``--watch`` one on each line."""
    while True:
        documents, batches = _look(client)
        data = msgspec.json.encode({"documents": documents, "batches": batches})
        shown = data if is_watched else msgspec.json.format(data, indent=2)
        sys.stdout.write(f"{shown.decode()}\n")
        sys.stdout.flush()
        if not is_watched:
            return 0
        time.sleep(INTERVAL_S)


# -- ask, trace and top ----------------------------------------------------------------------------


def _ask(client: Client, arguments: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False)
    with console.status("asking ...") as status:
        answer = client.ask(
            arguments.question,
            document_id=arguments.document,
            session_id=arguments.session,
            max_tokens=arguments.max_tokens,
            on_prefill=lambda done, total: status.update(f"prefill {done}/{total} tokens"),
        )
        with answer:
            _print_text(answer, status.stop)
    outcome = answer.outcome
    sys.stderr.write(f"{_describe(outcome, _whole_path(client, outcome))}\n")
    return 0


def _print_text(answer: Stream[str], begin: Callable[[], None]) -> None:
    """Each piece as it comes; what follows, an error too, begins on a line of its own."""
    has_begun = False
    try:
        for text in answer:
            if not has_begun:
                begin()
            has_begun = True
            sys.stdout.write(text)
            sys.stdout.flush()
    finally:
        if has_begun:
            sys.stdout.write("\n")
            sys.stdout.flush()


def _whole_path(client: Client, outcome: Outcome) -> str:
    """The headers of a long prefill's answer are sent before its path is known."""
    if "computed=" in outcome.path or not outcome.answer_id:
        return outcome.path
    try:
        return ", ".join(one.path for one in client.timeline(outcome.answer_id).requests)
    except ClientError:
        return outcome.path  # the answer is there: nothing is wrong


def _describe(outcome: Outcome, path: str) -> str:
    parts = []
    if outcome.usage is not None:
        usage = outcome.usage
        parts.append(
            f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached, "
            f"{usage.computed_tokens} computed), {usage.completion_tokens} answered"
        )
    if outcome.cache_miss is not None:
        miss = outcome.cache_miss
        parts.append(f"{miss.missed_tokens} cached tokens missed: {miss.reason}")
    if outcome.first_token_s is not None:
        parts.append(f"first token {show_seconds(outcome.first_token_s)}")
    parts.append(f"all {show_seconds(outcome.total_s)}")
    return ", ".join(parts) + f"; {path}; baton trace {outcome.answer_id}"


def _trace(client: Client, arguments: argparse.Namespace) -> int:
    console = _output()
    for sequence in client.timeline(arguments.request_id).requests:
        draw_sequence(console, sequence)
    return 0


def _top(client: Client, arguments: argparse.Namespace) -> int:
    console = _output()
    if arguments.once:
        console.print(draw_cluster(client.cluster()))
    else:
        watch(console, lambda: draw_cluster(client.cluster()))
    return 0
