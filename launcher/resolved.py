"""From the configuration of ``baton serve`` to a cluster: "auto" becomes a value here.

Everything that can be known before a process starts is checked before one starts, so that a mistake
is one line and not the same line from every rank.
"""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from coordinator.config import ExpectedPool
from coordinator.key_file import read_keys
from kvcache.host_memory import available
from launcher.config import ServeConfig, key_file, parse_size
from launcher.data_folder import DataFolder, open_data_folder
from launcher.memory import MemoryPlan, share_out
from launcher.models import find_model
from launcher.topology import parse_pools, store_pool, threads_per_rank
from modeling.checkpoint.config import ModelConfig, load_config
from modeling.checkpoint.dtypes import serving_dtype
from protocol.errors import ConfigError
from protocol.kv import KVLayout
from protocol.process.limits import num_cores


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster as it will run."""

    serve: ServeConfig
    model: str
    model_config: ModelConfig
    pools: tuple[ExpectedPool, ...]
    device: str
    dtype: str
    max_model_len: int
    memory: MemoryPlan
    threads: int
    token: str
    model_names: tuple[str, ...]
    chat_template: str  # a file, or ""
    template_kwargs: dict[str, Any]  # of requests that say nothing else
    kv_memory_from: str  # how its size was found
    data: DataFolder | None = None  # what survives a restart
    store_memory_bytes: int = 0
    disk_quota_bytes: int = 0


def resolve_cluster(serve: ServeConfig) -> Cluster:
    """Check ``serve`` against the model and this machine, and choose all "auto" values.

    Raises:
        ConfigError: anything that would keep the cluster from serving one request.
    """
    if not serve.prefill and not serve.decode:  # the smallest cluster that disaggregates
        pools = parse_pools(("cp1",), ("tp1",))
    else:
        pools = parse_pools(serve.prefill, serve.decode)
    found = find_model(serve.model, serve.revision)
    model = found.path_or_name
    model_config = load_config(model)
    device = _device(serve.device)
    dtype = serving_dtype(serve.dtype, model_config, device)
    max_model_len = _max_model_len(serve.max_model_len, model_config)
    store_memory_bytes = parse_size("--store-memory", serve.store_memory)
    memory = share_out(
        serve.kv_memory,
        sum(pool.num_ranks for pool in pools),
        store_memory_bytes if serve.data_dir is not None else 0,
        available() if device == "cpu" and serve.launcher == "local" else None,
    )
    for pool in pools:
        _check_pool(pool, model_config, serve.block_size, dtype, memory.kv_bytes)
    if serve.api_key_file is not None:
        read_keys(key_file(serve.api_key_file))
    data = open_data_folder(serve.data_dir) if serve.data_dir is not None else None
    if data is not None:
        pools = (*pools, store_pool())
    return Cluster(
        serve=serve,
        model=model,
        model_config=model_config,
        pools=pools,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        memory=memory,
        threads=serve.threads_per_rank or threads_per_rank(num_cores(), pools),
        token=secrets.token_hex(16),
        model_names=serve.served_model_name or (found.name,),
        chat_template=_chat_template(serve.chat_template),
        template_kwargs=_json_object(
            "--default-chat-template-kwargs", serve.default_chat_template_kwargs
        ),
        kv_memory_from=memory.found_by(device),
        data=data,
        store_memory_bytes=store_memory_bytes,
        disk_quota_bytes=parse_size("--disk-quota", serve.disk_quota),
    )


def _device(asked: str) -> str:
    has_cuda = Path("/dev/nvidiactl").exists()
    if asked == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: no NVIDIA device on this machine, use --device cpu")
    return ("cuda" if has_cuda else "cpu") if asked == "auto" else asked


def _chat_template(file: str | None) -> str:
    if file is None:
        return ""
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise ConfigError(f"--chat-template {file}: no such file")
    return str(path)


def _json_object(flag: str, text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{flag} {text}: not a JSON object ({error})") from error


def _max_model_len(asked: int | None, model: ModelConfig) -> int:
    if asked is None:
        return model.max_model_len
    if asked > model.max_model_len:
        raise ConfigError(
            f"--max-model-len {asked}: the model's context ends at {model.max_model_len} tokens"
        )
    return asked


def _check_pool(
    pool: ExpectedPool, model: ModelConfig, block_size: int, dtype: str, kv_bytes: int
) -> None:
    heads = (("attention", model.num_heads), ("KV", model.num_kv_heads))
    for kind, count in heads:
        if count % pool.tp_size:
            raise ConfigError(
                f"--{pool.role} tp{pool.tp_size}: does not divide the model's {count} {kind} heads"
            )
    one = block_layout(pool, model, block_size, dtype)
    # A request needs a block for its prompt and, once the prompt fills it, one for its answer.
    if 0 < kv_bytes < 2 * one.num_bytes:
        raise ConfigError(
            f"--kv-memory {kv_bytes} bytes per rank is too little for one request: "
            f"{pool.pool_id} needs at least {2 * one.num_bytes} (two blocks of {block_size} tokens)"
        )


def block_layout(pool: ExpectedPool, model: ModelConfig, block_size: int, dtype: str) -> KVLayout:
    """One block of KV of a rank of ``pool``."""
    return KVLayout(
        num_layers=model.num_layers,
        num_blocks=1,
        num_kv_heads_total=model.num_kv_heads,
        tp_rank=0,
        tp_size=pool.tp_size,
        block_size=block_size,
        head_dim=model.head_dim,
        dtype=dtype,
    )
