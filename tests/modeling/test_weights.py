"""Checkpoint files that are sharded, incomplete, damaged or hostile."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bench.checkpoint import write_llama
from modeling.checkpoint.config import load_config
from modeling.checkpoint.folder import read_checkpoint
from modeling.checkpoint.weights import Part, WeightReader
from modeling.loader import load_model
from modeling.parallel import SingleRank
from protocol.errors import ConfigError
from tests.sizes import some_of

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 264,
    "max_position_embeddings": 128,
    "dtype": "float32",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_llama(tmp_path, SHAPE)
    return tmp_path


def _load(folder: Path) -> Any:
    return load_model(str(folder), tp=SingleRank(), dtype="auto", device="cpu")


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _shard(folder: Path) -> dict[str, str]:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file_name = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (folder / "model.safetensors").unlink()
    _write_index(folder, weight_map)
    return weight_map


def _write_index(folder: Path, weight_map: object) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _hidden(folder: Path, context: Any) -> torch.Tensor:
    hidden: torch.Tensor = _load(folder).forward(
        torch.arange(9), torch.arange(9), context((None, None))
    )
    return hidden


def test_shards_load_like_one_file(folder: Path, dense_attention: Any) -> None:
    whole = _hidden(folder, dense_attention)
    fingerprint = load_config(str(folder)).fingerprint
    _shard(folder)
    assert torch.equal(_hidden(folder, dense_attention), whole)
    assert load_config(str(folder)).fingerprint == fingerprint


def test_known_extras_are_ignored(folder: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    _rewrite(folder, lambda tensors: tensors.update(extra))
    _load(folder)


def test_float16_and_float64_weights_are_converted(folder: Path, dense_attention: Any) -> None:
    whole = _hidden(folder, dense_attention)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.double() for name, tensor in tensors.items()})

    _rewrite(folder, widen)
    assert torch.equal(_hidden(folder, dense_attention), whole)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    _rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ConfigError, match=f"tensor {name} is missing"):
        _load(folder)


def test_a_wrong_shape_is_named(folder: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    _rewrite(folder, lambda tensors: tensors.update({name: torch.ones(16, 31)}))
    with pytest.raises(ConfigError, match=rf"{name} has shape \[16, 31\].*asks for \[16, 32\]"):
        _load(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    ones = torch.ones(32, dtype=torch.int8)
    _rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": ones}))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is stored as I8"):
        _load(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 5000, -1])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"model\.safetensors: .*download it again|not JSON"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"x": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32"}},
        {"x": 3},
        [1],
    ],
)
def test_a_hostile_header(folder: Path, header: object) -> None:
    raw = json.dumps(header).encode()
    data = struct.pack("<Q", len(raw)) + raw + bytes(16)
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load_config(str(folder))


@settings(
    max_examples=some_of(100),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=st.binary(max_size=200))
def test_garbage_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    try:
        read_checkpoint(tmp_path)
    except ConfigError as error:
        assert "\n" not in str(error)


def test_an_index_with_a_missing_file(folder: Path) -> None:
    _shard(folder)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"names model-1\.safetensors, which is missing"):
        _load(folder)


def test_an_index_that_promises_too_much(folder: Path) -> None:
    weight_map = _shard(folder)
    _write_index(folder, weight_map | {"model.norm.bias": "model-0.safetensors"})
    with pytest.raises(ConfigError, match=r"holds model\.norm\.bias, but it does not"):
        _load(folder)


@pytest.mark.parametrize(
    "file_name",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, [], "a\\b"],
)
def test_an_index_cannot_leave_its_folder(folder: Path, file_name: object) -> None:
    weight_map = _shard(folder)
    (folder.parent / "secret.safetensors").write_bytes(b"")
    _write_index(folder, weight_map | {"model.norm.weight": file_name})
    with pytest.raises(ConfigError, match=r"is no plain file name|not a \.safetensors file"):
        _load(folder)


def test_an_index_names_safetensors_only(folder: Path) -> None:
    _write_index(folder, {"x": "pytorch_model.bin"})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"not a \.safetensors file"):
        _load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        _load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match="no weights to load"):
        _load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model-Q4_K_M.gguf", r"has only GGUF weights \(model-Q4_K_M\.gguf\)"),
        ("adapter_model.safetensors", r"is an adapter \(adapter_model\.safetensors\)"),
        ("model-00001-of-00002.safetensors", r"has model-00001-of-00002.*but no index"),
    ],
)
def test_other_weights_are_refused_by_name(folder: Path, name: str, message: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ConfigError, match=message):
        _load(folder)


def test_a_git_lfs_pointer_says_what_to_run(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(ConfigError, match=r"model\.safetensors: is a Git LFS.*git lfs pull"):
        _load(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    _shard(folder)
    shards = [load_file(folder / f"model-{number}.safetensors") for number in (0, 1)]
    name = next(iter(shards[0]))
    save_file({**shards[1], name: shards[0][name] + 1}, folder / "model-1.safetensors")
    with pytest.raises(ConfigError, match=f"{name} is there twice"):
        _load(folder)


def test_a_tensor_under_two_names_is_refused(folder: Path) -> None:
    _rewrite(folder, lambda t: t.update({"norm.weight": torch.ones(32)}))
    with pytest.raises(ConfigError, match=r"there twice, also as"):
        _load(folder)


def test_code_in_the_folder_never_runs(folder: Path) -> None:
    canary = folder / "canary"
    (folder / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    _load(folder)
    assert not canary.exists()


def test_parts_are_slices_one_below_the_other(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    reader = WeightReader(folder, torch.float32)
    parts = [Part(name, (48, 32), slice(24, 48), slice(0, 8)) for name in names]
    expected = torch.cat([tensors[name][24:48, :8] for name in names])
    read = reader.read(parts)
    reader.release()
    assert torch.equal(read, expected)
    assert read.is_contiguous()


MEMORY = """
import sys, torch
torch.set_num_threads(1)
from modeling.loader import load_model
from modeling.parallel import SingleRank
import modeling.kernels.cpu_attention

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) >> 10

if len(sys.argv) > 2:
    model = load_model(sys.argv[1], tp=SingleRank(), dtype="auto", device="cpu")
print(status("VmHWM"), status("VmRSS"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    write_llama(tmp_path, {**SHAPE, **wide, "dtype": "bfloat16"})
    weights_mb = (tmp_path / "model.safetensors").stat().st_size >> 20

    def measure(*more: str) -> list[int]:
        command = [sys.executable, "-c", MEMORY, str(tmp_path), *more]
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return [int(word) for word in run.stdout.split()]

    empty_peak, _ = measure()
    peak, resident = measure("load")
    assert weights_mb > 60
    assert peak - empty_peak < weights_mb + 60, "the checkpoint was in memory twice"
    assert resident - empty_peak < weights_mb + 60


def test_weights_that_are_not_finite_are_named_and_read(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][3, 5] = float("nan")
        tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = float("inf")

    _rewrite(folder, spoil)
    _load(folder)
    errors = [record.args for record in caplog.records if record.levelname == "ERROR"]
    named = [args[1] for args in errors if isinstance(args, tuple)]
    assert named == ["lm_head.weight", "model.layers.1.self_attn.k_proj.weight"]
