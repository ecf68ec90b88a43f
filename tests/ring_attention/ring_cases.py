"""Chunks on rings of threads, checked against dense attention over the whole sequence.

Shape suffixes as in modeling.context; S runs over all positions up to the chunk's end.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec
import torch

from kvcache.pool import KVPool
from modeling.checkpoint.config import ModelConfig
from modeling.kernels.attention import AttentionKernel, Piece
from protocol.kv import KVLayout
from protocol.plans import ChunkWork, PlacedBlock
from ring_attention.comm import RingComm
from ring_attention.context import RingAttention
from ring_attention.partition import deal_zigzag
from tests.ring_attention.local_ring import LocalRing

BUDGET_S = 60.0
MODULUS = 2**20
Share = tuple[torch.Tensor, torch.Tensor]  # a rank's (positions_T, out_TNH)
Result = TypeVar("Result")


def visible(
    q_positions: torch.Tensor, k_positions: torch.Tensor, window: int | None
) -> torch.Tensor:
    """bool [T, S]: what a dense causal mask lets through."""
    distance = q_positions.unsqueeze(1) - k_positions.unsqueeze(0)
    return (distance >= 0) & (distance < (window or 1 << 40))


class _CheckingKernel(AttentionKernel):
    """Holds the ring to the interface: no empty call, no key that the piece says is not there."""

    def check(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, piece: Piece
    ) -> torch.Tensor:
        assert 0 not in q_TNH.shape and 0 not in k_SKH.shape and k_SKH.shape == v_SKH.shape
        assert q_TNH.stride(-1) == k_SKH.stride(-1) == v_SKH.stride(-1) == 1
        assert piece.k_positions.shape[0] == k_SKH.shape[0]
        q_positions = piece.q_start + torch.arange(q_TNH.shape[0])
        if piece.causal:
            assert torch.equal(q_positions, piece.k_positions)
        else:
            assert piece.k_positions[-1] < piece.q_start
        mask = visible(q_positions, piece.k_positions, piece.window)
        assert mask.any(dim=0).all(), "a key that no query of the piece sees"
        if piece.window is not None:
            assert not torch.equal(mask, visible(q_positions, piece.k_positions, None))
        return mask

    def paged_decode(
        self,
        q_BNH: torch.Tensor,
        pool: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        *,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class DenseKernel(_CheckingKernel):
    """Attention by the book, in fp64 inside."""

    def attend(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, piece: Piece
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = self.check(q_TNH, k_SKH, v_SKH, piece)
        out_TNH, lse_TN = dense_attention(q_TNH, k_SKH, v_SKH, mask)
        return out_TNH.to(q_TNH.dtype), lse_TN.float()

    def merge_(
        self,
        out_TNH: torch.Tensor,
        lse_TN: torch.Tensor,
        other_out_TNH: torch.Tensor,
        other_lse_TN: torch.Tensor,
    ) -> None:
        assert out_TNH.dtype == lse_TN.dtype == torch.float32
        lse = torch.logaddexp(lse_TN, other_lse_TN)
        weight = torch.sigmoid(other_lse_TN - lse_TN).unsqueeze(-1)
        out_TNH.lerp_(other_out_TNH.float(), weight)
        lse_TN.copy_(lse)


class PositionKernel(_CheckingKernel):
    """Exact: adds ``k * weight(position)`` of all visible keys, mod 2^20. Order cannot matter."""

    def attend(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, piece: Piece
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = self.check(q_TNH, k_SKH, v_SKH, piece)
        out_TNH = position_sum(k_SKH, piece.k_positions, mask, q_TNH.shape[1])
        return out_TNH, torch.zeros(out_TNH.shape[:2])

    def merge_(
        self,
        out_TNH: torch.Tensor,
        lse_TN: torch.Tensor,
        other_out_TNH: torch.Tensor,
        other_lse_TN: torch.Tensor,
    ) -> None:
        out_TNH.add_(other_out_TNH).remainder_(MODULUS)
        lse_TN.add_(other_lse_TN)


def position_sum(
    k_SKH: torch.Tensor, k_positions: torch.Tensor, mask_TS: torch.Tensor, num_heads: int
) -> torch.Tensor:
    weighted = k_SKH.double() * (k_positions * 7919 % 997 + 1).view(-1, 1, 1)
    per_head = weighted.repeat_interleave(num_heads // k_SKH.shape[1], dim=1)
    return torch.einsum("ts,snh->tnh", mask_TS.double(), per_head).remainder(MODULUS).float()


def dense_attention(
    q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, mask_TS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 (out_TNH, lse_TN)."""
    groups = q_TNH.shape[1] // k_SKH.shape[1]
    k_SNH = k_SKH.double().repeat_interleave(groups, dim=1)
    v_SNH = v_SKH.double().repeat_interleave(groups, dim=1)
    scores = torch.einsum("tnh,snh->tns", q_TNH.double(), k_SNH) * q_TNH.shape[-1] ** -0.5
    scores.masked_fill_(~mask_TS.unsqueeze(1), -torch.inf)
    lse_TN = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse_TN.clamp(min=-1e300).unsqueeze(-1))
    return torch.einsum("tns,snh->tnh", weights, v_SNH), lse_TN


@dataclass(frozen=True)
class Setup:
    """What to put on a ring; ``build`` does it."""

    ring: tuple[int, ...] = (0, 1)
    num_prefix_blocks: int = 0
    num_tokens: int = 64
    block_size: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    window: int | None = None
    pass_q: bool = False
    dtype: str = "float32"
    integers: bool = False
    seed: int = 0

    def build(self) -> "RingCase":
        return RingCase(self)


class RingCase:
    """One chunk with its prefix in place, on a pool per cp rank."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        rng = random.Random(setup.seed)
        self.start = setup.num_prefix_blocks * setup.block_size
        self.end = self.start + setup.num_tokens
        self.positions_S = torch.arange(self.end)
        self.q_SNH = self._rows(setup.num_heads, 1)
        self.k_SKH = self._rows(setup.num_kv_heads, 2)
        self.v_SKH = self._rows(setup.num_kv_heads, 3)
        self.config = ModelConfig(
            architecture="llama",
            vocab_size=512,
            hidden_size=8,
            intermediate_size=8,
            num_layers=1,
            num_heads=setup.num_heads,
            num_kv_heads=setup.num_kv_heads,
            head_dim=setup.head_dim,
            max_model_len=1 << 20,
            layer_windows=(setup.window,),
        )
        num_blocks = -(-self.end // setup.block_size)
        self.work = self._place(num_blocks, rng)
        self.pools = {
            rank: KVPool(self._layout(num_blocks + 3, setup.num_kv_heads)) for rank in setup.ring
        }
        for block in self.work.blocks[: setup.num_prefix_blocks]:
            first = block.logical * setup.block_size
            rows = slice(first, first + setup.block_size)
            slots = block.block_id * setup.block_size + torch.arange(setup.block_size)
            self.pools[block.cp_rank].write(0, slots, self.k_SKH[rows], self.v_SKH[rows])

    def _rows(self, num_heads: int, salt: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.setup.seed * 8 + salt)
        shape = (self.end, num_heads, self.setup.head_dim)
        if self.setup.integers:
            return torch.randint(0, MODULUS, shape, generator=generator).float()
        return torch.randn(shape, generator=generator).to(getattr(torch, self.setup.dtype))

    def _layout(self, num_blocks: int, num_kv_heads: int) -> KVLayout:
        setup = self.setup
        return KVLayout(
            1, num_blocks, num_kv_heads, 0, 1, setup.block_size, setup.head_dim, setup.dtype
        )

    def _place(self, num_blocks: int, rng: random.Random) -> ChunkWork:
        setup = self.setup
        owners = [rng.choice(setup.ring) for _ in range(setup.num_prefix_blocks)]
        dealt = deal_zigzag(num_blocks - len(owners), len(setup.ring))
        chunk_owner = {block: rank for rank, blocks in zip(setup.ring, dealt, strict=True)
                       for block in blocks}  # fmt: skip
        owners += [chunk_owner[block] for block in range(num_blocks - len(owners))]
        free = {rank: rng.sample(range(num_blocks + 3), num_blocks + 3) for rank in setup.ring}
        return ChunkWork(
            request_id="r",
            attempt=0,
            chunk=0,
            start=self.start,
            token_ids=tuple(rng.randrange(512) for _ in range(setup.num_tokens)),
            ring=setup.ring,
            pass_q=setup.pass_q,
            blocks=tuple(
                PlacedBlock(logical, owner, free[owner].pop(), 0)
                for logical, owner in enumerate(owners)
            ),
            is_last=True,
        )

    def swap_blocks(self, first: int, second: int) -> None:
        """Let the plan name two blocks' places the wrong way round."""
        blocks = list(self.work.blocks)
        blocks[first], blocks[second] = (
            msgspec.structs.replace(blocks[second], logical=first),
            msgspec.structs.replace(blocks[first], logical=second),
        )
        self.work = msgspec.structs.replace(self.work, blocks=tuple(blocks))

    def attend(self, cp_rank: int, comm: RingComm | None, kernel: AttentionKernel) -> Share:
        """This rank's (positions_T, out_TNH)."""
        context = RingAttention(self.work, cp_rank, self.pools[cp_rank], comm, kernel, self.config)
        positions = context.positions_T
        if not context.num_tokens:
            context.attend_empty(0)
            return positions, self.q_SNH[:0]
        rows = (tensor[positions] for tensor in (self.q_SNH, self.k_SKH, self.v_SKH))
        return positions, context.attend(0, *rows)

    def expected_attention(self) -> torch.Tensor:
        q_positions = self.positions_S[self.start :]
        mask = visible(q_positions, self.positions_S, self.setup.window)
        return dense_attention(self.q_SNH[self.start :], self.k_SKH, self.v_SKH, mask)[0]

    def expected_position_sum(self) -> torch.Tensor:
        q_positions = self.positions_S[self.start :]
        mask = visible(q_positions, self.positions_S, self.setup.window)
        return position_sum(self.k_SKH, self.positions_S, mask, self.setup.num_heads)


def on_threads(ranks: Sequence[int], run: Callable[[int, RingComm], Result]) -> list[Result]:
    """Run every virtual rank in a thread; no message may be left over."""
    ring = LocalRing(timeout_s=BUDGET_S)
    with ThreadPoolExecutor(len(ranks)) as threads:
        futures = [threads.submit(run, rank, ring.comm(rank)) for rank in ranks]
        results = [future.result() for future in futures]
    ring.assert_idle()
    return results


def attend_on_threads(case: RingCase, kernel: AttentionKernel) -> torch.Tensor:
    """out_TNH of the whole chunk, put together from all ranks."""
    parts = on_threads(case.setup.ring, lambda rank, comm: case.attend(rank, comm, kernel))
    return assemble(case, parts)


def assemble(case: RingCase, parts: Sequence[Share]) -> torch.Tensor:
    order = torch.cat([positions for positions, _ in parts])
    assert sorted(order.tolist()) == list(range(case.start, case.end))
    out_TNH = torch.empty_like(case.q_SNH[case.start : case.end])
    out_TNH[order - case.start] = torch.cat([out for _, out in parts])
    return out_TNH


def process_cases(size: int, seed: int) -> list[Setup]:
    """What is run between processes and between threads, to the same bits."""
    ring = tuple(range(size))
    part = ring[1:] if size > 2 else ring
    setups = [
        Setup(ring=ring, num_tokens=203, num_prefix_blocks=9, pass_q=pass_q, **more)
        for pass_q in (False, True)
        for more in ({}, {"dtype": "bfloat16"}, {"integers": True}, {"window": 30})
    ] + [
        Setup(ring=part, num_tokens=9, num_prefix_blocks=5),
        Setup(ring=ring, num_tokens=1, num_prefix_blocks=5, pass_q=True),
        Setup(ring=ring, num_tokens=3),
    ]
    return [replace(setup, seed=seed) for setup in setups]


def digest(out_TNH: torch.Tensor) -> str:
    values = out_TNH.double().flatten()  # exact from either dtype
    return hashlib.blake2b(values.numpy().tobytes()).hexdigest()


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())
