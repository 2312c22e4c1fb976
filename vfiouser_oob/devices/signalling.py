"""Writing and reading eventfds of others, without ever waiting and without touching their flags.

Whether a write to an eventfd waits is decided by its O_NONBLOCK, which everybody who holds it shares: setting it would
make the owner's own blocking reads fail, and relying on it would let the owner stop us. To poll before writing proves
nothing, since the counter may be filled in between. So the kernel is made to signal it as it does itself for a device:
an asynchronous read of no bytes from a file of ours completes at once and notifies the eventfd (IOCB_FLAG_RESFD), by
a call that cannot wait; a counter that is full stays full. Where asynchronous I/O is not permitted, a thread writes.

Reading has a flag for a single call, RWF_NOWAIT.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import errno
import os
import platform
import struct
from collections import deque
from typing import Protocol

from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_oob.transport.reaper import Account

#: io_setup, io_destroy, io_getevents, io_submit.
_SYSCALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2), "riscv64": (0, 1, 4, 2)}
#: data, key, rw_flags, opcode, priority, fildes, buffer, bytes, offset, reserved, flags, resfd: struct iocb.
_IOCB = struct.Struct("<QIIHhIQQqQII")
_EVENT_SIZE = 32
_PREAD = 0
_RESFD = 1
#: Completions that the kernel keeps until they are collected, and after how many they are.
_RING = 128
_COLLECT = 64
_COUNTER = 8
#: Interrupts that wait for a thread; beyond that they are lost, as in a counter that is full.
_MAX_WAITING = 4096
#: Threads that may be held up, per function.
_MAX_THREADS = 4


class Signaller(Protocol):
    """Adds 1 to eventfds."""

    def signal(self, fd: OwnedFd) -> None:
        """Add 1 to the counter; never waits, and a counter that is full stays so."""
        ...

    def forget(self) -> None:
        """The eventfds so far are used no more."""
        ...


class KernelSignaller:
    """Lets the kernel signal, by asynchronous I/O that is complete at once.

    Raises:
        OSError: it is not permitted, or not known for this machine.
    """

    def __init__(self) -> None:
        try:
            self._setup, self._destroy, self._getevents, self._submit = _SYSCALLS[platform.machine()]
        except KeyError:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
        # None of these calls waits, so there is no need to let other threads run meanwhile.
        self._syscall = ctypes.PyDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        self._context = ctypes.c_ulong(0)
        if self._syscall(self._setup, _RING, ctypes.byref(self._context)) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._file = OwnedFd(os.memfd_create("vfiouser-signal", os.MFD_CLOEXEC))
        self._iocb = ctypes.create_string_buffer(_IOCB.size)
        self._iocbs = (ctypes.c_void_p * 1)(ctypes.addressof(self._iocb))
        self._byte = ctypes.create_string_buffer(1)
        self._events = ctypes.create_string_buffer(_EVENT_SIZE * _RING)
        self._uncollected = 0

    def signal(self, fd: OwnedFd) -> None:
        """Read nothing, and let the completion go to the eventfd."""
        buffer = ctypes.addressof(self._byte)
        request = (0, 0, 0, _PREAD, 0, self._file.fileno(), buffer, 0, 0, 0, _RESFD, fd.fileno())
        _IOCB.pack_into(self._iocb, 0, *request)
        if self._uncollected >= _COLLECT:
            self._collect()
        self._uncollected += 1
        if self._syscall(self._submit, self._context, ctypes.c_long(1), self._iocbs) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _collect(self) -> None:
        least, most = ctypes.c_long(0), ctypes.c_long(_RING)
        self._syscall(self._getevents, self._context, least, most, self._events, None)
        self._uncollected = 0

    def forget(self) -> None:
        """Nothing is kept of them."""

    def close(self) -> None:
        """Give the context back."""
        self._syscall(self._destroy, self._context)
        self._file.close()


class ThreadSignaller:
    """Lets a thread write, which may be held up for as long as the eventfd's owner likes.

    Args:
        account: whose threads count together.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._lock = _thread.allocate_lock()
        self._waiting: deque[OwnedFd] | None = None

    def signal(self, fd: OwnedFd) -> None:
        """Let the thread write to a copy, whose number is its own."""
        with self._lock:
            if self._waiting is not None:
                if len(self._waiting) < _MAX_WAITING:
                    self._waiting.append(fd.duplicate())
            elif self._account.threads < _MAX_THREADS:
                self._account.threads += 1
                self._waiting = deque()
                _thread.start_new_thread(self._run, (fd.duplicate(), self._waiting))

    def _run(self, fd: OwnedFd, waiting: deque[OwnedFd]) -> None:
        while True:
            try:
                os.eventfd_write(fd.fileno(), 1)
            except OSError:  # full, and its owner does not want to wait either
                pass
            fd.close()
            with self._lock:
                if not waiting:
                    self._account.threads -= 1
                    if self._waiting is waiting:
                        self._waiting = None
                    return
                fd = waiting.popleft()

    def forget(self) -> None:
        """Leave a thread that is held up to itself, and begin anew with another."""
        with self._lock:
            lost, self._waiting = self._waiting, None
            dropped = list(lost or ())
            if lost is not None:
                lost.clear()
        for fd in dropped:
            fd.close()


def make_signaller(account: Account) -> Signaller:
    """Return the best way that this machine permits.

    Args:
        account: whose threads count, where threads are needed.
    """
    global _kernel
    if _kernel is None:
        try:
            _kernel = KernelSignaller()
        except OSError:
            return ThreadSignaller(account)
        atexit.register(_kernel.close)
    return _kernel


_kernel: KernelSignaller | None = None


def read_counter(fd: OwnedFd) -> int:
    """Read and clear an eventfd's counter; never waits.

    Raises:
        BlockingIOError: it is 0.
        OSError: this kernel cannot promise not to wait.
    """
    counter = bytearray(_COUNTER)
    os.preadv(fd.fileno(), [counter], -1, os.RWF_NOWAIT)
    return int.from_bytes(counter, "little")
