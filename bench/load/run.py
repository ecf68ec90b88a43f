"""One run from its plan to its folder.

1. A ``Plan`` says everything; its schedule is drawn already.
2. ``execute`` drives it from processes of their own, judges the driver, and asks a Baton server for
   the time lines of the requests; on the way it may watch the cluster's own state.
3. What comes back is a manifest and the records; ``record.write_run`` puts them into a folder.
"""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from bench.environment import describe
from bench.load.analysis.metrics import METRICS_VERSION
from bench.load.analysis.slo import Slo
from bench.load.analysis.validity import Audit, invalid_reasons, send_lag
from bench.load.driving.client import Budgets
from bench.load.driving.driver import Load, Target
from bench.load.driving.process import OnProgress, drive, num_processes_for
from bench.load.driving.target import join_timelines
from bench.load.driving.watch import OnSample, Watch
from bench.load.record import FORMAT_VERSION, Manifest, RequestRecord
from bench.load.workload.schedule import Schedule, ideal_cached_share
from protocol.process.limits import num_cores


@dataclass(frozen=True, slots=True)
class Plan:
    """A run to be.

    Args:
        workload, arrival: as the manifest is to have them.
        num_users: of the closed loop, which begins no session after ``duration_s``.
        num_processes: None for as many as the schedule takes.
        wants_timelines: ask the server about its requests afterwards.
    """

    target: Target
    schedule: Schedule
    workload: dict[str, Any]
    arrival: dict[str, Any]
    slo: Slo | None = None
    budgets: Budgets = field(default_factory=Budgets)
    loop: Literal["open", "closed"] = "open"
    num_users: int = 1
    duration_s: float | None = None
    num_processes: int | None = None
    wants_timelines: bool = True
    command: str = ""


def execute(
    plan: Plan, on_progress: OnProgress | None = None, on_sample: OnSample | None = None
) -> tuple[Manifest, list[RequestRecord]]:
    """Run it.

    Args:
        on_progress: called twice a second; true ends the run early.
        on_sample: called about once a second with the state of a Baton cluster, never for another
            server; without it nobody is asked.

    Raises:
        DriverError: a driver's process has died.
    """
    return asyncio.run(_execute(plan, on_progress, on_sample))


async def _execute(
    plan: Plan, on_progress: OnProgress | None, on_sample: OnSample | None
) -> tuple[Manifest, list[RequestRecord]]:
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    loads = loads_of(plan)
    watched: dict[str, Any] | None = None
    if on_sample is None:
        records, audits = await drive(loads, on_progress)
    else:
        async with Watch(plan.target, on_sample) as watch:
            records, audits = await drive(loads, on_progress, watch.follow)
            await watch.end()
        watched = watch.described()
    if plan.wants_timelines:
        records = await join_timelines(plan.target, records)
    manifest = _manifest(plan, started_at, records, audits)
    if watched is not None:
        manifest.driver["samples"] = watched
    return manifest, records


def loads_of(plan: Plan) -> list[Load]:
    """The plan, dealt to its processes."""
    num = plan.num_processes or num_processes_for(plan.schedule, num_cores())
    if plan.loop == "closed":
        num = min(num, plan.num_users)
    num = max(1, min(num, len(plan.schedule.sessions)))
    run_id = uuid.uuid4().hex[:12]
    return [
        Load(
            plan.target,
            part,
            run_id,
            plan.budgets,
            plan.loop,
            plan.num_users // num + (number < plan.num_users % num),
            plan.duration_s,
            plan.slo,
        )
        for number, part in enumerate(plan.schedule.deal(num))
    ]


def _manifest(
    plan: Plan, started_at: str, records: Sequence[RequestRecord], audits: Sequence[Audit]
) -> Manifest:
    num_planned = len(plan.schedule.requests) if plan.loop == "open" else len(records)
    reasons = invalid_reasons(records, audits, num_planned, plan.slo)
    dialect = plan.target.dialect
    span_s = max((audit.span_s for audit in audits), default=0.0)
    in_flight_s = sum(audit.mean_in_flight * audit.span_s for audit in audits)
    return Manifest(
        version=FORMAT_VERSION,
        command=plan.command,
        seed=plan.schedule.seed,
        workload=plan.workload,
        arrival=plan.arrival,
        targets=[
            {
                "name": plan.target.name,
                "url": plan.target.url,
                "model": dialect.model,
                "api": dialect.api.value,
                "extensions": dialect.extensions,
                "vocabulary": list(dialect.vocabulary),
            }
        ],
        slo=None if plan.slo is None else msgspec.to_builtins(plan.slo),
        duration_s=span_s,
        environment=describe(),
        started_at=started_at,
        schedule_sha256=plan.schedule.sha256,
        valid=not reasons,
        invalid_reasons=reasons,
        send_lag=send_lag(records),
        metrics_version=METRICS_VERSION,
        driver={
            "loop": plan.loop,
            "num_users": plan.num_users if plan.loop == "closed" else None,
            "num_processes": len(audits),
            "cpu_share": max((audit.cpu_share for audit in audits), default=0.0),
            "loop_lag_s": max((audit.loop_lag_s for audit in audits), default=0.0),
            "mean_in_flight": in_flight_s / span_s if span_s else 0.0,
            "ideal_cached_share": ideal_cached_share(plan.schedule),
            "num_connections": sum(audit.num_connections for audit in audits),
            "budgets": msgspec.to_builtins(plan.budgets),
        },
    )
