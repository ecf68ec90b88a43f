"""The cluster as a picture: pools, ranks, queues, and what their blocks are used for."""

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from baton_client import BlockCounts, ClusterState, PoolState

BAR_WIDTH = 30
GIB = 1 << 30
BLOCKS = (  # in the order of the bar; what is left of it is free
    ("owned", "owned", "red"),
    ("in_flight", "in flight", "magenta"),
    ("cached", "cached", "cyan"),
)


def draw_cluster(cluster: ClusterState) -> RenderableType:
    """One frame."""
    grid = Table.grid(padding=(0, 0, 1, 0))
    for part in (_headline(cluster), _pools(cluster), _blocks(cluster), _ranks(cluster)):
        grid.add_row(part)
    return grid


def _headline(cluster: ClusterState) -> Text:
    state = (
        ("ready", "bold green")
        if cluster.ready
        else (cluster.unready_reason or cluster.missing or "starting", "bold red")
    )
    text = Text.assemble(
        (cluster.model, "bold"),
        "  ",
        state,
        f"  {cluster.num_active_requests} requests active, "
        f"{cluster.max_model_len} tokens at most, blocks of {cluster.block_size}",
    )
    if cluster.num_leaked:
        text.append(f", {cluster.num_leaked} leaked", "bold red")
    return text


def _table(*columns: str) -> Table:
    """Names to the left, numbers to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    return table


def _pools(cluster: ClusterState) -> Table:
    table = _table("pool", "state", "ring", "TP", "tok/s", "waiting", "running", "pending tokens")
    for pool in cluster.pools:
        style = "green" if pool.serving else "red"
        state = pool.state + (f" ({pool.lost_reason})" if pool.lost_reason else "")
        table.add_row(
            pool.pool_id,
            Text(state, style),
            str(pool.cp_size),
            str(pool.tp_size),
            f"{pool.tokens_per_s:.0f}",
            str(pool.num_waiting),
            str(pool.num_running),
            str(pool.pending_tokens),
        )
    return table


def _blocks(cluster: ClusterState) -> RenderableType:
    names = [name for _, name, _ in BLOCKS]
    table = _table("blocks of", "", "total", "free", *names)
    for pool in cluster.pools:
        for counts in pool.blocks:
            used = [str(getattr(counts, field)) for field, _, _ in BLOCKS]
            table.add_row(pool.pool_id, _bar(counts), str(counts.total), str(counts.free), *used)
    return table


def _bar(counts: BlockCounts) -> Text:
    """Every state that has a block is seen."""
    text = Text()
    for field, _, color in BLOCKS:
        number = getattr(counts, field)
        width = round(BAR_WIDTH * number / counts.total) if counts.total else 0
        text.append("█" * (max(1, width) if number else 0), color)
    text.truncate(BAR_WIDTH)
    text.append("░" * (BAR_WIDTH - len(text)), "dim")
    return text


def _ranks(cluster: ClusterState) -> Table:
    table = _table("rank", "state", "transport", "CP", "TP", "silent", "steps", "step", "memory")
    for pool in cluster.pools:
        for row in _rank_rows(pool):
            table.add_row(*row)
    return table


def _rank_rows(pool: PoolState) -> list[tuple[str | Text, ...]]:
    return [
        (
            f"{pool.pool_id}/{rank.rank}",
            Text("ready", "green") if rank.ready else Text("loading", "yellow"),
            rank.transport,
            str(rank.cp_rank),
            str(rank.tp_rank),
            f"{rank.silent_s:.1f} s",
            str(rank.num_steps),
            f"{rank.step_age_s:.1f} s",
            f"{rank.rss_bytes / GIB:.1f} GiB",
        )
        for rank in pool.ranks
    ]
