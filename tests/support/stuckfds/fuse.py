"""A FUSE server of one file, by the raw protocol of /dev/fuse, that answers some requests only when it is told to."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import struct
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

_IN = struct.Struct("=IIQQIIIHH")
_OUT = struct.Struct("=IiQ")
_INIT_OUT = struct.Struct("=IIIIHHIIHHII")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_OPCODES = {
    1: "LOOKUP",
    2: "FORGET",
    3: "GETATTR",
    4: "SETATTR",
    14: "OPEN",
    15: "READ",
    16: "WRITE",
    18: "RELEASE",
    25: "FLUSH",
    26: "INIT",
    36: "INTERRUPT",
    38: "DESTROY",
    42: "BATCH_FORGET",
}
_SILENT = {"FORGET", "INTERRUPT", "BATCH_FORGET"}
_SIZE = 1 << 20
_MNT_DETACH = 2


class FuseMount:
    """A file system with one file, which is mounted only for the moment of opening its root.

    So nobody who walks through the file system of this machine meets it, and waits.

    Args:
        directory: where to mount it; created.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        libc = ctypes.CDLL(None, use_errno=True)
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other"
        if libc.mount(b"stuck", os.fsencode(directory), b"fuse", 0, options.encode()):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._root = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        libc.umount2(os.fsencode(directory), _MNT_DETACH)
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._waiting: list[Callable[[], None]] = []
        #: Set whenever a request is held back.
        self.caught = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        # What still waits in the kernel ends with its server.
        for fd in (self._device, self._stop, self._root):
            os.close(fd)

    def open(self) -> int:
        """Open the file for reading and writing."""
        return os.open("file", os.O_RDWR | os.O_CLOEXEC, dir_fd=self._root)

    def hold(self, *names: str) -> None:
        """Answer no requests of these kinds until `let_go`."""
        with self._lock:
            self._held.update(names)
            self.caught.clear()

    def let_go(self) -> None:
        """Answer everything that was held back, and what is to come."""
        with self._lock:
            self._held.clear()
            waiting, self._waiting = self._waiting, []
        for answer in waiting:
            answer()

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._device, self._stop], [], [])
            if self._stop in ready:
                return
            try:
                request = os.read(self._device, 1 << 17)
            except (BlockingIOError, FileNotFoundError):  # whoever asked has given up
                continue
            _, opcode, unique, node, *_ = _IN.unpack_from(request)
            name = _OPCODES.get(opcode, "")
            if name in _SILENT:
                continue
            with self._lock:
                if name in self._held:
                    self._waiting.append(partial(self._answer, request, unique, name, node))
                    self.caught.set()
                    continue
            self._answer(request, unique, name, node)

    def _answer(self, request: bytes, unique: int, name: str, node: int) -> None:
        error, body = 0, b""
        if name == "INIT":
            body = _INIT_OUT.pack(7, 31, 1 << 17, 0, 16, 12, 1 << 16, 1, 0, 0, 0, 0) + bytes(24)
        elif name == "LOOKUP":
            if request[_IN.size :].rstrip(b"\0") == b"file":
                body = struct.pack("=QQQQII", 2, 0, 3600, 0, 0, 0) + _attributes(2)
            else:
                error = -errno.ENOENT
        elif name in ("GETATTR", "SETATTR"):
            body = struct.pack("=QII", 0, 0, 0) + _attributes(node)
        elif name == "OPEN":
            body = struct.pack("=QIi", 1, 1, 0)  # FOPEN_DIRECT_IO: each access is a request
        elif name == "READ":
            body = bytes(struct.unpack_from("=QQI", request, _IN.size)[2])
        elif name == "WRITE":
            body = struct.pack("=II", struct.unpack_from("=QQI", request, _IN.size)[2], 0)
        elif name not in ("RELEASE", "FLUSH", "DESTROY"):
            error = -errno.ENOSYS
        try:
            os.write(self._device, _OUT.pack(_OUT.size + len(body), error, unique) + body)
        except OSError:  # whoever asked has given up
            pass


def _attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == 1 else stat.S_IFREG | 0o644
    return _ATTR.pack(node, _SIZE, _SIZE // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
