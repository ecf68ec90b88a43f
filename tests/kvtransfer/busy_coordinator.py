"""Listens as a coordinator does and answers each frame; ``hold`` has it compute, and keep the GIL.

``python busy_coordinator.py ADDRESS`` prints the address that it listens at.
"""

import asyncio
import sys

import zmq.asyncio

from coordinator.faulty import stall_here
from protocol.failpoints import HOLD, Fault
from protocol.sockets import AsyncRouter


async def main(address: str) -> None:
    router = AsyncRouter(zmq.asyncio.Context(), address)
    sys.stdout.write(f"{router.address}\n")
    sys.stdout.flush()
    while True:
        peer, frame = await router.receive()
        if frame.startswith(b"hold "):
            stall_here(Fault(HOLD, float(frame[5:])), "hold")
        await router.send(peer, frame)


asyncio.run(main(sys.argv[1]))
