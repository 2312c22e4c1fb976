"""Ends connections of another process, as a fault would: neither side has closed them.

Spec: Linux, sock_diag(7), pidfd_getfd(2).
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from vmbed.errors import BedError

__all__ = ["may_sever", "sever"]

#: The system call's number, the same on every architecture; Python has no name for it.
_PIDFD_GETFD = 438
_SOCK_DIAG, _BY_FAMILY, _REQUEST_DUMP, _DONE = 4, 20, 0x301, 3
_SHOW_FILE, _SHOW_PEER = 2, 4
_HEAD, _MESSAGE, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBBBIII"), struct.Struct("=HH")
_FILE, _PEER = 1, 2


def may_sever() -> bool:
    """Whether this machine lets one process have another one's descriptors; a container may not."""
    own = os.pidfd_open(os.getpid())
    try:
        copied = _copied(own, own)
    finally:
        os.close(own)
    if copied >= 0:
        os.close(copied)
    return copied >= 0


def sever(pid: int, path: Path) -> None:
    """End all connections that a process has with a UNIX socket.

    Args:
        pid: of a process that this one has started, on either side.
        path: the socket's, whatever name it was bound by.

    Raises:
        BedError: it has none.
    """
    inodes = set(_connected(path.stat().st_ino))
    process = os.pidfd_open(pid)
    try:
        found = [shut for number in os.listdir(f"/proc/{pid}/fd") if (shut := _shut(process, int(number), inodes))]
    finally:
        os.close(process)
    if not found:
        raise BedError(f"process {pid} has no connection with {path}")


def _connected(file: int) -> Iterator[int]:
    """The numbers of sockets on both sides of connections with whoever listens at a file."""
    for number, file_seen, peer in _sockets():
        if file_seen == file and peer:
            yield from (number, peer)


def _sockets() -> Iterator[tuple[int, int, int]]:
    """All UNIX sockets: each one's number, that of its file, and that of its peer; 0 for none."""
    request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW_FILE | _SHOW_PEER, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
        kernel.send(_HEAD.pack(_HEAD.size + len(request), _BY_FAMILY, _REQUEST_DUMP, 1, 0) + request)
        while True:
            data = kernel.recv(1 << 20)
            while data:
                size, kind, *_ = _HEAD.unpack_from(data)
                if kind == _DONE:
                    return
                if kind != _BY_FAMILY:
                    raise BedError(f"the kernel does not tell of its UNIX sockets (message {kind})")
                number = _MESSAGE.unpack_from(data, _HEAD.size)[4]
                found = dict(_attributes(data[_HEAD.size + _MESSAGE.size : size]))
                yield number, found.get(_FILE, 0), found.get(_PEER, 0)
                data = data[size + 3 & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, int]]:
    while data:
        size, kind = _ATTRIBUTE.unpack_from(data)
        if kind in (_FILE, _PEER):
            yield kind, struct.unpack_from("=I", data, _ATTRIBUTE.size)[0]
        data = data[size + 3 & ~3 :]


def _shut(process: int, number: int, inodes: set[int]) -> bool:
    copied = _copied(process, number)
    if copied < 0:  # closed meanwhile
        return False
    try:
        if os.fstat(copied).st_ino not in inodes:
            return False
        with socket.socket(fileno=os.dup(copied)) as connection:
            connection.shutdown(socket.SHUT_RDWR)
        return True
    except OSError:  # no socket, or it has ended
        return False
    finally:
        os.close(copied)


def _copied(process: int, number: int) -> int:
    return int(ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, number, 0))
