"""The last thing that went wrong with a function: what, when, and whether it is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

#: Seconds for which a refused command is told of: it is an event, not a condition, and its client may live for weeks.
PASSING_S = 600.0


class Trouble(NamedTuple):
    """Something that went wrong.

    Args:
        text: what, for people.
        time: when it was seen last, in seconds since 1970.
        passing: it is old news after `PASSING_S`; else it lasts until somebody says that it is over.
    """

    text: str
    time: float
    passing: bool


class TroubleBook:
    """Keeps the last trouble until it is over.

    Args:
        clock: seconds since 1970.
    """

    __slots__ = ("_clock", "_last")

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._last: Trouble | None = None

    def note(self, text: str, *, passing: bool = False) -> None:
        """Something went wrong.

        Args:
            text: what.
            passing: it is an event rather than a condition.
        """
        self._last = Trouble(text, self._clock(), passing)

    def over(self) -> None:
        """All is well again."""
        self._last = None

    @property
    def last(self) -> Trouble | None:
        """What went wrong last; None if nothing did, or it is over."""
        last = self._last
        if last is not None and last.passing and self._clock() - last.time > PASSING_S:
            self._last = last = None
        return last
