"""Packs on disk: whole or not there, checked when read, the least valuable given up first."""

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcache.pool import KVPool
from kvcache.tiers.files import PackFiles
from kvcache.tiers.index import HALF_LIFE_S, PackIndex
from kvcache.tiers.pack import KVShape, PackError, PackHeader, read_header
from protocol.kv import KVLayout
from store.disk_io import open_mover

LAYOUT = KVLayout(3, 8, 2, 0, 1, 4, 8, "float32")
SHAPE = KVShape.of(LAYOUT)
WAYS = ["vectored", "nixl-posix"]


def hash_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def hashes_of(*numbers: int) -> tuple[bytes, ...]:
    return tuple(map(hash_of, numbers))


@pytest.fixture
def pool() -> KVPool:
    pool = KVPool(LAYOUT)
    pool.tensor.copy_(torch.arange(pool.tensor.numel()).view(pool.tensor.shape))
    return pool


@pytest.fixture(params=WAYS)
def files(request: pytest.FixtureRequest, tmp_path: Path, pool: KVPool) -> Iterator[PackFiles]:
    with closing(open_mover(request.param, pool.view())) as mover:
        yield PackFiles(tmp_path / "kv", pool, "model", mover)


def test_what_was_written_comes_back_into_any_blocks(files: PackFiles, pool: KVPool) -> None:
    written = pool.tensor[:, [5, 0, 3]].clone()
    name, header = files.write(7, b"parent", hashes_of(1, 2, 3), [5, 0, 3])
    assert (header.first_logical, header.parent, header.num_blocks) == (7, b"parent", 3)
    pool.tensor.zero_()
    files.read(name, [0, 1, 2], [1, 2, 6])
    assert torch.equal(pool.tensor[:, [1, 2, 6]], written)
    assert not pool.tensor[:, [0, 3, 4, 5, 7]].any(), "other blocks are left alone"
    pool.tensor.zero_()
    files.read(name, [0, 2], [7, 4])
    assert torch.equal(pool.tensor[:, [7, 4]], written[:, [0, 2]])


def test_another_process_finds_it(tmp_path: Path, files: PackFiles, pool: KVPool) -> None:
    name, header = files.write(0, b"", hashes_of(1, 2), [0, 1])
    again = PackFiles(tmp_path / "kv", pool, "model")
    assert list(again.scan()) == [(name, header)]
    assert list(PackFiles(tmp_path / "kv", pool, "another model").scan()) == []
    assert read_header(tmp_path / "kv" / f"{name}.pack")[0] == header


@pytest.mark.parametrize("place", ["payload", "header", "magic", "end"])
def test_damage_is_seen(tmp_path: Path, files: PackFiles, pool: KVPool, place: str) -> None:
    name, _ = files.write(0, b"", hashes_of(1, 2), [0, 1])
    path = tmp_path / "kv" / f"{name}.pack"
    content = bytearray(path.read_bytes())
    if place == "end":
        del content[-1]
    else:
        content[{"payload": -100, "header": 40, "magic": 3}[place]] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackError):
        files.read(name, [0, 1], [2, 3])
    if place != "payload":  # that is only seen when it is read
        assert list(PackFiles(tmp_path / "kv", pool, "model").scan()) == []
        assert not path.exists(), "what is no pack takes no room"


def test_unfinished_and_foreign_files(tmp_path: Path, files: PackFiles, pool: KVPool) -> None:
    files.write(0, b"", hashes_of(1), [0])
    (tmp_path / "kv" / "half.part").write_bytes(b"BATONKV\x01")
    (tmp_path / "kv" / "notes.txt").write_text("not ours")
    assert len(list(PackFiles(tmp_path / "kv", pool, "model").scan())) == 1
    assert not (tmp_path / "kv" / "half.part").exists()
    assert (tmp_path / "kv" / "notes.txt").exists()


def test_a_pack_is_the_same_whatever_wrote_it(tmp_path: Path, pool: KVPool) -> None:
    contents = set()
    for way in WAYS:
        with closing(open_mover(way, pool.view())) as mover:
            files = PackFiles(tmp_path / way, pool, "model", mover)
            name, _ = files.write(0, b"", hashes_of(1, 2), [3, 1])
        contents.add((tmp_path / way / f"{name}.pack").read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_leaves_no_trace(tmp_path: Path, way: str) -> None:
    """The limit on a file's size is the smallest disk there is."""
    script = f"""
import errno, resource, signal, sys
from pathlib import Path
from kvcache.pool import KVPool
from kvcache.tiers.files import PackFiles
from store.disk_io import open_mover
from protocol.kv import KVLayout
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
pool = KVPool(KVLayout(3, 8, 2, 0, 1, 4, 8, "float32"))
files = PackFiles(Path({str(tmp_path)!r}), pool, "m", open_mover({way!r}, pool.view()))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    files.write(0, b"", (b"a" * 16, b"b" * 16), [0, 1])
except OSError as error:
    sys.exit(7 if error.errno == errno.EFBIG else 8)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert done.returncode == 7
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 5000


# -- the index -------------------------------------------------------------------------------------


def header(first: int, *numbers: int, parent: int | None = None) -> PackHeader:
    behind = b"" if parent is None else hash_of(parent)
    return PackHeader("m", SHAPE, 10, first, behind, hashes_of(*numbers), (0,) * len(numbers))


@pytest.fixture
def make_index() -> Callable[[int], PackIndex]:
    """A prompt of three packs of two blocks, and another one of one pack."""

    def make(quota_bytes: int = 80) -> PackIndex:
        index = PackIndex(quota_bytes)
        index.add("c", header(4, 5, 6, parent=4), 0.0)
        index.add("a", header(0, 1, 2), 0.0)
        index.add("b", header(2, 3, 4, parent=2), 0.0)
        index.add("x", header(0, 7, 8), 0.0)
        return index

    return make


def test_children_go_before_their_parents(make_index: Callable[[int], PackIndex]) -> None:
    index = make_index(80)
    assert index.num_bytes == 80
    index.hit(["x", "x", "x"], 0.0)
    assert index.room_for(10, 0.0) == ["c"]
    assert index.room_for(60, 0.0) == ["c", "b", "a"]
    assert index.room_for(61, 0.0) == ["c", "b", "a", "x"]
    assert index.room_for(81, 0.0) is None
    assert len(index) == 4, "to ask changes nothing"


def test_value_is_use_and_cost(make_index: Callable[[int], PackIndex]) -> None:
    index = make_index(80)
    assert index.room_for(1, 0.0) == ["x"], "the beginning of a prompt is cheap to compute"
    index.hit(["x"], 0.0)
    assert index.room_for(1, 0.0) == ["c"]
    index.hit(["c"], 20 * HALF_LIFE_S)
    assert index.room_for(1, 20 * HALF_LIFE_S) == ["x"], "an old hit is worth little"


def test_pins(make_index: Callable[[int], PackIndex]) -> None:
    index = make_index(80)
    index.pin("doc", hashes_of(5), "hard")
    assert index.room_for(20, 0.0) == ["x"]
    assert index.room_for(21, 0.0) is None, "what a pinned block stands on stays, too"
    index.pin("doc", hashes_of(5), "soft")
    assert index.room_for(21, 0.0) == ["x", "c"], "soft gives way, last"
    index.pin("doc", (), "soft")
    index.pin("doc2", hashes_of(7), "soft")
    assert index.room_for(80, 0.0) == ["c", "b", "a", "x"]


def test_readers_and_reservations(make_index: Callable[[int], PackIndex]) -> None:
    index = make_index(80)
    index.pack("c").num_readers += 1
    assert index.room_for(20, 0.0) == ["x"] and index.room_for(21, 0.0) is None
    index.pack("c").num_readers -= 1
    index.num_reserved_bytes = 20
    assert index.room_for(1, 0.0) == ["x", "c"]


def test_forgetting(make_index: Callable[[int], PackIndex]) -> None:
    index = make_index(80)
    assert index.forgettable(hashes_of(3, 4, 5, 6)) == ["c", "b"]
    assert index.forgettable(hashes_of(1, 2, 3, 4)) == [], "somebody goes on from there"
    assert index.forgettable(hashes_of(5)) == [], "of a pack that holds more"
    index.pin("doc", hashes_of(6), "soft")
    assert index.forgettable(hashes_of(3, 4, 5, 6)) == []
    assert set(index.remove("x")) == set(hashes_of(7, 8))
    assert hash_of(7) not in index and index.num_bytes == 60


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    parents=st.lists(st.integers(0, 11), min_size=12, max_size=12),
    quota=st.integers(0, 30),
    pinned=st.sets(st.integers(0, 11)),
)
def test_making_room(sizes: list[int], parents: list[int], quota: int, pinned: set[int]) -> None:
    """Whatever is given up, what is left stands on what is left, and is within the quota."""
    index = PackIndex(10 * quota)
    first_hash: list[list[int]] = []
    number = 0
    for position, size in enumerate(sizes):
        numbers = list(range(number, number + size))
        number += size
        parent = first_hash[parents[position]][-1] if parents[position] < position else None
        index.add(str(position), header(0, *numbers, parent=parent), 0.0)
        first_hash.append(numbers)
    for position in pinned & set(range(len(sizes))):
        index.pin(str(position), hashes_of(first_hash[position][0]), "hard")
    victims = index.room_for(5, 0.0)
    if victims is None:
        return
    assert len(set(victims)) == len(victims)
    for name in victims:
        assert int(name) not in pinned
        index.remove(name)
    assert index.num_bytes + 5 <= max(10 * quota, 5) or not victims
    for position in range(len(sizes)):
        if str(position) not in victims and parents[position] < position:
            assert str(parents[position]) not in victims, "a block whose prefix is gone"
