"""Shared memory that a device model exposes as a mappable region."""

from __future__ import annotations

import fcntl
import mmap
import os

from vfiouser_oob.transport.fds import OwnedFd


class SharedMemory:
    """A memfd of fixed size, mapped here and by whoever receives the descriptor.

    It is sealed against shrinking and growing, so a client that holds the descriptor cannot make our accesses fault.

    Args:
        name: shown in /proc/PID/maps of every process that maps it.
        size: bytes; rounded up to whole pages.
        fd: another process's memory of that size, to go on with; taken. None: new memory.

    Raises:
        OSError: there is no memory.
        ValueError: the other process's is smaller.
    """

    def __init__(self, name: str, size: int, fd: OwnedFd | None = None) -> None:
        self.name = name
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._fd, self._map = _make(name, self.size) if fd is None else _mapped(fd, self.size)
        #: The bytes; a view that the model reads and writes. After `renew` it is another one.
        self.view = memoryview(self._map)

    def renew(self) -> None:
        """Become other memory, all zeros: whoever has mapped the old one reaches nothing of ours any more.

        Views taken before reach the old memory, too, and keep it until they are gone.

        Raises:
            OSError: there is none to be had; everything is as before.
        """
        fd, mapped = _make(self.name, self.size)
        old, self._fd, self._map = self._fd, fd, mapped
        self.view = memoryview(mapped)
        old.close()

    def adopt(self, fd: OwnedFd) -> None:
        """Become another process's memory, whose clients may have mapped it; views taken before reach the old one.

        Args:
            fd: that memory; taken.

        Raises:
            OSError: it cannot be mapped; everything is as before.
            ValueError: it is smaller; likewise.
        """
        found, mapped = _mapped(fd, self.size)
        old, self._fd, self._map = self._fd, found, mapped
        self.view = memoryview(mapped)
        old.close()

    def fileno(self) -> int:
        """Return the descriptor to hand to clients; it stays this object's."""
        return self._fd.fileno()

    def clear(self, offset: int = 0, count: int | None = None) -> None:
        """Fill with zeros, releasing the pages.

        Args:
            offset: where to begin, in bytes; a whole number of pages.
            count: bytes, likewise; None for all behind that.
        """
        self._map.madvise(mmap.MADV_REMOVE, offset, self.size - offset if count is None else count)

    def close(self) -> None:
        """Unmap and close."""
        self.view.release()
        self._map.close()
        self._fd.close()


def _mapped(fd: OwnedFd, size: int) -> tuple[OwnedFd, mmap.mmap]:
    mapped = mmap.mmap(fd.fileno(), size)
    return fd.take(), mapped


def _make(name: str, size: int) -> tuple[OwnedFd, mmap.mmap]:
    fd = OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(fd.fileno(), size)
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return fd, mmap.mmap(fd.fileno(), size)
    except (OSError, ValueError, OverflowError):
        fd.close()
        raise
