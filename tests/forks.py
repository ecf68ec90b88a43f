"""Processes with torch, as forks of one that has it: to import it takes longer than they do."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from launcher.supervise.forks import ForkedProcess, ForkServer

_ROOT = Path(__file__).resolve().parents[1]
_PRELOADED = ("decode.worker", "prefill.worker", "tests.ring_attention.ring_cases")


class TorchForks:
    """A fork server of ranks, with the environment of one. ``close`` ends it."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(_ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {"OMP_NUM_THREADS": "1", "UCX_LOG_FILE": "stderr"}  # not standard output
        self._server = ForkServer(_PRELOADED, environment)
        self._process = self._server.start()
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"preloaded": True}

    def start(self, module: str, *arguments: str, pass_fds: Sequence[int] = ()) -> ForkedProcess:
        """What ``python -P -m module arguments`` would start."""
        return self._server.fork(module, *arguments, pass_fds=pass_fds)

    def close(self) -> None:
        self._server.close()
        self._process.communicate(timeout=60)


def end(process: ForkedProcess) -> None:
    """Kill it if it runs, and close what it wrote to."""
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()


def outputs(process: ForkedProcess, timeout_s: float) -> tuple[str, str]:
    """What it has written when it has ended, little of it."""
    process.wait(timeout_s)
    return process.stdout.read().decode(), process.stderr.read().decode()
