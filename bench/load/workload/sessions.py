"""What users send: sessions of one or more turns, told as segments of prompts, not yet as tokens.

A segment is a name and a length. The same name is the same tokens, so two prompts share a prefix
exactly as far as they begin with the same segments; everything else differs from the first token.
"""

from collections.abc import Iterator
from random import Random
from typing import Protocol

import msgspec

from bench.load.workload.lengths import count_of, sampler
from protocol.errors import ConfigError


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """A named run of tokens."""

    key: str
    num_tokens: int


class Turn(msgspec.Struct, frozen=True):
    """One request of a session.

    Args:
        think_s: from the end of the turn before.
        keeps_history: its prompt begins with the session's prompts and answers so far.
    """

    kind: str
    segments: tuple[Segment, ...]
    max_tokens: int
    think_s: float = 0.0
    keeps_history: bool = False


class TurnSource(Protocol):
    """What draws sessions, without end."""

    def sessions(self, random: Random) -> Iterator[tuple[Turn, ...]]: ...


class Lengths(msgspec.Struct, frozen=True, tag="lengths", tag_field="kind"):
    """Single requests that share nothing."""

    prompt: str = "512"
    output: str = "128"
    name: str = "request"

    def sessions(self, random: Random) -> Iterator[tuple[Turn, ...]]:
        prompt, output = count_of(self.prompt), count_of(self.output)
        number = 0
        while True:
            segment = Segment(f"{self.name}/{number}", prompt(random))
            yield (Turn(self.name, (segment,), output(random)),)
            number += 1


class PrefixTree(msgspec.Struct, frozen=True, tag="prefix_tree", tag_field="kind"):
    """Prompts that are paths of a tree, with a tail of their own: system prompts, tools, examples.

    Args:
        fanout: children of each node, the same at every level.
        segment: tokens of a node.
    """

    depth: int = 3
    fanout: int = 4
    segment: str = "256"
    tail: str = "64"
    output: str = "128"
    name: str = "tree"

    def sessions(self, random: Random) -> Iterator[tuple[Turn, ...]]:
        node, tail, output = count_of(self.segment), count_of(self.tail), count_of(self.output)
        sizes: dict[str, int] = {}
        number = 0
        while True:
            path, segments = self.name, []
            for _ in range(self.depth):
                path += f".{int(random.random() * self.fanout)}"
                if path not in sizes:
                    sizes[path] = node(random)
                segments.append(Segment(path, sizes[path]))
            segments.append(Segment(f"{self.name}/{number}", tail(random)))
            yield (Turn(self.name, tuple(segments), output(random)),)
            number += 1


class Documents(msgspec.Struct, frozen=True, tag="documents", tag_field="kind"):
    """A document is sent with a first question, then asked again; every session has its own.

    The first turn is of kind ``document``, the others of kind ``question``: cold and warm have
    different deadlines.
    """

    document: str = "16384"
    question: str = "32"
    questions: str = "4"
    output: str = "64"
    think_s: str = "exponential/2"

    def sessions(self, random: Random) -> Iterator[tuple[Turn, ...]]:
        document, question = count_of(self.document), count_of(self.question)
        questions, output = count_of(self.questions), count_of(self.output)
        think = sampler(self.think_s)
        number = 0
        while True:
            text = Segment(f"document/{number}", document(random))
            yield tuple(
                Turn(
                    "question" if turn else "document",
                    (text, Segment(f"question/{number}.{turn}", question(random))),
                    output(random),
                    think(random) if turn else 0.0,
                )
                for turn in range(questions(random))
            )
            number += 1


class Sessions(msgspec.Struct, frozen=True, tag="sessions", tag_field="kind"):
    """Conversations: each turn's prompt is all that was said before and a new message."""

    first: str = "512"
    message: str = "128"
    turns: str = "uniform/2/8"
    output: str = "128"
    think_s: str = "exponential/5"
    name: str = "turn"

    def sessions(self, random: Random) -> Iterator[tuple[Turn, ...]]:
        first, message = count_of(self.first), count_of(self.message)
        turns, output, think = count_of(self.turns), count_of(self.output), sampler(self.think_s)
        number = 0
        while True:
            yield tuple(
                Turn(
                    self.name,
                    (
                        Segment(
                            f"{self.name}/{number}.{turn}", (message if turn else first)(random)
                        ),
                    ),
                    output(random),
                    think(random) if turn else 0.0,
                    keeps_history=turn > 0,
                )
                for turn in range(turns(random))
            )
            number += 1


class Mixed(msgspec.Struct, frozen=True, tag="mixed", tag_field="kind"):
    """Short ones, and now and then a long one: what one does to the other is the question."""

    short: str = "256"
    long: str = "32768"
    long_share: float = 0.05
    output: str = "64"

    def sessions(self, random: Random) -> Iterator[tuple[Turn, ...]]:
        parts = {name: count_of(getattr(self, name)) for name in ("short", "long")}
        output = count_of(self.output)
        number = 0
        while True:
            name = "long" if random.random() < self.long_share else "short"
            segment = Segment(f"{name}/{number}", parts[name](random))
            yield (Turn(name, (segment,), output(random)),)
            number += 1


Workload = Lengths | PrefixTree | Documents | Sessions | Mixed


class Cancellations(msgspec.Struct, frozen=True):
    """Users who go away: a share of the sessions, in their last turn, so long after its sending."""

    share: float
    after_s: str = "uniform/0/2"

    def draw(self, random: Random) -> float | None:
        """After how many seconds this one goes, or None when it stays. Always two draws."""
        goes, after_s = random.random() < self.share, sampler(self.after_s)(random)
        return after_s if goes else None


def check_workload(workload: TurnSource, cancellations: Cancellations | None = None) -> None:
    """Nothing, where it can be drawn from.

    Raises:
        ConfigError: a length in it is none, or a share is not between 0 and 1.
    """
    next(workload.sessions(Random(0)))
    shares = [workload.long_share] if isinstance(workload, Mixed) else []
    if cancellations is not None:
        cancellations.draw(Random(0))
        shares.append(cancellations.share)
    if not all(0 <= share <= 1 for share in shares):
        raise ConfigError("a share must lie between 0 and 1")
    if isinstance(workload, PrefixTree) and min(workload.depth, workload.fanout) < 1:
        raise ConfigError("prefix_tree: depth and fanout must be at least 1")
