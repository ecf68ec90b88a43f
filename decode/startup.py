"""From a gang that has formed to one that serves: a warm model, and how fast it is.

Every rank runs the same few plans on blocks that nobody holds yet. How many is fixed and not
decided by a clock, for each is a collective.
"""

from dataclasses import dataclass

from decode.runner import DecodeRunner
from modeling.checkpoint.config import ModelConfig
from modeling.sampling import SamplingRow
from protocol.kv import KVLayout
from protocol.plans import DecodePlan, NewSequence, SequenceStep
from protocol.request import SamplingParams

CHUNK_TOKENS = 128
NUM_DECODING = 8
NUM_DECODE_STEPS = 4
_NAME = "warm-up"


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a short prompt computed here, and of a small decoding batch; 0 when not measured."""

    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0


def warm_up(runner: DecodeRunner, layout: KVLayout, model: ModelConfig) -> Speed:
    """Run the model once in each of its two ways, then once more with a watch.

    Args:
        runner: one that has executed nothing yet.
        layout: of its pool.
        model: of the whole model.
    """
    if model.architecture == "arithmetic":
        return Speed()
    num_blocks = -(-CHUNK_TOKENS // layout.block_size)
    num_chunk = min(CHUNK_TOKENS, layout.num_blocks * layout.block_size, model.max_model_len)
    blocks = tuple(range(min(num_blocks, layout.num_blocks)))
    num_decoding = min(NUM_DECODING, layout.num_blocks)
    new = [NewSequence(_NAME, 0, block_ids=blocks)]
    new += [NewSequence(_NAME, 1 + i, block_ids=(i,)) for i in range(num_decoding)]
    chunk = SequenceStep(_NAME, 0, start=0, token_ids=(0,) * num_chunk)
    _run(runner, (chunk,), tuple(new))
    prefill_s = _run(runner, (chunk,))
    decoding = tuple(
        SequenceStep(_NAME, 1 + i, start=0, token_ids=(0,)) for i in range(num_decoding)
    )
    _run(runner, decoding)
    decode_s = sum(_run(runner, decoding) for _ in range(NUM_DECODE_STEPS))
    dropped = tuple(sequence.key for sequence in new)
    runner.execute(DecodePlan(step=0, sequences=(), dropped=dropped))
    return Speed(num_chunk / prefill_s, num_decoding * NUM_DECODE_STEPS / decode_s)


def _run(
    runner: DecodeRunner, steps: tuple[SequenceStep, ...], new: tuple[NewSequence, ...] = ()
) -> float:
    """Seconds that the plan took."""
    row = SamplingRow(
        params=SamplingParams(max_tokens=1, temperature=0.0),
        index=0,
        prompt_token_ids=(),
        output_token_ids=(),
    )
    return runner.execute(DecodePlan(0, steps, new=new), [row] * len(steps)).compute_s
