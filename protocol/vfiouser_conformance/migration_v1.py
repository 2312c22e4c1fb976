"""What the cases of the migration region do over and over."""

from __future__ import annotations

import struct

from vfiouser_conformance import wire
from vfiouser_conformance.case import CannotTell, CaseFailed, check, same
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.trial import Trial
from vfiouser_conformance.wire import Received
from vfiouser_protocol.constants import Command

STOPPED, RUNNING, STOP_COPY, PRE_COPY, RESUMING = 0, 1, 2, 3, 4
STATE, RESERVED, PENDING, DATA_OFFSET, DATA_SIZE, REGISTERS = 0, 4, 8, 16, 24, 32
NAMES = {0: "stopped", 1: "running", 2: "stop-and-copy", 3: "pre-copy", 4: "resuming", 6: "error"}
_STREAM_MAX = 256 << 20


class View:
    """The migration region over one connection.

    Args:
        t: the case's run.
        link: the connection.
    """

    def __init__(self, t: Trial, link: RawLink) -> None:
        self.t = t
        self.link = link
        self.index = t.facts.v1()
        self.size = t.facts.regions[self.index].size

    def read(self, offset: int, count: int) -> Received:
        """REGION_READ of the region, whatever comes of it."""
        return self.link.call(Command.REGION_READ, wire.access(self.index, offset, count))

    def write(self, offset: int, data: bytes) -> Received:
        """REGION_WRITE to the region, whatever comes of it."""
        return self.link.call(Command.REGION_WRITE, wire.access(self.index, offset, len(data), data))

    def register(self, offset: int) -> int:
        """One of the 64-bit registers."""
        return int.from_bytes(self.t.read(self.link, self.index, offset, 8), "little")

    def state(self) -> int:
        """device_state."""
        return int.from_bytes(self.t.read(self.link, self.index, STATE, 4), "little")

    def try_state(self, state: int) -> Received:
        """Write device_state, whatever comes of it."""
        return self.write(STATE, struct.pack("<I", state))

    def go(self, *states: int) -> None:
        """Write states that have to be reached."""
        for state in states:
            reply = self.try_state(state)
            if reply.failed and state == RUNNING and self.state() == STOPPED:
                raise CannotTell(f"the device stays stopped: running is refused with error {reply.error}, as it may")
            if reply.failed:
                raise CaseFailed(f"device_state {NAMES[state]} failed with error {reply.error}")
            same(NAMES[state], NAMES.get(self.state(), "another one"), "device_state after it was written")

    def to_running(self) -> None:
        """Bring the device back, by whatever way there is."""
        if self.try_state(RUNNING).failed:
            self.link.call(Command.DEVICE_RESET)
            self.try_state(RUNNING)

    def chunk(self, pieces: int = 0) -> bytes | None:
        """One iteration; None if nothing is pending.

        Args:
            pieces: largest access in bytes; 0 = as large as the server takes.
        """
        if not self.register(PENDING):
            return None
        offset, size = self.register(DATA_OFFSET), self.register(DATA_SIZE)
        check(REGISTERS <= offset <= offset + size <= self.size, f"data at {offset:#x}+{size:#x} outside the region")
        step = pieces or self.t.facts.transfer
        parts = (self.t.read(self.link, self.index, offset + at, min(step, size - at)) for at in range(0, size, step))
        return b"".join(parts)

    def stream(self) -> list[bytes]:
        """Chunks until nothing is pending, or one is empty."""
        found: list[bytes] = []
        while chunk := self.chunk():
            found.append(chunk)
            check(sum(map(len, found)) <= _STREAM_MAX, f"the stream has more than {_STREAM_MAX} bytes")
        return found

    def give(self, data: bytes) -> None:
        """One chunk to a resuming device."""
        offset = self.register(DATA_OFFSET)
        for at in range(0, len(data), self.t.facts.transfer):
            part = data[at : at + self.t.facts.transfer]
            self.t.write(self.link, self.index, offset + at, part)
        reply = self.write(DATA_SIZE, struct.pack("<Q", len(data)))
        check(not reply.failed, f"a chunk of {len(data)} bytes was refused with error {reply.error}")

    def room(self) -> int:
        """Bytes that a resuming device takes in one chunk."""
        return self.size - self.register(DATA_OFFSET)


def begin(t: Trial, path: str | None = None) -> View:
    """A connection to a device with a migration region; in the end the device runs again."""
    t.facts.v1()
    view = View(t, t.attach(path=path))
    if found := wake(view):
        raise CannotTell(f"the device is in {found}")
    t.at_end(lambda: back(view))
    return view


def wake(view: View) -> str:
    """Bring the device to running; says in which state it is and why it stays there, if it does."""
    reply = view.read(STATE, 4)
    if reply.failed or len(reply.payload) != 20 or view.state() == RUNNING:
        return ""
    error = view.try_state(RUNNING).error
    if view.state() == RUNNING:
        return ""
    view.to_running()
    state = view.state()
    return "" if state == RUNNING else f"{NAMES.get(state, state)}, and running is refused with error {error}"


def back(view: View) -> None:
    """Bring the device to running, by whatever way there is.

    Raises:
        CannotTell: it stays elsewhere; a device may fail a transition.
    """
    view.to_running()
    if found := wake(view):
        raise CannotTell(f"the device is in {found}")


def save(view: View) -> list[bytes]:
    """Stop the device and take its chunks; it ends stopped."""
    view.go(STOP_COPY)
    chunks = view.stream()
    view.go(STOPPED)
    return chunks


def load(view: View, chunks: list[bytes]) -> None:
    """Give chunks to a device, which runs then."""
    view.go(RESUMING)
    for chunk in chunks:
        for at in range(0, len(chunk), view.room()):
            view.give(chunk[at : at + view.room()])
    view.go(RUNNING)
