"""Example runs on virtual time: how a report looks before one has figures of one's own.

The same users ask a split cluster and a whole one, of as many accelerators. Both are production's
nodes, on a model of a small machine; their report says that no server was measured.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bench.load.analysis.metrics import METRICS_VERSION
from bench.load.analysis.validity import send_lag
from bench.load.record import FORMAT_VERSION, Manifest
from bench.load.samples import Blocks, ClusterSample, PoolSample
from bench.load.workload.arrival import Poisson
from bench.load.workload.schedule import draw
from bench.load.workload.sessions import Documents, Lengths
from bench.report.runs import Run
from bench.simulate.driver import ClusterSetting, VirtualCluster, serve
from bench.simulate.pools import DecodeSetting, PrefillSetting
from bench.simulate.step_time import ROOFLINE
from bench.simulate.workload import Blend
from ring_attention.cost import CostModel

SLOWER = 16  # in arithmetic than the roofline's accelerator, and half as fast in memory
MACHINE = dataclasses.replace(
    ROOFLINE,
    flops_per_s=ROOFLINE.flops_per_s / SLOWER,
    bytes_per_s=ROOFLINE.bytes_per_s / 2,
    costs=dataclasses.replace(
        ROOFLINE.costs, model=CostModel(300e12 / SLOWER, 495e12 / SLOWER, 50e9, 20e-6)
    ),
)
DECODE = DecodeSetting(num_blocks=2048)
SETTINGS = {
    "disaggregated": ClusterSetting(MACHINE, (DECODE,), (PrefillSetting(3, num_blocks=2048),)),
    "colocated": ClusterSetting(MACHINE, (DECODE,) * 4),
}
USERS = Blend(
    (
        (0.9, Lengths("lognormal/250/0.6", "uniform/8/48", "short")),
        (0.05, Lengths("lognormal/2500/0.6", "uniform/8/48", "long")),
        (0.05, Documents("lognormal/2500/0.6", "40", "4", "uniform/8/48", "1.5")),
    )
)
SLO = {
    "short": {"ttft_ms": {"base": 500, "per_1k_tokens": 900}, "tpot_ms": 25, "target": 0.9},
    "long": {"ttft_ms": {"base": 500, "per_1k_tokens": 900}, "tpot_ms": 25, "target": 0.9},
    "default": {"ttft_ms": 2500, "target": 0.9},
}
RATES, DURATION_S = (2.0, 4.0, 6.0, 8.0), 20.0


class _Watched(VirtualCluster):
    """Says once a second how its pools are, as ``/v1/cluster`` does."""

    def __init__(self, name: str) -> None:
        super().__init__(SETTINGS[name])
        self.samples: list[ClusterSample] = []
        self._name = name
        self._start_s = self.world.now
        self._tell()

    def _tell(self) -> None:
        pools = []
        for pool_id, gang in self.gangs.items():
            load = gang.node.load()
            blocks = tuple(
                Blocks(total=one.total, free=one.free, owned=one.owned, cached=one.cached)
                for one in load.blocks
            )
            pools.append(
                PoolSample(
                    pool_id,
                    gang.spec.role,
                    num_running=load.num_running,
                    num_waiting=load.num_waiting,
                    pending_tokens=load.pending_tokens,
                    blocks=blocks,
                    counters=dict(load.counters),
                )
            )
        at_s, num_active = self.world.now - self._start_s, self.node.service.loads.num_active
        self.samples.append(ClusterSample(self._name, at_s, 0.0, num_active, tuple(pools)))
        self.world.at(1.0, self._tell)


def example_runs(seed: int = 0, rates: Sequence[float] = RATES) -> list[Run]:
    """A sweep: one run per rate, of both clusters under the same schedule."""
    return [_run(seed, rate) for rate in rates]


def _run(seed: int, rate: float) -> Run:
    schedule = draw(USERS, Poisson(rate), seed, duration_s=DURATION_S)
    clusters = {name: _Watched(name) for name in SETTINGS}
    records = [one for name, own in clusters.items() for one in serve(own, schedule, name)]
    manifest = Manifest(
        version=FORMAT_VERSION,
        command=f"baton bench report --example --seed {seed}",
        seed=seed,
        workload={"name": "example: short, long, documents with questions"},
        arrival={"name": "poisson", "rate": rate},
        targets=[
            {"name": name, "url": "example:", "model": "example", "num_accelerators": 4}
            for name in SETTINGS
        ],
        slo=SLO,
        duration_s=DURATION_S,
        environment={"machine": MACHINE.source},
        started_at="",
        schedule_sha256=schedule.sha256,
        valid=False,
        invalid_reasons=["an example: no server was measured"],
        send_lag=send_lag(records),
        metrics_version=METRICS_VERSION,
        driver={"loop": "open", "clock": "virtual"},
    )
    samples = [sample for own in clusters.values() for sample in own.samples]
    return Run(Path(f"rate-{rate:g}"), manifest, records, samples=samples)
