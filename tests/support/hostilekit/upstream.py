"""A vfio-user server whose answers an attack chooses; everything else it answers as a small function would."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from hostilekit.wire import Peer
from rawmessages import (
    DMA_MAP,
    DMA_UNMAP,
    GET_INFO,
    HEADER,
    IRQ_INFO,
    QEMU_CAPABILITIES,
    REGION_INFO,
    REGION_READ,
    REGION_WRITE,
    VERSION,
)

Reply = tuple[bytes, Sequence[int]]
Handler = Callable[["Link", int, bytes], "Reply | None"]
_SIZES = {0: 0x1000, 7: 256}


class Link(Peer):
    """One connection of the daemon to the server."""

    def say(self, msg_id: int, command: int, payload: bytes = b"", fds: Sequence[int] = (), error: int = 0) -> None:
        """Send a reply."""
        flags = 0x21 if error else 1
        self.send(HEADER.pack(msg_id, command, 16 + len(payload), flags, error) + payload, fds)


class Upstream:
    """The server; each connection has a thread.

    Args:
        path: where it listens.
        handlers: by command; None instead of a reply = nothing is said, or all was said already.
    """

    def __init__(self, path: Path, handlers: dict[int, Handler] | None = None) -> None:
        self._handlers: dict[int, Handler] = {
            VERSION: lambda link, msg_id, payload: (struct.pack("<HH", 0, 1) + QEMU_CAPABILITIES, ()),
            GET_INFO: lambda link, msg_id, payload: (struct.pack("<4I", 16, 3, 9, 5), ()),
            REGION_INFO: _region_info,
            IRQ_INFO: lambda link, msg_id, payload: (
                struct.pack("<4I", 16, 1, int.from_bytes(payload[8:12], "little"), 1),
                (),
            ),
            REGION_READ: _region_read,
            REGION_WRITE: lambda link, msg_id, payload: (payload[:16], ()),
            DMA_MAP: lambda link, msg_id, payload: (b"", ()),
            DMA_UNMAP: lambda link, msg_id, payload: (payload[:24], ()),
            **(handlers or {}),
        }
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(path))
        self._listener.listen(64)
        self.links: list[Link] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            link = Link(self._listener.accept()[0], timeout=60.0)
            self.links.append(link)
            threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: Link) -> None:
        try:
            while True:
                msg_id, command, _, flags, _, payload, fds = link.receive()
                if flags & 1:
                    continue
                handler = self._handlers.get(command)
                reply = (b"", ()) if handler is None else handler(link, msg_id, payload)
                if reply is not None and not flags & 0x10:
                    link.say(msg_id, command, *reply)
                for fd in fds:
                    os.close(fd)
                    link.received.remove(fd)
        except (OSError, EOFError):
            pass


def region_info(index: int, size: int, flags: int = 3) -> bytes:
    """The fixed part of a reply to GET_REGION_INFO."""
    return struct.pack("<IIIIQQ", 32, flags, index, 0, size, index << 40)


def _region_info(link: Link, msg_id: int, payload: bytes) -> Reply:
    index = int.from_bytes(payload[8:12], "little")
    size = _SIZES.get(index, 0)
    return region_info(index, size, 3 if size else 0), ()


def _region_read(link: Link, msg_id: int, payload: bytes) -> Reply:
    count = int.from_bytes(payload[12:16], "little")
    return payload[:16] + bytes(count), ()
