"""A client that has nothing to do with what goes on, and reads a register again and again meanwhile.

It is a process of its own: `python -m vfiouser_oob.lab.bench.bystander CLIENT_FD CONTROL_FD`, with a connection that is
attached already. It would otherwise measure how long our own process was busy.
"""

from __future__ import annotations

import array
import select
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from vfiouser_oob.lab.bench.measure import REGISTER_READ
from vfiouser_oob.lab.bench.peers import READ_REPLY_SIZE
from vfiouser_oob.lab.bench.raw import BenchFailed, RawClient
from vfiouser_oob.lab.demo.children import running_command
from vfiouser_oob.systemd.notify import Notifier

#: Seconds between two reads: a guest that looks now and then, not one that is a load by itself.
PACE_S = 0.001
_BEGIN, _END = b"b", b"e"
_COUNT_SIZE = 8


class Bystander:
    """The process, from outside.

    Args:
        control: the other end of its control socket.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def begin(self) -> None:
        """Have it read from now on."""
        self._control.sendall(_BEGIN)

    def end(self) -> list[int]:
        """Have it stop; returns nanoseconds of each read.

        Raises:
            BenchFailed: it has died.
        """
        self._control.sendall(_END)
        count = int.from_bytes(self._control.recv(_COUNT_SIZE, socket.MSG_WAITALL), "little")
        if not count:
            raise BenchFailed("the client that reads meanwhile has died, or was not answered")
        times = array.array("q")
        times.frombytes(self._control.recv(count * times.itemsize, socket.MSG_WAITALL))
        return times.tolist()


@asynccontextmanager
async def bystander(path: Path, directory: Path) -> AsyncIterator[Bystander]:
    """Run one.

    Args:
        path: the socket of the function that it reads.
        directory: for its log.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, RawClient.attach(path) as client:
        fds = [client.sock.fileno(), theirs.fileno()]
        command = [sys.executable, "-m", "vfiouser_oob.lab.bench.bystander", *map(str, fds)]
        async with running_command("reader", command, directory, pass_fds=fds):
            # Its end has to be the only one, so that its death is noticed.
            theirs.close()
            client.close()
            yield Bystander(ours)


def main(arguments: Sequence[str]) -> None:
    """Read when told to, until nobody tells us any more."""
    client_fd, control_fd = map(int, arguments)
    with RawClient(socket.socket(fileno=client_fd)) as client, socket.socket(fileno=control_fd) as control:
        Notifier.from_environment().ready()
        while control.recv(1) == _BEGIN:
            times = array.array("q")
            while not select.select([control], [], [], PACE_S)[0]:
                times.extend(client.round_trips(REGISTER_READ, READ_REPLY_SIZE, 1))
            if control.recv(1) != _END:
                return
            times.extend(client.round_trips(REGISTER_READ, READ_REPLY_SIZE, 1))
            control.sendall(len(times).to_bytes(_COUNT_SIZE, "little") + times.tobytes())


if __name__ == "__main__":
    main(sys.argv[1:])
