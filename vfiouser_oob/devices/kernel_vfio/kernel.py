"""The system calls of this backend behind one small interface, so that tests can put another kernel in its place."""

from __future__ import annotations

import abc
import ctypes
import fcntl
import os
from pathlib import Path

from vfiouser_oob.transport.fds import OwnedFd


class Kernel(abc.ABC):
    """What the backend asks of the operating system; every method raises OSError as the system call does.

    Args:
        sysfs: where sysfs is mounted.
        dev: where the device nodes are.
    """

    def __init__(self, sysfs: Path, dev: Path) -> None:
        self.sysfs = sysfs
        self.dev = dev

    @abc.abstractmethod
    def open(self, path: Path) -> int:
        """Open a device node for reading and writing, close-on-exec."""

    @abc.abstractmethod
    def may_open(self, path: Path) -> bool:
        """Whether this process can open a node; nothing comes of trying."""

    @abc.abstractmethod
    def close(self, fd: int) -> None:
        """Close a descriptor that `open` or an ioctl gave."""

    def adopt(self, fd: OwnedFd) -> int:
        """Take over a descriptor that another process has opened."""
        return fd.detach()

    @abc.abstractmethod
    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """Call ioctl; a bytearray is the structure, which the kernel may change."""

    @abc.abstractmethod
    def pread(self, fd: int, count: int, offset: int) -> bytes:
        """Read from a device's region."""

    @abc.abstractmethod
    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write into a device's region."""

    @abc.abstractmethod
    def read(self, fd: int, count: int) -> bytes:
        """Read from a migration's data descriptor."""

    @abc.abstractmethod
    def write(self, fd: int, data: bytes) -> int:
        """Write to a migration's data descriptor."""

    @abc.abstractmethod
    def mmap(self, fd: int, size: int, offset: int, *, writable: bool) -> int:
        """Map a file, shared; returns the address. Nobody may touch the memory: the file may be truncated."""

    @abc.abstractmethod
    def munmap(self, address: int, size: int) -> None:
        """Drop a mapping."""


class KernelFd:
    """A descriptor that an ioctl gave, and the duty to close it.

    Args:
        kernel: the operating system that it is of.
        fd: descriptor number; owned from now on.
    """

    def __init__(self, kernel: Kernel, fd: int) -> None:
        self._kernel = kernel
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor's number.

        Raises:
            ValueError: it was closed.
        """
        if self._fd < 0:
            raise ValueError("the descriptor was closed")
        return self._fd

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._kernel.close(fd)


class LinuxKernel(Kernel):
    """The kernel that this process runs on.

    `mmap.mmap` will not do: it duplicates the descriptor, which keeps a device open, and tells no address.
    """

    _PROT_READ = 1
    _PROT_WRITE = 2
    _MAP_SHARED = 1

    def __init__(self, sysfs: Path = Path("/sys"), dev: Path = Path("/dev")) -> None:
        super().__init__(sysfs, dev)
        libc = ctypes.CDLL(None, use_errno=True)
        self._mmap = libc.mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        ]
        self._munmap = libc.munmap
        self._munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def open(self, path: Path) -> int:
        """Open a device node."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def may_open(self, path: Path) -> bool:
        """Try: permissions alone do not tell, a service manager may keep devices away by other means."""
        try:
            os.close(self.open(path))
        except OSError:
            return False
        return True

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """Call ioctl; the interpreter's lock is released meanwhile."""
        if isinstance(argument, int):
            return fcntl.ioctl(fd, request, argument)
        result: int = fcntl.ioctl(fd, request, argument, True)
        return result

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        """Read from a region."""
        return os.pread(fd, count, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write into a region."""
        return os.pwrite(fd, data, offset)

    def read(self, fd: int, count: int) -> bytes:
        """Read state."""
        return os.read(fd, count)

    def write(self, fd: int, data: bytes) -> int:
        """Write state."""
        return os.write(fd, data)

    def mmap(self, fd: int, size: int, offset: int, *, writable: bool) -> int:
        """Map a file."""
        protection = self._PROT_READ | (self._PROT_WRITE if writable else 0)
        address = self._mmap(None, size, protection, self._MAP_SHARED, fd, offset)
        if address is None or address == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return int(address)

    def munmap(self, address: int, size: int) -> None:
        """Drop a mapping."""
        if self._munmap(address, size):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
