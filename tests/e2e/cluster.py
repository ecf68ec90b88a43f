"""Whole clusters: ``baton serve`` as a user starts it, and what tests do to a running one."""

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from baton_client import BatonAPIError, BatonConnectionError, Client, Completion, Usage
from bench.load.local_cluster import LocalCluster, descendants
from modeling.checkpoint.config import load_config
from tests.arithmetic_reference import expected_tokens
from tests.forks import ForkedCluster, end, lines_of, shared_forks

Json = dict[str, Any]
BACK_S = 90.0  # a gang's start, on a machine that is busy with other things
DECODING = 10  # tokens of an answer whose KV has been handed over
COORDINATOR = "coordinator"
# What runs while something dies has to take a while; a step that waits takes it from nobody else.
SLOW_STEPS = "step:delay=0.008"


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Wait for another process to get somewhere; there is no event to wait for but its answers."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
        pause.wait(0.02)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waits for is a zombie for a moment."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal, and see that a SIGSTOP has taken effect."""
    os.kill(pid, number)
    if number is signal.SIGSTOP:
        stat = Path(f"/proc/{pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it is stopped")


def parse_path(header: str) -> dict[str, str]:
    """``decode=d0; local; cached=3`` as a dict; a bare word maps to the empty string."""
    parts = (part.strip().partition("=") for part in header.split(";"))
    return {name: value for name, _, value in parts}


def greedy(max_tokens: int) -> dict[str, Any]:
    """The parameters of an answer of so many tokens, each the likeliest."""
    return {
        "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True, "ignore_eos": True
    }  # fmt: skip


def prompt_of(rng: random.Random, num_tokens: int) -> list[int]:
    """Token ids that every model of these tests has."""
    return [rng.randrange(500) for _ in range(num_tokens)]


class Stream(threading.Thread):
    """A streamed completion, greedy by default, that is read while the test does other things."""

    def __init__(
        self, url: str, prompt: Sequence[int], max_tokens: int, request_id: str = "", **fields: Any
    ) -> None:
        super().__init__(daemon=True)
        self.prompt, self.max_tokens = prompt, max_tokens
        self.path: dict[str, str] = {}
        self.token_ids: list[int] = []
        self.num_logprobs = 0
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.error = ""  # the code of an error event, or of a broken connection
        self.is_done = False  # [DONE] was said
        self._url = url
        self._parameters = {**greedy(max_tokens), **fields}
        self._request_id = request_id or None
        self._begun = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with (
                Client(self._url, timeout_s=120.0) as client,
                client.complete_stream(
                    self.prompt, request_id=self._request_id, **self._parameters
                ) as chunks,
            ):
                self.path = parse_path(chunks.outcome.path)
                for chunk in chunks:
                    self._take(chunk)
                self.usage = chunks.outcome.usage
            self.is_done = True
        except BatonAPIError as error:
            self.error = error.code
        except BatonConnectionError as error:
            self.error = type(error).__name__
        finally:
            self._begun.set()

    def _take(self, chunk: Completion) -> None:
        for choice in chunk.choices:
            self.token_ids += choice.token_ids or ()
            self.num_logprobs += len((choice.logprobs or {}).get("token_logprobs", ()))
            self.finish_reason = choice.finish_reason or self.finish_reason
        if len(self.token_ids) > DECODING:  # the first one comes from the prefill pool
            self._begun.set()

    def wait_begun(self) -> str:
        """Wait until it is being decoded; the pool that does."""
        assert self._begun.wait(60), "no tokens"
        return self.path["decode"]

    def wait_ended(self) -> None:
        self.join(120)
        assert not self.is_alive(), "it does not end"

    def check_exact(self, model: str) -> None:
        """It ended whole, with the arithmetic model's tokens."""
        self.wait_ended()
        assert (self.error, self.is_done) == ("", True)
        assert self.token_ids == expected(model, self.prompt, self.max_tokens)

    def check_end(self, model: str, *codes: str) -> None:
        """It ended whole and exact, or with one of these errors and nothing wrong before it."""
        self.wait_ended()
        if self.error:
            assert self.error in codes
            assert not self.is_done
        else:
            assert self.is_done
        want = expected(model, self.prompt, self.max_tokens)
        assert self.token_ids == want[: len(self.token_ids)]
        assert self.error or len(self.token_ids) == self.max_tokens


def expected(model: str, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What an arithmetic model generates after ``prompt``."""
    return expected_tokens(load_config(model), prompt, num_tokens)


class Cluster:
    """A ``baton serve`` process that has printed its ready line.

    Args:
        model: as it was named to it; with an arithmetic one, answers can be checked.
    """

    def __init__(self, local: LocalCluster, model: str) -> None:
        self.process = local.process
        self.pids = local.processes  # by name: ``coordinator``, ``prefill0/0``...
        self.url = local.url
        self.model = model
        self.client = Client(local.url, timeout_s=120.0)
        self.http = httpx.Client(base_url=local.url, timeout=120.0)
        self.exit_code: int | None = 0  # with which it must end; None if it is killed

    # -- requests ----------------------------------------------------------------------------------

    def complete(self, prompt: str | Sequence[int], max_tokens: int, **fields: Any) -> Completion:
        """A greedy completion of that many tokens."""
        return self.client.complete(prompt, **greedy(max_tokens), **fields)

    def tokens(self, prompt: str | Sequence[int], max_tokens: int, **fields: Any) -> list[int]:
        """The greedy tokens after ``prompt``."""
        return self.complete(prompt, max_tokens, **fields).token_ids

    def stream(
        self, prompt: Sequence[int], max_tokens: int, request_id: str = "", **fields: Any
    ) -> Stream:
        """Ask, in another thread."""
        return Stream(self.url, prompt, max_tokens, request_id, **fields)

    def check_exact(self, prompt: Sequence[int], **path: str) -> None:
        """A request is answered with the arithmetic model's tokens, and went this way."""
        answer = self.complete(prompt, 8)
        assert answer.token_ids == expected(self.model, prompt, 8)
        assert path.items() <= parse_path(answer.path).items(), answer.path

    # -- what is known of it -----------------------------------------------------------------------

    def state(self) -> Json:
        """What ``/v1/cluster`` says."""
        state: Json = self.http.get("/v1/cluster").json()
        return state

    def pools(self) -> dict[str, Json]:
        """The pools of ``/v1/cluster`` by their ids."""
        return {pool["pool_id"]: pool for pool in self.state()["pools"]}

    def timeline(self, request_id: str) -> Json:
        """What became of a request so far; empty if it is not known yet."""
        reply = self.http.get(f"/v1/requests/{request_id}/timeline")
        requests: list[Json] = [] if reply.status_code == 404 else reply.json()["requests"]
        return requests[0] if requests else {}

    # -- what is done to it ------------------------------------------------------------------------

    def kill_pool(self, pool_id: str) -> None:
        """Every rank of it, at once."""
        pids = [pid for name, pid in self.pids().items() if name.startswith(f"{pool_id}/")]
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """All of it, at once."""
        children = descendants(self.process.pid)
        self.exit_code = None
        self.process.kill()
        self.process.wait()
        wait_until(lambda: all(map(is_gone, children)), "the children are gone")

    # -- what is waited for ------------------------------------------------------------------------

    def wait_lost(self, pool_id: str, epoch: int) -> float:
        """Wait until the pool is not of that epoch any more; how long that took."""
        began = time.monotonic()
        wait_until(lambda: self.pools()[pool_id]["epoch"] > epoch, f"{pool_id} is lost", 30.0)
        return time.monotonic() - began

    def wait_serving(self) -> None:
        """Wait until every pool serves and the cluster says that it is ready."""

        def is_serving() -> bool:
            with contextlib.suppress(httpx.TransportError, json.JSONDecodeError):
                return all(pool["serving"] for pool in self.pools().values())
            return False

        wait_until(is_serving, "every pool serves", BACK_S)
        # A loop that stood still is not ready for some seconds more.
        wait_until(lambda: self.http.get("/ready").status_code == 200, "it is ready", BACK_S)

    def assert_no_leaks(self, num_lost: int = 0) -> None:
        """Every block of every pool but those that are lost is free or cached once nothing runs."""

        def is_clean() -> bool:
            pools = self.state()["pools"]
            blocks = [pool["blocks"] for pool in pools if pool["serving"]]
            return (
                len(blocks) == len(pools) - num_lost
                and all(blocks)
                and all(
                    space["free"] + space["cached"] == space["total"]
                    for spaces in blocks
                    for space in spaces
                )
            )

        wait_until(is_clean, f"blocks are still held: {json.dumps(self.state())}")


@contextlib.contextmanager
def run_cluster(
    *flags: str,
    environment: dict[str, str] | None = None,
    log: Path | None = None,
    is_forked: bool = True,
) -> Iterator[Cluster]:
    """``baton serve --port 0 FLAGS`` until the block ends; then it must end cleanly.

    Args:
        flags: the model first, if it is not the embedded one.
        environment: what it has besides ours.
        log: a file for its messages, which go to ours without one.
        is_forked: whether it and its children are forks of one process (tests/forks.py). Without,
            each is an interpreter of its own, as for a user.
    """
    kind = ForkedCluster if is_forked else LocalCluster
    local = kind(flags, log=log, environment=environment)
    try:
        local.wait_until_ready()
        cluster = Cluster(local, flags[0])
        with cluster.client, cluster.http:
            yield cluster
    finally:
        processes = descendants(local.process.pid)
        code = local.stop()
    if cluster.exit_code is not None:
        assert code == cluster.exit_code
        assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()], "a rank is left"


class LoneProcess:
    """A coordinator or a rank without a launcher.

    Args:
        folder: for its configuration, which is called ``name``.
        network: the namespace that it is in, if not ours.
    """

    def __init__(
        self, folder: Path, module: str, name: str, settings: Json, network: Path | None = None
    ) -> None:
        file = folder / f"{name}.json"
        file.write_text(json.dumps(settings))
        self.process = shared_forks().start(
            module, "--config", str(file), stderr=2, network=network
        )
        self._lines = lines_of(self.process.stdout)

    def said(self, key: str) -> str:
        """What its next line with this key says."""
        for line in self._lines:
            if key in (said := json.loads(line)):
                return str(said[key])
        raise AssertionError(f"it ended without saying {key}")

    def end(self) -> None:
        self._lines.close()
        end(self.process)
