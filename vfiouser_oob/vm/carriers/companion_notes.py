"""What a companion's connection leaves to the daemon after this one, since QEMU says nothing again.

A message is taken out of the socket and handled; who dies in between leaves a conversation that nobody can follow. So
it is taken down when one begins and when all are answered. In between the connection is dropped by the next daemon, a
migration that is under way fails, and the VM goes on where it is.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from struct import Struct

import trio

from vfiouser_oob.persist.successor.things import CompanionThing, SaidThing
from vfiouser_oob.server.ledger import Ledger
from vfiouser_oob.transport.fds import ForeignFd, HasFileno, close_fds
from vfiouser_oob.transport.reaper import STRANGERS
from vfiouser_oob.vm.carriers.vhost_backend import Standing
from vfiouser_oob.vm.carriers.vhost_messages import (
    REQUESTS,
    VRING_MASK,
    Number,
    VhostRequest,
    VringAddress,
    VringState,
)
from vfiouser_oob.vm.carriers.vhost_wire import VhostMessage
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.errors import CommandError

_BASE = Struct("<II")
#: What counts until it is said again, in the order in which it is taken up.
_LASTING: Sequence[VhostRequest] = (
    VhostRequest.SET_FEATURES,
    VhostRequest.SET_MEM_TABLE,
    VhostRequest.SET_VRING_NUM,
    VhostRequest.SET_VRING_ADDR,
    VhostRequest.SET_VRING_KICK,
    VhostRequest.SET_VRING_CALL,
    VhostRequest.SET_LOG_BASE,
)
_PER_VRING = frozenset(_LASTING) - {VhostRequest.SET_FEATURES, VhostRequest.SET_MEM_TABLE, VhostRequest.SET_LOG_BASE}


@dataclass(frozen=True, slots=True)
class LeftCompanion:
    """A connection that another daemon has left.

    Args:
        sock: it; None if QEMU listens, and we connect.
        standing: where the device is.
        said: what counts of what was said; their descriptors belong to whoever takes this.
    """

    sock: socket.socket | None
    standing: Standing
    said: Sequence[VhostMessage] = ()

    def close(self) -> None:
        """Close the descriptors of what was said, as far as nobody took them; the socket is somebody else's."""
        for message in self.said:
            close_fds(message.fds)


class CompanionNotes:
    """Takes down a companion's connection, and knows the one that another daemon has left.

    Args:
        ledger: where to.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._number = 0
        self._descriptors = 0
        self._kept = False
        #: What was written last; None if there is no connection.
        self._thing: CompanionThing | None = None
        self._said: dict[tuple[VhostRequest, int], list[str]] = {}
        self._left = False
        self._settled = trio.Event()
        #: Why a connection that was left cannot be gone on with; empty if it can, or there is none.
        self.lost = ""
        self.left = self._read()

    @property
    def leaving(self) -> bool:
        """Whether the connection is left to another daemon, which finds it as it is."""
        return self._left and self._thing is not None and not self._thing.busy

    # What was left

    def _read(self) -> LeftCompanion | None:
        things = self._ledger.left(CompanionThing)
        said = sorted(self._ledger.left(SaidThing), key=lambda each: (_rank(each.request), each.index))
        if not things:
            return None
        self._thing = thing = things[0]
        self._number, self._kept = thing.number, thing.kept
        kept = self._ledger.claimed(self._part) if thing.kept else None
        messages = [] if thing.busy else [self._message(each) for each in said]
        known = [message for message in messages if message is not None]
        sock = None if kept is None else socket.socket(fileno=kept.detach())
        left = LeftCompanion(sock, _standing(thing), known)
        if thing.busy or len(known) < len(messages) or (thing.kept and sock is None):
            self.lost = "it was in the middle of a message" if thing.busy else "not all of it was kept"
            if sock is not None:
                with suppress(OSError):  # QEMU may have gone
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
            left.close()
            self.ended()
            return None
        return left

    def taken(self) -> LeftCompanion | None:
        """What was left, for whoever goes on with it."""
        left, self.left = self.left, None
        return left

    def close(self) -> None:
        """Close what nobody took."""
        left = self.taken()
        if left is not None:
            left.close()
            if left.sock is not None:
                left.sock.close()

    def _message(self, thing: SaidThing) -> VhostMessage | None:
        """A message as it was taken; None if it cannot be had any more."""
        parts = [f"{thing.descriptors}.{number}" for number in range(thing.count)]
        claimed = [self._ledger.claimed(f"companion.{part}") for part in parts]
        fds = [ForeignFd(fd.detach(), STRANGERS) for fd in claimed if fd is not None]
        self._descriptors = max(self._descriptors, thing.descriptors)
        try:
            request = VhostRequest(thing.request)
            payload = decode(REQUESTS[request].payload, thing.payload)
        except (ValueError, KeyError, CommandError):
            close_fds(fds)
            return None
        if len(fds) < thing.count:
            close_fds(fds)
            return None
        self._said[request, thing.index] = [f"companion.{part}" for part in parts]
        return VhostMessage(request, payload, False, fds)

    # What is left

    def began(self, sock: HasFileno | None) -> None:
        """A front-end has come, and what was said before does not count for it.

        Args:
            sock: its socket; None if QEMU listens, so that another daemon connects as we did.
        """
        self.ended()
        self._number, self._kept = secrets.randbits(32), sock is not None
        if sock is not None:
            self._ledger.keep(self._part, sock)
        self._put(CompanionThing(self._number, self._kept, True, False, b""))

    @property
    def _part(self) -> str:
        return f"companion.{self._number:x}"

    def busy(self) -> None:
        """A message may be read from now on."""
        if self._thing is not None and not self._thing.busy:
            self._put(CompanionThing(self._number, self._kept, True, self._thing.runs, self._thing.bases))

    def idle(self, standing: Standing) -> None:
        """All that was read is answered."""
        if self._thing is not None:
            bases = b"".join(_BASE.pack(*base) for base in standing.bases)
            thing = CompanionThing(self._number, self._kept, False, standing.runs, bases)
            if thing != self._thing:
                self._put(thing)
            self._settled.set()

    async def come_to_rest(self) -> None:
        """Wait until all that was read is answered, so that another daemon can go on; or there is no connection."""
        while self._thing is not None and self._thing.busy:
            self._settled = trio.Event()
            await self._settled.wait()

    def _put(self, thing: CompanionThing) -> None:
        if not self._left:
            self._thing = thing
            self._ledger.put(thing)

    def said(self, message: VhostMessage) -> None:
        """A message counts from now on; its descriptors stay its own."""
        if message.request not in _LASTING or self._thing is None or self._left:
            return
        index = _index(message)
        self.unsaid(message.request, index)
        self._descriptors += 1
        parts = [f"companion.{self._descriptors}.{number}" for number in range(len(message.fds))]
        for part, fd in zip(parts, message.fds, strict=True):
            self._ledger.keep(part, fd)
        self._said[message.request, index] = parts
        self._ledger.put(
            SaidThing(message.request, index, encode(message.payload), self._descriptors, len(message.fds))
        )

    def unsaid(self, request: VhostRequest, index: int = 0) -> None:
        """What was said does not count any more."""
        parts = None if self._left else self._said.pop((request, index), None)
        if parts is not None:
            self._ledger.remove(SaidThing(request, index, b"", 0, 0))
            for part in parts:
                self._ledger.drop(part)

    def ended(self) -> None:
        """There is no connection any more."""
        if self._left:
            return
        for request, index in list(self._said):
            self.unsaid(request, index)
        self._ledger.forget(SaidThing)
        if self._kept:
            self._ledger.drop(self._part)
        self._ledger.forget(CompanionThing)
        self._thing, self._kept = None, False
        self._settled.set()

    def leave(self) -> None:
        """Leave it to another daemon as it is: nothing more is taken down."""
        self._left = True


def _index(message: VhostMessage) -> int:
    payload = message.payload
    if message.request not in _PER_VRING:
        return 0
    if isinstance(payload, VringState | VringAddress):
        return payload.index
    assert isinstance(payload, Number)
    return payload.value & VRING_MASK


def _rank(request: int) -> int:
    return next((rank for rank, each in enumerate(_LASTING) if each == request), len(_LASTING))


def _standing(thing: CompanionThing) -> Standing:
    whole = len(thing.bases) - len(thing.bases) % _BASE.size
    return Standing(thing.runs, tuple(_BASE.iter_unpack(thing.bases[:whole])))


__all__ = ["CompanionNotes", "LeftCompanion"]
