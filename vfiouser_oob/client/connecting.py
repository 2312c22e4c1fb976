"""Getting a connection to a server: its options, and the socket."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import TypedDict

import trio

from vfiouser_oob.client.dma import DmaServer
from vfiouser_oob.client.keeping import ConnectionKeeping
from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.reaper import Account
from vfiouser_protocol.limits import Limits


class ClientOptions(TypedDict, total=False):
    """Keyword arguments of `Connection`, described there."""

    limits: Limits | None
    twin_socket: bool
    minor: int
    dma_server: DmaServer | None
    serve_dma_when_idle: bool
    activity: Activity | None
    send_guard_s: float
    max_write_size: int | None
    trace: Callable[[str], None] | None
    account: Account
    keeping: ConnectionKeeping | None


#: How long a server whose queue of clients is full is left alone, first and at most, in seconds.
_FULL_FIRST_S, _FULL_MOST_S = 0.001, 0.05


async def connect_socket(path: str | os.PathLike[str]) -> socket.socket:
    """Connect to a server's socket; one that has no room for another client yet is waited for.

    Args:
        path: where the server listens.

    Raises:
        OSError: nobody listens there, or it is not permitted; it carries the path.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        pause = _FULL_FIRST_S
        # A UNIX socket never connects in the background: EAGAIN means that it is not connected, and nothing tells when
        # there will be room. Waiting until it can be written to, as for TCP, would take it for connected at once.
        while (number := sock.connect_ex(os.fspath(path))) in (errno.EAGAIN, errno.EINTR):
            await trio.sleep(pause)
            pause = min(2 * pause, _FULL_MOST_S)
        if number:
            raise OSError(number, os.strerror(number), os.fspath(path))
        await trio.lowlevel.checkpoint()
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            error.filename = os.fspath(path)
        raise
    return sock
