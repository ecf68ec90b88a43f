"""How the memory of a cluster's processes moves over hours, and what of it is growth. Pure but for
reading /proc.

Resident memory rises in steps and falls again, so single samples tell nothing. The median of each
minute is what is compared, and the slope is Theil and Sen's: the median of the slopes of all pairs,
which a few odd minutes do not move (P. K. Sen, JASA 63, 1968).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

_PAGE_BYTES = 4096
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at one process."""

    at_s: float
    rss_bytes: int
    num_files: int
    num_threads: int


@dataclass(slots=True)
class History:
    """All looks at one process, of the warm-up too."""

    samples: list[Sample] = field(default_factory=list)

    def after(self, warm_s: float) -> "History":
        """What was seen from ``warm_s`` on."""
        return History([sample for sample in self.samples if sample.at_s >= warm_s])

    def by_minute(self) -> list[tuple[float, float]]:
        """(minute, median of its resident memory in MiB), the minutes in order."""
        minutes: dict[int, list[int]] = {}
        for sample in self.samples:
            minutes.setdefault(int(sample.at_s // 60), []).append(sample.rss_bytes)
        return [
            (float(minute), statistics.median(sizes) / MIB)
            for minute, sizes in sorted(minutes.items())
        ]

    @property
    def slope(self) -> float:
        """MiB per minute; 0 of less than two minutes."""
        return sen_slope(self.by_minute())

    @property
    def most_files(self) -> tuple[int, int]:
        """Open files: the most in the first third of the samples, and in the last."""
        third = max(1, len(self.samples) // 3)
        first, last = self.samples[:third], self.samples[-third:]
        return max(s.num_files for s in first), max(s.num_files for s in last)


def sen_slope(points: Sequence[tuple[float, float]]) -> float:
    """The median slope over all pairs of points with different x; 0 if there is no pair."""
    slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in combinations(points, 2) if x1 != x0]
    return statistics.median(slopes) if slopes else 0.0


def look(pid: int, at_s: float) -> Sample | None:
    """A process now, or None when it is gone."""
    folder = Path(f"/proc/{pid}")
    try:
        rss_bytes = int((folder / "statm").read_text().split()[1]) * _PAGE_BYTES
        num_files = sum(1 for _ in (folder / "fd").iterdir())
        num_threads = sum(1 for _ in (folder / "task").iterdir())
    except (OSError, IndexError):
        return None
    return Sample(at_s, rss_bytes, num_files, num_threads)


def table(histories: Mapping[str, History], warm_s: float) -> list[str]:
    """One line for each process: where it was after the warm-up, where it ended, its slope."""
    lines = ["process          after warm-up   at the end    MiB a minute   open files  threads"]
    for name, whole in sorted(histories.items()):
        history = whole.after(warm_s)
        minutes = history.by_minute()
        if not minutes:
            continue
        last = history.samples[-1]
        lines.append(
            f"{name:<16} {minutes[0][1]:9.1f} MiB {minutes[-1][1]:8.1f} MiB"
            f"   {history.slope:+12.3f} {last.num_files:12d} {last.num_threads:8d}"
        )
    return lines
