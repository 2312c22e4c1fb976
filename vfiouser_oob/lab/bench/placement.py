"""Who runs on which processor while round trips are measured.

The kernel may put a client and the process that answers it on one processor, where waking up costs next to nothing, or
on two, where it costs most of the round trip, and it may change its mind from second to second. A VMM's virtual CPU and
a daemon that serves many are not on one processor; so the client gets one, and whatever answers it another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


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
