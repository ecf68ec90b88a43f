"""The frames between two transfer threads: hand-off messages with numbers, and acknowledgements.

A *stream* is the sequence of messages from one sender to one receiver, over a connection that
either side may lose and find again. A sender counts its streams, over all receivers: of two streams
from it the one with the higher number is the newer. Frames do not carry the number of their stream;
the routing id of its socket does.

The messages of a stream are numbered from 1. A receiver acknowledges them in the next frame that
goes the other way or, after a moment, in a frame of its own. What is not acknowledged is sent
again.
"""

import msgspec

from protocol.handoff import HandoffMessage


class Numbered(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A message, which also acknowledges some of the stream in the other direction.

    Of the receiver's stream ``ack_stream`` all messages up to number ``ack`` have come, and behind
    a gap at least those with the numbers ``held``.
    """

    number: int
    message: HandoffMessage
    ack_stream: int = 0
    ack: int = 0
    held: tuple[int, ...] = ()


class Acknowledgement(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The same without a message; it is not acknowledged itself."""

    ack_stream: int
    ack: int
    held: tuple[int, ...] = ()


Frame = Numbered | Acknowledgement
