"""One log format for every process: time, level, role and rank, then the message."""

import logging
import sys


def configure_logging(who: str, level: str = "INFO") -> None:
    """Send this process's log to standard error, each line marked with ``who`` (``prefill0/1``)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s.%(msecs)03d %(levelname).1s {who} %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
