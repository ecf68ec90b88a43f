"""Faulty reads over the transport in memory: what they do is real."""

import time

import pytest
import torch

from kvcache.pool import KVPool
from kvtransfer.faulty import FaultyTransport
from kvtransfer.plan import ByteRun
from kvtransfer.transport.interface import ReadHandle, ReadState
from protocol.errors import TransferError
from protocol.kv import KVLayout, RankEndpoint
from protocol.process.failpoints import Failpoints
from tests.kvtransfer.local_transport import LocalFabric, LocalTransport

LAYOUT = KVLayout(2, 4, 2, 0, 1, 8, 16, "float32")
RUN = ByteRun(0, LAYOUT.block_bytes, LAYOUT.block_bytes)


def _pair(text: str) -> tuple[KVPool, KVPool, FaultyTransport]:
    """The source's pool, the target's, and the target's transport with these failpoints."""
    fabric = LocalFabric()
    source, target = KVPool(LAYOUT), KVPool(LAYOUT)
    source.bytes.copy_(torch.arange(LAYOUT.num_bytes) % 251)
    target.bytes.fill_(255)
    served = LocalTransport("source", fabric)
    served.start(source)
    faulty = FaultyTransport(LocalTransport("target", fabric), Failpoints(text))
    faulty.start(target)
    endpoint = RankEndpoint(
        0, 0, 0, "source", "", LAYOUT, served.name, served.metadata(), source.base_address
    )
    faulty.connect(endpoint)
    return source, target, faulty


def _finish(transport: FaultyTransport, read: ReadHandle) -> ReadState:
    until = time.monotonic() + 10
    while (state := transport.poll(read)) is ReadState.IN_FLIGHT:
        assert time.monotonic() < until
        transport.progress()
    return state


def _landed(pool: KVPool) -> torch.Tensor:
    return pool.bytes[RUN.target_offset : RUN.target_offset + RUN.num_bytes]


def test_a_late_read_reads_what_is_there_when_it_is_late() -> None:
    source, target, transport = _pair("transfer.read:delay=0.05@1")
    read = transport.read("source", [RUN])
    assert transport.poll(read) is ReadState.IN_FLIGHT
    source.bytes.fill_(7)  # somebody else's block by now
    assert _finish(transport, read) is ReadState.DONE
    assert bool((_landed(target) == 7).all())


def test_a_late_read_of_a_peer_that_is_gone_fails_and_stays_failed() -> None:
    _, target, transport = _pair("transfer.read:delay=0.02@1")
    read = transport.read("source", [RUN])
    transport.disconnect("source")
    assert _finish(transport, read) is ReadState.FAILED
    assert transport.poll(read) is ReadState.FAILED
    assert bool((target.bytes == 255).all())


def test_changed_bytes_are_in_the_first_token_and_finite() -> None:
    source, target, transport = _pair("transfer.read:corrupt@2")
    numbers = source.tensor
    numbers.copy_(torch.randint(0, 1 << 20, numbers.shape))
    assert _finish(transport, transport.read("source", [RUN])) is ReadState.DONE
    intact = _landed(target).clone()
    read = transport.read("source", [RUN])
    assert _finish(transport, read) is ReadState.DONE
    assert transport.poll(read) is ReadState.DONE  # a second look changes nothing more
    changed = _landed(target) != intact
    assert int(changed.sum()) == 16
    assert int(changed.nonzero().max()) < 64
    assert bool(target.tensor[0, 1].isfinite().all())


def test_a_read_that_fails_is_not_posted() -> None:
    _, target, transport = _pair("transfer.read:fail@1")
    with pytest.raises(TransferError, match=r"failpoint transfer\.read"):
        transport.read("source", [RUN])
    assert bool((target.bytes == 255).all())
