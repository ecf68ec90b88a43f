"""Who gets the next request: the production router among simpler policies.

All see the requests and prefixes that the coordinator has; only the choice differs. The workers
are whole colocated pools of different speed; prompts share prefixes as popular as Zipf says, and no
worker can keep them all.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any

from bench.simulate.cluster import Cluster, ClusterSetting, Router, Served
from bench.simulate.estimates import Estimate, mean_of, percentile, pick, ratio
from bench.simulate.pools import BLOCK_SIZE, DecodeSetting, seeded
from bench.simulate.report import COLOURS, VIRTUAL, NullCase, Report, Scale, Table
from bench.simulate.step_time import MEASURED, ROOFLINE, StepTime
from bench.simulate.workload import Arrival, Lengths, poisson, zipf_weights
from coordinator.cluster.placement import Placement
from coordinator.cluster.registry import Registry
from coordinator.cluster.router import PrefixMap
from coordinator.request import Loads, Request
from protocol.messages import CacheUpdate

NAME = "routing"
QUESTION = "What is the production router worth against simpler policies?"
PRODUCTION, BASELINE = "production", "least tokens"
NUM_PREFIXES, PREFIX_TOKENS = 24, 512
OWN, OUTPUT = Lengths(48, 0.5, 256), Lengths(48, 0.7, 512)
NUM_REQUESTS = 250
CASES = ((0.5, 1.0), (0.8, 1.0), (0.8, 2.5))  # (load, exponent of the prefixes' popularity)
HETEROGENEOUS = (1.0, 1.0, 1.5, 3.0)  # how many times as long a step takes on each worker
MACHINES: tuple[StepTime, ...] = (MEASURED, ROOFLINE)
EQUAL = (1.0, 1.0, 1.0, 1.0)
KNOWN_LIMIT_CASE = CASES[1]  # run once more with requests that say how much they will generate
LIMIT = 1024  # else
NUM_BLOCKS = 12 * PREFIX_TOKENS // BLOCK_SIZE + 256  # a worker keeps about half of the prefixes
BATCH = 32


class Policy:
    """Chooses among the pools that serve; all else is the coordinator's.

    Args:
        placement: the coordinator's own.
        registry: which pools there are.
        random: for those that throw dice.
    """

    def __init__(self, placement: Placement, registry: Registry, random: Random) -> None:
        self._placement = placement
        self._pool_ids = sorted(pool.pool_id for pool in registry.serving("decode"))
        self._random = random
        self._prefixes = PrefixMap()
        self._num_chosen = 0

    def choose_decode(self, request: Request, loads: Loads, now: float) -> str | None:
        del now
        pending = {pool_id: loads.decode_tokens(pool_id) for pool_id in self._pool_ids}
        self._num_chosen += 1
        return self._choose(pending, request)

    def _choose(self, pending: dict[str, int], request: Request) -> str:
        """The pool, knowing the tokens that each has still to compute."""
        raise NotImplementedError

    def choose_prefill(self, request: Request, loads: Loads) -> str | None:
        return self._placement.choose_prefill(request, loads)

    def on_cache_update(self, pool_id: str, update: CacheUpdate) -> None:
        self._prefixes.update(pool_id, update.stored, update.evicted)
        self._placement.on_cache_update(pool_id, update)


class RandomPolicy(Policy):
    def _choose(self, pending: dict[str, int], request: Request) -> str:
        del request
        return self._random.choice(list(pending))


class RoundRobin(Policy):
    def _choose(self, pending: dict[str, int], request: Request) -> str:
        del pending, request
        return self._pool_ids[self._num_chosen % len(self._pool_ids)]


class LeastTokens(Policy):
    def _choose(self, pending: dict[str, int], request: Request) -> str:
        del request
        return min(pending, key=lambda pool_id: (pending[pool_id], pool_id))


class TwoChoices(Policy):
    def _choose(self, pending: dict[str, int], request: Request) -> str:
        del request
        seen = self._random.sample(list(pending), min(2, len(pending)))
        return min(seen, key=lambda pool_id: (pending[pool_id], pool_id))


class PrefixOnly(Policy):
    """The most cached prefix; whoever comes first among equals, by dice."""

    def _choose(self, pending: dict[str, int], request: Request) -> str:
        cached = {
            pool_id: self._prefixes.num_cached_blocks(pool_id, request.block_hashes)
            for pool_id in pending
        }
        most = max(cached.values())
        return self._random.choice([pool_id for pool_id in pending if cached[pool_id] == most])


class PrefixAndTokens(Policy):
    """The fewest tokens to wait for, what this prompt would add included."""

    def _choose(self, pending: dict[str, int], request: Request) -> str:
        def total(pool_id: str) -> int:
            num_cached = self._prefixes.num_cached_blocks(pool_id, request.block_hashes)
            return pending[pool_id] - num_cached * BLOCK_SIZE

        return min(pending, key=lambda pool_id: (total(pool_id), pool_id))


POLICIES: dict[str, type[Policy] | None] = {
    "random": RandomPolicy,
    "round robin": RoundRobin,
    BASELINE: LeastTokens,
    "two choices": TwoChoices,
    "prefix only": PrefixOnly,
    "prefix + tokens": PrefixAndTokens,
    PRODUCTION: None,  # the coordinator's own placement
}


def make_router(name: str, seed: int) -> Callable[[Placement, Registry], Router] | None:
    policy = POLICIES[name]
    return None if policy is None else partial(_make, policy, seed)


def _make(policy: type[Policy], seed: int, placement: Placement, registry: Registry) -> Router:
    return policy(placement, registry, seeded(NAME, "dice", seed))


def capacity(steps: StepTime, slowness: Sequence[float], prefix_tokens: int) -> float:
    """Requests a second of workers that are always full and hit every prefix half of the time."""
    num_tokens = prefix_tokens // 2 + round(OWN.mean)
    step_s = steps.step_s(BATCH, BATCH * (prefix_tokens + 100), [])
    work_s = steps.step_s(0, 0, [(num_tokens, 0)]) + OUTPUT.mean * step_s / BATCH
    return sum(1 / slower for slower in slowness) / work_s


def traffic(rate: float, exponent: float, seed: int, num: int, prefix_tokens: int) -> list[Arrival]:
    random = seeded(NAME, seed, rate, exponent)
    weights = zipf_weights(NUM_PREFIXES, exponent)
    arrivals = []
    for number, time_s in zip(range(num), poisson(random, rate), strict=False):
        prefix = random.choices(range(NUM_PREFIXES), weights)[0]
        own, output = OWN.draw(random), OUTPUT.draw(random)
        arrivals.append(
            Arrival(number, time_s, prefix_tokens + own, output, "chat", prefix, prefix_tokens)
        )
    return arrivals


def setting_of(
    steps: StepTime, slowness: Sequence[float], max_tokens: int = LIMIT
) -> ClusterSetting:
    decode = tuple(
        DecodeSetting(512, 32, num_blocks=NUM_BLOCKS, slowness=slower) for slower in slowness
    )
    return ClusterSetting(steps, decode, max_tokens=max_tokens)


def figures(served: Sequence[Served], cluster: Cluster) -> dict[str, float]:
    ttfts = [one.ttft_s for one in served]
    shared = sum(one.arrival.num_prefix_tokens for one in served)
    busy = [pool.usage.busy_s for pool in cluster.decode.values()]
    return {
        "ttft_mean_s": statistics.fmean(ttfts),
        "ttft_p99_s": percentile(ttfts, 0.99),
        "e2e_mean_s": statistics.fmean(one.e2e_s for one in served),
        "hit_rate": sum(one.num_cached_tokens for one in served) / max(1, shared),
        "imbalance": max(busy) / statistics.fmean(busy),
    }


def compare(
    setting: ClusterSetting,
    case: tuple[float, float],
    scale: Scale,
    prefix_tokens: int = PREFIX_TOKENS,
) -> Iterator[dict[str, Any]]:
    """All policies on the same traffic."""
    load, exponent = case
    steps, slowness = setting.steps, [pool.slowness for pool in setting.decode]
    rate = load * capacity(steps, slowness, prefix_tokens)
    num = scale.count(NUM_REQUESTS, 30)
    for seed in scale.seeds:
        arrivals = traffic(rate, exponent, seed, num, prefix_tokens)
        for name in POLICIES:
            cluster = Cluster(setting, make_router=make_router(name, seed))
            served = cluster.run(arrivals)
            yield {
                "machine": steps.name, "load": load, "exponent": exponent,
                "workers": len(slowness), "prefix_tokens": prefix_tokens,
                "limit": setting.max_tokens, "seed": seed,
                "policy": name, **figures(served, cluster),
            }  # fmt: skip


def null_cases(scale: Scale) -> list[NullCase]:
    """One worker: there is no choice. Equal workers and nothing shared: load is all there is."""
    rows = list(compare(setting_of(MEASURED, (1.0,)), CASES[0], scale))
    means = [pick(rows, "e2e_mean_s", policy=name) for name in POLICIES]
    spread = max(max(values) / min(values) - 1 for values in zip(*means, strict=True))
    rows = list(compare(setting_of(MEASURED, EQUAL), CASES[0], scale, 0))
    found = over_baseline(rows, "e2e_mean_s", PRODUCTION)
    return [
        NullCase(
            "one worker, time to the last token under all policies",
            f"differs by {spread:.2%}",
            spread < 1e-9,
        ),
        NullCase(
            f"equal workers and no shared prefix, production over {BASELINE}, time to the last "
            "token",
            str(found),
            not found.excludes(1.0) or abs(found.value - 1) < 0.02,
        ),
    ]


def over_baseline(
    rows: Sequence[dict[str, Any]], figure: str, policy: str, **where: object
) -> Estimate:
    """Against the least tokens, which is no weak policy."""
    found = (pick(rows, figure, policy=name, **where) for name in (policy, BASELINE))
    return ratio(*found)


def run(scale: Scale) -> Report:
    """All of it."""
    rows = [
        row
        for steps in MACHINES
        for case in CASES
        for row in compare(setting_of(steps, HETEROGENEOUS), case, scale)
    ]
    rows += compare(setting_of(MEASURED, HETEROGENEOUS, 0), KNOWN_LIMIT_CASE, scale)
    return Report(
        name=NAME,
        question=QUESTION,
        clock=VIRTUAL,
        setting=[
            f"Four colocated workers whose steps take {', '.join(map(str, HETEROGENEOUS))} times "
            f"as long; {NUM_PREFIXES} prefixes of {PREFIX_TOKENS} tokens, of which a worker can "
            "keep about half; some 48 tokens of their own, answers of 48. Poisson.",
            "Zipf 1: the most popular prefix is in a quarter of the prompts; Zipf 2.5: in three "
            "quarters.",
            "Load 1 is what the workers can do when they are full and hit half of all prefixes.",
            "Production is the placement in coordinator/cluster: most cached prefix, then shortest "
            "wait. What is cached is known without delay.",
            *(f"`{steps.name}`: {steps.source}." for steps in MACHINES),
        ],
        tables=[_table(rows, steps, case) for steps in MACHINES for case in CASES],
        nulls=null_cases(Scale(scale.num_seeds, scale.size / 2)),
        reading=_reading(rows),
        rows=rows,
        draw=partial(_draw, rows),
    )


def _where(steps: StepTime, case: tuple[float, float]) -> dict[str, object]:
    return {"machine": steps.name, "load": case[0], "exponent": case[1], "limit": LIMIT}


def _table(rows: Sequence[dict[str, Any]], steps: StepTime, case: tuple[float, float]) -> Table:
    where = _where(steps, case)
    lines = []
    for name in POLICIES:
        lines.append(
            (
                name,
                str(mean_of(pick(rows, "ttft_mean_s", policy=name, **where))),
                str(over_baseline(rows, "ttft_mean_s", name, **where)),
                str(over_baseline(rows, "ttft_p99_s", name, **where)),
                str(over_baseline(rows, "e2e_mean_s", name, **where)),
                f"{mean_of(pick(rows, 'hit_rate', policy=name, **where)).value:.0%}",
                f"{mean_of(pick(rows, 'imbalance', policy=name, **where)).value:.2f}",
            )
        )
    over = f"over {BASELINE}"
    header = [
        "policy",
        "mean TTFT (s)",
        f"mean TTFT {over}",
        f"p99 TTFT {over}",
        f"mean E2E {over}",
        "prefix hit",
        "busiest / mean",
    ]
    return Table(f"{steps.name}, load {case[0]:g}, Zipf {case[1]:g}", header, tuple(lines))


def _reading(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for steps in MACHINES:
        for case in CASES:
            where = _where(steps, case)
            means = {
                name: mean_of(pick(rows, "ttft_mean_s", policy=name, **where)).value
                for name in POLICIES
            }
            best = min(means, key=lambda name: means[name])
            hit, skew = (
                mean_of(pick(rows, figure, policy=PRODUCTION, **where)).value
                for figure in ("hit_rate", "imbalance")
            )
            ttft, tail, whole = (
                over_baseline(rows, figure, PRODUCTION, **where)
                for figure in ("ttft_mean_s", "ttft_p99_s", "e2e_mean_s")
            )
            lines.append(
                f"`{steps.name}`, load {case[0]:g}, Zipf {case[1]:g}: production has {ttft} times "
                f"the mean TTFT of {BASELINE}, {tail} times its p99 and {whole} times its mean "
                f"time to the last token; it hits {hit:.0%} of the prefixes, its busiest worker "
                f"has {skew:.2f} times the mean work. The least mean TTFT had {best}."
            )
    return [
        *lines,
        "Production and `prefix only` both take the most cached prefix, whatever the wait there "
        "is; among equals production takes the shortest wait by measured speeds, the other throws "
        "dice. That is all that lies between them: a popular prefix is soon on several workers.",
        _known_limits(rows),
        "Not shown: stale knowledge of loads and caches, sessions, failures, and a burst of one "
        "new prefix, which the rule must send to one worker as soon as that one has it.",
    ]


def _known_limits(rows: Sequence[dict[str, Any]]) -> str:
    where = _where(MEASURED, KNOWN_LIMIT_CASE)
    found = {
        (name, limit): over_baseline(rows, "ttft_mean_s", name, **{**where, "limit": limit})
        for name in ("prefix + tokens", PRODUCTION)
        for limit in (LIMIT, 0)
    }
    return (
        f"What a request may still generate counts as pending, up to its limit ({LIMIT} here), and "
        f"outweighs any prefix: `prefix + tokens` has {found['prefix + tokens', LIMIT]} times the "
        f"mean TTFT of {BASELINE} (`measured`, load {KNOWN_LIMIT_CASE[0]:g}, Zipf "
        f"{KNOWN_LIMIT_CASE[1]:g}). Were limits the true lengths, it would have "
        f"{found['prefix + tokens', 0]} times, and production {found[PRODUCTION, 0]} instead of "
        f"{found[PRODUCTION, LIMIT]}."
    )


def _draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:  # noqa: ANN401 - matplotlib's
    names = [name for name in POLICIES if name != BASELINE]
    for axes, steps in zip(figure.subplots(1, 2, sharey=True), MACHINES, strict=True):
        for offset, (colour, case) in enumerate(zip(COLOURS, CASES, strict=False)):
            where = _where(steps, case)
            found = [over_baseline(rows, "ttft_mean_s", name, **where) for name in names]
            errors = [[f.value - f.low for f in found], [f.high - f.value for f in found]]
            places = [place + 0.25 * offset for place in range(len(names))]
            axes.errorbar([f.value for f in found], places, xerr=errors, fmt="o", capsize=3,
                          color=colour,
                          label=f"load {case[0]:g}, Zipf {case[1]:g}")  # fmt: skip
        axes.axvline(1.0, color="#888888", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yticks([place + 0.25 for place in range(len(names))], names)
        axes.set(xlabel=f"mean TTFT, as a multiple of {BASELINE}", title=steps.name)
    figure.axes[0].invert_yaxis()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(CASES), frameon=False)  # fmt: skip
