"""The commands that talk to a running server, and their flags."""

import argparse
from typing import Any

from launcher.config import default_url

CLIENT_COMMANDS = ("ingest", "jobs", "ask", "trace", "top")


def add_client_flags(commands: Any) -> None:  # noqa: ANN401 - argparse does not name this type
    """Add the commands to those of ``baton``."""
    ingest = _command(commands, "ingest", "have a document's KV computed and kept")
    ingest.add_argument("file", metavar="FILE", help="text, Markdown, HTML or PDF; - is stdin")
    ingest.add_argument("--name", help="shown in place of the file's")
    ingest.add_argument("--pin", choices=["soft", "hard"], help="keep it")
    ingest.add_argument("--ttl", metavar="TIME", help="of the pin: 90s, 15m, 2h, 7d")
    ingest.add_argument("--no-wait", action="store_true", help="only say its id")
    ingest.add_argument("--timeout", type=float, default=86_400.0, metavar="SECONDS")
    jobs = _command(commands, "jobs", "the newest documents and batches")
    jobs.add_argument("action", nargs="?", choices=["retry"], help="what was set aside")
    jobs.add_argument(
        "id", nargs="?", metavar="ID", help="of a document or a batch, to be tried again"
    )
    jobs.add_argument("--json", action="store_true", help="for programs")
    jobs.add_argument("--watch", action="store_true", help="until q or Ctrl-C")
    ask = _command(commands, "ask", "a question; its answer as it comes")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--document", metavar="ID", help="what it is about")
    ask.add_argument("--session", metavar="ID", help="keeps a conversation on one pool")
    ask.add_argument("--max-tokens", type=int, metavar="N", help="of the answer")
    trace = _command(commands, "trace", "where one request's time went")
    trace.add_argument("request_id", metavar="REQUEST_ID", help="of an answer, or x-request-id")
    top = _command(commands, "top", "a live view of the cluster")
    top.add_argument("--once", action="store_true", help="one frame, and no more")


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:  # noqa: ANN401
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--url", default=default_url(), help="of the server, default %(default)s")
    return parser
