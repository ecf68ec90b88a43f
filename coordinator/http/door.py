"""The door of HTTP: open, or closed to what is new while what runs may still end.

A request runs from the moment at which all of its body is here. While the door is closed, every
POST is refused, and so is one whose body had not come in full; what only looks is answered.
"""

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.errors import shutting_down

_log = logging.getLogger(__name__)
_TAKEN = ("POST", "PUT", "PATCH")  # they ask for work, or for something to be kept


class Door:
    """Counts what runs, and closes."""

    def __init__(self) -> None:
        self.is_closed = False
        self.num_running = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def close(self) -> None:
        """Let nothing new in. Idempotent."""
        self.is_closed = True

    def check(self) -> None:
        """Raises RequestError once it is closed."""
        if self.is_closed:
            raise shutting_down()

    async def drained(self, grace_s: float, now: asyncio.Event) -> None:
        """Wait until nothing runs any more, for at most ``grace_s`` and until ``now`` is set."""
        if self.num_running == 0:
            return
        _log.info("ending: %d requests may take %.0f s more", self.num_running, grace_s)
        waiting = [asyncio.create_task(event.wait()) for event in (self._is_idle, now)]
        await asyncio.wait(waiting, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if self.num_running:
            _log.warning("ending: %d requests are cut off", self.num_running)

    def enter(self) -> None:
        """One more runs."""
        self.num_running += 1
        self._is_idle.clear()

    def leave(self) -> None:
        """One less."""
        self.num_running -= 1
        if self.num_running == 0:
            self._is_idle.set()


class DoorMiddleware:
    """Passes requests through a :class:`Door`."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        door, has_entered = self._door, False

        def enter() -> None:
            nonlocal has_entered
            if not has_entered:
                has_entered = True
                door.enter()

        async def receive_body() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                if not has_entered:
                    door.check()
                enter()
            return message

        if scope["method"] in _TAKEN:
            door.check()
        else:
            enter()
        try:
            await self._app(scope, receive_body, send)
        finally:
            if has_entered:
                door.leave()
