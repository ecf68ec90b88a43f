"""Figures (b) and (c): what of the hand-off is not hidden behind the prefill, and memory per rank.

    python -m bench.handoff [--prefill cp2] [--decode tp2] [--tokens 8192] [--runs 5] [--json]

Starts ``baton serve`` on the benchmark model, sends cold prompts of random token ids one after the
other, and reads each request's time line. (b) is the time from the first token, which the prefill
pool sends when it is done, to the commit, over the time from arrival to the first token that the
decode pool made; all three as the coordinator sees them. (c) is each rank's resident memory, its
weights and its KV pool subtracted.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from baton_client import Client
from bench.checkpoint import SHAPES, write_llama
from bench.environment import describe, headline
from bench.load.local_cluster import local_cluster

KV_MEMORY_BYTES = 256 << 20
VOCABULARY = 8000


def measure_request(client: Client, prompt: list[int]) -> dict[str, float]:
    """One cold request: seconds to the first token and to the first decode step, exposed, bytes."""
    answer = client.complete(prompt, max_tokens=4, temperature=0, ignore_eos=True)
    (timeline,) = client.timeline(answer.request_id).requests
    events, transfer = timeline.events, timeline.transfer
    assert transfer is not None, "a cold prompt is handed over"
    exposed_s = max(0.0, events["committed"] - events["first_token"])
    return {
        "first_token_s": events["first_token"],
        "first_decode_s": events["first_decode"],
        "exposed_s": exposed_s,
        "exposed_share": exposed_s / events["first_decode"],
        "moved_bytes": transfer.num_bytes,
        "layers_overlapped": transfer.num_layers_overlapped,
        "layers": transfer.num_layers,
    }


def memory_beyond_weights_and_kv(client: Client, weight_bytes: int) -> dict[str, float]:
    """MiB per rank that are neither its share of the weights nor its KV pool."""
    beyond = {}
    for pool in client.cluster().pools:
        for rank in pool.ranks:
            rest = rank.rss_bytes - weight_bytes / pool.tp_size - KV_MEMORY_BYTES
            beyond[f"{pool.pool_id}/{rank.rank}"] = rest / (1 << 20)
    return beyond


def run(prefill: str, decode: str, num_tokens: int, num_runs: int) -> dict[str, Any]:
    """Start the cluster and measure; the first request is a warm-up that does not count."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "bench-model"
        write_llama(model, SHAPES["bench"])
        weight_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        pools = ("--prefill", prefill, "--decode", decode, "--kv-memory", str(KV_MEMORY_BYTES))
        flags = ("--threads-per-rank", "1", "--checksum", "off")
        with local_cluster((str(model), *pools, *flags)) as served, Client(served.url) as client:
            results = [
                measure_request(client, [rng.randrange(VOCABULARY) for _ in range(num_tokens)])
                for _ in range(num_runs + 1)
            ][1:]
            memory = memory_beyond_weights_and_kv(client, weight_bytes)
    return {
        "prefill": prefill,
        "decode": decode,
        "tokens": num_tokens,
        "runs": results,
        "exposed_share_median": statistics.median(r["exposed_share"] for r in results),
        "memory_beyond_mib": memory,
        "environment": describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--prefill", default="cp2")
    parser.add_argument("--decode", default="tp2")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = run(arguments.prefill, arguments.decode, arguments.tokens, arguments.runs)
    if arguments.json:
        print(json.dumps(result))
        return
    print(headline())
    shares = [r["exposed_share"] for r in result["runs"]]
    exposed_ms = 1000 * statistics.median(r["exposed_s"] for r in result["runs"])
    first = statistics.median(r["first_decode_s"] for r in result["runs"])
    print(
        f"{result['prefill']} -> {result['decode']}, {result['tokens']} tokens: first decode step "
        f"after {first:.2f} s; transfer not hidden {exposed_ms:.1f} ms, "
        f"{statistics.median(shares):.3%} of it ({min(shares):.3%} to {max(shares):.3%}), target 5%"
    )
    for name, mib in result["memory_beyond_mib"].items():
        print(f"{name}: {mib:.0f} MiB beyond weights and KV, target 600")


if __name__ == "__main__":
    main()
