"""Every socket that a live cluster listens on, compared with what SECURITY.md says of it.

And what of the caller's environment, of keys and of the token other users could see of it.
"""

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.cluster import Cluster, run_cluster
from tests.e2e.doors import Door, doors_of, tree

MODEL = "arithmetic:layers=3,heads=4,kv_heads=2,vocab=512,max_len=4096"
POOLS = ("--prefill", "cp2", "--decode", "tp2", "--decode", "tp1", "--kv-memory", "16MiB")
STORE = ("--store-memory", "8MiB", "--disk-quota", "64MiB")
HUB_TOKEN = "hf_of_the_user"  # for the launcher, which reads models


def role(pid: int) -> str:
    """The module that a process runs: ``launcher``, ``coordinator``, ``prefill``..."""
    arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return arguments[arguments.index("-m") + 1]


# Of each process: Unix sockets in the run folder, and TCP ports of the loopback: gloo has one for
# every group of a gang, the transport tcp one, and NIXL none.
# Every other process, as the launcher and those that read texts and files, has nothing.
FILES = {"coordinator": {1}, "prefill": {1, 2}, "decode": {1, 2}, "store": {2}}
GLOO, RANKS = 2, ("prefill", "decode", "store")


@pytest.fixture(scope="module", params=["nixl", "tcp"])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Cluster, str]]:
    """A cluster, and its transport: of interpreters, since a fork shares what others have open."""
    transport = request.param
    data = ("--data-dir", str(tmp_path_factory.mktemp("p") / "data"), *STORE)
    flags = (*POOLS, *data, "--block-size", "16", "--transport", transport)
    variables = {"HF_TOKEN": HUB_TOKEN}
    with run_cluster(MODEL, *flags, environment=variables, is_forked=False) as cluster:
        yield cluster, transport


@pytest.mark.cluster
def test_what_a_cluster_on_one_host_listens_on(running: tuple[Cluster, str]) -> None:
    cluster, transport = running
    cluster.tokens(list(range(300)), 4)
    doors = {pid: (role(pid), found) for pid, found in _of_all(cluster).items()}
    (http,) = [door for name, found in doors.values() if name == "coordinator"
               for door in found if door.kind != "unix"]  # fmt: skip
    assert http == Door("tcp", "127.0.0.1", urlsplit(cluster.url).port or 0)
    folders = set()
    for name, found in doors.values():
        unix = [door.host for door in found if door.kind == "unix"]
        # UCX wakes a reader by an empty datagram to a name that the kernel has given.
        wakers = [path for path in unix if path.startswith("@")]
        assert not wakers or (transport == "nixl" and name in RANKS), (name, wakers)
        files = [Path(path) for path in unix if path not in wakers]
        ports = [door for door in found if door.kind != "unix"]
        assert len(files) in FILES.get(name, {0}), (name, found)
        folders |= {file.parent for file in files}
        assert {(door.kind, door.host) for door in ports} <= {("tcp", "127.0.0.1")}, name
        assert not ports or name in FILES, (name, ports)
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700]
    ranks = [found for name, found in doors.values() if name in RANKS]
    assert len(ranks) == 6, "the store is one of them"
    fewest = min(sum(door.kind == "tcp" for door in found) for found in ranks)
    assert fewest == (transport == "tcp"), "a gang of one has no port but the transport's"
    most = GLOO + (transport == "tcp")
    assert max(sum(door.kind == "tcp" for door in found) for found in ranks) <= most


def _of_all(cluster: Cluster) -> dict[int, list[Door]]:
    return doors_of(tree(cluster.process.pid))


@pytest.mark.cluster
def test_junk_at_every_port_of_a_rank_ends_nothing(running: tuple[Cluster, str]) -> None:
    """Other users of the machine reach the loopback too."""
    cluster, _ = running
    prompt = list(range(300))
    want = cluster.tokens(prompt, 4)
    before = [(pool["pool_id"], pool["epoch"]) for pool in cluster.state()["pools"]]
    for found in _of_all(cluster).values():
        for door in found:
            for junk in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 95, b"\x00" * 8192):
                _send(door, junk)
    assert cluster.tokens(prompt, 4) == want
    assert cluster.tokens([*reversed(prompt)], 4)
    after = [(pool["pool_id"], pool["epoch"]) for pool in cluster.state()["pools"]]
    assert after == before, "no gang was started again"


def _send(door: Door, junk: bytes) -> None:
    if door.host.startswith("@"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            stranger.settimeout(5.0)
            stranger.sendto(junk, door.host.replace("@", "\0", 1))
        return
    family = socket.AF_UNIX if door.kind == "unix" else socket.AF_INET
    with socket.socket(family) as stranger:
        stranger.settimeout(5.0)
        stranger.connect(door.host if door.kind == "unix" else (door.host, door.port))
        with contextlib.suppress(ConnectionError):
            stranger.sendall(junk)


@pytest.mark.cluster
def test_what_others_can_see_of_a_cluster(running: tuple[Cluster, str]) -> None:
    """Command lines are everybody's to read; files of the run folder and the data are ours alone.

    The environment is our own to read. Who reads strangers' texts, and the coordinator, whose
    children they are, has no more of it than it needs.
    """
    cluster, _ = running
    pids = tree(cluster.process.pid)
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in pids}
    (config,) = [words[words.index("--config") + 1] for words in commands.values()
                 if "coordinator" in words and "--config" in words]  # fmt: skip
    token = json.loads(Path(config).read_text())["token"]
    assert len(token) >= 32
    assert not [words for words in commands.values() if token in " ".join(words)]
    launcher = commands[cluster.process.pid]
    data = Path(launcher[launcher.index("--data-dir") + 1])
    for folder in (Path(config).parent, data):
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o077 == 0, path
    for pid in pids:
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
        is_reader = role(pid).startswith("coordinator")
        assert (HUB_TOKEN in environment) != is_reader, commands[pid]
        assert token not in environment
