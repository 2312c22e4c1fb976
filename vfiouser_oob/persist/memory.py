"""Reading memory that another process left behind."""

from __future__ import annotations

import os
import stat

from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.transport.fds import HasFileno


def read_memory(fd: HasFileno, limit: int) -> bytes:
    """Read what another process left in a file in memory; nothing is assumed of it.

    Args:
        fd: the file; it stays the caller's.
        limit: bytes that it may have.

    Raises:
        UnusableRecord: it is something else, or larger.
        OSError: it cannot be read.
    """
    status = os.fstat(fd.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        raise UnusableRecord(f"it is not a file of at most {limit} bytes")
    image = bytearray()
    while len(image) < status.st_size:
        piece = os.pread(fd.fileno(), status.st_size - len(image), len(image))
        if not piece:  # it was cut short meanwhile
            break
        image += piece
    return bytes(image)
