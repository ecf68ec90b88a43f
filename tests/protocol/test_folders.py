"""Temporary folders: those of the dead go, nobody else's does."""

import subprocess
import sys
from pathlib import Path

from protocol.process.folders import remove_dead, temporary_folder

HOLDER = """
import sys
from pathlib import Path
from protocol.process.folders import temporary_folder
with temporary_folder("baton-", Path(sys.argv[1])) as folder:
    (folder / "control.sock").touch()
    (folder / "coordinator.json").write_text("{}")
    print(folder, flush=True)
    sys.stdin.read()
"""


def hold(root: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that has a temporary folder, and that folder."""
    argv = [sys.executable, "-c", HOLDER, str(root)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str], *, is_killed: bool) -> None:
    if is_killed:
        process.kill()
    process.communicate(timeout=20)


def test_the_folders_of_killed_processes_go_at_the_next_start(tmp_path: Path) -> None:
    living, lives = hold(tmp_path)
    killed, left = hold(tmp_path)
    end(killed, is_killed=True)
    others = {tmp_path / name for name in ("baton-data", "baton-old", "baton-link")}
    (tmp_path / "baton-data").mkdir()
    (tmp_path / "baton-data" / "lock").touch()  # of a data folder that nobody has open
    (tmp_path / "baton-old").mkdir()
    (tmp_path / "baton-link").symlink_to(left)
    assert (left / "coordinator.json").exists()
    with temporary_folder("baton-", tmp_path) as own:
        assert set(tmp_path.iterdir()) == {own, lives, *others}
        assert own.stat().st_mode & 0o777 == 0o700
        assert remove_dead("baton-", tmp_path) == 0
    end(living, is_killed=False)
    assert set(tmp_path.iterdir()) == others


def test_a_killed_process_of_another_prefix_is_left(tmp_path: Path) -> None:
    killed, left = hold(tmp_path)
    end(killed, is_killed=True)
    assert remove_dead("baton-jobs-", tmp_path) == 0
    assert left.exists()
    assert remove_dead("baton-", tmp_path) == 1
