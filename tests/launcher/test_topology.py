"""Pool spellings and the resolution of configurations."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config import parse_size, resolve
from launcher.topology import parse_pool, parse_pools, threads_per_rank
from protocol.errors import ConfigError


@given(cp=st.integers(1, 999), tp=st.integers(1, 999))
def test_every_spelling_is_read_back(cp: int, tp: int) -> None:
    pool = parse_pool("prefill", 3, f"cp{cp}tp{tp}")
    assert (pool.pool_id, pool.cp_size, pool.tp_size) == ("prefill3", cp, tp)
    assert pool.num_ranks == cp * tp
    assert parse_pool("prefill", 0, f"CP{cp}").tp_size == 1
    assert parse_pool("decode", 0, f"tp{tp}").cp_size == 1


@given(st.text(max_size=8).filter(lambda text: not text.strip().lower().startswith(("cp", "tp"))))
def test_anything_else_is_refused(spelling: str) -> None:
    with pytest.raises(ConfigError, match="cp2, tp2 or cp4tp2"):
        parse_pool("prefill", 0, spelling)


def test_pools_are_numbered_by_role() -> None:
    pools = parse_pools(("cp2", "cp1"), ("tp2",))
    assert [pool.pool_id for pool in pools] == ["prefill0", "prefill1", "decode0"]
    assert threads_per_rank(16, pools) == 3
    assert threads_per_rank(1, pools) == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 1 << 30), ("512MB", 512_000_000), ("1.5k", 1500), ("4096", 4096), ("2 MiB", 2 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--kv-memory", text) == size


def test_later_wins(tmp_path: Path) -> None:
    file = tmp_path / "baton.toml"
    file.write_text('port = 1\nblock_size = 8\nprefill = ["cp2"]\n[prefill_pool]\nchunk_tokens = 4')
    config = resolve(str(file), {"port": 2}, ("block_size=16", "prefill_pool.layers_per_group=3"))
    assert (config.port, config.block_size, config.prefill) == (2, 16, ("cp2",))
    assert config.prefill_pool == {"chunk_tokens": 4, "layers_per_group": 3}


@pytest.mark.parametrize("content", ["port =", "no_such = 1", 'port = "many"'])
def test_a_bad_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "baton.toml"
    file.write_text(content)
    with pytest.raises(ConfigError):
        resolve(str(file), {}, ())
