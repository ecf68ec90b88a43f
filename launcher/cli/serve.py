"""``baton serve``: from a configuration to one line ``ready http://HOST:PORT``, and to the end.

1. A private folder for sockets and configurations is made.
2. The coordinator starts and says where its control socket and its HTTP port are.
3. The ranks start, here or through Ray, and introduce themselves to the coordinator.
4. The coordinator says that every pool serves: we print the ready line.
5. A gang that dies is started again, and so is the coordinator (supervisor.py).
6. A signal ends everything, once what runs has ended or ``shutdown_grace_s`` is over, a second one
   at once; so does the loss of all that can serve. Nothing of a cluster outlives it.
"""

import contextlib
import errno
import logging
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from coordinator.http.start_report import render
from launcher.config import ServeConfig, parse_size, runtime_root
from launcher.resolved import resolve_cluster
from launcher.supervise.processes import LogFiles, Report, StopAsked
from launcher.supervise.supervisor import ClusterFailed, Supervisor
from protocol.errors import ConfigError
from protocol.process.folders import temporary_folder
from protocol.process.limits import raise_open_files

log = logging.getLogger(__name__)


@contextmanager
def run_directory() -> Iterator[Path]:
    """A private folder that is gone afterwards; what killed launchers have left goes first.

    Raises:
        ConfigError: it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            # Unix socket paths end at 107 bytes, so the name is short.
            path = stack.enter_context(temporary_folder("baton-", runtime_root()))
        except OSError as error:
            raise ConfigError(f"{runtime_root()}: no folder in it: {error.strerror}") from error
        yield path


@contextmanager
def signals_to(reports: "queue.SimpleQueue[Report]") -> Iterator[None]:
    """SIGINT and SIGTERM become reports, so that one loop waits for everything."""

    def handler(number: int, _frame: FrameType | None) -> None:
        reports.put(StopAsked(signal.Signals(number).name))

    previous: dict[signal.Signals, Callable[..., object] | int | None] = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _log_files(config: ServeConfig) -> LogFiles | None:
    if config.log_dir is None:
        return None
    folder = Path(config.log_dir).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # which costs lines, and may pass
            raise ConfigError(f"--log-dir {config.log_dir}: {error.strerror}") from error
    max_bytes = parse_size("log_max_bytes", config.log_max_bytes)
    return LogFiles(folder, max_bytes, config.log_files)


def serve(config: ServeConfig) -> int:
    """Run a cluster until a signal. Returns the exit code; messages go to standard error."""
    os.umask(0o077)  # children have it from us: what they write is the operator's alone
    raise_open_files()  # for the processes that are started
    try:
        cluster = resolve_cluster(config)
        log_files = _log_files(config)
    except ConfigError as error:
        return _fail(str(error), 2)
    with (
        run_directory() as run_dir,
        Supervisor(cluster, run_dir, log_files) as supervisor,
        signals_to(supervisor.reports),
    ):
        try:
            supervisor.start()
            if not config.quiet and supervisor.report is not None:
                sys.stderr.write("\n".join(["serving", *render(supervisor.report), ""]))
            sys.stdout.write(f"ready {supervisor.url}\n")
            sys.stdout.flush()
            supervisor.supervise()
        except KeyboardInterrupt:
            return 0
        except ClusterFailed as error:
            return _fail(str(error), 2 if error.is_config else 1)
    return 0


def _fail(reason: str, code: int) -> int:
    sys.stderr.write(f"error: {reason}\n")
    return code
