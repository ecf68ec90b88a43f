"""The states of a hand-off, on a source rank and on a target rank. Pure.

    source  ANNOUNCING --all announced--> DRAINING --all read--> CLOSED
               '------ break ------> BROKEN    (nothing more is announced or confirmed)
               '------ close ------> CLOSING --reads ended--> CLOSED
    target  OPEN --manifest--> MANIFESTED --complete--> CLOSED
              '------ break ---> BROKEN        (nothing more is read)
              '------ close ---> CLOSING --quiet--> CLOSED

A break or a close is possible from every state to its left; what is broken still has to be closed.
A closed hand-off is remembered by its key alone, so that late messages of it are known as late.
"""

import enum


class SourceState(enum.Enum):
    ANNOUNCING = "announcing"
    DRAINING = "draining"  # everything is announced, not everything is read
    BROKEN = "broken"  # it can never commit; the leader knows it and will close the hand-off
    CLOSING = "closing"  # nothing more is announced or confirmed; readers are waited for
    CLOSED = "closed"


class SourceEvent(enum.Enum):
    ALL_ANNOUNCED = "all_announced"
    ALL_READ = "all_read"
    BREAK = "break"
    CLOSE = "close"
    READS_ENDED = "reads_ended"


class TargetState(enum.Enum):
    OPEN = "open"
    MANIFESTED = "manifested"  # what has to be here is known
    BROKEN = "broken"  # it can never be whole; reads in flight go on
    CLOSING = "closing"  # reads in flight are waited for
    CLOSED = "closed"


class TargetEvent(enum.Enum):
    MANIFEST = "manifest"
    COMPLETE = "complete"
    BREAK = "break"
    CLOSE = "close"
    QUIET = "quiet"


SOURCE_TABLE: dict[tuple[SourceState, SourceEvent], SourceState] = {
    (SourceState.ANNOUNCING, SourceEvent.ALL_ANNOUNCED): SourceState.DRAINING,
    (SourceState.ANNOUNCING, SourceEvent.BREAK): SourceState.BROKEN,
    (SourceState.ANNOUNCING, SourceEvent.CLOSE): SourceState.CLOSING,
    (SourceState.DRAINING, SourceEvent.ALL_READ): SourceState.CLOSED,
    (SourceState.DRAINING, SourceEvent.BREAK): SourceState.BROKEN,
    (SourceState.DRAINING, SourceEvent.CLOSE): SourceState.CLOSING,
    (SourceState.BROKEN, SourceEvent.CLOSE): SourceState.CLOSING,
    (SourceState.CLOSING, SourceEvent.READS_ENDED): SourceState.CLOSED,
}

TARGET_TABLE: dict[tuple[TargetState, TargetEvent], TargetState] = {
    (TargetState.OPEN, TargetEvent.MANIFEST): TargetState.MANIFESTED,
    (TargetState.OPEN, TargetEvent.BREAK): TargetState.BROKEN,
    (TargetState.OPEN, TargetEvent.CLOSE): TargetState.CLOSING,
    (TargetState.MANIFESTED, TargetEvent.COMPLETE): TargetState.CLOSED,
    (TargetState.MANIFESTED, TargetEvent.BREAK): TargetState.BROKEN,
    (TargetState.MANIFESTED, TargetEvent.CLOSE): TargetState.CLOSING,
    (TargetState.BROKEN, TargetEvent.CLOSE): TargetState.CLOSING,
    (TargetState.CLOSING, TargetEvent.QUIET): TargetState.CLOSED,
}
