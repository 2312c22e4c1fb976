"""Files that clients send with DMA_MAP: one descriptor per file, and reads and writes that never fault.

A client may truncate the file behind a mapping at any time, and touching a truncated mapping is SIGBUS, which would
kill every function of the daemon. So memory is accessed by pread and pwrite on the kept descriptor. hugetlbfs has no
write(2); there the kernel copies from a scratch file into a mapping (`preadv`), which reports EFAULT where a store of
our own would be killed.

What may wait for the client, and so is done by a thread (`worker`): every write, since pwrite takes the inode's lock,
which the client holds for as long as it punches holes; everything about files that are not anonymous memory, since
their file system answers when it likes. Reading memory takes no lock.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_oob.transport.reaper import REAPER, STRANGERS, Account
from vfiouser_protocol.constants import DmaMapFlags
from vfiouser_protocol.errors import CommandError, DmaFault

#: Plain numbers: an IntFlag costs a microsecond per operation, and VMMs map in bursts of thousands.
_READ = int(DmaMapFlags.READ)
_WRITE = int(DmaMapFlags.WRITE)
_O_PATH = getattr(os, "O_PATH", 0o10000000)


@dataclass(slots=True)
class GuestFile:
    """One file of a client, opened once however many ranges lie in it.

    Args:
        key: identity: device, inode and access mode.
        fd: the kept descriptor; it also pins the inode number, so that identity cannot be reused.
        in_memory: whether it is anonymous memory (memfd, tmpfs, hugetlbfs), whose reads do not wait for the client.
        users: how many DMA ranges lie in it.
        accesses: how many accesses a thread has under way; it stays open until they have returned.
        account: whose it is.
    """

    key: tuple[int, int, int]
    fd: OwnedFd
    in_memory: bool
    users: int = 0
    accesses: int = 0
    account: Account = STRANGERS
    _closing: bool = False
    _window: HugeWindow | None = field(default=None, repr=False)

    @property
    def identity(self) -> Hashable:
        """Which file it is, however it was opened."""
        return self.key[:2]

    def read(self, offset: int, count: int) -> bytes:
        """Read bytes of the file.

        Args:
            offset: file offset in bytes.
            count: bytes to read.

        Raises:
            DmaFault: the client truncated the file, or reading it failed.
        """
        try:
            data = os.pread(self.fd.fileno(), count, offset)
        except OSError as error:
            raise DmaFault(f"reading client memory failed: {error.strerror}", error.errno) from error
        if len(data) != count:
            raise DmaFault(f"the client's file ends {count - len(data)} bytes before the end of its mapping")
        return data

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes into the file; it never grows by that.

        Args:
            offset: file offset in bytes.
            data: what to write.

        Raises:
            DmaFault: the client truncated the file, or writing it failed.
        """
        fd = self.fd.fileno()
        try:
            if offset + len(data) > os.fstat(fd).st_size:
                raise DmaFault("the client's file ends before the end of its mapping")
            if self._window is None:
                try:
                    written = os.pwrite(fd, data, offset)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._window = HugeWindow(fd)
            if self._window is not None:
                written = self._window.write(offset, data)
        except OSError as error:
            raise DmaFault(f"writing client memory failed: {error.strerror}", error.errno) from error
        if written != len(data):
            raise DmaFault(f"only {written} of {len(data)} bytes could be written to client memory")

    def landed(self) -> None:
        """An access of a thread has returned."""
        self.accesses -= 1
        if self._closing:
            self.close()

    def close(self) -> None:
        """Close the descriptor and drop the mapping, if there is one, as soon as no thread uses them."""
        self._closing = True
        if self.accesses:
            return
        window, self._window = self._window, None
        if window is not None:
            REAPER.dispose(self.account, window.close)
        self.fd.close()


class HugeWindow:
    """A mapping of a file without write(2), written by the kernel and never by us.

    Args:
        fd: the file; it stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._view = memoryview(self._map)
        self._scratch = OwnedFd(os.memfd_create("vfiouser-scratch"))

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Copy bytes into the mapping.

        Args:
            offset: offset in the file and mapping.
            data: what to write.

        Returns:
            How many bytes were written.

        Raises:
            OSError: EFAULT when the page is gone.
        """
        scratch = self._scratch.fileno()
        os.pwrite(scratch, data, 0)
        with self._view[offset : offset + len(data)] as target:
            return os.preadv(scratch, [target], 0)

    def close(self) -> None:
        """Unmap the file."""
        self._view.release()
        self._map.close()
        self._scratch.close()


class FileFacts(NamedTuple):
    """What can be found out about a descriptor.

    Args:
        status: what fstat says.
        mode: its access mode and flags.
        in_memory: whether it is anonymous memory.
    """

    status: os.stat_result
    mode: int
    in_memory: bool


def examine(fd: OwnedFd, *, in_memory: bool) -> FileFacts:
    """Look at a descriptor; that waits for its file system, unless it is in memory.

    Args:
        fd: the descriptor.
        in_memory: what `is_memory` said.

    Raises:
        CommandError: EACCES when it is unusable.
    """
    number = fd.fileno()
    try:
        return FileFacts(os.fstat(number), fcntl.fcntl(number, fcntl.F_GETFL), in_memory)
    except OSError as error:
        raise CommandError(f"the descriptor of a DMA_MAP is unusable: {error.strerror}", errno.EACCES) from error


def is_memory(fd: OwnedFd) -> bool:
    """Whether a descriptor is of anonymous memory; asking waits for nobody."""
    try:
        fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS)
    except OSError:  # seals exist on memfd, tmpfs and hugetlbfs only
        return False
    return True


class FileTable:
    """The files of one connection, one descriptor each.

    Args:
        account: whose files they are.
    """

    def __init__(self, account: Account = STRANGERS) -> None:
        self._account = account
        self._files: dict[tuple[int, int, int], GuestFile] = {}

    def __len__(self) -> int:
        return len(self._files)

    def adopt(self, fd: OwnedFd, facts: FileFacts, *, flags: int, offset: int, size: int, check: bool) -> GuestFile:
        """Take the descriptor of a DMA_MAP, unless there is one of the same file already.

        The file is returned with one user more; `release` gives that up.

        Args:
            fd: the descriptor; empty afterwards if it was taken.
            facts: what `examine` found.
            flags: DmaMapFlags of the range.
            offset: start of the range in the file, in bytes.
            size: bytes of the range.
            check: whether this process itself will access the file, so that it must be able to.

        Raises:
            CommandError: EACCES when the file does not allow the access, EINVAL when the range lies beyond its end.
        """
        status, mode, in_memory = facts
        if check:
            _check_usable(status, mode, flags, offset, size)
        key = (status.st_dev, status.st_ino, mode & os.O_ACCMODE)
        known = self._files.get(key)
        if known is None:
            known = self._files[key] = GuestFile(key, fd.take(), in_memory, account=self._account)
        if in_memory and not fd.closed:
            # Not the last reference to memory: there is nothing to give back, so nothing to wait for.
            fd.close_at_once()
        known.users += 1
        return known

    def release(self, file: GuestFile) -> None:
        """Give up one use of a file; the last one closes it."""
        file.users -= 1
        if not file.users:
            del self._files[file.key]
            file.close()

    def close(self) -> None:
        """Close every file."""
        files, self._files = list(self._files.values()), {}
        for file in files:
            file.close()


def _check_usable(status: os.stat_result, mode: int, flags: int, offset: int, size: int) -> None:
    access = mode & os.O_ACCMODE
    if not stat.S_ISREG(status.st_mode) or mode & _O_PATH:
        raise CommandError("DMA_MAP came with a descriptor that is neither memory nor a regular file", errno.EACCES)
    if flags & _READ and access == os.O_WRONLY:
        raise CommandError("DMA_MAP wants READ on a descriptor opened write-only", errno.EACCES)
    if flags & _WRITE and (access == os.O_RDONLY or mode & os.O_APPEND):
        raise CommandError("DMA_MAP wants WRITE on a descriptor opened read-only or append-only", errno.EACCES)
    if offset + size > status.st_size:
        raise CommandError(
            f"DMA_MAP wants bytes {offset:#x}+{size:#x} of a file of {status.st_size:#x} bytes", errno.EINVAL
        )
