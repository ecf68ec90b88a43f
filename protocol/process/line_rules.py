"""Which lines of a log are written, and where a stream of bytes has its lines. Pure."""

from collections import OrderedDict
from dataclasses import dataclass

BURST = 20
PER_S = 1.0
MAX_KINDS = 512
MAX_LINE_BYTES = 16 << 10
OTHERS = "other lines"


@dataclass(slots=True)
class _Bucket:
    """The allowance of one kind (a token bucket)."""

    tokens: float
    filled_at: float
    num_untold: int = 0  # dropped since the last line that was written


class RateLimit:
    """At most ``burst`` lines of one kind at a time, then ``per_s``.

    There are never more than ``max_kinds`` kinds: when all of them are busy, new ones share one.
    """

    def __init__(
        self, burst: int = BURST, per_s: float = PER_S, max_kinds: int = MAX_KINDS
    ) -> None:
        self.num_dropped = 0
        self._burst = burst
        self._per_s = per_s
        self._max_kinds = max_kinds
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()  # the longest unused first

    def admit(self, kind: str, now: float) -> int | None:
        """Whether a line may be written: None if not, else how many like it were dropped before."""
        bucket = self._bucket(kind, now)
        if bucket.tokens < 1:
            bucket.num_untold += 1
            self.num_dropped += 1
            return None
        bucket.tokens -= 1
        untold = bucket.num_untold
        bucket.num_untold = 0
        return untold

    def settle(self, now: float) -> list[tuple[str, int]]:
        """Kinds that have become quiet, each with the number of lines that were dropped of it."""
        quiet = []
        for kind, bucket in self._buckets.items():
            self._fill(bucket, now)
            if bucket.num_untold and bucket.tokens >= 1:
                quiet.append((kind, bucket.num_untold))
                bucket.num_untold = 0
        return quiet

    def _bucket(self, kind: str, now: float) -> _Bucket:
        bucket = self._buckets.get(kind)
        if bucket is None and len(self._buckets) >= self._max_kinds and not self._forget(now):
            kind = OTHERS
            bucket = self._buckets.get(kind)
        if bucket is None:
            bucket = self._buckets[kind] = _Bucket(float(self._burst), now)
        self._buckets.move_to_end(kind)
        self._fill(bucket, now)
        return bucket

    def _forget(self, now: float) -> bool:
        """Drop the kind that was not seen for longest, if nothing is lost with it."""
        kind, bucket = next(iter(self._buckets.items()))
        self._fill(bucket, now)
        if bucket.num_untold or bucket.tokens < self._burst:
            return False
        del self._buckets[kind]
        return True

    def _fill(self, bucket: _Bucket, now: float) -> None:
        gained = self._per_s * max(0.0, now - bucket.filled_at)
        bucket.tokens = min(float(self._burst), bucket.tokens + gained)
        bucket.filled_at = max(now, bucket.filled_at)


class LineSplitter:
    """Bytes in, lines out. Of a line longer than ``max_bytes`` the rest is counted, not kept."""

    def __init__(self, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._head = bytearray()
        self._num_cut = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that ``piece`` completes, without their ends."""
        *ended, rest = piece.split(b"\n")
        lines = []
        for part in ended:
            self._take(part)
            lines.append(self._line())
        self._take(rest)
        return lines

    def end(self) -> list[bytes]:
        """The last line, if the stream has ended in the middle of one."""
        return [self._line()] if self._head else []

    def _take(self, part: bytes) -> None:
        room = self._max_bytes - len(self._head)
        self._head += part[:room]
        self._num_cut += max(0, len(part) - room)

    def _line(self) -> bytes:
        line = bytes(self._head)
        if self._num_cut:
            line += b" ... and %d bytes more" % self._num_cut
        self._head.clear()
        self._num_cut = 0
        return line
