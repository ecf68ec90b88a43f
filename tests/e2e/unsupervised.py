"""A cluster of which nobody restarts what dies: ``python unsupervised.py`` with a ServeConfig as
JSON on standard input. Says one line ``{"url": ..., "pids": {...}}``, ends when its input does."""

import json
import sys

import msgspec

from launcher.cli.serve import run_directory
from launcher.config import ServeConfig
from launcher.resolved import resolve_cluster
from launcher.supervise.supervisor import Supervisor


def main() -> None:
    config = msgspec.json.decode(sys.stdin.readline(), type=ServeConfig)
    with run_directory() as run_dir, Supervisor(resolve_cluster(config), run_dir) as supervisor:
        supervisor.start()
        print(json.dumps({"url": supervisor.url, "pids": supervisor.pids()}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
