"""Virtual time, and what can go wrong on the way from one process to another.

One heap of things to do, one random generator: a seed decides everything. Links keep their order,
as the sockets do; what one link delays, another may overtake.
"""

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from random import Random

TRACE_LENGTH = 400


@dataclass(frozen=True, slots=True)
class FaultModel:
    """How bad it is; probabilities of each message or read, times in seconds."""

    delay_s: float = 0.002
    read_s: float = 0.005
    late: float = 0.0  # of a message or a read: up to ``late_s``
    late_s: float = 0.0
    doubled: float = 0.0  # hand-off messages that come twice
    lost: float = 0.0  # hand-off messages between pools
    lost_control: float = 0.0  # messages about a request, to and from the coordinator
    failed: float = 0.0  # reads
    corrupted: float = 0.0  # reads


class EventLoop:
    """The clock and the dice.

    Args:
        seed: of everything.
        model: what happens to messages and reads; by default neither takes time nor goes wrong.
    """

    def __init__(self, seed: int = 0, model: FaultModel | None = None) -> None:
        self.random = Random(seed)
        self.model = model or FaultModel(delay_s=0.0, read_s=0.0)
        self.now = 0.0
        self.faults: Counter[str] = Counter()
        self.trace: deque[str] = deque(maxlen=TRACE_LENGTH)
        self._todo: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._links: dict[Hashable, float] = {}  # when the last message of each arrives

    def note(self, text: str) -> None:
        """For whoever looks into a failing seed."""
        self.trace.append(f"{self.now:9.4f} {text}")

    def at(self, delay_s: float, what: Callable[[], object]) -> None:
        """Do it later."""
        heapq.heappush(self._todo, (self.now + delay_s, next(self._numbers), what))

    def send(self, link: Hashable, what: Callable[[], object]) -> None:
        """Do it when it has come over the link, behind all that was sent there before."""
        arrives = max(self._links.get(link, 0.0), self.now + self.delay(self.model.delay_s))
        self._links[link] = arrives
        # Not as a delay: the sum of that and the present may round to before the message before.
        heapq.heappush(self._todo, (arrives, next(self._numbers), what))

    def delay(self, usual_s: float) -> float:
        """A little, and sometimes a lot."""
        if self.happens(self.model.late, "late"):
            return self.random.random() * self.model.late_s
        return self.random.random() * 2 * usual_s

    def happens(self, probability: float, name: str) -> bool:
        """Throw the dice, and count."""
        if probability and self.random.random() < probability:
            self.faults[name] += 1
            return True
        return False

    def run_until(self, is_over: Callable[[], bool], limit_s: float) -> bool:
        """Do what is to be done until it is over; False if it is not by then."""
        while self._todo and self.now < limit_s:
            self.now, _, what = heapq.heappop(self._todo)
            what()
            if is_over():
                return True
        return is_over()
