"""KV that is not finite, in a real model's batch: the request at fault ends, and it alone."""

import math
from pathlib import Path

import pytest

from decode.runner import DecodeRunner
from kvcache.pool import KVPool
from modeling.loader import load_model
from modeling.model import Model
from modeling.parallel import SingleRank
from modeling.sampling import SamplingRow
from prefill.announcer import Announcer
from prefill.runner import PrefillRunner
from protocol.plans import (
    ChunkWork,
    DecodePlan,
    FailedRow,
    NewSequence,
    PlacedBlock,
    PrefillPlan,
    SequenceStep,
    StepResult,
)
from protocol.request import NoToken, SamplingParams
from tests.decode.real_ranks import layout_of
from tests.modeling.checkpoints import write_checkpoint

BLOCK_SIZE, BLOCKS_EACH = 16, 3
GREEDY = SamplingParams(max_tokens=9, temperature=0.0)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp(request.param)
    sizes = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 96, "vocab": 131}
    write_checkpoint(path, family=request.param, dtype="float32", seed=5, **sizes)
    return load_model(str(path), tp=SingleRank(), dtype="float32", device="cpu")


def make_pool(model: Model, leftover: float) -> KVPool:
    pool = KVPool(layout_of(model, SingleRank(), 4 * BLOCKS_EACH, BLOCK_SIZE))
    pool.tensor.fill_(leftover)  # of whoever had the blocks before
    return pool


def blocks_of(number: int) -> tuple[int, ...]:
    return tuple(range(number * BLOCKS_EACH, (number + 1) * BLOCKS_EACH))


def prompt_of(number: int) -> tuple[int, ...]:
    return tuple((31 * number + 7 * i) % 131 for i in range(20 + number))


def run(model: Model, leftover: float, spoil: tuple[int, int] | None = None) -> list[StepResult]:
    """Three prompts in one step, then two steps of a token each; ``spoil`` is (slot of the KV of
    the second one, 0 for K or 1 for V), before the first of those."""
    pool = make_pool(model, leftover)
    runner = DecodeRunner(0, model, pool)
    names = ("a", "b", "c")
    new = tuple(NewSequence(name, 1, blocks_of(i)) for i, name in enumerate(names))
    steps = tuple(SequenceStep(name, 1, 0, prompt_of(i)) for i, name in enumerate(names))
    rows = [SamplingRow(GREEDY, 0)] * 3
    results = [runner.execute(DecodePlan(1, steps, new=new), rows)]
    if spoil is not None:
        slot, which = spoil
        block_id = blocks_of(1)[slot // BLOCK_SIZE]
        pool.tensor[-1, block_id, 0, which, slot % BLOCK_SIZE, 3] = math.nan
    for step in (2, 3):
        tokens = {token.request_id: token.token_id for token in results[-1].tokens}
        steps = tuple(
            SequenceStep(name, 1, len(prompt_of(i)) + step - 2, (tokens[name],))
            for i, name in enumerate(names)
            if name in tokens
        )
        results.append(runner.execute(DecodePlan(step, steps), rows[: len(steps)]))
    return results


@pytest.mark.parametrize("leftover", [math.nan, math.inf])
def test_what_another_request_has_left_in_a_block_is_never_seen(
    model: Model, leftover: float
) -> None:
    clean, after = run(model, 0.0), run(model, leftover)
    assert [r.tokens for r in after] == [r.tokens for r in clean]
    assert [len(r.tokens) for r in clean] == [3, 3, 3]
    assert all(not r.failed for r in after)


@pytest.mark.parametrize("slot", [0, 15, 16, 20])
@pytest.mark.parametrize("which", [0, 1])
def test_only_the_request_whose_kv_is_spoilt_fails(model: Model, slot: int, which: int) -> None:
    clean, spoilt = run(model, 0.0), run(model, 0.0, (slot, which))
    assert spoilt[0] == StepResult(1, 0, clean[0].tokens, spoilt[0].compute_s)
    assert spoilt[1].failed == (FailedRow("b", 1, NoToken.NON_FINITE),)
    for sound, mine in zip(clean[1:], spoilt[1:], strict=True):
        assert mine.tokens == tuple(t for t in sound.tokens if t.request_id != "b")


@pytest.mark.parametrize("is_sampled", [True, False])
def test_a_chunk_over_a_spoilt_prefix_fails_before_it_is_offered(
    model: Model, is_sampled: bool
) -> None:
    """Locally and on a prefill rank: its blocks would be hashed next."""
    prompt = prompt_of(1) + prompt_of(2)
    pool = make_pool(model, math.nan)
    new = (NewSequence("a", 1, blocks_of(0)),)
    step = SequenceStep("a", 1, BLOCK_SIZE, prompt[BLOCK_SIZE:], sample=is_sampled)
    rows = [SamplingRow(GREEDY, 0)] * is_sampled
    result = DecodeRunner(0, model, pool).execute(DecodePlan(1, (step,), new=new), rows)
    assert FailedRow("a", 1, NoToken.NON_FINITE) in result.failed

    announcer = Announcer(lambda _: None, cp_rank=0, block_size=BLOCK_SIZE, groups=(range(2),))
    runner = PrefillRunner(0, model, make_pool(model, math.nan), None, announcer)
    for start, failed in ((0, ()), (BLOCK_SIZE, (FailedRow("a", 1, NoToken.NON_FINITE),))):
        work = ChunkWork(
            request_id="a",
            attempt=1,
            chunk=0,
            start=start,
            token_ids=prompt[start:],
            ring=(0,),
            pass_q=False,
            blocks=tuple(PlacedBlock(i, 0, i + 3 * bool(start), 1) for i in range(3)),
            is_last=is_sampled,
            sampling=GREEDY if is_sampled else None,
        )
        result = runner.execute(PrefillPlan(1, (work,)))
        assert result.failed == failed
        assert len(result.tokens) == (is_sampled and not failed)
