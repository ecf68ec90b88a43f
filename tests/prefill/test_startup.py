"""What a rank does between the forming of its gang and its first plan, in a pool of one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcache.pool import KVPool
from modeling.arithmetic import ArithmeticModel
from modeling.checkpoint.config import load_config
from modeling.parallel import SingleRank
from prefill.config import PrefillConfig
from prefill.manifest import layer_groups
from prefill.worker import ARITHMETIC_COSTS, measure, open_ring, warm_up
from protocol.errors import ConfigError
from protocol.kv import KVLayout

NAME = "arithmetic:layers=2,heads=2,kv_heads=1,vocab=512,max_len=1024"


def config(**fields: Any) -> PrefillConfig:
    required = {
        "model": NAME,
        "pool_id": "prefill0",
        "control_address": "ipc:///nowhere",
        "token": "t",
        "listen": "ipc:///nowhere",
    }
    return PrefillConfig(**(required | fields))


@pytest.mark.parametrize("num_blocks", [1, 3, 40])
def test_a_pool_of_any_size_warms_up(num_blocks: int) -> None:
    torch.set_num_threads(1)
    model_config = load_config(NAME)
    layout = KVLayout(2, num_blocks, 1, 0, 1, 4, model_config.head_dim, "float32")
    model, pool = ArithmeticModel(model_config, SingleRank()), KVPool(layout)
    one = config(block_size=4)
    assert open_ring(one, torch.device("cpu")) is None
    assert warm_up(one, model, pool) > 0
    costs = measure(one, model, pool, None)
    assert costs.model == ARITHMETIC_COSTS
    assert costs.seconds(64, 0, 1) > costs.seconds(32, 0, 1) > 0


def test_the_operator_may_say_when_to_ring() -> None:
    model_config = load_config(NAME)
    layout = KVLayout(2, 8, 1, 0, 1, 4, model_config.head_dim, "float32")
    model, pool = ArithmeticModel(model_config, SingleRank()), KVPool(layout)
    costs = measure(config(ring_threshold_tokens=100), model, pool, None)
    assert costs.worth_taking(99, 0, (1, 2, 4)) == (1,)
    assert costs.worth_taking(100, 0, (1, 2, 4)) == (4,)


@pytest.mark.parametrize(
    "fields",
    [
        {"chunk_tokens": 0},
        {"max_num_sequences": 0},
        {"step_target_s": 0.0},
        {"layers_per_group": -1},
        {"rank": 1},
        {"threads": 0},
        {"max_model_len": 1},
        {"listen": "/tmp"},
    ],
)
def test_what_no_rank_can_run_with_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config(**fields)


@pytest.mark.parametrize(("num_layers", "asked", "sizes"), [(28, 0, 4), (3, 0, 1), (10, 4, 4)])
def test_layer_groups_cover_all_layers(num_layers: int, asked: int, sizes: int) -> None:
    groups = layer_groups(num_layers, asked)
    assert [layer for group in groups for layer in group] == list(range(num_layers))
    assert {len(group) for group in groups[:-1]} == {sizes}


def run_rank(path: Path, text: str | None) -> tuple[int, str]:
    if text is not None:
        path.write_text(text)
    command = [sys.executable, "-P", "-m", "prefill", "--config", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("{", "truncated"),
        ('{"model": "x"}', "missing required field"),
        (
            '{"model": "/no/such", "pool_id": "p", "control_address": "ipc:///x", "token": "t", '
            '"listen": "ipc:///x"}',
            "/no/such",
        ),
        (
            f'{{"model": "{NAME}", "pool_id": "p", "control_address": "ipc:///x", "token": "t", '
            '"listen": "ipc:///x", "kv_memory_bytes": 100}',
            "--kv-memory 100 bytes",
        ),
    ],
)
def test_an_operators_mistake_is_one_line(tmp_path: Path, text: str | None, says: str) -> None:
    code, stderr = run_rank(tmp_path / "rank.json", text)
    assert code == 2, stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert says in stderr
