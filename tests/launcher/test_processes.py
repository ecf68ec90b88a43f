"""Children of the launcher: whatever they write is read, and none of it is kept for long."""

import os
import sys
from pathlib import Path

import pytest

from launcher.supervise.processes import Exited, LogFiles, OutputLine, ProcessGroup

DEADLINE_S = 60.0
CHATTY = """
import os, sys
os.write(1, b'a library says hello\\n{"half": \\n[1]\\n{"ready": "http://x"}\\n')
for _ in range(400):
    os.write(2, b"z" * 65536)  # one line of 26 MB
os.write(2, b"\\nanother line\\nerror: no such thing\\n")
sys.exit(2)
"""


def start(group: ProcessGroup, folder: Path, source: str) -> None:
    """Run ``source`` as the child ``chatty``."""
    (folder / "chatty.py").write_text(source)
    group.start("chatty", "chatty", folder / "none.json", {**os.environ, "PYTHONPATH": str(folder)})


def test_what_a_child_writes_is_split_bounded_and_told(tmp_path: Path) -> None:
    group = ProcessGroup(LogFiles(tmp_path / "logs"))
    start(group, tmp_path, CHATTY)
    assert group.reports.get(timeout=DEADLINE_S) == OutputLine("chatty", '{"ready": "http://x"}')
    assert group.reports.get(timeout=DEADLINE_S) == Exited("chatty", 2, "no such thing")
    group.stop()
    log = (tmp_path / "logs" / "chatty.log").read_text()
    assert len(log) < 100_000
    for line in ("a library says hello", '{"half": ', "[1]", "another line"):
        assert line in log.splitlines()
    assert "bytes more" in log


def test_a_child_is_read_though_its_log_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "chatty.log").symlink_to("/dev/full")
    group = ProcessGroup(LogFiles(tmp_path / "logs"))
    start(group, tmp_path, CHATTY)
    assert isinstance(group.reports.get(timeout=DEADLINE_S), OutputLine)
    assert group.reports.get(timeout=DEADLINE_S) == Exited("chatty", 2, "no such thing")
    group.stop()


def test_a_process_that_cannot_be_started_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    group = ProcessGroup()
    start(group, tmp_path, "")
    report = group.reports.get(timeout=DEADLINE_S)
    assert isinstance(report, Exited)
    assert report.code == 1
    assert "cannot be started" in report.reason
    group.stop()
