"""Descriptors whose owner decides how long it takes to close them, or to look at them."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from stuckfds.fuse import FuseMount

#: Far more than any test takes; a process that waits in close is let go by then at the latest.
LINGER_S = 30


class Stuck(Protocol):
    """Something to be sent."""

    def give(self) -> int:
        """Return a descriptor; whoever closes its last copy waits, once `arm` was called."""
        ...

    def arm(self) -> None:
        """From now on closing takes until `release`."""
        ...

    def release(self) -> None:
        """Let whoever waits go on."""
        ...


class LingeringSocket:
    """A TCP socket that is closed only when its peer has read everything, which it never does."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._sock = socket.create_connection(server.getsockname())
            self._peer, _ = server.accept()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_S))
        self._sock.setblocking(False)
        try:
            while True:
                self._sock.send(bytes(1 << 16))
        except BlockingIOError:
            pass
        self._sock.setblocking(True)

    def give(self) -> int:
        """The socket's descriptor."""
        return self._sock.detach()

    def arm(self) -> None:
        """Nothing to do: it lingers already."""

    def release(self) -> None:
        """Reset the connection."""
        self._peer.close()


class StuckFile:
    """A file of a FUSE server that stops answering."""

    def __init__(self, mount: FuseMount) -> None:
        self.mount = mount

    def give(self) -> int:
        """Open the file."""
        return self.mount.open()

    def arm(self) -> None:
        """Answer no FLUSH any more."""
        self.mount.hold("FLUSH")

    def release(self) -> None:
        """Answer everything."""
        self.mount.let_go()


@contextmanager
def lingering(directory: Path) -> Iterator[Stuck]:
    """A lingering socket."""
    sock = LingeringSocket()
    try:
        yield sock
    finally:
        sock.release()


@contextmanager
def stuck_file(directory: Path) -> Iterator[StuckFile]:
    """A FUSE file."""
    with FuseMount(directory / "mnt") as mount:
        yield StuckFile(mount)


#: What there is on this machine, by name: only root can mount a file system.
KINDS: dict[str, Callable[[Path], AbstractContextManager[Stuck]]] = {"linger": lingering}
if os.geteuid() == 0 and os.path.exists("/dev/fuse"):
    KINDS["fuse"] = stuck_file
