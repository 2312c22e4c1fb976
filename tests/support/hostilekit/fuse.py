"""A FUSE file system of one file, whose server answers until it is told to be silent.

It is mounted in a mount namespace of this process's own, so nothing is left behind whatever becomes of the process. It
speaks the kernel's protocol itself, so no library is needed. The server is a process of its own, because one that has
both the device and files of it open could never end: it would wait for its own answers while it closes them.

Spec: linux/fuse.h.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
from pathlib import Path

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_LOOKUP, _FORGET, _GETATTR, _OPEN, _INIT = 1, 2, 3, 14, 26
_OPENDIR, _BATCH_FORGET = 27, 42
_NO_ANSWER = (_FORGET, _BATCH_FORGET)
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 1 << 18
SIZE = 1 << 20


def _libc_call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


class Fuse:
    """The mounted file system; to be ended before this process ends.

    Args:
        place: an empty directory.
    """

    def __init__(self, place: Path) -> None:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        _libc_call("unshare", _CLONE_NEWNS)
        _libc_call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
        _libc_call("mount", b"hostile", os.fsencode(place), b"fuse", 0, options.encode())
        self.file = place / "file"
        self._silence = mmap.mmap(-1, 1)
        self._server = os.fork()
        if self._server == 0:
            try:
                self._serve(device)
            finally:
                os._exit(0)
        os.close(device)

    def be_silent(self) -> None:
        """Answer nothing from now on."""
        self._silence[0] = 1

    def end(self) -> None:
        """Kill the server, which ends every wait for its answers."""
        os.kill(self._server, signal.SIGKILL)
        os.waitpid(self._server, 0)

    def open(self) -> int:
        """Open the file; the caller closes it, while the server still answers."""
        return os.open(self.file, os.O_RDWR | os.O_CLOEXEC)

    def _serve(self, device: int) -> None:
        while True:
            request = os.read(device, 1 << 18)
            _, code, unique, node, *_ = _IN.unpack_from(request)
            if code in _NO_ANSWER or self._silence[0]:
                continue
            body = self._answer(code, node)
            os.write(device, _OUT.pack(_OUT.size + len(body), 0, unique) + body)

    def _answer(self, code: int, node: int) -> bytes:
        if code == _INIT:
            return struct.pack("<IIIIHHIIHHI7I", 7, 31, 0, 0, 16, 12, 1 << 17, 1, 32, 0, 0, *[0] * 7)
        if code == _LOOKUP:
            return struct.pack("<4Q2I", 2, 1, 0, 0, 0, 0) + self._attributes(2)
        if code == _GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self._attributes(node)
        if code in (_OPEN, _OPENDIR):
            return struct.pack("<QII", 1, 0, 0)
        return b""

    def _attributes(self, node: int) -> bytes:
        mode = 0o40755 if node == 1 else 0o100666
        return _ATTR.pack(node, SIZE, SIZE >> 9, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
