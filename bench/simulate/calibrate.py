"""The measured machine's table: ``python -m bench.simulate.calibrate``; takes a few minutes.

Runs the real decode runner with the benchmark model, one thread, on plans of every shape of the
table, and the real cost model's measurement on a ring of two. Prints what step_time.py holds, and
by how much a mixed step differs from what the table makes of it. The least of a few runs counts:
what others do on the machine only ever adds. For the same reason it is the thread's CPU time,
which for one thread that never waits is the time it would take alone.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.checkpoint import SHAPES, write_llama
from bench.environment import headline
from bench.simulate.step_time import Grid
from decode.runner import DecodeRunner
from kvcache.pool import KVPool
from modeling.loader import load_model
from modeling.model import Model
from modeling.parallel import SingleRank
from modeling.sampling import SamplingRow
from protocol.kv import KVLayout
from protocol.plans import DecodePlan, NewSequence, SequenceStep
from protocol.request import SamplingParams
from ring_attention.comm import GlooRing
from ring_attention.cost import ChunkShape
from ring_attention.measure import measure_cost_model

BLOCK_SIZE = 32
NEW_TOKENS = (1, 32, 128, 512, 1024, 2048)
PAST_TOKENS = (0, 1024, 4096)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
KEYS = (32, 512, 2048)
MIXED = ((8, 512, 128, 0), (8, 512, 512, 1024), (32, 512, 128, 1024))  # (seqs, keys, new, past)
NUM_BLOCKS = 64 * 2048 // BLOCK_SIZE + (2048 + 4096) // BLOCK_SIZE
ENVIRONMENT = ("OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1", "GLOO_SOCKET_IFNAME=lo")
TIMEOUT_S = 300.0
NUM_RANKS = 2


class Bench:
    """A decode rank that executes made-up plans."""

    def __init__(self, model: Model) -> None:
        config = model.config
        layout = KVLayout(
            config.num_layers, NUM_BLOCKS, config.num_kv_heads, 0, 1,
            BLOCK_SIZE, config.head_dim, "bfloat16",
        )  # fmt: skip
        pool = KVPool(layout)
        pool.tensor.normal_(std=0.1)
        self._runner = DecodeRunner(0, model, pool)

    def seconds(self, num_seqs: int, keys: int, chunk: tuple[int, int] | None, runs: int) -> float:
        """The least time of a step: sequences that decode at ``keys`` tokens, and a chunk."""
        steps, new, first = [], [], 0
        shapes = [(1, keys - 1)] * num_seqs + ([chunk] if chunk else [])
        for index, (num_new, past) in enumerate(shapes):
            num_blocks = -(-(past + num_new) // BLOCK_SIZE)
            new.append(NewSequence("r", index, tuple(range(first, first + num_blocks))))
            steps.append(SequenceStep("r", index, past, (5,) * num_new))
            first += num_blocks
        row = SamplingRow(SamplingParams(max_tokens=1, temperature=0.0), 0, (), [])
        plan = DecodePlan(0, tuple(steps), new=tuple(new))
        times = []
        for _ in range(runs):
            started = time.thread_time()
            self._runner.execute(plan, [row] * len(steps))
            times.append(time.thread_time() - started)
        self._runner.execute(DecodePlan(0, (), dropped=tuple(("r", i) for i in range(len(steps)))))
        return min(times)


def measure_steps(folder: str) -> dict[str, Any]:
    """Both grids and the mixed steps."""
    torch.set_num_threads(1)
    model = load_model(folder, tp=SingleRank(), dtype="bfloat16", device="cpu")
    bench = Bench(model)
    bench.seconds(4, 64, (128, 0), 2)  # what only the first run pays for
    prefill = [
        [bench.seconds(0, 0, (new, past), 2 if new > 256 else 7) for past in PAST_TOKENS]
        for new in NEW_TOKENS
    ]
    decode = [[bench.seconds(batch, keys, None, 9) for keys in KEYS] for batch in BATCHES]
    mixed = [bench.seconds(seqs, keys, (new, past), 3) for seqs, keys, new, past in MIXED]
    return {"prefill": prefill, "decode": decode, "mixed": mixed}


def run_rank(folder: str, rank: int, store: str) -> None:
    """One of the ring that measures links; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    model = load_model(folder, tp=SingleRank(), dtype="bfloat16", device="cpu")
    shape = ChunkShape.of(model.config)
    costs = measure_cost_model(
        model.kernel,
        shape,
        model.dtype,
        model.device,
        comm=GlooRing(timeout_s=TIMEOUT_S),
        ring=tuple(range(NUM_RANKS)),
        cp_rank=rank,
    )
    if rank == 0:
        print(json.dumps(dataclasses.astuple(costs)))
    dist.destroy_process_group()


def measure_link(folder: str) -> list[float]:
    """The four figures of the cost model, on a ring of two."""
    with tempfile.TemporaryDirectory() as scratch:
        command = ["env", *ENVIRONMENT, sys.executable, "-P", "-m", "bench.simulate.calibrate"]
        command += ["--model", folder, "--store", str(Path(scratch) / "store"), "--rank"]
        ranks = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True)
            for rank in range(NUM_RANKS)
        ]
        outputs = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
        found: list[float] = json.loads(outputs[0])
        return found


def report(found: dict[str, Any]) -> None:
    """In the form in which step_time.py holds it."""
    print(headline())
    for name, xs, ys in (("prefill", NEW_TOKENS, PAST_TOKENS), ("decode", BATCHES, KEYS)):
        print(f"{name}=Grid(\n    {xs},\n    {ys},\n    (")
        for row in found[name]:
            print(f"        ({', '.join(_digits(row))}),")
        print("    ),\n),")
    print("costs:", ", ".join(f"{figure:.3g}" for figure in found["costs"]))
    prefill = Grid(NEW_TOKENS, PAST_TOKENS, tuple(map(tuple, found["prefill"])))
    decode = Grid(BATCHES, KEYS, tuple(map(tuple, found["decode"])))
    for shape, measured_s in zip(MIXED, found["mixed"], strict=True):
        seqs, keys, new, past = shape
        table_s = decode.at(seqs, keys) + prefill.at(new, past)
        print(f"mixed {shape}: {measured_s:.4f} s, the table says {table_s / measured_s - 1:+.1%}")


def _digits(row: Iterable[float]) -> list[str]:
    return [f"{seconds:.4f}" for seconds in row]


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.simulate.calibrate")
    for hidden in ("--model", "--store", "--rank"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments.model, int(arguments.rank), arguments.store)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), SHAPES["bench"])
        report({**measure_steps(folder), "costs": measure_link(folder)})


if __name__ == "__main__":
    main()
