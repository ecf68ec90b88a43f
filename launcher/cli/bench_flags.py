"""The flags that several subcommands of ``baton bench`` share, and what they mean."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import default_url
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from bench.load.driving.driver import Target
    from bench.load.planning import Options
    from bench.load.workload.prompts import Dialect

EXIT_INVALID = 3  # the run was made, and must not be believed
EXIT_MISSED = 4  # the objectives were not attained, or a gate of a comparison does not hold


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    """One server, and where the run is to go."""
    parser.add_argument(
        "--url",
        help="of any OpenAI-compatible server; SSL_CERT_FILE for a certificate of one's own",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to leave manifest and records"
    )
    add_dialect_flags(parser)


def add_dialect_flags(parser: argparse.ArgumentParser) -> None:
    """How servers are spoken to."""
    add = parser.add_argument
    add("--model", default="", help="asked for when not named")
    add("--api", default="tokens", metavar="tokens|text|chat", help="how prompts are sent")
    add("--plain", action="store_true", help="send no field that is not OpenAI's")
    add("--api-key", default="", metavar="KEY")
    add("--vocabulary", metavar="LOW:HIGH", help="token ids of prompts, LOW <= id < HIGH")


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """Who asks what, and when."""

    def add(flag: str, kind: Callable[[str], Any], metavar: str, about: str) -> None:
        parser.add_argument(flag, type=kind, metavar=metavar, help=about, default=argparse.SUPPRESS)

    add("--workload", str, "KIND[:NAME=VALUE,...]", "lengths, prefix_tree, documents, ...; or YAML")
    add("--arrival", str, "KIND[:NAME=VALUE,...]", "poisson, gamma, constant, on_off, ramp")
    add("--rate", float, "R", "requests, or sessions, per second")
    add("--duration", float, "SECONDS", "users come until then")
    add("--requests", int, "N", "at most so many")
    add("--seed", int, "N", "decides everything")
    add("--cancel", str, "SHARE[:SECONDS]", "users who go away early")
    add("--users", int, "N", "a CLOSED loop of so many, which hides stalls")
    add("--trace", str, "FILE", "of Mooncake, Azure or BurstGPT")
    add("--speed", float, "X", "of the trace")
    add("--jitter", float, "SECONDS", "spreads the trace's stamps; default: their grid, if any")
    add("--scale", float, "X", "of the trace's lengths")
    add("--block-size", int, "TOKENS", "behind each of the trace's hash ids")
    add("--slo", str, "FILE|PRESET", "objectives")
    add("--timeout", float, "SECONDS", "of each request")
    add("--processes", int, "N", "of the driver")
    parser.add_argument(
        "--no-samples",
        dest="samples",
        action="store_false",
        default=argparse.SUPPRESS,
        help="do not ask a Baton cluster for its state, once a second",
    )


def options_of(arguments: argparse.Namespace) -> "Options":
    """The load that the flags describe."""
    from bench.load.planning import Options

    renamed = {"duration": "duration_s", "timeout": "timeout_s", "jitter": "jitter_s"}
    given = {renamed.get(name, name): value for name, value in vars(arguments).items()}
    return Options(**{name: given[name] for name in Options.__struct_fields__ if name in given})


def dialect_of(arguments: argparse.Namespace) -> "Dialect":
    """How the flags say that servers are spoken to."""
    from bench.load.driving.target import api_of
    from bench.load.workload.prompts import DEFAULT_VOCABULARY, Dialect

    vocabulary = DEFAULT_VOCABULARY
    if arguments.vocabulary:
        low, _, high = arguments.vocabulary.partition(":")
        if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
            raise ConfigError(f"--vocabulary is LOW:HIGH, not {arguments.vocabulary!r}")
        vocabulary = int(low), int(high)
    return Dialect(arguments.model, api_of(arguments.api), vocabulary=vocabulary)


def target_of(arguments: argparse.Namespace, url: str = "", name: str = "") -> "Target":
    """The server behind ``url``, or behind the flag, or the one on this machine."""
    from bench.load.driving.target import discover

    url = url or arguments.url or default_url()
    plain = arguments.plain
    api_key = arguments.api_key
    return discover(url, dialect_of(arguments), name=name, api_key=api_key, plain=plain)
