"""One contract for every way between memory and a file."""

import errno
import gc
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from nixl import nixl_agent, nixl_agent_config

from kvcache.tiers.movers import ByteRange, FileMover
from kvtransfer.transport.nixl_library import NIXL_ERRORS
from protocol.errors import ConfigError
from store import disk_io
from store.disk_io import open_mover
from store.nixl_mover import NixlMover

MEMORY_BYTES = 1 << 20
NAMES = ["vectored", "nixl-posix", pytest.param("nixl-gds", marks=pytest.mark.gpu)]


class Way:
    """A mover with the memory that it moves."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.memory = bytearray(MEMORY_BYTES)
        self.mover: FileMover = open_mover(name, memoryview(self.memory))

    def scramble(self, seed: int) -> None:
        self.memory[:] = Random(seed).randbytes(MEMORY_BYTES)

    def bytes_of(self, pieces: list[ByteRange]) -> bytes:
        return b"".join(self.memory[offset : offset + size] for offset, size in pieces)


@pytest.fixture(scope="module", params=NAMES)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    if request.param == "nixl-gds" and not _has_gds():
        pytest.skip("NIXL's GDS backend does not start here: no cuFile, or no device")
    way = Way(request.param)
    yield way
    way.mover.close()
    way.mover.close()


def _has_gds() -> bool:
    """Asked of NIXL itself, not of what is tested."""
    agent = nixl_agent("probe", nixl_agent_config(enable_prog_thread=False, backends=[]))
    try:
        agent.create_backend("GDS")
    except (*NIXL_ERRORS, RuntimeError):
        return False
    return True


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def _content(file: int) -> bytes:
    return os.pread(file, 2 * MEMORY_BYTES, 0)


def _num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@st.composite
def plans(draw: st.DrawFn) -> list[ByteRange]:
    """Pieces that do not overlap, of odd sizes, in any order; often more than one post or call."""
    count = draw(st.sampled_from([1, 2, 63, 64, 65, 200, 1025, 2100]))
    sizes = [draw(st.sampled_from([1, 5, 64, 4096]))] * count
    sizes[draw(st.integers(0, count - 1))] = draw(st.integers(1, 9000))
    random = Random(draw(st.integers(0, 9)))
    pieces, offset = [], 0
    for size in sizes:
        offset += random.choice([0, 0, 3])
        if offset + size > MEMORY_BYTES:
            break
        pieces.append(ByteRange(offset, size))
        offset += size
    random.shuffle(pieces)
    return pieces


@settings(max_examples=25, deadline=None)
@given(plan=plans(), offset=st.sampled_from([0, 1, 4096, 70_001]), seed=st.integers(0, 99))
def test_what_was_written_is_read(way: Way, plan: list[ByteRange], offset: int, seed: int) -> None:
    way.scramble(seed)
    written = way.bytes_of(plan)
    before = bytes(way.memory)
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(b"h" * offset)
        way.mover.write(file.fileno(), offset, plan)
        assert way.memory == before, "writing changes nothing"
        assert _content(file.fileno()) == b"h" * offset + written
        way.scramble(seed + 1)
        expected, position = bytearray(way.memory), 0
        for start, size in plan:
            expected[start : start + size] = written[position : position + size]
            position += size
        way.mover.read(file.fileno(), offset, plan)
        assert way.memory == expected, "a wrong byte, or one beside the pieces"


def test_no_pieces_are_fine(way: Way, file: int) -> None:
    way.mover.write(file, 100, [])
    way.mover.read(file, 100, [])
    assert _content(file) == b""


def test_pieces_outside_of_the_memory(way: Way, file: int) -> None:
    for piece in (ByteRange(-1, 10), ByteRange(MEMORY_BYTES - 1, 2)):
        with pytest.raises(AssertionError):
            way.mover.write(file, 0, [piece])
    assert _content(file) == b""


def test_a_file_that_ends_early(way: Way, file: int) -> None:
    os.write(file, b"x" * 1000)
    with pytest.raises(OSError, match="ends early"):
        way.mover.read(file, 0, [ByteRange(0, 600), ByteRange(5000, 401)])
    way.mover.read(file, 0, [ByteRange(0, 600), ByteRange(5000, 400)])
    assert way.memory[5000:5400] == b"x" * 400


def test_a_file_of_another_mode(way: Way, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    for flags, move in ((os.O_WRONLY, way.mover.read), (os.O_RDONLY, way.mover.write)):
        file = os.open(tmp_path / "file", flags)
        with pytest.raises(OSError):
            move(file, 0, [ByteRange(0, 100)])
        os.close(file)
    assert (tmp_path / "file").read_bytes() == b"x" * 1000


def test_a_descriptor_that_is_another_file_now(way: Way, tmp_path: Path) -> None:
    """What was known of a file by its number would be of the one before."""
    numbers = set()
    for round_ in range(20):
        (tmp_path / str(round_)).write_bytes(bytes([round_]) * (3000 - 100 * round_))
        file = os.open(tmp_path / str(round_), os.O_RDONLY)
        numbers.add(file)
        way.mover.read(file, 0, [ByteRange(0, 3000 - 100 * round_)])
        os.close(file)
        assert set(way.memory[: 3000 - 100 * round_]) == {round_}
    assert len(numbers) == 1


def test_many_threads(way: Way, tmp_path: Path) -> None:
    way.scramble(1)
    before = bytes(way.memory)
    share = MEMORY_BYTES // 8

    def back_and_forth(thread: int) -> None:
        pieces = [ByteRange(thread * share + 512 * n, 512) for n in range(share // 512)]
        with (tmp_path / str(thread)).open("w+b", buffering=0) as file:
            for offset in range(10):
                way.mover.write(file.fileno(), offset, pieces)
                way.mover.read(file.fileno(), offset, pieces)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(back_and_forth, range(8)))
    assert way.memory == before


def test_nothing_is_kept(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither descriptors nor registrations grow, whether it goes well or not."""
    held: Counter[str] = Counter()
    register, deregister = nixl_agent.register_memory, nixl_agent.deregister_memory

    def count_in(agent: Any, *args: Any, **kwargs: Any) -> Any:
        registered = register(agent, *args, **kwargs)
        held["registrations"] += 1
        return registered

    def count_out(agent: Any, *args: Any, **kwargs: Any) -> None:
        deregister(agent, *args, **kwargs)
        held["registrations"] -= 1

    def use(way: Way) -> None:
        with (tmp_path / "file").open("w+b", buffering=0) as file:
            way.mover.write(file.fileno(), 7, [ByteRange(0, 100), ByteRange(200, 100)])
            way.mover.read(file.fileno(), 0, [ByteRange(0, 100)])

    def fail(way: Way) -> None:
        with (tmp_path / "file").open("wb") as file, pytest.raises(OSError):
            os.ftruncate(file.fileno(), 100)
            way.mover.read(file.fileno(), 0, [ByteRange(0, 100)])

    monkeypatch.setattr(nixl_agent, "register_memory", count_in)
    monkeypatch.setattr(nixl_agent, "deregister_memory", count_out)
    gc.collect()
    without = _num_descriptors()
    fresh = Way(way.name)
    use(fresh)
    before, registered = _num_descriptors(), held.total()
    for _ in range(50):
        use(fresh)
    assert held.total() == registered
    assert _num_descriptors() <= before
    for _ in range(20):
        fail(fresh)
        use(fresh)
    assert held.total() == registered
    assert _num_descriptors() <= before
    fresh.mover.close()
    assert held.total() == 0
    assert _num_descriptors() <= without


def test_the_file_system_says_why(way: Way, tmp_path: Path) -> None:
    """A full disk is told from others by its number. No file is as long as that."""
    with (tmp_path / "file").open("wb", buffering=0) as file, pytest.raises(OSError) as caught:
        way.mover.write(file.fileno(), 1 << 62, [ByteRange(0, 100)])
    assert caught.value.errno == errno.EFBIG


# -- choosing --------------------------------------------------------------------------------------


def test_a_way_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memoryview(bytearray(64))
    with pytest.raises(ConfigError, match=r"--disk-io tape: .*vectored, nixl-posix, nixl-gds"):
        open_mover("tape", memory)
    with pytest.raises(ConfigError, match="NO_SUCH"):
        NixlMover(memory, "NO_SUCH")
    monkeypatch.setitem(disk_io._BACKENDS, "nixl-gds", "NO_SUCH")
    with pytest.raises(ConfigError, match=r"--disk-io nixl-gds: .*use --disk-io vectored"):
        open_mover("nixl-gds", memory)
