"""Recorded load: Mooncake's, Azure's and BurstGPT's published files, as rows of one shape.

Mooncake names every block of 512 tokens of a prompt by a number; prompts that begin with the same
numbers share a prefix. The others have lengths only. No file says what the tokens were: they are
drawn from the block's number.
"""

import csv
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.load.workload.sessions import Segment, Turn
from protocol.errors import ConfigError

BLOCK_SIZE = 512  # Mooncake's; Qwen's traces of the same shape have 16


class Row(msgspec.Struct, frozen=True):
    """One request of a trace."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()


class _MooncakeRow(msgspec.Struct):
    timestamp: float  # milliseconds
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


_MOONCAKE = msgspec.json.Decoder(_MooncakeRow)
_READ_ERRORS = (ValueError, KeyError, TypeError, AttributeError)


def load_trace(path: Path) -> list[Row]:
    """A file of any of the three formats, told apart by how it begins; in order of time.

    Rows without an answer, as BurstGPT's failures are, are left out.

    Raises:
        ConfigError: none of the formats, or a row of it is damaged.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    head = lines[0] if lines else ""
    rows: Iterator[Row]
    if head.startswith("{"):
        rows = map(_mooncake_row, filter(str.strip, lines))
    elif "ContextTokens" in head:
        rows = _table(lines, _azure_row)
    elif "Request tokens" in head:
        rows = _table(lines, _burst_row)
    else:
        raise ConfigError(f"{path}: not a trace of Mooncake (JSON lines), Azure or BurstGPT (CSV)")
    read: list[Row] = []
    try:
        read.extend(rows)
    except _READ_ERRORS as error:  # msgspec's are ValueErrors
        raise ConfigError(f"{path}: after {len(read)} rows: {error!r}") from error
    kept = [row for row in read if row.num_prompt_tokens > 0 and row.num_output_tokens > 0]
    if not kept:
        raise ConfigError(f"{path}: no row has a prompt and an answer")
    return sorted(kept, key=lambda row: row.at_s)


def _mooncake_row(line: str) -> Row:
    row = _MOONCAKE.decode(line)
    return Row(row.timestamp / 1000, row.input_length, row.output_length, row.hash_ids)


def _table(lines: Iterable[str], read_row: Callable[[dict[str, str]], Row]) -> Iterator[Row]:
    return map(read_row, csv.DictReader(lines))


def _azure_row(fields: dict[str, str]) -> Row:
    return Row(
        _seconds(fields["TIMESTAMP"]), int(fields["ContextTokens"]), int(fields["GeneratedTokens"])
    )


def _burst_row(fields: dict[str, str]) -> Row:
    return Row(
        float(fields["Timestamp"]), int(fields["Request tokens"]), int(fields["Response tokens"])
    )


def _seconds(stamp: str) -> float:
    """``2023-11-16 18:15:46.6805900``: seven digits, one more than datetime takes."""
    whole, _, fraction = stamp.strip().removesuffix("Z").partition("+")[0].partition(".")
    moment = datetime.fromisoformat(whole).replace(tzinfo=UTC)
    return moment.timestamp() + float(f"0.{fraction or 0}")


def turn_of(row: Row, number: int, *, block_size: int = BLOCK_SIZE, scale: float = 1.0) -> Turn:
    """The request that a row stands for.

    Args:
        number: of the row; the name of a prompt that has no blocks.
        block_size: tokens behind each hash id.
        scale: of prompt, answer and blocks, for a machine smaller than the one that was recorded.

    Raises:
        ConfigError: the row has too few or too many hash ids for its length.
    """
    size = max(1, round(block_size * scale))
    num_tokens = max(1, round(row.num_prompt_tokens * scale))
    max_tokens = max(1, round(row.num_output_tokens * scale))
    if not row.hash_ids:
        return Turn("trace", (Segment(f"row/{number}", num_tokens),), max_tokens)
    num_full, rest = divmod(row.num_prompt_tokens, block_size)
    if len(row.hash_ids) not in (num_full, num_full + (rest > 0)):
        raise ConfigError(
            f"row {number}: {len(row.hash_ids)} hash ids for {row.num_prompt_tokens} tokens; "
            f"is its block size {block_size}?"
        )
    segments = [Segment(f"block/{hash_id}", size) for hash_id in row.hash_ids[:num_full]]
    tail = max(1, round(rest * scale)) if rest else 0
    if tail:  # has its length in its name: it is not the beginning of a whole block
        last = row.hash_ids[num_full] if len(row.hash_ids) > num_full else f"row.{number}"
        segments.append(Segment(f"block/{last}/{tail}", tail))
    return Turn("trace", tuple(segments), max_tokens)
