"""From logits to the next token of each sequence.

1. A batch of plain greedy rows is one argmax.
2. Otherwise each row alone: the grammar's mask, logit bias, min_tokens' ban on stop tokens,
   penalties; from these numbers come the log-probabilities that a caller sees.
3. Numbers that are not finite give no token. Nothing is computed to find them: ``argmax`` takes
   NaN for the greatest, so a row holds a distribution if and only if its greatest logit is finite.
4. Temperature, then top-k, top-p and min-p, each of which only raises the threshold below which a
   token is out: equal logits, frequent with bf16, stay in or out together.
5. A uniform number that depends on (seed, index) alone, and the inverse of the cumulative
   distribution in the order of token ids.

So a row's token depends on nothing but its own logits and history: not on the batch, nor on the
pool that computes it.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from protocol.request import NoToken, SamplingParams, TokenLogprobs

_TOP_P_CANDIDATES = (1024, 16384)  # the nucleus nearly always is among them: saves a sort
_LEAST_LOGPROB = -9999.0  # instead of -inf, which JSON does not have
_WORD = 2**32 - 1


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one sequence's next token depends on besides its logits."""

    params: SamplingParams
    index: int  # of the token among those generated, from 0
    prompt_token_ids: Sequence[int] = ()  # may be left out unless there is a repetition penalty
    output_token_ids: Sequence[int] = ()  # may be left out unless penalties or a grammar need it
    allowed: bytes | None = None  # a bit for each token that the grammar allows, lowest bit first


Sampled = tuple[int, TokenLogprobs | None]  # token id, its log-probabilities if asked for


def sample(logits_BV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Sampled | NoToken]:
    """Choose every row's next token.

    Args:
        logits_BV: fp32, not changed.
        rows: one for each row of the logits.

    Returns:
        Each row's token, or why it has none; a row never depends on another one's numbers.
    """
    assert len(logits_BV) == len(rows)
    greedy_B = logits_BV.argmax(-1)  # the lowest id where several are equal, NaN above all
    greatest_B = logits_BV.gather(-1, greedy_B.unsqueeze(-1)).squeeze(-1)
    picks = zip(greedy_B.tolist(), greatest_B.tolist(), rows, strict=True)
    return [
        _choose(logits_BV[i], row, token_id, greatest)
        for i, (token_id, greatest, row) in enumerate(picks)
    ]


def is_finite(hidden_TD: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite; True of no number at all. Waits for the device."""
    if not hidden_TD.numel():
        return True
    least, greatest = torch.aminmax(hidden_TD)  # NaN goes through both
    return bool(torch.isfinite(torch.stack((least, greatest))).all())


def needs_history(params: SamplingParams) -> bool:
    """Whether a row of these parameters must be given its token ids."""
    return bool(params.grammar) or _has_penalties(params)


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _choose(
    logits_V: torch.Tensor, row: SamplingRow, greedy: int, greatest: float
) -> Sampled | NoToken:
    if not math.isfinite(greatest):
        return NoToken.NON_FINITE
    if row.params.grammar and row.allowed is None:
        return NoToken.OFF_GRAMMAR
    return (greedy, None) if _is_plain(row) else _sample_row(logits_V, row)


def _is_plain(row: SamplingRow) -> bool:
    params = row.params
    return (
        params.temperature == 0.0
        and params.num_logprobs is None
        and not params.logit_bias
        and not needs_history(params)
        and not _bans_stop_tokens(row)
    )


def _bans_stop_tokens(row: SamplingRow) -> bool:
    return row.index < row.params.min_tokens and bool(row.params.stop_token_ids)


def _sample_row(logits_V: torch.Tensor, row: SamplingRow) -> Sampled | NoToken:
    """A row of finite logits; a logit of -inf is one that the model itself masks."""
    params = row.params
    logits_V = _adjust(logits_V, row)
    token_id = int(logits_V.argmax())
    if not math.isfinite(float(logits_V[token_id])):
        if row.allowed is not None and not any(row.allowed):
            return NoToken.OFF_GRAMMAR
        return NoToken.NOTHING_LEFT  # all is banned, or a penalty is beyond what fp32 holds
    if params.temperature != 0.0:
        token_id = _draw(logits_V, params, uniform(params.seed, row.index))
    if params.num_logprobs is None:
        return token_id, None
    return token_id, _logprobs(logits_V, token_id, params.num_logprobs)


def _adjust(logits_V: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """The grammar's mask, bias, min_tokens and penalties, with vLLM's meaning: presence and
    frequency count what was generated, repetition also the prompt; it divides positive logits and
    multiplies negative ones.
    """
    params = row.params
    device = logits_V.device
    if row.allowed is None:
        logits_V = logits_V.clone()
    else:
        logits_V = logits_V.masked_fill(~_unpacked(row.allowed, len(logits_V), device), -torch.inf)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=device)
        logits_V[ids] += torch.tensor(list(params.logit_bias.values()), device=device)
    if _bans_stop_tokens(row):
        logits_V[list(params.stop_token_ids)] = -torch.inf
    if not _has_penalties(params):
        return logits_V
    if params.repetition_penalty != 1.0:
        seen = {*row.prompt_token_ids, *row.output_token_ids}
        ids = torch.tensor(list(seen), dtype=torch.int64, device=device)
        found = logits_V[ids]
        penalty = params.repetition_penalty
        logits_V[ids] = torch.where(found > 0, found / penalty, found * penalty)
    counts = Counter(row.output_token_ids)
    if counts:
        ids = torch.tensor(list(counts), device=device)
        times = torch.tensor(list(counts.values()), dtype=torch.float32, device=device)
        logits_V[ids] -= params.frequency_penalty * times + params.presence_penalty
    return logits_V


def _unpacked(allowed: bytes, size: int, device: torch.device) -> torch.Tensor:
    """A row's mask as booleans ``[size]``; ids beyond it are a model's padding, not allowed."""
    bytes_N = torch.frombuffer(bytearray(allowed), dtype=torch.uint8).to(device)
    bits_N8 = (bytes_N.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    bits = bits_N8.flatten()[:size].bool()
    return torch.nn.functional.pad(bits, (0, size - len(bits)))


def _logprobs(logits_V: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    logprobs_V = logits_V.log_softmax(-1)
    chosen = max(_LEAST_LOGPROB, float(logprobs_V[token_id]))
    if num_top == 0:
        return TokenLogprobs(chosen)
    values, ids = logprobs_V.topk(min(num_top, len(logprobs_V)))
    pairs = zip((-values).tolist(), ids.tolist(), strict=True)
    ranked = sorted(pair for pair in pairs if math.isfinite(pair[0]))
    return TokenLogprobs(
        chosen=chosen, top_ids=tuple(i for _, i in ranked), top=tuple(-value for value, _ in ranked)
    )


def _draw(logits_V: torch.Tensor, params: SamplingParams, u: float) -> int:
    """The token at which the cumulative distribution passes ``u``."""
    scaled_V = (logits_V - logits_V.max()) / params.temperature  # the best is at 0
    kept_V = scaled_V >= _threshold(scaled_V, params)
    cumulative_V = scaled_V.exp().masked_fill_(~kept_V, 0.0).double().cumsum(-1)
    total = float(cumulative_V[-1])
    if not total > 0.0:  # so small a temperature that 0 divided by it is NaN: its limit is greedy
        return int(logits_V.argmax())
    # u has 52 bits: u * total rounds to less than total, so the token found has a probability.
    return int(torch.searchsorted(cumulative_V, u * total, right=True))


def _threshold(scaled_V: torch.Tensor, params: SamplingParams) -> float:
    """The least scaled logit that all of top-k, top-p and min-p let through."""
    least = -math.inf
    if 0 < params.top_k < len(scaled_V):
        least = float(scaled_V.topk(params.top_k).values[-1])
    if params.top_p < 1.0:
        least = max(least, _nucleus(scaled_V, least, params.top_p))
    if params.min_p > 0.0:
        least = max(least, math.log(params.min_p))
    return least


def _nucleus(scaled_V: torch.Tensor, least: float, top_p: float) -> float:
    """The least scaled logit of the smallest set that holds ``top_p`` of what is above ``least``
    (Holtzman et al., arXiv 1904.09751)."""
    total = float(scaled_V[scaled_V >= least].exp().sum(dtype=torch.float64))
    for count in (*_TOP_P_CANDIDATES, len(scaled_V)):
        values = scaled_V.topk(min(count, len(scaled_V))).values
        mass = values.exp().double().cumsum(-1)
        if float(mass[-1]) >= top_p * total:
            index = int(torch.searchsorted(mass, top_p * total))
            return float(values[index])
    return least


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 52 random bits, a pure function of its arguments."""
    key = (seed & _WORD, (seed >> 32) & _WORD)
    high, low, _, _ = philox((index & _WORD, (index >> 32) & _WORD, 0, 0), key)
    return ((high << 32 | low) >> 12) * 2.0**-52


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC'11)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (product1 >> 32) ^ c1 ^ k0, product1 & _WORD
        c2, c3 = (product0 >> 32) ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3
