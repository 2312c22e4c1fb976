"""When the daemon is started again, and when a keeper gives up. Pure: time is what the caller says."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

#: So many starts within so many seconds, and it is given up.
STARTS = 5
WINDOW_S = 10.0
#: Exit codes that trying again does not mend: a mistake in the configuration or on the command line, and what a shell
#: says of a program that cannot be executed or found.
HOPELESS: Mapping[int, str] = MappingProxyType(
    {2: "its arguments are wrong", 126: "it cannot be executed", 127: "it was not found"}
)
#: Exit code of a keeper that gave up.
GAVE_UP = 1


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended.

    Args:
        code: its exit code; None if a signal killed it.
        signal: that; None if it ended by itself.
    """

    code: int | None
    signal: int | None

    @classmethod
    def of(cls, status: int) -> Ending:
        """How a process ended.

        Args:
            status: as waitpid(2) has it.
        """
        code = os.waitstatus_to_exitcode(status)
        return cls(code, None) if code >= 0 else cls(None, -code)

    def __str__(self) -> str:
        return f"exit code {self.code}" if self.signal is None else f"signal {self.signal}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows an ending.

    Args:
        code: the keeper ends with this; None if the daemon is started again.
        reason: why the keeper ends, when that was not asked for; None if it was, or is usual.
    """

    code: int | None
    reason: str | None = None


class Lives:
    """The daemon's lives so far.

    Args:
        most: so many starts within `WINDOW_S`, and it is given up.
    """

    def __init__(self, most: int = STARTS) -> None:
        self._most = most
        self._starts: deque[float] = deque(maxlen=most)

    def started(self, now: float) -> None:
        """One has begun.

        Args:
            now: seconds of a clock that only goes forward.
        """
        self._starts.append(now)

    def after(self, ending: Ending, now: float, *, stopping: bool, restarting: bool) -> Verdict:
        """What to do after one has ended.

        Args:
            ending: how.
            now: seconds of the same clock.
            stopping: the keeper was told to end.
            restarting: it was told to start the daemon again, so how it ended does not matter.
        """
        if stopping:
            return Verdict(ending.code or 0)
        if restarting:
            return Verdict(None)
        if ending.code == 0:
            return Verdict(0)
        if ending.code is not None and ending.code in HOPELESS:
            return Verdict(ending.code, HOPELESS[ending.code])
        if len(self._starts) == self._most and now - self._starts[0] < WINDOW_S:
            return Verdict(GAVE_UP, f"it ended {self._most} times within {WINDOW_S:g} s, the last time with {ending}")
        return Verdict(None)
