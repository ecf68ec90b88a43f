"""One sequence to generate, as the HTTP side asks the service for it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.request import SamplingParams

SessionKey = tuple[str, str]  # (tenant, session_id)


@dataclass(frozen=True, slots=True)
class Generation:
    """One sequence to generate. ``request_id`` is the server's own, unique in the cluster."""

    request_id: str
    prompt_token_ids: Sequence[int]  # packed, if it may be long
    block_hashes: tuple[bytes, ...]
    sampling: SamplingParams
    tenant: str
    cache_salt: str = ""
    session: SessionKey | None = None
    is_offload: bool = False  # computed for a store: there is no answer
    priority: int = 0  # of its prefill; the lower go first
    chunk_tokens: int = 0  # of its prefill's chunks at most; 0: as configured
    ring_size: int = 0  # of its prefill; 0: the pool's choice
