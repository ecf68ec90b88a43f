"""Gangs on a Ray that has no room for them. Prints what became of it, one JSON object a line."""

import json
import queue
import sys
import time

import ray
from msgspec.structs import replace

from launcher.config import ServeConfig
from launcher.resolved import resolve_cluster
from launcher.supervise import ray_ranks
from launcher.supervise.processes import Exited, Report, StartFailed
from launcher.supervise.ray_ranks import RayRanks

DEADLINE_S = 60.0


@ray.remote(num_cpus=1)
class Hog:
    """Takes the only core."""

    def here(self) -> bool:
        return True


def main() -> None:
    ray.init(num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    hog = Hog.remote()  # type: ignore[attr-defined]  # the decorator's
    assert ray.get(hog.here.remote(), timeout=DEADLINE_S)
    brief = {"start_timeout_s": 2.0}  # of a rank that finds no coordinator
    serve = ServeConfig(model="arithmetic", decode=("tp1",), launcher="ray", decode_pool=brief)
    cluster = resolve_cluster(serve)
    reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
    ranks = RayRanks(cluster, reports)
    (pool,) = cluster.pools

    began = time.monotonic()
    ranks.start(pool, 1, "tcp://127.0.0.1:1")
    say(start_returned_after_s=time.monotonic() - began)
    ranks.kill(pool)
    tell(reports)

    patience_s, ray_ranks.PLACEMENT_BUDGET_S = ray_ranks.PLACEMENT_BUDGET_S, 1.0
    ranks.start(pool, 2, "tcp://127.0.0.1:1")
    tell(reports)
    ray_ranks.PLACEMENT_BUDGET_S = patience_s

    ray.kill(hog)
    ranks.start(pool, 3, "tcp://127.0.0.1:1")
    tell(reports)

    bug = replace(pool, pool_id="store0", role="store")  # of a cluster that has no folder for it
    ranks.start(bug, 4, "tcp://127.0.0.1:1")
    tell(reports)
    ranks.stop()


def tell(reports: "queue.SimpleQueue[Report]") -> None:
    report = reports.get(timeout=DEADLINE_S)
    assert isinstance(report, StartFailed | Exited)
    kind = type(report).__name__
    say(kind=kind, name=report.name, start=report.start, reason=report.reason)


def say(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
