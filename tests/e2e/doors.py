"""What processes listen on, as the kernel has it."""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_LISTEN, _ACCEPTS = "0A", 0x10000  # states in /proc/net/tcp; flags in /proc/net/unix


class Door(NamedTuple):
    """A socket that somebody else can send to."""

    kind: str
    host: str  # an address; of a Unix socket its path
    port: int


def _address(text: str) -> str:
    raw = bytes.fromhex(text)
    words = struct.unpack(f">{len(raw) // 4}I", raw)  # each in the machine's own order
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, struct.pack(f"<{len(words)}I", *words))


def _all_doors() -> Iterator[tuple[str, Door]]:
    """(inode, door) of every socket in this network namespace that accepts anything."""
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            host, _, port = fields[1].rpartition(":")
            if kind.startswith("udp") or fields[3] == _LISTEN:
                yield fields[9], Door(kind, _address(host), int(port, 16))
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[3], 16) & _ACCEPTS or (fields[4] == "0002" and len(fields) > 7):
            yield fields[6], Door("unix", fields[7] if len(fields) > 7 else "", 0)


def doors_of(pids: list[int]) -> dict[int, list[Door]]:
    """What each process listens on."""
    doors = dict(_all_doors())
    found: dict[int, list[Door]] = {}
    for pid in pids:
        links = []
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                links.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        inodes = [link[8:-1] for link in links if link.startswith("socket:[")]
        found[pid] = [doors[inode] for inode in inodes if inode in doors]
    return found


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    below = []
    for task in os.listdir(f"/proc/{pid}/task"):
        below += Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    return [pid, *(deeper for child in below for deeper in tree(int(child)))]
