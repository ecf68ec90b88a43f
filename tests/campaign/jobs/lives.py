"""The process that has lives (life.py), seen from whoever kills them."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_S = 60.0


class Lives:
    """One life after the other. A context manager: at its end no process is left.

    Args:
        root: where the packages are.
    """

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.campaign.jobs.life"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        self._said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._pid = 0  # of the life
        self.code: int | None = None  # with which the latest life has ended
        self.folder = root

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pid:
            self.kill()
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(START_S)
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(json.loads(line))
        self._said.put({"ended": None})

    def begin(self, folder: Path, failpoints: str = "", poison: str = "") -> None:
        """The next life, on a folder. The one before has ended."""
        assert not self._pid, "one at a time"
        self.code, self.folder = None, folder
        self.ask(live=str(folder), failpoints=failpoints, poison=poison)
        began = self.next(START_S)
        assert began is not None and "began" in began, began
        self._pid = began["began"]

    def ask(self, **fields: Any) -> None:
        """Ask the life for something; if it has died, nothing happens."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(fields).encode() + b"\n")
        self._process.stdin.flush()

    def next(self, timeout_s: float) -> dict[str, Any] | None:
        """What is said next; None when nothing is in time. The end of a life is said, too."""
        try:
            said = self._said.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        if "ended" in said:
            self._pid, self.code = 0, said["ended"]
        return said

    def until_end(self, timeout_s: float) -> tuple[list[dict[str, Any]], bool]:
        """What is said until the life ends by itself, and whether it does in time."""
        deadline = time.monotonic() + timeout_s
        heard: list[dict[str, Any]] = []
        while self._pid:
            said = self.next(deadline - time.monotonic())
            if said is None:
                return heard, False
            heard.append(said)
        return heard, True

    def kill(self) -> list[dict[str, Any]]:
        """kill -9, unless it is dead already; what it had said."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
        heard, has_ended = self.until_end(START_S)
        assert has_ended, "the kernel kills"
        return heard

    def last_words(self) -> str:
        """What the latest life has written to standard error."""
        return (self.folder / "said").read_text(encoding="utf-8", errors="replace")
