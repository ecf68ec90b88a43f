"""From the service to whoever answers a caller: the tokens of all choices of one HTTP request."""

import asyncio
import contextlib
from collections.abc import Sequence

from protocol.errors import RequestError
from protocol.messages import NewToken


class Delivery:
    """New tokens in the order of their arrival, each with the number of its choice.

    What is not taken adds up to ``max_tokens`` at most, since decoding ends there; a reader who has
    stopped is noticed where the bytes are sent.
    """

    def __init__(self) -> None:
        self._arrived: list[tuple[int, Sequence[NewToken]]] = []
        self._error: RequestError | None = None
        self._event = asyncio.Event()

    def put(self, choice: int, tokens: Sequence[NewToken]) -> None:
        self._arrived.append((choice, tokens))
        self._event.set()

    def fail(self, error: RequestError) -> None:
        """Nothing more will come. What has arrived before can still be taken."""
        self._error = self._error or error
        self._event.set()

    async def take(self, timeout_s: float | None = None) -> list[tuple[int, Sequence[NewToken]]]:
        """All that has arrived since the last call; waits for something. Empty after the timeout.

        Raises:
            RequestError: the request has failed, and everything before has been taken.
        """
        if not self._arrived and self._error is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._event.wait()
        self._event.clear()
        arrived, self._arrived = self._arrived, []
        if not arrived and self._error is not None:
            raise self._error
        return arrived
