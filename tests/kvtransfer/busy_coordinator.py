"""Listens as a coordinator does and answers each frame; ``hold`` has it compute, and keep the GIL.

``python busy_coordinator.py TOKEN ADDRESS`` prints the address that it listens at.
"""

import asyncio
import sys

from coordinator.faulty import stall_here
from protocol.process.failpoints import HOLD, Fault
from protocol.sockets import AsyncRouter, open_async_context


async def main(token: str, address: str) -> None:
    with open_async_context(token) as context:
        router = AsyncRouter(context, address)
        sys.stdout.write(f"{router.address}\n")
        sys.stdout.flush()
        while True:
            peer, frame = await router.receive()
            if frame.startswith(b"hold "):
                stall_here(Fault(HOLD, float(frame[5:])), "hold")
            await router.send(peer, frame)


asyncio.run(main(*sys.argv[1:]))
