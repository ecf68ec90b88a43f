"""What is served, and how, in a dozen lines: one object, made here and rendered here. Pure.

``baton serve`` shows it when the cluster answers, ``/v1/cluster`` has it as ``serving``, and
``baton config show --resolved`` before anything is started.
"""

from collections.abc import Iterable

import msgspec

from coordinator.cluster.pools import Pool
from coordinator.config import CoordinatorConfig
from modeling.checkpoint.tensors import grouped
from modeling.facts import CheckpointFacts

MAX_NOTES = 3


class PoolMemory(msgspec.Struct, frozen=True):
    """The KV memory of a pool: of each rank in bytes, of all together in tokens."""

    pool_id: str
    role: str
    bytes_per_rank: int
    num_tokens: int

    @staticmethod
    def of(pool: Pool) -> "PoolMemory":
        """Of a pool whose ranks have said HELLO."""
        layout = pool.ranks[0].hello.endpoint.layout
        num_tokens = layout.num_blocks * layout.block_size * pool.spec.cp_size
        return PoolMemory(pool.pool_id, pool.spec.role, layout.num_bytes, num_tokens)


class StartReport(msgspec.Struct, frozen=True):
    """Everything that decides how requests are answered."""

    model: str
    names: tuple[str, ...]  # that requests may give
    dtype: str
    checkpoint: CheckpointFacts
    generation_config: str  # "auto" or "none"
    kv_memory_from: str  # how its size was found
    pools: tuple[PoolMemory, ...]
    request_tokens: int | None  # of prompt and answer, for which every pool has room; None: unknown
    max_model_len: int  # that are promised


def make_report(
    config: CoordinatorConfig,
    checkpoint: CheckpointFacts,
    pools: Iterable[PoolMemory],
    max_model_len: int,
) -> StartReport:
    """The report of a cluster.

    Args:
        config: of its coordinator.
        checkpoint: what was read of it.
        pools: those that are there.
        max_model_len: the context that is promised.
    """
    pools = tuple(pools)
    # An answer's last token needs no room: nothing follows it.
    room = [pool.num_tokens + 1 for pool in pools if pool.role != "store"]
    return StartReport(
        model=config.model,
        names=config.model_names,
        dtype=config.kv_dtype or checkpoint.stored_dtype,
        checkpoint=checkpoint,
        generation_config=config.generation_config,
        kv_memory_from=config.kv_memory_from,
        pools=pools,
        request_tokens=min(room, default=None),
        max_model_len=max_model_len,
    )


def render(report: StartReport) -> list[str]:
    """Its lines, for people."""
    facts = report.checkpoint
    lines = [
        ("model", f"{report.model} ({facts.architecture}), named {', '.join(report.names)}"),
        ("dtype", _dtype(report.dtype, facts.stored_dtype)),
        ("stop tokens", _stop_tokens(facts)),
        ("sampling", _sampling(report.generation_config, facts)),
        ("chat template", facts.template),
        ("output head", facts.head),
    ]
    if facts.unread_tensors:
        lines.append(("not read", grouped(facts.unread_tensors)))
    memory = ", ".join(
        f"{pool.pool_id} {_size(pool.bytes_per_rank)} a rank, {pool.num_tokens} tokens"
        for pool in report.pools
    )
    lines.append(("KV memory", f"{memory} ({report.kv_memory_from})"))
    fit = f", {report.request_tokens} fit for one request" if report.request_tokens else ""
    lines.append(("context", f"{report.max_model_len} tokens are promised{fit}"))
    lines += [("note", note) for note in facts.notes[:MAX_NOTES]]
    return [f"  {name + ':':<15}{text}" for name, text in lines]


def _size(num_bytes: int) -> str:
    for unit, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << unit:
            return f"{num_bytes / (1 << unit):.3g} {name}"
    return f"{num_bytes} bytes"


def _dtype(served: str, stored: str) -> str:
    if served == stored or stored == "built in":
        return served
    return f"{served}, from weights in {stored} (--dtype {stored} keeps them)"


def _stop_tokens(facts: CheckpointFacts) -> str:
    stops = [
        f"{stop.text} {stop.token_id} ({', '.join(stop.sources)})" for stop in facts.stop_tokens
    ]
    return ", ".join(stops) or "none: answers end at max_tokens or a stop string"


def _sampling(generation_config: str, facts: CheckpointFacts) -> str:
    if generation_config == "none":
        return "temperature 1 (--generation-config none)"
    named = ", ".join(f"{name} {value:g}" for name, value in facts.sampling.items())
    shown = f"{named} ({facts.sampling_from})" if named else "temperature 1"
    if facts.not_followed:
        shown += f"; without effect: {', '.join(facts.not_followed)}"
    return shown
