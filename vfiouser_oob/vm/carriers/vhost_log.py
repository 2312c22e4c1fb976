"""The log of written pages that QEMU shares with us: a bit for each 4 KiB of guest memory.

It is mapped only if it can never be made shorter, since touching what is gone is SIGBUS, which would end every
function. QEMU's own log is such a file.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from vfiouser_oob.transport.fds import ForeignFd
from vfiouser_oob.transport.reaper import REAPER, Account

#: Bytes of guest memory for each byte of the log.
_COVERED = 8 * 4096
#: Bytes of the largest log: that of a guest of 32 TiB.
LOG_MAX = 1 << 30


class LogRefused(Exception):
    """The log cannot be used; the text says why."""


class VhostLog:
    """A log in use.

    Args:
        fd: the file; it stays the caller's.
        size: bytes of the log.
        offset: where in the file it begins.
        account: whose mapping it is.

    Raises:
        LogRefused: it could become shorter, or is not where it is said to be.
    """

    def __init__(self, fd: ForeignFd, size: int, offset: int, account: Account) -> None:
        self._account = account
        try:
            # Only memory files know of seals; asking never leaves the kernel's own tables.
            seals = fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS)
            if not seals & fcntl.F_SEAL_SHRINK:
                raise LogRefused("the log is in a file that could become shorter")
            if not 0 < size <= LOG_MAX or offset % mmap.ALLOCATIONGRANULARITY:
                raise LogRefused(f"a log of {size} bytes at {offset:#x} cannot be mapped")
            if offset + size > os.fstat(fd.fileno()).st_size:
                raise LogRefused("the log is longer than its file")
            self._map: mmap.mmap | None = mmap.mmap(fd.fileno(), size, offset=offset)
        except OSError as error:
            raise LogRefused(f"the log cannot be mapped: {error.strerror}") from error
        self._size = size

    def mark(self, address: int, length: int) -> None:
        """Tell that guest memory was written; only after it was.

        Eight pages share a byte, and all of them are marked: a plain store needs no care for those who set other bits
        at the same time, and a page that is sent once too often does no harm.

        Args:
            address: guest physical address.
            length: bytes.
        """
        first, last = address // _COVERED, min((address + length - 1) // _COVERED, self._size - 1)
        if self._map is not None and length > 0 and first <= last:
            self._map[first : last + 1] = b"\xff" * (last + 1 - first)

    def close(self) -> None:
        """Give it up; a later mark goes nowhere."""
        mapped, self._map = self._map, None
        if mapped is not None:
            REAPER.dispose(self._account, mapped.close)
