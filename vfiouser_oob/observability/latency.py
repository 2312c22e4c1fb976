"""How long commands take: a histogram per command, cheap enough for every register access.

A duration falls into one of four buckets per power of two, so a quantile is right within an eighth. What is recent is
told apart by marks: copies of the counts, taken every half minute by whoever keeps time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

#: Durations below this many nanoseconds are not told apart.
_FLOOR_NS = 1 << 10
#: Bits of a duration that is longer than all others: about 73 minutes.
_MOST_BITS = 42
#: Buckets per power of two.
_PARTS = 4
_FIRST = _FLOOR_NS.bit_length() * _PARTS
_BUCKETS = (_MOST_BITS + 1) * _PARTS - _FIRST
#: Seconds between two marks; what is recent is between one and two of these old.
MARK_S = 30.0


class Latency(NamedTuple):
    """What is known of one command.

    Args:
        answered: how many were answered, or refused, since the function was opened.
        total_s: what they took together, in seconds.
        per_s: how many per second of late.
        p50_s: half of them took no longer: of late, or, if none came of late, of all.
        p99_s: all but one of a hundred took no longer.
    """

    answered: int
    total_s: float
    per_s: float
    p50_s: float
    p99_s: float


class _Mark(NamedTuple):
    """The counts at a time."""

    time: float
    rows: Sequence[Sequence[int] | None]


class CommandTimings:
    """The durations of one function's commands.

    Args:
        commands: how many commands there are; they are numbers below that.
        now: the time, by any clock that only moves forward, in seconds; the one of `mark` and `summary`.
    """

    __slots__ = ("_marks", "rows", "totals_ns")

    def __init__(self, commands: int, now: float) -> None:
        #: Counts by bucket, by command; None for a command that never came.
        self.rows: list[list[int] | None] = [None] * commands
        #: Nanoseconds, by command.
        self.totals_ns = [0] * commands
        self._marks = deque([_Mark(now, [None] * commands)], maxlen=2)

    def record(self, command: int, nanoseconds: int) -> None:
        """Note that a command was answered.

        Args:
            command: its number.
            nanoseconds: since it came.
        """
        row = self.rows[command]
        if row is None:
            row = self.rows[command] = [0] * _BUCKETS
        self.totals_ns[command] += nanoseconds
        if nanoseconds < _FLOOR_NS:
            row[0] += 1
            return
        bits = nanoseconds.bit_length()
        if bits > _MOST_BITS:
            row[-1] += 1
            return
        row[bits * _PARTS + (nanoseconds >> (bits - 3) & 3) - _FIRST] += 1

    def mark(self, now: float) -> None:
        """Begin another stretch of time; what is older than two of them is not recent any more.

        Args:
            now: the time.
        """
        self._marks.append(_Mark(now, [None if row is None else tuple(row) for row in self.rows]))

    def summary(self, now: float) -> dict[int, Latency]:
        """What is known, by command; those that never came are left out.

        Args:
            now: the time.
        """
        since = self._marks[0]
        elapsed = max(now - since.time, 1e-9)
        found: dict[int, Latency] = {}
        for command, row in enumerate(self.rows):
            if row is None:
                continue
            before = since.rows[command]
            recent = row if before is None else [here - there for here, there in zip(row, before, strict=True)]
            came = sum(recent)
            of = recent if came else row
            found[command] = Latency(
                sum(row), self.totals_ns[command] / 1e9, came / elapsed, quantile(of, 0.5), quantile(of, 0.99)
            )
        return found

    def powers(self, command: int) -> list[int]:
        """How many took less than each power of two of nanoseconds, from 2**11 on; each counts those before as well.

        Args:
            command: its number.
        """
        row = self.rows[command] or [0] * _BUCKETS
        counts, total = [], 0
        for start in range(0, _BUCKETS, _PARTS):
            total += sum(row[start : start + _PARTS])
            counts.append(total)
        return counts


#: The bounds of `powers`, in seconds; the last bucket has none.
POWER_BOUNDS_S: tuple[float, ...] = tuple((1 << bits) / 1e9 for bits in range(_FLOOR_NS.bit_length(), _MOST_BITS))


def quantile(row: Sequence[int], part: float) -> float:
    """The duration that this part of all did not exceed.

    Args:
        row: counts by bucket, as `CommandTimings` has them.
        part: from 0 to 1.

    Returns:
        Seconds: the middle of the bucket where that is; 0 if nothing was counted.
    """
    left = sum(row) * part
    if not left:
        return 0.0
    reached = next(index for index, count in enumerate(accumulate(row)) if count >= left)
    return (_edge(reached) + _edge(reached + 1)) / 2e9


def _edge(index: int) -> int:
    """The shortest duration of a bucket, in nanoseconds."""
    bits, part = divmod(index + _FIRST, _PARTS)
    return (_PARTS + part) << (bits - 3)
