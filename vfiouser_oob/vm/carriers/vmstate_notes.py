"""The connection of a `dbus-vmstate` object over the end of the daemon, while that end would not be noticed.

QEMU asks how many pieces the state has, then each of them for its name, then for its bytes. A connection that ends
between the first answer and the last name fails nothing: QEMU leaves out the pieces that it cannot name, and completes
the migration without them. So the connection outlives the daemon there. The next daemon answers to the names and
refuses the bytes, since the state has gone, and the migration fails. Where the bytes are asked for, the end of the
connection fails the migration by itself.

Spec: QEMU, backends/dbus-vmstate.c, dbus_get_proxies.
"""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass

from vfiouser_oob.persist.successor.things import VmstateThing
from vfiouser_oob.server.ledger import Ledger
from vfiouser_oob.transport.fds import HasFileno

__all__ = ["LeftVmstate", "VmstateNotes"]


@dataclass(frozen=True, slots=True)
class LeftVmstate:
    """A connection that another daemon has left.

    Args:
        sock: it; owned by whoever takes this.
        owners: how many pieces QEMU has been told of, or was about to be.
        serial: of the call that asked for that.
    """

    sock: socket.socket
    owners: int
    serial: int


class VmstateNotes:
    """Keeps a connection while its end would not be noticed, and knows the one that another daemon has left.

    Args:
        ledger: where to.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._part = ""
        self._left = False
        self.left = self._read()

    def _read(self) -> LeftVmstate | None:
        for thing in self._ledger.left(VmstateThing):
            self._part = _part(thing.number)
            kept = self._ledger.claimed(self._part)
            if kept is not None:
                return LeftVmstate(socket.socket(fileno=kept.detach()), thing.owners, thing.serial)
            self.let_go()
        return None

    def taken(self) -> LeftVmstate | None:
        """What was left, for whoever goes on with it."""
        left, self.left = self.left, None
        return left

    @property
    def leaving(self) -> bool:
        """Whether the connection is left to another daemon, which finds it as it is."""
        return self._left and bool(self._part)

    def hold(self, sock: HasFileno, owners: int, serial: int) -> None:
        """Keep a connection from now on.

        Args:
            sock: it; it stays the caller's.
            owners: how many pieces QEMU is about to be told of.
            serial: of the call that asks for that.
        """
        self.let_go()
        if not self._left:
            number = secrets.randbits(32)
            self._part = _part(number)
            self._ledger.keep(self._part, sock)
            self._ledger.put(VmstateThing(number, owners, serial))

    def let_go(self) -> None:
        """Keep it no longer."""
        if self._part and not self._left:
            self._ledger.forget(VmstateThing)
            self._ledger.drop(self._part)
            self._part = ""

    def leave(self) -> None:
        """Leave it to another daemon as it is: nothing more is taken down."""
        self._left = True

    def close(self) -> None:
        """Close what nobody took."""
        left = self.taken()
        if left is not None:
            left.sock.close()


def _part(number: int) -> str:
    return f"vmstate.{number:x}"
