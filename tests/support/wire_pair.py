"""A client session and a server session joined by a wire that carries bytes and file descriptors.

Every byte goes through the real framers in pieces as small as a test wants, so that what is proven of a pair
holds for a socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from vfiouser_protocol.capabilities import VersionCapabilities
from vfiouser_protocol.framing import Framer, Message
from vfiouser_protocol.session import CommandReceived, ConnectionEnd, MessageRefused, ProtocolSession, ReplyReceived

Received = CommandReceived | ReplyReceived | MessageRefused


class Wire:
    """One direction of one stream: bytes, with descriptors attached to the first byte of each send."""

    def __init__(self, framer: Framer, piece: int) -> None:
        self.framer = framer
        self._piece = piece
        self._parts: deque[tuple[bytes, list[int]]] = deque()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Put bytes on the wire; nothing, as for a command without reply, sends nothing."""
        if data:
            self._parts.append((data, list(fds)))

    def recvmsg(self, size: int) -> tuple[bytes, list[int]]:
        """As the kernel does: glue sends together, but never past the next one that has descriptors."""
        data, fds = b"", []
        size = min(size, self._piece)
        while self._parts and len(data) < size:
            part, attached = self._parts[0]
            if attached and data:
                break
            fds += attached
            taken = part[: size - len(data)]
            data += taken
            rest = part[len(taken) :]
            self._parts.popleft()
            if rest:
                self._parts.appendleft((rest, []))
        return data, fds

    def messages(self) -> list[Message]:
        """Every message that is complete by now."""
        found: list[Message] = []
        while True:
            data, fds = self.recvmsg(self.framer.bytes_wanted)
            if not data:
                return found
            message = self.framer.feed(data, fds)
            if message is not None:
                found.append(message)


class SessionPair:
    """Two real sessions; what one sends, the other receives.

    Args:
        piece: most bytes that one read returns.
    """

    def __init__(self, piece: int = 1 << 20) -> None:
        self.client = ProtocolSession(ConnectionEnd.CLIENT)
        self.server = ProtocolSession(ConnectionEnd.SERVER)
        self._wires = {
            (session.role, twin): Wire(session.new_framer(), piece)
            for session in (self.client, self.server)
            for twin in (False, True)
        }

    def send(self, sender: ProtocolSession, data: bytes, fds: Sequence[int] = (), *, twin: bool = False) -> None:
        """Send from one session towards the other."""
        self._wires[sender.role.peer, twin].send(data, fds)

    def receive(self, receiver: ProtocolSession, *, twin: bool = False) -> list[Received]:
        """Let a session take all that is complete on one of its sockets."""
        return [receiver.receive(m, twin=twin) for m in self._wires[receiver.role, twin].messages()]

    def negotiate(
        self,
        proposal: VersionCapabilities | None = None,
        offer: VersionCapabilities | None = None,
        *,
        grant_twin: bool = False,
    ) -> ReplyReceived:
        """Go through VERSION and return the client's view of the reply; a twin socket is descriptor 70."""
        _, data = self.client.propose(VersionCapabilities() if proposal is None else proposal, token="version")
        self.send(self.client, data)
        [command] = self.receive(self.server)
        assert isinstance(command, CommandReceived), command
        reply = self.server.accept(
            command.header, VersionCapabilities() if offer is None else offer, grant_twin=grant_twin
        )
        assert self.server.negotiated is not None
        self.send(self.server, reply, [70] if self.server.negotiated.twin else [])
        [answer] = self.receive(self.client)
        assert isinstance(answer, ReplyReceived), answer
        return answer


def joined(**options: Any) -> SessionPair:
    """A pair that has negotiated with defaults."""
    pair = SessionPair(**options)
    pair.negotiate()
    return pair
