"""A writer of newc cpio archives, the format of an initramfs.

Written by hand because it must make device nodes and root-owned files without being root.

Spec: Linux, Documentation/driver-api/early-userspace/buffer-format.rst (c_magic "070701").
"""

from __future__ import annotations

import stat
from pathlib import PurePosixPath
from typing import BinaryIO

__all__ = ["CpioWriter"]

_MAGIC = "070701"
_TRAILER = "TRAILER!!!"


class CpioWriter:
    """Writes entries in order; parent folders are made as needed. Call `close` at the end."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0
        self._folders: set[PurePosixPath] = set()

    def folder(self, name: str) -> None:
        """Add a folder, and the folders above it."""
        path = PurePosixPath(name)
        for each in (*reversed(path.parents), path):
            if each != PurePosixPath(".") and each not in self._folders:
                self._folders.add(each)
                self._entry(str(each), stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file, owned by root."""
        self._parent(name)
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._parent(name)
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node."""
        self._parent(name)
        self._entry(name, stat.S_IFCHR | mode, device=(major, minor))

    def close(self) -> None:
        """Write the trailer; the underlying file stays open."""
        self._entry(_TRAILER, 0)

    def _parent(self, name: str) -> None:
        self.folder(str(PurePosixPath(name).parent))

    def _entry(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        owner, links, mtime, own_device, checksum = (0, 0), 1, 0, (0, 0), 0
        fields = (
            self._inode,
            mode,
            *owner,
            links,
            mtime,
            len(data),
            *own_device,
            *device,
            len(encoded),
            checksum,
        )
        head = (_MAGIC + "".join(f"{value:08x}" for value in fields)).encode() + encoded
        self._out.write(_padded(head) + _padded(data))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
