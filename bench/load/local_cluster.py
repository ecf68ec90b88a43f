"""A cluster of our own for as long as a comparison lasts, started as an operator would start it.

``baton serve`` is started as a child: this layer knows its command line, and nothing else of it.
"""

import contextlib
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from protocol.errors import ConfigError

START_S = 180.0
STOP_S = 25.0


@contextlib.contextmanager
def local_cluster(flags: Sequence[str], log: Path | None = None) -> Iterator[str]:
    """The URL of a ``baton serve`` with these flags, on a free port; it ends with the block.

    Raises:
        ConfigError: it did not become ready.
    """
    command = [sys.executable, "-P", "-m", "launcher", "serve", "--port", "0", *flags]
    with contextlib.ExitStack() as stack:
        errors = None if log is None else stack.enter_context(log.open("a"))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        stack.callback(_stop, process)
        line = _first_line(process)
        if not line.startswith("ready http"):
            where = f"; see {log}" if log is not None else ""
            told = line.strip() or "it said nothing"
            raise ConfigError(f"baton serve {' '.join(flags)} did not start: {told}{where}")
        yield line.split()[1]


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(START_S):
            return f"nothing in {START_S:.0f} s"
    return process.stdout.readline()


def _stop(process: subprocess.Popen[str]) -> None:
    """It ends its ranks itself; killed, it would leave that to them."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
