"""``baton bench run`` against a real coordinator: the cluster's state stands beside the records."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.load.record import read_run
from bench.load.samples import SAMPLES_FILE, read_samples, sample_of
from launcher.__main__ import main


def test_field_names_are_those_of_the_state(cluster: Any) -> None:
    """A renamed one would be decoded to nothing, in silence."""
    answer = cluster.client.get("/v1/cluster")
    sample = sample_of(answer.content, "t", 1.0, 0.01)
    assert sample is not None
    for told, kept in zip(answer.json()["pools"], sample.pools, strict=True):
        for name in ("pool_id", "role", "serving", "num_running", "num_waiting", "pending_tokens"):
            assert getattr(kept, name) == told[name], name
        assert msgspec.to_builtins(kept.counters) == told["ranks"][0]["counters"]
        names = kept.blocks[0].__struct_fields__
        spaces = [{name: getattr(space, name) for name in names} for space in kept.blocks]
        assert spaces == told["blocks"]
    assert sample.pools[0].blocks[0].total > 0


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_leaves_samples_unless_told_not_to(
    wanted: bool, cluster: Any, tmp_path: Path
) -> None:
    flags = ["--url", cluster.url, "--workload", "lengths:prompt=40,output=3", "--rate", "20"]
    flags += ["--requests", "10", "--output", str(tmp_path), *([] if wanted else ["--no-samples"])]
    assert main(["bench", "run", *flags]) in (0, 3)  # a busy machine makes the driver late
    manifest, records = read_run(tmp_path)
    samples = read_samples(tmp_path)
    assert {record.outcome for record in records} == {"ok"}
    assert (tmp_path / SAMPLES_FILE).exists() == wanted == bool(samples)
    if not wanted:
        assert "samples" not in manifest.driver
        return
    assert manifest.driver["samples"]["file"] == SAMPLES_FILE
    assert manifest.driver["samples"]["num_samples"] == len(samples)
    assert {sample.target for sample in samples} == {records[0].target}
    assert {pool.role for pool in samples[0].pools} == {"prefill", "decode"}
    times = [sample.at_s for sample in samples]
    assert times == sorted(times)
    assert times[-1] >= max(record.finished_s or 0.0 for record in records)  # one after the end
