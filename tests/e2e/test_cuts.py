"""Machines that do not reach one another for a while: each a network namespace, all on one bridge.

Ranks and coordinator talk by TCP, as between hosts. A cut sends what one host has for another to an
address that no machine has: packets are lost without a word, connections stay open on both sides.
"""

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton_client import Client, PoolState
from tests.e2e.cluster import (
    SLOW_STEPS,
    Json,
    LoneProcess,
    Stream,
    expected,
    greedy,
    parse_path,
    wait_until,
)

MODEL = "arithmetic:layers=2,heads=2,kv_heads=2,vocab=512,max_len=4096"
HERE, RANKS = "coordinator", ("prefill0", "decode0", "decode1")
NUM_TOKENS = 6
NOTICED_S, SLACK_S = 5.0, 10.0
LONG = 300  # tokens of an answer that takes seconds, each of SLOW_STEPS
NOWHERE = "02:00:00:00:00:99"

pytestmark = pytest.mark.cluster


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Network:
    """A namespace for each rank, and a bridge between them that the coordinator is on."""

    def __init__(self) -> None:
        self._tag = f"{os.getpid() % 10000}"
        self._bridge = f"b{self._tag}"

    def address(self, host: str) -> str:
        return "10.87.0.254" if host == HERE else f"10.87.0.{RANKS.index(host) + 1}"

    def inside(self, host: str) -> tuple[str, ...]:
        """Words before a command that is to run on that host."""
        return () if host == HERE else ("ip", "netns", "exec", self.namespace(host))

    def namespace(self, host: str) -> str:
        return f"n{self._tag}{host}"

    def make(self) -> None:
        run("ip", "link", "add", self._bridge, "type", "bridge")
        run("ip", "address", "add", f"{self.address(HERE)}/24", "dev", self._bridge)
        run("ip", "link", "set", self._bridge, "up")
        for number, host in enumerate(RANKS):
            name, namespace = f"v{self._tag}{number}", self.namespace(host)
            run("ip", "netns", "add", namespace)
            run("ip", "link", "add", name, "type", "veth", "peer", "name", "v0", "netns", namespace)
            run("ip", "link", "set", name, "master", self._bridge, "up")
            address = ("address", "add", f"{self.address(host)}/24", "dev", "v0")
            for words in (address, ("link", "set", "v0", "up"), ("link", "set", "lo", "up")):
                run(*self.inside(host), "ip", *words)

    def remove(self) -> None:
        for words in (
            *(("netns", "delete", self.namespace(host)) for host in RANKS),
            ("link", "delete", self._bridge),
        ):
            with contextlib.suppress(OSError):
                run("ip", *words)

    @contextlib.contextmanager
    def cut(self, one: str, other: str) -> Iterator[None]:
        """Neither reaches the other while the block runs."""
        both = ((one, other), (other, one))
        for here, there in both:
            self._neighbour("replace", here, there, "lladdr", NOWHERE, "nud", "permanent")
        try:
            yield
        finally:
            for here, there in both:
                self._neighbour("delete", here, there)

    def _neighbour(self, verb: str, here: str, there: str, *words: str) -> None:
        device = self._bridge if here == HERE else "v0"
        command = ("ip", "neighbour", verb, self.address(there), "dev", device)
        run(*self.inside(here), *command, *words)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed")
    made = Network()
    try:
        try:
            made.make()
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield made
    finally:
        made.remove()


class Site:
    """A cluster over these hosts that nobody supervises."""

    def __init__(self, network: Network, processes: dict[str, LoneProcess], url: str) -> None:
        self.network = network
        self.processes = processes
        self.url = url
        self._rng = random.Random(7)

    def pool(self, pool_id: str) -> PoolState:
        with Client(self.url, timeout_s=10.0) as client:
            (found,) = [pool for pool in client.cluster().pools if pool.pool_id == pool_id]
        return found

    def ask(self) -> tuple[float, dict[str, str]]:
        """A long prompt that nobody has seen, answered exactly: seconds, and its path."""
        prompt = [self._rng.randrange(250) for _ in range(400)]
        began = time.monotonic()
        with Client(self.url, timeout_s=90.0) as client:
            answer = client.complete(prompt, **greedy(NUM_TOKENS))
        took_s = time.monotonic() - began
        assert answer.token_ids == expected(MODEL, prompt, NUM_TOKENS)
        return took_s, parse_path(answer.path)


@pytest.fixture(scope="module")
def site(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder: Path = tmp_path_factory.mktemp("s")
    shared = {"token": "t", "model": MODEL, "block_size": 16, "log_level": "WARNING"}
    pools = [{"pool_id": host, "role": host[:-1], "cp_size": 1, "tp_size": 1} for host in RANKS]
    listen = f"tcp://{network.address(HERE)}:*"
    fields = {**shared, "pools": pools, "port": 0, "control_listen": listen}
    with contextlib.ExitStack() as stack:
        processes: dict[str, LoneProcess] = {}

        def start(host: str, module: str, settings: Json) -> LoneProcess:
            where = None if host == HERE else Path("/run/netns", network.namespace(host))
            process = LoneProcess(folder, module, host, settings, where)
            stack.callback(process.end)
            return processes.setdefault(host, process)

        coordinator = start(HERE, "coordinator", {**fields, "local_prefill_threshold": 16})
        control = coordinator.said("control")
        for host in RANKS:
            settings = {
                **shared,
                "pool_id": host,
                "control_address": control,
                "listen": f"tcp://{network.address(host)}",
                "kv_memory_bytes": 8 << 20,
                "transport": "tcp",
            }
            if host.startswith("decode"):
                settings["failpoints"] = SLOW_STEPS
            start(host, host[:-1], settings)
        yield Site(network, processes, coordinator.said("ready"))


def test_pools_that_do_not_reach_each_other(site: Site) -> None:
    """No request waits for longer than it takes to notice; decode computes meanwhile."""
    _, path = site.ask()
    assert "local" not in path
    with site.network.cut("prefill0", "decode0"), site.network.cut("prefill0", "decode1"):
        asked = [site.ask() for _ in range(4)]
        assert all("local" in path for _, path in asked), asked
        assert max(took_s for took_s, _ in asked) < NOTICED_S + SLACK_S, asked
        assert asked[-1][0] < NOTICED_S, "it is known by then"
    wait_until(lambda: "local" not in site.ask()[1], "the pair is used again", 30.0)


def test_a_pool_that_the_coordinator_does_not_reach_for_a_while(site: Site) -> None:
    """Its streams go on elsewhere, and it comes back as it is: with model, process and cache."""
    stream = Stream(site.url, [5] * 300, LONG)
    pool_id = stream.wait_begun()
    epoch = site.pool(pool_id).epoch
    with site.network.cut(HERE, pool_id):
        wait_until(lambda: not site.pool(pool_id).serving, "it is missed")
    wait_until(lambda: site.pool(pool_id).serving, "it is back")
    stream.check_exact(MODEL)
    assert site.pool(pool_id).epoch > epoch
    assert all(process.process.poll() is None for process in site.processes.values()), "given up"
    for _ in range(4):
        site.ask()
