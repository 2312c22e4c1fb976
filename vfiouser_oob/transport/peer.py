"""Who is at the other end of a UNIX socket."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

_UCRED = struct.Struct("iII")
#: Bytes of a name that are read; the kernel keeps fewer.
_COMMAND_SIZE = 256


@dataclass(frozen=True, slots=True)
class Peer:
    """Credentials of a peer, as the kernel recorded them when the socket was connected.

    Args:
        pid: process id; 0 when the peer lives in another pid namespace.
        uid: user id.
        gid: primary group id.
        command: the process's name, empty when it cannot be read.
    """

    pid: int
    uid: int
    gid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command or '?'}[{self.pid}] uid {self.uid}"


def peer_of(sock: socket.socket) -> Peer:
    """Return the credentials of the process that connected a UNIX socket.

    Args:
        sock: a connected AF_UNIX socket.

    Raises:
        OSError: the socket is not connected or not of AF_UNIX.
    """
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(raw)
    return Peer(pid, uid, gid, _command_of(pid))


def _command_of(pid: int) -> str:
    if pid <= 0:
        return ""
    try:
        # Without a buffer, whose making costs more than the reading: each client waits for this.
        with open(f"/proc/{pid}/comm", "rb", buffering=0) as comm:
            return comm.read(_COMMAND_SIZE).decode(errors="replace").strip()
    except OSError:  # it has gone already, or /proc hides other users' processes
        return ""
