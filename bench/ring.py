"""Figure (a): how much of two ranks' compute a ring of two turns into speed.

    python -m bench.ring [--tokens 8192] [--model DIR] [--runs 5] [--json]

Prefills one prompt with the whole model, by one rank and by a ring of two, alternately, in the same
two processes with one thread each. The efficiency is T(1 rank) / (2 * T(cp2)), taken of each pair
of neighbouring runs; T is the time until the last rank is done. A rank that is not in the ring
sleeps meanwhile. The ratio of CPU seconds is given too: it leaves out what the rest of the machine
takes away, and waiting. Without ``--model`` it is the benchmark model with random weights.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.checkpoint import SHAPES, write_llama
from bench.environment import describe, headline
from kvcache.pool import KVPool
from modeling.loader import load_model
from modeling.model import Model
from modeling.parallel import SingleRank
from protocol.kv import KVLayout
from protocol.plans import ChunkWork, PlacedBlock
from ring_attention.comm import GlooRing
from ring_attention.context import RingAttention, forward_chunk
from ring_attention.partition import deal_zigzag
from ring_attention.ring import RingBuffers

BLOCK_SIZE = 32
NUM_RANKS = 2
TARGET = 0.85
TIMEOUT_S = 600.0
# Before exec: one thread for each rank, freed memory stays mapped, gloo on the loopback interface.
ENVIRONMENT = (
    "OMP_NUM_THREADS=1",
    "MKL_NUM_THREADS=1",
    "GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592",
    "GLOO_SOCKET_IFNAME=lo",
)


# -- a rank ----------------------------------------------------------------------------------------


class Rank:
    """One process: the model, a KV pool for the whole prompt, and the way to the other rank."""

    def __init__(self, rank: int, folder: str, num_tokens: int) -> None:
        self.rank = rank
        self.model: Model = load_model(folder, tp=SingleRank(), dtype="bfloat16", device="cpu")
        config = self.model.config
        self.layout = KVLayout(
            num_layers=config.num_layers,
            num_blocks=-(-num_tokens // BLOCK_SIZE),
            num_kv_heads_total=config.num_kv_heads,
            tp_rank=0,
            tp_size=1,
            block_size=BLOCK_SIZE,
            head_dim=config.head_dim,
            dtype="bfloat16",
        )
        self.pool = KVPool(self.layout)
        self.comm = GlooRing(timeout_s=TIMEOUT_S)
        self.buffers = RingBuffers()
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.randint(0, config.vocab_size, (num_tokens,), generator=generator)
        self.token_ids = tuple(token_ids.tolist())

    def prefill(self, ring: tuple[int, ...]) -> tuple[float, float, torch.Tensor]:
        """(seconds until all of the ring are done, their CPU seconds, the last logits_1V)."""
        dist.barrier()
        started, cpu_started = time.perf_counter(), time.process_time()
        logits_1V = torch.zeros(1, self.model.config.vocab_size)
        if self.rank in ring:
            context = RingAttention(
                self._work(ring),
                self.rank,
                self.pool,
                self.comm,
                self.model.kernel,
                self.model.config,
                buffers=self.buffers,
            )
            hidden_TD = forward_chunk(self.model, context)
            if context.last_token_index is not None and hidden_TD is not None:
                logits_1V = self.model.logits(hidden_TD[context.last_token_index].unsqueeze(0))
        dist.barrier()
        elapsed_s = time.perf_counter() - started
        cpu_s = torch.tensor([time.process_time() - cpu_started], dtype=torch.float64)
        dist.all_reduce(cpu_s)
        dist.all_reduce(logits_1V)
        return elapsed_s, float(cpu_s), logits_1V

    def _work(self, ring: tuple[int, ...]) -> ChunkWork:
        num_blocks = self.layout.num_blocks
        owners = {
            block: rank
            for rank, blocks in zip(ring, deal_zigzag(num_blocks, len(ring)), strict=True)
            for block in blocks
        }
        return ChunkWork(
            request_id="bench",
            attempt=0,
            chunk=0,
            start=0,
            token_ids=self.token_ids,
            ring=ring,
            pass_q=False,
            blocks=tuple(PlacedBlock(block, owners[block], block, 0) for block in sorted(owners)),
            is_last=True,
        )


def run_rank(arguments: argparse.Namespace) -> None:
    """A process of the pair: rank 0 prints the figures as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{arguments.store}",
        rank=arguments.rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    rank = Rank(arguments.rank, arguments.model, arguments.tokens)
    alone, both = (0,), (0, 1)
    rank.prefill(alone)  # what only the first run pays for
    *_, expected_1V = rank.prefill(alone)
    *_, logits_1V = rank.prefill(both)
    pairs = []
    for _ in range(arguments.runs):
        alone_s, alone_cpu_s, _ = rank.prefill(alone)
        both_s, both_cpu_s, _ = rank.prefill(both)
        pairs.append(
            {
                "cp1_s": alone_s,
                "cp2_s": both_s,
                "cp1_cpu_s": alone_cpu_s,
                "cp2_cpu_s": both_cpu_s,
            }
        )
    if arguments.rank == 0:
        error = float((logits_1V - expected_1V).norm() / expected_1V.norm())
        print(json.dumps({"pairs": pairs, "logits_error": error}))
    dist.destroy_process_group()


# -- the command -----------------------------------------------------------------------------------


@contextlib.contextmanager
def model_folder(given: str | None) -> Iterator[str]:
    """The given checkpoint, or the benchmark model while the block runs."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), SHAPES["bench"])
        yield folder


def measure(folder: str, num_tokens: int, num_runs: int) -> dict[str, Any]:
    """Start the two ranks, wait for them, and sum up."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-P", "-m", "bench.ring", "--model", folder]
        command += ["--tokens", str(num_tokens), "--runs", str(num_runs)]
        command += ["--store", str(Path(scratch) / "store"), "--rank"]
        ranks = [
            subprocess.Popen(
                ["env", *ENVIRONMENT, *command, str(rank)], stdout=subprocess.PIPE, text=True
            )
            for rank in range(NUM_RANKS)
        ]
        try:
            output = ranks[0].communicate()[0]
            ranks[1].communicate()
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed; its error is above")
    result: dict[str, Any] = json.loads(output)
    efficiencies = [pair["cp1_s"] / (2 * pair["cp2_s"]) for pair in result["pairs"]]
    return {
        **result,
        "tokens": num_tokens,
        "efficiency_median": statistics.median(efficiencies),
        "efficiency_min": min(efficiencies),
        "efficiency_max": max(efficiencies),
        "cpu_ratio_median": statistics.median(
            pair["cp1_cpu_s"] / pair["cp2_cpu_s"] for pair in result["pairs"]
        ),
        "environment": describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--model", help="a checkpoint folder; default: the benchmark model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments)
        return
    with model_folder(arguments.model) as folder:
        result = measure(folder, arguments.tokens, arguments.runs)
    if arguments.json:
        print(json.dumps(result))
        return
    print(headline())
    alone, both = (
        statistics.median(pair[key] for pair in result["pairs"]) for key in ("cp1_s", "cp2_s")
    )
    print(
        f"{result['tokens']} tokens: 1 rank {alone:.2f} s, cp2 {both:.2f} s; efficiency "
        f"{result['efficiency_median']:.3f} ({result['efficiency_min']:.3f} to "
        f"{result['efficiency_max']:.3f}, {len(result['pairs'])} pairs), target {TARGET}; "
        f"CPU seconds 1 : {1 / result['cpu_ratio_median']:.2f}; "
        f"logits differ by {result['logits_error']:.1e} of their size"
    )


if __name__ == "__main__":
    main()
