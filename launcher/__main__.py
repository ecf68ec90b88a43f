"""``baton``: the command line. Mistakes are one line on standard error and exit code 2."""

import argparse
import logging
import sys
from typing import Any, NoReturn

import msgspec

from launcher.cli.bench_commands import add_bench, run_bench
from launcher.cli.client_flags import CLIENT_COMMANDS, add_client_flags
from launcher.cli.serve_flags import EPILOG, add_serve_flags
from launcher.config import resolve
from protocol.errors import ConfigError
from protocol.process.logs import configure_logging


class _Parser(argparse.ArgumentParser):
    """A mistake is one line that names it, not the usage of everything."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message} (see {self.prog} --help)\n")
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="baton", description="Disaggregated LLM serving.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    serve = commands.add_parser(
        "serve",
        help="run a cluster",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add_serve_flags(serve)
    config = commands.add_parser("config", help="show the configuration that serve would run")
    # A command of its own, not an argument: MODEL may then stand behind --resolved.
    actions = config.add_subparsers(dest="action", required=True, parser_class=_Parser)
    show = actions.add_parser("show", help="the configuration as given, or that of each process")
    show.add_argument("--resolved", action="store_true", help="every field of every process")
    add_serve_flags(show)
    doctor = commands.add_parser(
        "doctor",
        help="check this machine, and a cluster that runs",
    )
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.add_argument("--url", help="of a running cluster, to be looked at too")
    demo = commands.add_parser("demo", help="a small disaggregated cluster at work")
    demo.add_argument("--keep", action="store_true", help="leave the cluster running")
    demo.add_argument("--tokens", type=int, default=32_768, metavar="N", help="of the document")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of the document")
    add_bench(commands)
    add_client_flags(commands)
    return parser


def _serve_config(arguments: argparse.Namespace) -> Any:  # noqa: ANN401 - resolved lazily
    flags = vars(arguments).copy()
    file = flags.pop("config")
    sets = tuple(flags.pop("sets"))
    for name in ("command", "action", "resolved"):
        flags.pop(name, None)
    return resolve(file, flags, sets)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        return _run(arguments, argv)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _run(arguments: argparse.Namespace, argv: list[str] | None) -> int:
    if arguments.command in CLIENT_COMMANDS:
        from launcher.cli.job_commands import run

        return run(arguments)
    if arguments.command == "serve":
        from launcher.cli.serve import serve

        config = _serve_config(arguments)
        configure_logging("launcher", config.log_level)
        return serve(config)
    if arguments.command == "config":
        from launcher.cli.show import asked, resolved

        shown = (resolved if arguments.resolved else asked)(_serve_config(arguments))
        print(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())
        return 0
    if arguments.command == "doctor":
        from launcher.doctor.doctor import doctor

        return doctor(as_json=arguments.json, url=arguments.url)
    if arguments.command == "bench":
        return run_bench(arguments, argv)
    from launcher.cli.demo import demo

    logging.getLogger().setLevel("WARNING")
    return demo(keep=arguments.keep, num_tokens=arguments.tokens, seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
