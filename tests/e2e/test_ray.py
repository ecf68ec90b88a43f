"""The same requests with ranks as Ray actors."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cluster import expected, parse_path, prompt_of, run_cluster, wait_until
from tests.e2e.doors import doors_of, tree

MODEL = "arithmetic:layers=3,heads=4,kv_heads=2,vocab=512,max_len=4096"


@pytest.mark.cluster
def test_the_same_requests_pass_under_ray(tmp_path: Path) -> None:
    rng = random.Random(5)
    flags = ("--launcher", "ray", "--prefill", "cp2", "--decode", "tp2", "--kv-memory", "32MiB")
    store = ("--data-dir", str(tmp_path), "--store-memory", "8MiB")
    with run_cluster(MODEL, *flags, *store, "--block-size", "16", is_forked=False) as cluster:
        for length in (1, 40, 700):
            prompt = prompt_of(rng, length)
            assert cluster.tokens(prompt, 8) == expected(MODEL, prompt, 8)
            longer = prompt + prompt_of(rng, 200)
            assert cluster.tokens(longer, 8) == expected(MODEL, longer, 8)
        # Ray gives each of its workers a port on every address; ours are the loopback's here.
        for found in doors_of(_actors(cluster.process.pid)).values():
            hosts = sorted(door.host for door in found if door.kind != "unix")
            assert [host for host in hosts if host != "127.0.0.1"] == ["::"], found
        assert "AuthenticationError" in _ask_ray_without_its_token(cluster.process.pid, tmp_path)
        document = prompt_of(rng, 1600)
        made = cluster.client.documents.create(token_ids=document)
        cluster.client.documents.wait(made.id, timeout_s=60.0)
        assert list(tmp_path.glob("kv/**/*")), "its KV is on the disk"
        asked = cluster.complete([7, 3], 8, document_id=made.id)
        assert int(parse_path(asked.path)["cached"]) == 1600
        want = expected(MODEL, [*document, 7, 3], 8)
        assert asked.token_ids == want
        cluster.assert_no_leaks()


def _ask_ray_without_its_token(launcher: int, home: Path) -> str:
    """What the Ray that a launcher has started answers to somebody else on the machine."""
    (found,) = [
        doors
        for pid, doors in doors_of(tree(launcher)).items()
        if Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0].endswith("gcs_server")
    ]
    (port,) = {door.port for door in found if door.kind.startswith("tcp")}
    program = (
        "from ray._raylet import GcsClient; "
        f"GcsClient(address='127.0.0.1:{port}').internal_kv_get(b'x', namespace=None, timeout=10)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"HOME": str(home), "RAY_AUTH_MODE": "disabled"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.stderr


def _actors(launcher: int) -> list[int]:
    """Processes of rank actors below the launcher, whose child its Ray is."""
    children: dict[int, list[int]] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
            titles[int(folder.name)] = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(folder.name))
    found, unseen = [], [launcher]
    while unseen:
        pid = unseen.pop()
        unseen += children.get(pid, [])
        if titles.get(pid, "").startswith("ray::RankActor"):
            found.append(pid)
    return found


@pytest.mark.cluster
def test_a_gang_of_actors_comes_back() -> None:
    """A killed actor takes its gang with it, a stopped one too; both are started again."""
    flags = ("--launcher", "ray", "--decode", "tp2", "--decode", "tp1", "--kv-memory", "16MiB")
    with run_cluster(MODEL, *flags, "--block-size", "16", is_forked=False) as cluster:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            before = {pool["pool_id"]: pool["epoch"] for pool in cluster.state()["pools"]}
            pids = _actors(cluster.process.pid)
            assert len(pids) == 3
            os.kill(pids[0], number)

            def is_back(before: dict[str, int] = before) -> bool:
                pools = cluster.state()["pools"]
                return all(pool["serving"] for pool in pools) and any(
                    pool["epoch"] > before[pool["pool_id"]] for pool in pools
                )

            wait_until(is_back, "the gang is back", 90.0)
            assert not Path(f"/proc/{pids[0]}").exists()
            prompt = [number] * 300
            assert cluster.tokens(prompt, 8) == expected(MODEL, prompt, 8)
            cluster.assert_no_leaks()
