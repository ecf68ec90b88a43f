"""A document's events, each once, over as many connections as it takes. Pure.

1. ``call`` asks for what comes after the last event that was seen.
2. ``feed`` takes the bytes of the answer and gives what is new in it.
3. A connection that ends before the server has said ``[DONE]`` has broken: back to 1.
"""

from typing import Any

import msgspec

from coordinator.client.errors import BatonConnectionError, ErrorBody, stream_error
from coordinator.client.reading import DONE
from coordinator.client.requests import Call, get, path_of
from coordinator.client.sse import Comment, EventParser, ServerEvent
from coordinator.client.types import DocumentEvent


class Following:
    """
    Args:
        document_id: whose events.
        starting_after: the number of the last one that the caller has; 0 for all.
    """

    def __init__(self, document_id: str, starting_after: int) -> None:
        self._document_id = document_id
        self._last = starting_after
        self._parser = EventParser()
        self.is_over = False

    def call(self) -> Call:
        """The request of the next connection."""
        self._parser = EventParser()
        path = path_of("documents", self._document_id, "events")
        return get(path, starting_after=self._last)

    def feed(self, data: bytes) -> list[DocumentEvent]:
        """
        Raises:
            BatonAPIError: the server has given up on this stream.
            BatonConnectionError: these are not the events of a document.
        """
        found = []
        for item in self._parser.feed(data):
            if isinstance(item, Comment):
                continue
            if item.data == DONE:
                self.is_over = True
                break
            event = _read(item)
            if event.sequence_number > self._last:
                self._last = event.sequence_number
                found.append(event)
        return found


def _read(item: ServerEvent) -> DocumentEvent:
    try:
        data: dict[str, Any] = msgspec.json.decode(item.data, type=dict[str, Any])
        if "sequence_number" not in data and "error" in data:
            raise stream_error(msgspec.convert(data, ErrorBody).error, None)
        event = msgspec.convert({"type": item.event, **data}, DocumentEvent)
    except msgspec.MsgspecError as error:
        raise BatonConnectionError(f"not an event of a document: {error}") from error
    return msgspec.structs.replace(event, data=data)
