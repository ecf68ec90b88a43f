"""``python -P -m coordinator --config FILE``.

Standard output has JSON lines for whoever started us, and nothing else: {"control": ADDRESS,
"http": URL} when ranks can be started, {"ready": URL, "report": JSON} when the cluster answers, or
{"failed": REASON} before the exit code 1; after the start {"lost": POOL, "start": N, "reason": ...}
for a gang that is to be ended, {"serving": POOL, "start": N}, and {"alive": EPOCH} each second. A
coordinator that finds itself replaced ends at once with the exit code 3. The operator's mistakes
are one line on standard error and the exit code 2. SIGTERM and SIGINT end the whole cluster with
the exit code 0, in order; the second one at once.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
from functools import partial
from typing import NoReturn

import msgspec
import uvloop

from coordinator.config import CoordinatorConfig, read_config
from coordinator.control import Owner, StartFailed
from coordinator.http.frontend import Frontend
from coordinator.node import News
from coordinator.server import Coordinator
from protocol.errors import ConfigError
from protocol.process.ending import ASKED, DRAIN, END, die_with_parent
from protocol.process.limits import raise_open_files
from protocol.process.logs import configure_logging, finish_output

EXIT_CLEAN, EXIT_FAILED, EXIT_CONFIG, EXIT_STALE = 0, 1, 2, 3


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="coordinator")
    parser.add_argument(
        "--config", required=True, help="JSON file of the coordinator's configuration"
    )
    try:
        config = read_config(parser.parse_args().config)
        configure_logging("coordinator", config.log_level)
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        os.umask(0o077)  # documents and files are the operator's alone
        die_with_parent(config.parent_pid, END)
        raise_open_files()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except StartFailed as error:
        _say({"failed": str(error)})
        return EXIT_FAILED
    return EXIT_CLEAN


async def _serve(config: CoordinatorConfig) -> None:
    coordinator = Coordinator(
        config,
        on_control=lambda control, http: _say({"control": control, "http": http}),
        on_ready=lambda url: _say_ready(url, coordinator.frontend),
        owner=Owner(tell=_say, on_stale=_end_stale),
    )
    loop = asyncio.get_running_loop()
    num_asked = 0

    def on_asked() -> None:
        nonlocal num_asked
        num_asked += 1  # without what the launcher says, who may have got the same signal
        coordinator.stop(at_once=num_asked > 1)

    for number in ASKED:
        loop.add_signal_handler(number, on_asked)
    loop.add_signal_handler(DRAIN, coordinator.stop)
    loop.add_signal_handler(END, partial(coordinator.stop, at_once=True))
    await coordinator.run()


def _say_ready(url: str, frontend: Frontend) -> None:
    _say({"ready": url, "report": msgspec.json.encode(frontend.report()).decode()})


def _say(line: News) -> None:
    print(json.dumps(line))  # waits for nobody, see protocol/process/logs.py


def _end_stale(reason: str) -> NoReturn:
    """Put nothing away: the control socket's file, among other things, is our successor's now."""
    print(f"error: replaced by another coordinator: {reason}", file=sys.stderr)
    finish_output()
    os._exit(EXIT_STALE)


if __name__ == "__main__":
    sys.exit(main())
