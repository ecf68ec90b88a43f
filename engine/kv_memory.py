"""The number of KV blocks of a rank: as configured, or as many as its memory leaves room for.

``--kv-memory auto``, in the order of a rank's start
1. The launcher measures once what this machine has free and gives each of its ranks an equal part.
2. The rank loads its weights.
3. A dry run: the largest step that its scheduler may plan, over a few blocks of scratch, on this
   rank's shard alone. On a GPU the whole step is run. On CPU that would take as long as a long
   prompt, so a small part of it is run and its memory scaled up: it grows with the tokens.
4. A share of what is then left of the rank's part becomes KV, but no more than all of its sequences
   at their full length could use. The ranks that share a GPU have equal parts of it.

Either way the size is compared with the free memory before a page of it is touched, because the
kernel kills a rank that takes too much, without a message.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from engine.rank_config import RankConfig
from kvcache import host_memory
from kvcache.host_memory import CPU_SHARE, CUDA_SHARE
from kvcache.pool import KVPool
from modeling.checkpoint.config import ModelConfig
from modeling.model import Model
from modeling.paged import PagedAttention, PagedSequence
from protocol.errors import ConfigError
from protocol.kv import DTYPE_BYTES, KVLayout

DRY_RUN_TOKENS = 256  # on CPU
MIN_BLOCKS = 2  # one for a prompt, and one for the answer once the prompt has filled it
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class LargestStep:
    """The most that a scheduler may put into one step of a rank, and keep in its pool."""

    num_tokens: int
    num_rows: int  # tokens of those that are sampled
    num_sequences: int  # that hold KV at one time


def plan_layout(config: RankConfig, model: ModelConfig, dtype: str, num_bytes: int) -> KVLayout:
    """The layout of a rank's pool: as many blocks as ``num_bytes`` hold.

    Raises:
        ConfigError: not one block fits, or the heads cannot be divided.
    """
    one_block = KVLayout(
        num_layers=model.num_layers,
        num_blocks=1,
        num_kv_heads_total=model.num_kv_heads,
        tp_rank=config.tp_rank,
        tp_size=config.tp_size,
        block_size=config.block_size,
        head_dim=model.head_dim,
        dtype=dtype,
    )
    num_blocks = num_bytes // one_block.num_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"--kv-memory {num_bytes} bytes: one block of {config.block_size} tokens "
            f"of this model takes {one_block.num_bytes} bytes ({DTYPE_BYTES[dtype]} per number), "
            f"give more or choose a smaller --block-size"
        )
    return msgspec.structs.replace(one_block, num_blocks=num_blocks)


def size_pool(config: RankConfig, model: Model, dtype: str, largest: LargestStep) -> KVLayout:
    """The layout of a computing rank's pool, whose weights are loaded.

    Raises:
        ConfigError: there is not enough memory.
    """
    one_block = plan_layout(config, model.config, dtype, 1 << 62)
    one_block = msgspec.structs.replace(one_block, num_blocks=1)
    if config.kv_memory_bytes:
        layout = plan_layout(config, model.config, dtype, config.kv_memory_bytes)
        check_free(layout.num_bytes, model.device)
        return layout
    left = _left_bytes(config, model, one_block, largest)
    num_tokens = largest.num_sequences * model.config.max_model_len
    most = -(-num_tokens // (config.cp_size * config.block_size))
    num_blocks = min(most, auto_bytes(left, model.device) // one_block.num_bytes)
    if num_blocks < MIN_BLOCKS:
        raise ConfigError(
            f"--kv-memory auto: {max(0, left) // _MIB} MiB are left to this rank after its weights "
            f"and a step, too few for {MIN_BLOCKS} blocks of {one_block.num_bytes} bytes: free "
            f"memory, use fewer ranks on this machine, or give --kv-memory yourself"
        )
    layout = msgspec.structs.replace(one_block, num_blocks=num_blocks)
    check_free(layout.num_bytes, model.device)
    return layout


def device_index(rank: int, num_devices: int) -> int:
    """The index of the GPU, among its machine's, on which a rank of a pool computes."""
    return rank % num_devices


def sharing_ranks(pool_sizes: Sequence[int], num_devices: int, index: int) -> int:
    """The number of ranks, of all pools, that compute on one GPU; at least 1, the one that asks.

    Args:
        pool_sizes: ranks of each pool on this machine.
        num_devices: GPUs of this machine.
        index: of the GPU.
    """
    ranks = (rank for size in pool_sizes for rank in range(size))
    return max(1, sum(device_index(rank, num_devices) == index for rank in ranks))


def part_of_device(free: int, total: int, own: int, num_ranks: int) -> int:
    """Bytes that a rank may still take of its GPU: no more than its equal part, or than is free.

    All ranks of a GPU ask at about the same time, before any has taken its KV. Each then sees the
    same free memory, so without the equal parts they would take it several times over.

    Args:
        free: bytes of the device that are free now.
        total: bytes of the device.
        own: bytes that this rank has taken.
        num_ranks: that share the device.
    """
    return min(free, total // num_ranks - own)


def auto_bytes(left_bytes: int, device: torch.device) -> int:
    """The share of ``left_bytes`` that becomes KV."""
    return int(max(0, left_bytes) * (CUDA_SHARE if device.type == "cuda" else CPU_SHARE))


def check_free(num_bytes: int, device: torch.device) -> None:
    """Check that so many bytes are free, before any of them is touched.

    Raises:
        ConfigError: they are not.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        bound = f"free memory of {device}"
    else:
        free, bound = host_memory.available()
    if num_bytes > free:
        raise ConfigError(
            f"--kv-memory: a rank would take {num_bytes // _MIB} MiB of KV, and {free // _MIB} MiB "
            f"are left ({bound}): give less, or auto"
        )


def _left_bytes(config: RankConfig, model: Model, one_block: KVLayout, largest: LargestStep) -> int:
    # A chunk attends to a copy of its prefix in one piece, one layer at a time: room for one.
    gathered = one_block.block_bytes * -(-model.config.max_model_len // config.block_size)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_reserved(model.device)
        dry_run(model, one_block, largest.num_tokens, largest.num_rows)
        step = torch.cuda.max_memory_reserved(model.device) - before
        torch.cuda.empty_cache()
        num_devices = torch.cuda.device_count()
        index = model.device.index or 0
        num_ranks = sharing_ranks(config.device_sharers, num_devices, index)
        free, total = torch.cuda.mem_get_info(model.device)
        own = torch.cuda.memory_reserved(model.device)
        return part_of_device(free, total, own, num_ranks) - step - gathered
    num_tokens = min(largest.num_tokens, DRY_RUN_TOKENS)
    num_rows = min(largest.num_rows, num_tokens)
    dry_run(model, one_block, 1, 1)  # so that what is allocated only once does not count
    host_memory.reset_peak()
    resident = host_memory.resident_bytes()
    dry_run(model, one_block, num_tokens, num_rows)
    step = max(0, host_memory.peak_bytes() - resident) * largest.num_tokens // num_tokens
    part = config.memory_budget_bytes or host_memory.available().num_bytes + resident
    return part - resident - step - gathered


@torch.inference_mode()
def dry_run(model: Model, one_block: KVLayout, num_tokens: int, num_rows: int) -> None:
    """Compute one sequence of ``num_tokens`` tokens and the logits of ``num_rows`` of them.

    Its numbers mean nothing: a shard computes without the others of its group.
    """
    num_tokens = min(num_tokens, model.config.max_model_len)
    num_blocks = -(-num_tokens // one_block.block_size)
    pool = KVPool(msgspec.structs.replace(one_block, num_blocks=num_blocks), model.device)
    sequence = PagedSequence(0, num_tokens, torch.arange(num_blocks, dtype=torch.int32))
    context = PagedAttention(pool, model.kernel, model.config, [sequence])
    positions_T = torch.arange(num_tokens, device=model.device)
    hidden_TD = model.forward(torch.zeros_like(positions_T), positions_T, context)
    model.logits(hidden_TD[: min(num_rows, num_tokens)]).sum().item()  # waits for the device
