"""The folder of --data-dir: private, with a secret that lasts, and of one cluster at a time."""

import stat
from pathlib import Path

import pytest

from launcher.data_folder import open_data_folder
from protocol.errors import ConfigError


def test_a_folder_is_made_and_found_again(tmp_path: Path) -> None:
    first = open_data_folder(str(tmp_path / "a" / "data"))
    assert stat.S_IMODE(first.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((first.folder / "secret").stat().st_mode) == 0o600
    assert len(first.secret) == 64
    first.lock.close()
    with open_data_folder(str(tmp_path / "a" / "data")).lock as lock:
        again = (tmp_path / "a" / "data" / "secret").read_text()
        assert again == first.secret and not lock.closed


def test_two_clusters_do_not_share_one(tmp_path: Path) -> None:
    lock = open_data_folder(str(tmp_path)).lock
    with lock, pytest.raises(ConfigError, match="another cluster runs on it"):
        open_data_folder(str(tmp_path))
    open_data_folder(str(tmp_path)).lock.close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--data-dir "):
        open_data_folder(str(tmp_path / "file"))


def test_what_an_older_version_left_open_is_closed(tmp_path: Path) -> None:
    for name in ("kv", "documents"):
        (tmp_path / name).mkdir(mode=0o755)
    (tmp_path / "jobs.sqlite-wal").touch(mode=0o644)
    open_data_folder(str(tmp_path)).lock.close()
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert (found["kv"], found["documents"], found["jobs.sqlite-wal"]) == (0o700, 0o700, 0o600)
