"""A schedule of the load harness, run on a cluster on virtual time: its records come back.

1. ``VirtualCluster`` is the in-memory cluster with pools that a model of a machine times.
2. ``serve`` has every session begin at its instant, and its later turns follow its answers, as the
   harness's driver does with a server. Nobody waits for an answer before the next session comes.
3. Every request becomes a record, with the coordinator's time line: metrics and reports are those
   of real runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench.load.record import CANCELLED, OK, RequestRecord
from bench.load.workload.prompts import tokens_of
from bench.load.workload.schedule import Planned, Schedule
from bench.simulate.cluster import Cluster
from bench.simulate.event_loop import EventLoop
from bench.simulate.gangs import Gang, Site
from bench.simulate.pools import (
    BLOCK_SIZE,
    FINGERPRINT,
    LAST_TOKEN,
    MAX_MODEL_LEN,
    DecodeSetting,
    Machine,
    PrefillSetting,
    VirtualDecode,
    VirtualPool,
    VirtualPrefill,
)
from bench.simulate.step_time import StepTime
from coordinator.cluster.placement import Placement
from coordinator.cluster.registry import Registry
from coordinator.config import CoordinatorConfig, ExpectedPool, Limits
from coordinator.request import Request
from coordinator.requests.traces import Trace
from kvcache.prefix import block_salt, hash_blocks
from protocol.errors import RequestError
from protocol.messages import NewToken
from protocol.request import SamplingParams
from protocol.token_ids import TokenIds

VOCABULARY = (16, 1 << 20)
START_S = 1.0  # more than a cluster without delays takes to join
MakePlacement = Callable[[CoordinatorConfig, Registry], Placement]


@dataclass(frozen=True, slots=True)
class ClusterSetting:
    """What a cluster consists of.

    Args:
        steps: the machine.
        max_tokens: what requests say they may generate; less than is drawn is raised.
        make_placement: chooses pools instead of the coordinator's own placement.
    """

    steps: StepTime
    decode: tuple[DecodeSetting, ...] = (DecodeSetting(),)
    prefill: tuple[PrefillSetting, ...] = ()
    local_prefill_threshold: int = 128
    max_tokens: int = 1024
    make_placement: MakePlacement | None = None


class VirtualCluster(Cluster):
    """A cluster in which nothing is lost, messages take no time, and steps what the model says."""

    def __init__(self, setting: ClusterSetting) -> None:
        self.setting = setting
        self.lengths: dict[str, int] = {}
        self._machine = Machine(setting.steps, self.lengths)
        self._decode = {f"decode{n}": one for n, one in enumerate(setting.decode)}
        self._prefill = {f"prefill{n}": one for n, one in enumerate(setting.prefill)}
        config = CoordinatorConfig(
            token="virtual",
            model="virtual",
            pools=(
                *(ExpectedPool(name, "decode", 1, 1) for name in self._decode),
                *(ExpectedPool(n, "prefill", one.cp_size, 1) for n, one in self._prefill.items()),
            ),
            block_size=BLOCK_SIZE,
            local_prefill_threshold=setting.local_prefill_threshold,
            limits=Limits(max_requests=1 << 30),
        )
        super().__init__(
            EventLoop(),
            config,
            self._pool,
            fingerprint=FINGERPRINT,
            max_model_len=MAX_MODEL_LEN,
        )
        if setting.make_placement is not None:
            self.node.service.placement = setting.make_placement(config, self.node.registry)
        self.world.run_until(lambda: self.node.is_complete, START_S)
        assert self.node.is_complete

    def _pool(self, site: Site) -> Gang[Any]:
        name = site.spec.pool_id
        if name in self._decode:
            return VirtualDecode(site, self._machine, self._decode[name])
        return VirtualPrefill(site, self._machine, self._prefill[name])

    def busy_s(self, role: str) -> list[float]:
        """How long each pool of a role was in a step."""
        return [
            gang.busy_s
            for gang in self.gangs.values()
            if isinstance(gang, VirtualPool) and gang.spec.role == role
        ]


@dataclass(slots=True)
class Asked:
    """A request on its way: the receiver of its tokens."""

    planned: Planned
    intended_s: float
    request: Request
    on_end: Callable[["Asked"], None]
    now: Callable[[], float]
    times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    outcome: str = ""
    error_code: str = ""
    finished_s: float | None = None

    def put(self, choice: int, tokens: Sequence[NewToken]) -> None:
        del choice
        for token in tokens:
            self.times_s.append(self.now())
            self.token_ids.append(token.token_id)
        if self.request.finish_reason is not None:
            self._end(OK)

    def fail(self, error: RequestError) -> None:
        self.error_code = error.code
        self._end("http_error")

    def leave(self, abort: Callable[[], None]) -> None:
        """The user goes away, if the answer has not ended."""
        if not self.outcome:
            self._end(CANCELLED)
            abort()

    def _end(self, outcome: str) -> None:
        self.outcome = outcome
        self.finished_s = self.now()
        self.on_end(self)

    def record(self, target: str, start_s: float) -> RequestRecord:
        """As the harness has it, in seconds from the run's start."""
        planned, request = self.planned, self.request
        trace = Trace(request.request_id, "", "", "", 0, requests=[request])
        return RequestRecord(
            target=target,
            index=planned.index,
            session=planned.session,
            turn=planned.turn,
            kind=planned.what.kind,
            intended_s=self.intended_s - start_s,
            sent_s=self.intended_s - start_s,
            token_times_s=tuple(at - start_s for at in self.times_s),
            token_counts=(1,) * len(self.times_s),
            finished_s=None if self.finished_s is None else self.finished_s - start_s,
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=len(self.times_s),
            num_cached_tokens=request.num_cached_tokens,
            max_tokens=planned.what.max_tokens,
            outcome=self.outcome or "unsent",
            error_code=self.error_code,
            finish_reason=str(request.finish_reason or ""),
            request_id=request.request_id,
            path=request.describe_path(),
            timeline=trace.describe(),
        )


class _Run:
    """One schedule on one cluster."""

    def __init__(self, cluster: VirtualCluster, schedule: Schedule) -> None:
        self._cluster = cluster
        self._schedule = schedule
        self._start_s = cluster.world.now
        self._turns = {turns[0].session: turns for turns in schedule.sessions}
        self._history: dict[str, list[int]] = {}
        self._asked: list[Asked] = []
        self._num_left = len(self._turns)

    def records(self, target: str) -> list[RequestRecord]:
        world = self._cluster.world
        for turns in self._turns.values():
            world.at(turns[0].at_s, partial(self._ask, turns[0]))
        world.run_until(lambda: not self._num_left, float("inf"))
        found = [asked.record(target, self._start_s) for asked in self._asked]
        return sorted(found, key=lambda record: record.index)

    def _ask(self, planned: Planned) -> None:
        cluster, now = self._cluster, self._cluster.world.now
        prompt = self._history.get(planned.session, []) if planned.what.keeps_history else []
        for segment in planned.what.segments:
            prompt = prompt + tokens_of(self._schedule.seed, segment, VOCABULARY)
        self._history[planned.session] = prompt
        request_id = f"r{planned.index}"
        num_tokens = cluster.lengths[request_id] = planned.what.max_tokens
        # An application's limit, not the length: nobody knows that.
        sampling = SamplingParams(
            max_tokens=max(cluster.setting.max_tokens, num_tokens), stop_token_ids=(LAST_TOKEN,)
        )
        request = Request(
            request_id=request_id,
            prompt_token_ids=TokenIds.of(prompt),
            block_hashes=tuple(hash_blocks(prompt, BLOCK_SIZE, block_salt(FINGERPRINT, ""))),
            sampling=sampling,
            tenant="tenant",
            session=("tenant", planned.session) if len(self._turns[planned.session]) > 1 else None,
        )
        asked = Asked(planned, now, request, self._on_end, lambda: cluster.world.now)
        request.receiver = asked
        self._asked.append(asked)
        service = cluster.node.service
        try:
            service.submit(request, now)
        except RequestError as error:
            asked.fail(error)
            return
        if planned.cancel_after_s is not None:
            abort = partial(service.abort, request, now + planned.cancel_after_s)
            cluster.world.at(planned.cancel_after_s, partial(asked.leave, abort))

    def _on_end(self, asked: Asked) -> None:
        """The next turn follows when the user has thought, unless this one has failed."""
        turns = self._turns[asked.planned.session]
        number = asked.planned.turn + 1
        if asked.outcome != OK or number == len(turns):
            self._num_left -= 1
            return
        self._history[asked.planned.session] += asked.token_ids
        following = turns[number]
        self._cluster.world.at(following.what.think_s, partial(self._ask, following))


def serve(
    cluster: VirtualCluster | ClusterSetting, schedule: Schedule, target: str = "virtual"
) -> list[RequestRecord]:
    """Run a schedule to its end.

    Returns:
        A record of each request that was asked, in the order of the schedule.
    """
    if isinstance(cluster, ClusterSetting):
        cluster = VirtualCluster(cluster)
    return _Run(cluster, schedule).records(target)
