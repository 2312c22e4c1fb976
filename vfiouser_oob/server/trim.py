"""Giving memory back that a client made us use.

The C library keeps what is freed for later, and one piece that is still in use keeps everything below it. After a
client that made us hold a hundred megabytes that would be for good. Asking for it back takes a moment, so it is done by
a thread, and only where there is something to be had.
"""

from __future__ import annotations

import ctypes
import os
import threading

#: Growth in bytes that is worth asking for.
WORTH = 16 << 20
#: Seven numbers.
_STATM_SIZE = 256
_PAGE = os.sysconf("SC_PAGE_SIZE")
# Other C libraries than glibc have no such call, and some give memory back by themselves.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def resident() -> int:
    """Return how much memory this process has, in bytes; 0 if that cannot be told, as without a free descriptor."""
    try:
        # Without a buffer, whose making costs more than the reading: each client waits for this.
        with open("/proc/self/statm", "rb", buffering=0) as statm:
            return int(statm.read(_STATM_SIZE).split()[1]) * _PAGE
    except OSError:
        return 0


def give_back(since: int) -> threading.Thread | None:
    """Give freed memory back to the system, if the process has grown.

    Args:
        since: bytes of memory that it had before; 0 if that is not known.

    Returns:
        The thread that does it; None if it is not worth it.
    """
    if _trim is None or not since or resident() - since < WORTH:
        return None
    thread = threading.Thread(target=_trim, args=(0,), name="trim", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system has no thread to spare; then the memory stays for the next client
        return None
    return thread
