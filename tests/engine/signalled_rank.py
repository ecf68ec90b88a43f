"""A process that handles signals as a rank does, and does nothing else."""

import signal
import sys

from engine.boot import end_on_signals
from engine.rank_config import RankConfig

if __name__ == "__main__":
    config = RankConfig(
        model="arithmetic",
        pool_id="d",
        control_address="",
        token="",
        listen="ipc://",
        parent_pid=int(sys.argv[1]),
        shutdown_grace_s=0.0,
    )
    end_on_signals(config)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        signal.pause()
