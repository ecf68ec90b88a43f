"""Ranks as forks of a process that has imported what they need: as if each had been started."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from launcher.supervise.processes import FORK_SERVER, Exited, LogFiles, OutputLine, ProcessGroup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no fork server elsewhere")

DEADLINE_S = 60.0
R = TypeVar("R", OutputLine, Exited)
SAY = """
import ctypes, json, os, signal, sys, threading
from forked.worker import IMPORTED_BY
title = open("/proc/self/cmdline").read().rstrip("\\0").split("\\0")
print(json.dumps({
    "argv": sys.argv, "title": title, "imported_by": IMPORTED_BY, "pid": os.getpid(),
    "parent": os.getppid(), "threads": threading.active_count(),
    "environment": os.environ.get("SAID"), "files": sorted(os.listdir("/proc/self/fd")),
    "signals": [signal.getsignal(n) == signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGINT)],
}), flush=True)
print("error: it is over", file=sys.stderr)
sys.stderr.flush()
"""
WAIT = "import signal\nprint('{}', flush=True)\nsignal.pause()\n"
EXITS = "import os\nos._exit(7)\n"
FAILS = "raise RuntimeError('a bug of it')\n"
THREADS = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"


class Forks:
    """A group with a fork server of the package ``forked``."""

    def __init__(self, folder: Path, worker: str = "") -> None:
        self.folder = folder
        package = folder / "forked"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "worker.py").write_text(f"import os\nIMPORTED_BY = os.getpid()\n{worker}\n")
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "SAID": "when it started"}
        self.group = ProcessGroup(LogFiles(folder / "logs"))
        self.group.start_fork_server(["forked.worker"], self.environment)
        said = self.group.reports.get(timeout=DEADLINE_S)
        assert isinstance(said, OutputLine) and said.name == FORK_SERVER, said
        self.is_usable: bool = json.loads(said.line)["preloaded"]

    @property
    def server_pid(self) -> int:
        return self.group.pids()[FORK_SERVER]

    def start(self, source: str, name: str = "rank") -> None:
        (self.folder / "forked" / "__main__.py").write_text(source)
        self.group.start(name, "forked", self.folder / f"{name}.json", self.environment)

    def line(self) -> dict[str, Any]:
        """What the next line of a rank says."""
        said = self._next(OutputLine)
        line: dict[str, Any] = json.loads(said.line)
        return line

    def exit(self, name: str = "rank") -> Exited:
        """The exit of a child."""
        while (said := self._next(Exited)).name != name:
            pass
        return said

    def _next(self, kind: type[R]) -> R:
        while not isinstance(said := self.group.reports.get(timeout=DEADLINE_S), kind):
            pass
        return said


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[Forks]:
    forks = Forks(tmp_path)
    assert forks.is_usable
    yield forks
    forks.group.stop()


def test_a_fork_is_what_a_start_would_have_been(forks: Forks) -> None:
    """Its parent, its arguments, its environment, its outputs; nothing of the server's is open."""
    forks.start(SAY)
    said = forks.line()
    assert said["imported_by"] == forks.server_pid != said["pid"]
    assert said["parent"] == os.getpid()
    config = str(forks.folder / "rank.json")
    assert said["argv"][1:] == ["--config", config]
    assert said["title"] == [sys.executable, "-P", "-m", "forked", "--config", config]
    assert (said["threads"], said["environment"]) == (1, "when it started")
    assert said["files"][:3] == ["0", "1", "2"] and len(said["files"]) == 4, "and that of listdir"
    assert said["signals"] == [True, True]
    assert forks.exit() == Exited("rank", 0, "it is over")


def test_how_a_fork_ends_is_reported(forks: Forks) -> None:
    forks.start(EXITS)
    assert forks.exit().code == 7
    forks.start(FAILS)
    assert forks.exit().code == 1
    forks.start(WAIT)
    forks.line()
    pid = forks.group.pids()["rank"]
    assert forks.group.pids().keys() == {FORK_SERVER, "rank"}
    forks.group.kill("rank")
    assert forks.exit().code == -signal.SIGKILL
    assert forks.group.pids().keys() == {FORK_SERVER}
    forks.group.kill("rank")  # whoever has its id now must not be hurt
    forks.group.stop()
    assert "a bug of it" in (forks.folder / "logs" / "rank.log").read_text()
    assert not Path(f"/proc/{pid}").exists(), "a zombie"


def test_forks_outlive_their_server_and_later_starts_do_without(forks: Forks) -> None:
    forks.start(WAIT, "first")
    forks.line()
    os.kill(forks.server_pid, signal.SIGKILL)
    forks.exit(FORK_SERVER)
    assert "first" in forks.group.pids()
    forks.start(SAY, "second")
    said = forks.line()
    assert said["imported_by"] == said["pid"], "it imports for itself"
    assert said["parent"] == os.getpid()


def test_a_server_that_does_not_answer_is_given_up(forks: Forks) -> None:
    os.kill(forks.server_pid, signal.SIGSTOP)
    forks.start(SAY)
    said = forks.line()
    assert said["imported_by"] == said["pid"]


def test_another_environment_is_not_that_of_a_fork(forks: Forks) -> None:
    forks.environment["SAID"] = "later"
    forks.start(SAY)
    said = forks.line()
    assert (said["imported_by"], said["environment"]) == (said["pid"], "later")


def test_a_server_in_which_a_library_has_a_thread_is_of_no_use(tmp_path: Path) -> None:
    forks = Forks(tmp_path, worker=THREADS)
    assert not forks.is_usable
    forks.group.stop()


def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """Neither the server nor a fork, which has the kernel end it with its parent."""
    source = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_forks import Forks
forks = Forks(Path({str(tmp_path)!r}))
forks.start("import os, signal\\nfrom protocol.process.ending import die_with_parent\\n"
            "die_with_parent(os.getppid())\\nprint('{{}}', flush=True)\\nsignal.pause()\\n")
forks.line()
print(*forks.group.pids().values(), flush=True)
sys.stdin.read()
"""
    launcher = subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None and launcher.stdin is not None
    with launcher.stdout, launcher.stdin:
        fds = [os.pidfd_open(int(pid)) for pid in launcher.stdout.readline().split()]
        assert len(fds) == 2
        launcher.kill()
        launcher.wait(DEADLINE_S)
        for fd in fds:
            ends = select.poll()
            ends.register(fd)
            assert ends.poll(DEADLINE_S * 1000)
            os.close(fd)
