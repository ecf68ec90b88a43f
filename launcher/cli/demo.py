"""``baton demo``: a small disaggregated cluster at work, from nothing to answers.

1. A cluster ``--prefill cp2 --decode tp2`` starts on this machine, with the embedded model.
2. demo_script.py puts a document through the ring and asks about it.
3. Everything ends, or stays with ``--keep``.
"""

import sys
import time
from pathlib import Path

from rich.console import Console

from baton_client import Client, ClientError
from launcher.cli.demo_script import tell
from launcher.cli.serve import run_directory, signals_to
from launcher.config import ServeConfig
from launcher.resolved import resolve_cluster
from launcher.supervise.processes import LogFiles
from launcher.supervise.supervisor import ClusterFailed, Supervisor
from protocol.errors import ConfigError

NUM_DOCUMENT_TOKENS = 32_768
MIN_DOCUMENT_TOKENS = 1024


def demo(*, keep: bool, num_tokens: int = NUM_DOCUMENT_TOKENS, seed: int = 0) -> int:
    """Run the demonstration; returns the process's exit code, 1 when an answer was wrong."""
    console = Console(highlight=False)
    try:
        if num_tokens < MIN_DOCUMENT_TOKENS:
            raise ConfigError(f"--tokens {num_tokens}: at least {MIN_DOCUMENT_TOKENS}")
        with run_directory() as run_dir:
            return _run(console, run_dir, keep=keep, num_tokens=num_tokens, seed=seed)
    except (ConfigError, ClusterFailed, ClientError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def _run(console: Console, run_dir: Path, *, keep: bool, num_tokens: int, seed: int) -> int:
    console.rule("[bold]Baton[/]: one cluster, two legs")
    config = ServeConfig(
        prefill=("cp2",),
        decode=("tp2",),
        port=8000 if keep else 0,
        checksum="always",
    )
    cluster = resolve_cluster(config)
    with (
        Supervisor(cluster, run_dir, LogFiles(run_dir / "logs")) as supervisor,
        signals_to(supervisor.reports),
    ):
        started = time.monotonic()
        with console.status("starting a coordinator, a ring of 2 prefills, a decode pool of 2 ..."):
            supervisor.start()
        console.print(f"ready {supervisor.url} after {time.monotonic() - started:.1f} s")
        with Client(supervisor.url) as client:
            is_well = tell(console, client, num_tokens, seed)
        if keep:
            console.print(f"\nstill serving at {supervisor.url}; Ctrl-C ends it")
            supervisor.supervise()
    console.print("every process has ended")
    return 0 if is_well else 1
