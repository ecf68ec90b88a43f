"""What travels between two transfer threads: hand-off messages with numbers, and acknowledgements.

A *line* is what one sender says to one receiver over one connection that either side may lose and
find again. A sender counts its lines, over all receivers: of two lines from it the higher one is
the newer. Frames do not carry their line's number, the routing id of its socket does.

Messages of a line are numbered from 1. Whoever has received some says so, in the next frame that
goes the other way or, after a moment, in one of its own; what nobody says this of is sent again.
"""

import msgspec

from protocol.handoff import HandoffMessage


class Numbered(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A message. Of the receiver's line ``ack_line`` all up to number ``ack`` has come, and behind
    a gap at least the numbers ``held``."""

    number: int
    message: HandoffMessage
    ack_line: int = 0
    ack: int = 0
    held: tuple[int, ...] = ()


class Acknowledgement(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The same without a message; it is not acknowledged itself."""

    ack_line: int
    ack: int
    held: tuple[int, ...] = ()


Frame = Numbered | Acknowledgement
