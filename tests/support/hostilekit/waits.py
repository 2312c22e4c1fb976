"""How long processes were ready to run, and waited for a processor: the machine's doing, and nobody else's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeAlias

#: Nanoseconds that each thread has waited so far, by its id, for each process.
Look: TypeAlias = Sequence[Mapping[int, int]]


class Waits:
    """The kernel's account of each thread of some processes (`/proc/PID/task/TID/schedstat`).

    The event loop of a process may want the interpreter, or a lock, of a helper thread that has lost its processor. So
    the helpers' waits count as well as the loop's. (`/proc/PID/schedstat` is about the first thread alone.)

    Args:
        pids: the processes.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._files: dict[int, dict[int, int]] = {pid: {} for pid in pids}

    def look(self) -> Look:
        """What each thread has waited so far; a process that has ended has no threads."""
        return [self._threads(pid, files) for pid, files in self._files.items()]

    def _threads(self, pid: int, files: dict[int, int]) -> dict[int, int]:
        found: dict[int, int] = {}
        try:
            threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        except OSError:
            return found
        for thread in {*threads, *files}:
            try:
                if thread not in files:
                    files[thread] = os.open(f"/proc/{pid}/task/{thread}/schedstat", os.O_RDONLY)
                found[thread] = int(os.pread(files[thread], 128, 0).split()[1])
            except (OSError, IndexError):  # it has ended
                if thread in files:
                    os.close(files.pop(thread))
        return found


def waited(before: Look, after: Look) -> float:
    """Seconds that the processes have waited between two looks: of each, as long as that thread which waited longest.

    Threads may wait at the same time, so that the sum of their waits would excuse more than there was to wait for. The
    longest one excuses too little where one wait followed another, which is to the daemon's disadvantage.

    Args:
        before: the earlier look.
        after: the later one; a thread that is new in it has waited since it began.
    """
    return (
        sum(
            max((wait - old.get(thread, 0) for thread, wait in new.items()), default=0)
            for old, new in zip(before, after, strict=True)
        )
        / 1e9
    )
