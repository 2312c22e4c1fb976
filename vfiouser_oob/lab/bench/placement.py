"""Who runs on which processor while round trips are measured.

The kernel may put a client and the process that answers it on one processor, where waking up costs next to nothing, or
on two, where it costs most of the round trip, and it may change its mind from second to second. A VMM's virtual CPU and
a daemon that serves many are not on one processor; so the client gets one, and whatever answers it another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress


@contextmanager
def apart(servers: Sequence[int], helpers: Sequence[int] = ()) -> Iterator[bool]:
    """Keep ourselves and the servers on different processors.

    Args:
        servers: processes that answer us.
        helpers: processes behind those; they share our processor, which is free while we wait.

    Returns:
        Whether there are two processors to do that with.
    """
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        yield False
        return
    first, second, *_ = sorted(mine)
    places = {0: {first}, **{pid: {second} for pid in servers}, **{pid: {first} for pid in helpers}}
    try:
        for pid, processors in places.items():
            os.sched_setaffinity(pid, processors)
        yield True
    finally:
        for pid in places:
            try:
                os.sched_setaffinity(pid, mine)
            except ProcessLookupError:  # it died; whoever started it will say so
                pass


@contextmanager
def together(servers: Sequence[int]) -> Iterator[str]:
    """Keep ourselves and the servers, with all their threads, on one processor.

    Args:
        servers: processes that answer us, whosever they are; 0 for one that is not known.

    Returns:
        Why that cannot be; empty if it can.
    """
    before: dict[int, set[int]] = {}
    processor = {min(os.sched_getaffinity(0))}
    problem = "" if all(servers) else "its process cannot be seen from here"
    try:
        if not problem:
            for thread in (0, *_threads(servers)):
                before[thread] = os.sched_getaffinity(thread)
                os.sched_setaffinity(thread, processor)
    except OSError as error:
        problem = f"its process cannot be kept on one processor: {error.strerror}"
    try:
        yield problem
    finally:
        for thread, places in before.items():
            with suppress(OSError):  # it has ended, as threads do
                os.sched_setaffinity(thread, places)


def _threads(pids: Sequence[int]) -> list[int]:
    return [int(task) for pid in pids for task in os.listdir(f"/proc/{pid}/task")]
