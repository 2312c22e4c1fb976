"""Room for descriptors, made before anybody is served.

Every client brings descriptors. Two properties of the kernel matter to the others:

Rule 1: the soft limit is a default for programs that use select(), so we raise it to the hard one.
Rule 2: the kernel doubles a process's table of descriptors whenever it is full. If the process has threads, whoever
        brought the one descriptor too many waits for an RCU grace period: 5 to 20 ms, once for each doubling, in the
        middle of `recvmsg`. A single message with 253 descriptors doubles a small table twice, and the event loop with
        all its clients waits. A table never shrinks. So it gets its size once, at the start.
"""

from __future__ import annotations

import fcntl
import os
import resource
from contextlib import suppress

from vfiouser_oob.transport.fds import OwnedFd

#: Descriptors that the table shall hold from the start; half a megabyte of the kernel's memory. The units that we ship
#: allow as many (LimitNOFILE=).
ROOM = 65536


def make_room_for_fds() -> None:
    """Allow this process as many descriptors as it may have, and have the kernel make room for `ROOM` of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    room = ROOM if hard == resource.RLIM_INFINITY else min(hard, ROOM)
    # The table is as large as the highest number that was ever in use asks for; if that fails, it grows when it has to.
    with suppress(OSError), OwnedFd(os.eventfd(0)) as probe:
        OwnedFd(fcntl.fcntl(probe.fileno(), fcntl.F_DUPFD_CLOEXEC, room - 1)).close()
