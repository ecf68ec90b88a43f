"""The published traces' formats, on rows written here."""

from pathlib import Path

import pytest

from bench.load.workload.arrival import Replay
from bench.load.workload.schedule import draw_trace, ideal_cached_share, replay_of
from bench.load.workload.sessions import Segment
from bench.load.workload.traces import Row, load_trace, turn_of
from protocol.errors import ConfigError

MOONCAKE = """\
{"timestamp": 3000, "input_length": 1030, "output_length": 7, "hash_ids": [0, 1, 3]}
{"timestamp": 0, "input_length": 1024, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 0, "input_length": 700, "output_length": 3, "hash_ids": [0, 2]}
{"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [4, 5]}
{"timestamp": 3000, "input_length": 6, "output_length": 1, "hash_ids": [3]}
{"timestamp": 6000, "input_length": 6, "output_length": 1, "hash_ids": [6]}
{"timestamp": 6000, "input_length": 6, "output_length": 1, "hash_ids": [7]}
{"timestamp": 6000, "input_length": 6, "output_length": 1, "hash_ids": [8]}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-17 00:00:00,1,2
"""
BURST = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,,1.5,ChatGPT,472,18,490,Conversation log
45,,0.0,ChatGPT,1087,0,1087,API log
118,,2.0,GPT-4,417,276,693,API log
"""


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text)
    return path


def test_mooncake(tmp_path: Path) -> None:
    rows = load_trace(_write(tmp_path, MOONCAKE))
    assert rows[0] == Row(0.0, 1024, 5, (0, 1))
    assert [row.at_s for row in rows] == [0.0] * 3 + [3.0] * 2 + [6.0] * 3
    assert replay_of(rows).jitter_s == 3.0  # the stamps lie on a grid
    schedule = draw_trace(rows, 0)
    assert schedule == draw_trace(rows, 0)
    times = [planned.at_s for planned in schedule.requests]
    assert times == sorted(times)
    assert len(set(times)) == 8
    as_recorded = draw_trace(rows, 0, replay=Replay(replay_of(rows).stamps, speed=3.0))
    assert [planned.at_s for planned in as_recorded.requests] == [0, 0, 0, 1, 1, 2, 2, 2]
    # of 3378 tokens, 512 + (512 + 512) are whole blocks seen before
    share = ideal_cached_share(as_recorded)
    assert share == pytest.approx(1536 / sum(row.num_prompt_tokens for row in rows))


def test_a_part_of_a_block_is_not_its_beginning() -> None:
    assert turn_of(Row(0.0, 1030, 7, (0, 1, 3)), 0).segments == (
        Segment("block/0", 512),
        Segment("block/1", 512),
        Segment("block/3/6", 6),
    )
    scaled = turn_of(Row(0.0, 1030, 7, (0, 1, 3)), 0, scale=0.25)
    assert [segment.num_tokens for segment in scaled.segments] == [128, 128, 2]
    assert scaled.max_tokens == 2
    without = turn_of(Row(0.0, 1030, 7, (0, 1)), 5).segments  # traces that leave the rest unnamed
    assert without[-1] == Segment("block/row.5/6", 6)


def test_another_block_size_is_noticed() -> None:
    with pytest.raises(ConfigError, match="is its block size 16"):
        turn_of(Row(0.0, 1030, 7, (0, 1, 3)), 0, block_size=16)


def test_azure(tmp_path: Path) -> None:
    rows = load_trace(_write(tmp_path, AZURE))
    assert [(row.num_prompt_tokens, row.num_output_tokens) for row in rows] == [
        (374, 44),
        (396, 109),
        (1, 2),
    ]
    assert rows[1].at_s - rows[0].at_s == pytest.approx(4.314579, abs=1e-6)
    assert replay_of(rows).jitter_s == 0.0


def test_burstgpt_without_its_failures(tmp_path: Path) -> None:
    rows = load_trace(_write(tmp_path, BURST))
    assert rows == [Row(5.0, 472, 18), Row(118.0, 417, 276)]
    schedule = draw_trace(rows, 0, max_requests=1)
    assert schedule.requests[0].what.segments == (Segment("row/0", 472),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a trace"),
        ("a,b\n1,2\n", "not a trace"),
        ('{"timestamp": 3}\n', "after 0 rows"),
        (MOONCAKE + "{\n", "after 8 rows"),
        (AZURE + "noon,3,4\n", "after 3 rows"),
        (BURST + "1,2\n", "after 3 rows"),
        (BURST.splitlines()[0], "no row"),
    ],
)
def test_damage_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_trace(_write(tmp_path, text))
