"""Servers whose capability chains lead nowhere."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping

from mutants.server import Command, Connection, Server


class _Chain(Server):
    """Its mappable BAR has a chain of its own."""

    #: cap_offset of the reply, and (id, next) of the 16-byte capabilities behind the fixed part.
    first = 32
    chain: tuple[tuple[int, int], ...] = ()

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        connection = Connection(self, sock)
        inner = connection.session.table[5]

        def region_info(command: Command, fds: list[int]) -> bytes:
            argsz, _, index, _ = struct.unpack_from("<IIII", command.payload.ljust(16, b"\0"))
            if index != 2 or len(command.payload) < 32 or argsz < 32:
                return inner(command, fds)
            full = 32 + 16 * len(self.chain)
            if argsz < full:
                return struct.pack("<IIIIQQ", full, 7, index, 0, 0x10000, 0x1000)
            fds.append(self.device.memory_fd)
            links = b"".join(struct.pack("<HHIQ", number, 1, following, 0) for number, following in self.chain)
            return struct.pack("<IIIIQQ", full, 15, index, self.first, 0x10000, 0x1000) + links

        connection.session.table[5] = region_info
        connection.run()


class _ToItself(_Chain):
    chain = ((1, 32),)


class _Circle(_Chain):
    chain = ((2, 48), (1, 32))


class _Outside(_Chain):
    chain = ((1, 4096),)


class _IntoTheHead(_Chain):
    first = 8
    chain = ((1, 0),)


#: By name.
CHAINS: Mapping[str, type[Server]] = {
    "chain-to-itself": _ToItself,
    "chain-in-a-circle": _Circle,
    "chain-outside": _Outside,
    "chain-into-the-head": _IntoTheHead,
}
