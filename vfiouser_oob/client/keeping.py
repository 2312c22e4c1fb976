"""What makes a connection to a server outlive its process."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

from vfiouser_oob.client.call_ledger import CallLedger
from vfiouser_oob.persist.kept_socket import KeptSocket
from vfiouser_oob.persist.stream_memory import StreamMemory
from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.fds import HasFileno
from vfiouser_oob.transport.reaper import Account
from vfiouser_protocol.capabilities import Negotiated
from vfiouser_protocol.session import ConnectionEnd, ProtocolSession


@dataclass(frozen=True, eq=False)
class ConnectionKeeping:
    """How a connection is kept, and what a process before us has left of it.

    Args:
        memory: of its socket; owned from now on.
        settled: takes what was negotiated and the twin socket, returns the memory for that.
        agreed: what another process has negotiated; None if nobody has yet.
        twin: the twin socket that it was given, with its memory; owned from now on.
    """

    memory: StreamMemory
    settled: Callable[[Negotiated, HasFileno | None], StreamMemory | None]
    agreed: Negotiated | None = None
    twin: tuple[socket.socket, StreamMemory] | None = None

    def stream(self, sock: socket.socket, size: int, activity: Activity | None, account: Account) -> KeptSocket:
        """The connection's socket; arguments as for `KeptSocket`."""
        return KeptSocket(sock, size, self.memory, activity, account)

    def twin_stream(self, size: int, activity: Activity | None, account: Account) -> KeptSocket | None:
        """The twin socket that another process was given."""
        if self.twin is None:
            return None
        sock, memory = self.twin
        return KeptSocket(sock, size, memory, activity, account)

    def ledger(self) -> CallLedger:
        """What was asked."""
        return CallLedger(self.memory)

    def session(self) -> ProtocolSession:
        """The session that another process has begun, or a new one."""
        session = ProtocolSession(ConnectionEnd.CLIENT)
        if self.agreed is not None:
            session = ProtocolSession.resumed(ConnectionEnd.CLIENT, self.agreed)
        session.ids.use_half(self.memory.lives)
        return session
