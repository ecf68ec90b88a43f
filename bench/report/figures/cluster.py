"""Plots over the run's time of what a Baton cluster said of itself (``bench.load.samples``)."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

from bench.load.samples import ClusterSample, PoolSample
from bench.report.drawing.plot import Axis, Layer, Line, Plot
from bench.report.figures.slices import GUTTER, titled
from bench.report.runs import Side

HALF_S = 0.9  # of the window of a rate: a second, less than what samples jitter by
ROLES = ("prefill", "decode")  # stores run nothing
Points = tuple[tuple[float, float], ...]


def has_samples(side: Side) -> bool:
    """Whether the target has told its state at least once."""
    return bool(side.samples)


def occupancy(side: Side, x: Axis) -> Plot:
    """Requests that run and that wait, by role."""
    samples = side.samples
    layers: list[Layer] = []
    for color, role in enumerate(ROLES):
        if not any(pool.role == role for sample in samples for pool in sample.pools):
            continue
        running = _sums(samples, role, lambda pool: float(pool.num_running))
        waiting = _sums(samples, role, lambda pool: float(pool.num_waiting))
        layers.append(Line(f"{role}, running", color, running, steps=True))
        layers.append(Line(f"{role}, waiting", color, waiting, "dot", steps=True))
    seen = any(y for layer in layers if isinstance(layer, Line) for _, y in layer.points)
    empty = "" if seen else " No request was there at any of these instants."
    num_preempted = _rise(samples, "preemptions_total")
    return Plot(
        f"cluster-requests-{side.color}",
        f"Running and waiting requests by role: {side.name}",
        x,
        Axis("requests", low=0.0),
        tuple(layers),
        "Sums over the pools of a role, as the pools told them at most a second before: what came "
        f"and went between two samples is not seen.{empty} Preemptions in the whole run: "
        f"{num_preempted:.0f}.",
        tab=side.name,
        gutter=GUTTER,
    )


def _sums(samples: Sequence[ClusterSample], role: str, of: Callable[[PoolSample], float]) -> Points:
    return tuple(
        (sample.at_s, sum(of(pool) for pool in sample.pools if pool.role == role))
        for sample in samples
    )


def kv_use(side: Side, x: Axis) -> Plot:
    """The share of each pool's KV blocks that is held, and that is held or cached."""
    held: dict[str, list[tuple[float, float]]] = {}
    filled: dict[str, list[tuple[float, float]]] = {}
    for sample in side.samples:
        for pool in sample.pools:
            shares = _shares(pool)
            if shares is not None and pool.role in ROLES:
                held.setdefault(pool.pool_id, []).append((sample.at_s, shares[0]))
                filled.setdefault(pool.pool_id, []).append((sample.at_s, shares[1]))
    layers: list[Layer] = []
    for color, name in enumerate(sorted(held, key=lambda name: (name.startswith("decode"), name))):
        layers.append(Line(f"{name}, held", color, tuple(held[name]), steps=True))
        layers.append(Line(f"{name}, with cached", color, tuple(filled[name]), "dot", steps=True))
    return Plot(
        f"cluster-kv-{side.color}",
        f"KV use by pool: {side.name}",
        x,
        Axis("share of the pool's blocks", "share", low=0.0, high=1.0),
        tuple(layers),
        "Held blocks are of requests or on their way: near 100 % requests wait for "
        "room. Cached ones are given away as soon as somebody needs them, so a pool full of them "
        "is a good thing. Of several block spaces the fullest.",
        tab=side.name,
        gutter=GUTTER,
    )


def _shares(pool: PoolSample) -> tuple[float, float] | None:
    spaces = [space for space in pool.blocks if space.total > 0]
    if not spaces:
        return None
    held = max(space.held / space.total for space in spaces)
    return held, max(1.0 - space.free / space.total for space in spaces)


def prompt_tokens(sides: Sequence[Side], x: Axis) -> Plot:
    """Prompt tokens that were computed per second, of each target."""
    shown = [side for side in sides if len(side.samples) > 1]
    layers = tuple(Line(side.name, side.color, rates_of(_computed(side.samples))) for side in shown)
    return Plot(
        "cluster-prompt-tokens",
        titled("Prefill: prompt tokens computed per second", shown, sides),
        x,
        Axis("prompt tokens/s", "rate", low=0.0),
        layers,
        "By the prefill pools' counters, or, where there is no such pool, by the prompts that the "
        "decode pools granted less what was cached. Each point is over the two seconds around it; "
        "tokens count when their chunk is done.",
        tab="prefill",
        gutter=GUTTER,
    )


def _computed(samples: Sequence[ClusterSample]) -> Points:
    if any(pool.role == "prefill" for sample in samples for pool in sample.pools):
        return _sums(samples, "prefill", lambda pool: _counter(pool, "prefill_computed_tokens"))
    return _sums(
        samples,
        "decode",
        lambda pool: _counter(pool, "prompt_tokens_total") - _counter(pool, "cached_tokens_total"),
    )


def _counter(pool: PoolSample, name: str) -> float:
    return pool.counters.get(name, 0.0)


def rates_of(totals: Points) -> Points:
    """Per second, over about two seconds around each sample: a pool tells its totals each second,
    so over less it would be a matter of luck how many of those fall into it. A total that falls is
    of a pool that was started again: no rate."""
    found: list[tuple[float, float]] = []
    times = [at_s for at_s, _ in totals]
    for at_s in times:
        after = min(bisect_left(times, max(at_s, times[0] + HALF_S) + HALF_S), len(times) - 1)
        before = max(bisect_right(times, min(at_s, times[after] - HALF_S) - HALF_S) - 1, 0)
        rise, over_s = totals[after][1] - totals[before][1], times[after] - times[before]
        if rise >= 0.0 and over_s > 0.0:
            found.append((at_s, rise / over_s))
    return tuple(found)


def _rise(samples: Sequence[ClusterSample], name: str) -> float:
    """By how much a counter has risen over all pools, starts anew not counted."""
    total = 0.0
    last: dict[str, float] = {}
    for sample in samples:
        for pool in sample.pools:
            now = _counter(pool, name)
            total += max(0.0, now - last.get(pool.pool_id, now))
            last[pool.pool_id] = now
    return total
