"""Messages that stand between a socket and its process: not answered, or not sent."""

from __future__ import annotations

import errno
import mmap
import os
import socket
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from vfiouser_oob.transport.fds import OwnedFd

_LOOK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)


class HeldMessage:
    """A message that is in its socket still.

    Args:
        size: its bytes there.
        with_fds: whether descriptors are attached to it.
    """

    __slots__ = ("settled", "size", "with_fds")

    def __init__(self, size: int, with_fds: bool) -> None:
        self.size = size
        self.with_fds = with_fds
        #: It needs no answer.
        self.settled = False


class PutOff(NamedTuple):
    """A message that waits for room.

    Args:
        data: what of it is not sent.
        fds: copies of its descriptors.
        answer: whether it is an answer.
    """

    data: memoryview
    fds: Sequence[OwnedFd]
    answer: bool


def begin_of_last(sock: socket.socket, size: int) -> int:
    """Find where the last piece begins that was sent by one call, as the kernel keeps it.

    The kernel copies piece by piece, and what does not fit into our memory as a whole counts as not copied.

    Args:
        sock: a socket of AF_UNIX that is looked at (SO_PEEK_OFF).
        size: bytes that there are up to the end of that piece.

    Returns:
        Bytes before it.

    Raises:
        OSError: the connection broke.
    """
    try:
        return sock.recvmsg_into([bytearray(size - 1), _hole()], 0, _LOOK)[0]
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return 0


@cache
def _hole() -> mmap.mmap:
    """Memory that nobody can write: the kernel stops there (EFAULT); who touches it himself is killed."""
    with OwnedFd(os.memfd_create("vfiouser-hole", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), mmap.PAGESIZE)
        hole = mmap.mmap(fd.fileno(), mmap.PAGESIZE)
        os.ftruncate(fd.fileno(), 0)
    return hole
