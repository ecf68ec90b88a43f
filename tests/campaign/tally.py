"""What a campaign has seen, and whether any of it is wrong.

Three ways for a stream of tokens to lie: a token is *lost* (the next one comes in its place),
*repeated*, or *foreign* (any other number). The oracle knows every token, so each is told apart at
the first position that differs; nothing after it is compared.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

FREE_WITHIN_S = 2.0


@dataclass(slots=True)
class Tally:
    """Counts and durations (seconds); ``problems`` is what makes a campaign fail."""

    faults: Counter[str] = field(default_factory=Counter)  # that were seen to take effect
    ends: Counter[str] = field(default_factory=Counter)  # of requests
    num_tokens: int = 0
    lies: Counter[str] = field(default_factory=Counter)  # lost, repeated, foreign
    abort_phases: Counter[str] = field(default_factory=Counter)
    free_s: list[float] = field(default_factory=list)  # from a client's leaving to all freed
    detect_s: dict[str, list[float]] = field(default_factory=dict)
    recover_s: dict[str, list[float]] = field(default_factory=dict)
    num_leaked_blocks: int = 0
    num_audits: int = 0
    num_late_rounds: int = 0
    num_landed_late: int = 0  # reads whose bytes landed after their request was given up
    num_planted_seen: int = 0  # foreign tokens of the run without checksums, which must be seen
    skipped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        return self.ends.total() - self.ends["refused"]

    def add(self, other: "Tally") -> None:
        """Take in what another campaign has seen."""
        for name in self.__dataclass_fields__:
            mine, its = getattr(self, name), getattr(other, name)
            if isinstance(mine, Counter):
                mine.update(its)
            elif isinstance(mine, list):
                mine.extend(its)
            elif isinstance(mine, int):
                setattr(self, name, mine + its)
            else:
                for kind, seconds in its.items():
                    mine.setdefault(kind, []).extend(seconds)

    def compare(self, name: str, tokens: Sequence[int], expected: Sequence[int]) -> None:
        """Compare what a stream has brought so far with what it had to bring."""
        lie = first_lie(tokens, expected)
        if lie is None:
            self.num_tokens += len(tokens)
            return
        kind, position = lie
        self.num_tokens += position + 1
        self.lies[kind] += 1
        self.problem(f"{name}: token {position} of {len(tokens)} is {kind}")

    def problem(self, text: str) -> None:
        """Something that must not be."""
        self.problems.append(text)

    def detected(self, kind: str, seconds: float) -> None:
        self.detect_s.setdefault(kind, []).append(seconds)

    def recovered(self, kind: str, seconds: float) -> None:
        self.recover_s.setdefault(kind, []).append(seconds)


def first_lie(tokens: Sequence[int], expected: Sequence[int]) -> tuple[str, int] | None:
    """(kind, position) of the first token that is not the expected one."""
    for position, token in enumerate(tokens):
        if position >= len(expected):
            return "repeated", position  # more than there can be
        if token == expected[position]:
            continue
        following = list(tokens[position : position + 3])
        if following == list(expected[position + 1 : position + 1 + len(following)]):
            return "lost", position
        if position and following == list(expected[position - 1 : position - 1 + len(following)]):
            return "repeated", position
        return "foreign", position
    return None


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of ``values`` do not exceed; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
