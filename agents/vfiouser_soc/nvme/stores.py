"""Where the blocks of a namespace are kept: anonymous memory or a file.

Ordinary file I/O can block for as long as the medium likes, so it runs in threads; memory never waits.
"""

from __future__ import annotations

import abc
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import uuid
from pathlib import Path

import trio

from vfiouser_oob.devices.memfd import SharedMemory

#: Concurrent file accesses per store; the device's own queues are deeper, the medium's are not much.
_FILE_THREADS = 16
_ZERO_CHUNK = 1 << 20
_FALLOC_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01


class StoreError(Exception):
    """A backing store cannot be used; the message says which and why."""


class BackingStore(abc.ABC):
    """Bytes that outlive a controller reset. Offsets and counts are bytes and inside the store."""

    #: Bytes.
    size: int
    #: One line for logs.
    summary: str
    #: Equal for two stores only if they hold the same bytes, as far as can be told.
    identity: str
    #: Bytes that are read, and made to read as zeros, in one turn: neither a Verify of 65 536 blocks nor a deallocation
    #: of a whole namespace may hold up others, or hold much memory.
    read_piece = 1 << 20
    discard_piece = 1 << 30

    @abc.abstractmethod
    async def read(self, offset: int, count: int) -> bytes:
        """Read bytes."""

    @abc.abstractmethod
    async def write(self, offset: int, data: bytes) -> None:
        """Write bytes; they may stay in a volatile cache until `flush`."""

    @abc.abstractmethod
    async def discard(self, offset: int, count: int) -> None:
        """Make bytes read as zeros, giving back their space."""

    @abc.abstractmethod
    async def flush(self) -> None:
        """Return once everything written before is durable."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give the store's resources back."""


class MemoryStore(BackingStore):
    """Anonymous memory, taken from the system page by page as it is written.

    Args:
        size: bytes.
    """

    # It is accessed on the event loop, which has nothing else to do meanwhile.
    read_piece = 256 << 10
    discard_piece = 8 << 20

    def __init__(self, size: int) -> None:
        self.size = size
        self.summary = f"{size >> 20} MiB of memory"
        self.identity = f"memory {uuid.uuid4()}"
        try:
            #: The blocks; the process after this one may go on with them.
            self.memory = SharedMemory("nvme-namespace", size)
        except (OSError, ValueError, OverflowError) as error:
            raise StoreError(f"{size} bytes of memory for a namespace cannot be reserved: {error}") from error

    async def read(self, offset: int, count: int) -> bytes:
        """Read bytes."""
        return bytes(self.memory.view[offset : offset + count])

    async def write(self, offset: int, data: bytes) -> None:
        """Write bytes."""
        self.memory.view[offset : offset + len(data)] = data

    async def discard(self, offset: int, count: int) -> None:
        """Zero bytes; whole pages go back to the system."""
        end = offset + count
        first_page = min(-(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, end)
        last_page = max(end // mmap.PAGESIZE * mmap.PAGESIZE, first_page)
        self.memory.view[offset:first_page] = bytes(first_page - offset)
        self.memory.view[last_page:end] = bytes(end - last_page)
        if last_page > first_page:
            self.memory.clear(first_page, last_page - first_page)

    async def flush(self) -> None:
        """Nothing is more durable than what was written already."""

    def close(self) -> None:
        """Give the memory back."""
        self.memory.close()


class FileStore(BackingStore):
    """A file or block device.

    Writes are handed to the kernel before they are reported as done, so another process on the same host that shares
    the image sees them at once.

    Args:
        path: the image.
        size: bytes to create a missing image with; None to use an existing one as it is.
        shared: other simulators may have it open too, if they all say so; nobody else may.

    Raises:
        StoreError: it is missing, of another size, in use or not accessible.
    """

    def __init__(self, path: Path, size: int | None = None, *, shared: bool = False) -> None:
        self._limiter = trio.CapacityLimiter(_FILE_THREADS)
        self._fd = _open_image(path, size, shared=shared)
        try:
            self.size = _image_size(self._fd, path, size)
        except BaseException:
            os.close(self._fd)
            raise
        self.summary = f"{path} ({self.size >> 20} MiB{', shared' if shared else ''})"
        # Another host may know it by another name, so this is left to whoever configures both.
        self.identity = "image"

    async def read(self, offset: int, count: int) -> bytes:
        """Read bytes; a read that is given up may finish unseen."""
        return await trio.to_thread.run_sync(self._pread, offset, count, limiter=self._limiter, abandon_on_cancel=True)

    # Writes are never abandoned: after a reset, a late one would overwrite what the next guest wrote.

    async def write(self, offset: int, data: bytes) -> None:
        """Write bytes into the page cache or the medium."""
        await trio.to_thread.run_sync(self._pwrite, offset, data, limiter=self._limiter)

    async def discard(self, offset: int, count: int) -> None:
        """Punch a hole, or write zeros where the file system knows no holes."""
        await trio.to_thread.run_sync(self._punch, offset, count, limiter=self._limiter)

    async def flush(self) -> None:
        """Wait for the medium."""
        await trio.to_thread.run_sync(os.fdatasync, self._fd, limiter=self._limiter)

    def close(self) -> None:
        """Close the image, which also unlocks it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _pread(self, offset: int, count: int) -> bytes:
        data = os.pread(self._fd, count, offset)
        while len(data) < count:
            more = os.pread(self._fd, count - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, "the image became shorter than the namespace")
            data += more
        return data

    def _pwrite(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    def _punch(self, offset: int, count: int) -> None:
        if _fallocate(self._fd, _FALLOC_PUNCH_HOLE_KEEP_SIZE, offset, count):
            return
        zeros = bytes(_ZERO_CHUNK)
        while count:
            chunk = min(count, _ZERO_CHUNK)
            self._pwrite(offset, memoryview(zeros)[:chunk])
            offset, count = offset + chunk, count - chunk


def _open_image(path: Path, size: int | None, *, shared: bool) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if size is not None else 0)
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        hint = "; give a size to create it" if error.errno == errno.ENOENT and size is None else ""
        raise StoreError(f"image {path} cannot be opened: {error.strerror}{hint}") from error
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        hint = ", which does not share it" if shared else "; to share it, set this on both sides"
        raise StoreError(f"image {path} is in use by another process{hint}") from error
    return fd


def _image_size(fd: int, path: Path, wanted: int | None) -> int:
    """Find the size of an image, making a new and empty one as large as wanted."""
    kind = os.fstat(fd).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        raise StoreError(f"image {path} is neither a regular file nor a block device")
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0 and wanted:
        try:
            os.ftruncate(fd, wanted)
        except OSError as error:
            raise StoreError(f"image {path} cannot be made {wanted} bytes large: {error.strerror}") from error
        return wanted
    if size == 0:
        raise StoreError(f"image {path} is empty; give a size to fill it with zeros")
    if wanted is not None and wanted != size:
        raise StoreError(f"image {path} has {size} bytes, but {wanted} were asked for; it is left alone")
    return size


def _fallocate(fd: int, mode: int, offset: int, count: int) -> bool:
    """Call fallocate(2), which Python does not offer; False where the file system has no such operation."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(count)) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(error, os.strerror(error))
