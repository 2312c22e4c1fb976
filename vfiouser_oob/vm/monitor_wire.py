"""One connection of a monitor: the bytes of a socket, a QMP session, and who waits for what."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import trio

from vfiouser_oob.migration.backoff import Pace
from vfiouser_oob.transport.fds import ForeignFd, close_fds
from vfiouser_oob.vm.qmp import (
    LINE_MAX,
    QmpAnswer,
    QmpEvent,
    QmpGreeting,
    QmpMessage,
    QmpProtocolError,
    QmpRefusal,
    QmpSession,
    TooManyUnansweredError,
)

#: Events that nobody has taken yet.
EVENTS_MAX = 1024
#: The question that begins the listening: events that came before its answer are older than what it says.
STATUS = "query-status"
_CHUNK = 16384
#: As many as the kernel carries with one message.
_FDS_MAX = 253
_RECEIVE = int(socket.MSG_CMSG_CLOEXEC)
#: Messages of a peer in a second; more wait for the next one.
_PACE = 4096


class MonitorError(Exception):
    """QEMU did not do what it was asked."""


class RefusedError(MonitorError):
    """QEMU said no.

    Args:
        command: what it was asked.
        kind: the error's class, such as GenericError.
        text: QEMU's words.
    """

    def __init__(self, command: str, kind: str, text: str) -> None:
        super().__init__(f"QEMU refused {command}: {text}")
        self.kind = kind
        self.text = text


class UnansweredError(MonitorError):
    """QEMU did not answer in time; what it was asked may yet be done."""


class GoneError(MonitorError):
    """The monitor was lost."""


class MonitorWire:
    """A connected socket, from the greeting on; two tasks run it until it is lost.

    Args:
        sock: connected; owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.why_lost = ""
        self.lost = trio.Event()
        self._sock = sock
        self._session = QmpSession()
        self._waiting: dict[int, _QmpCall] = {}
        self._outbox: deque[bytes] = deque()
        self._filled = trio.Event()
        self._told, self._untaken = trio.open_memory_channel[QmpEvent](EVENTS_MAX)
        self._listening = False
        self._greeting: QmpGreeting | None = None
        self._greeted = trio.Event()

    async def run_reader(self) -> None:
        """Read until the peer has gone, or has to be sent away."""
        pace = Pace(_PACE, 1.0)
        try:
            while not self.why_lost:
                await trio.lowlevel.wait_readable(self._sock)
                with suppress(BlockingIOError):
                    for _ in range(self._receive()):
                        await pace.taken()
        except (QmpProtocolError, OSError) as error:
            self.lose(_reason(error))

    async def run_sender(self) -> None:
        """Send commands, one after the other and whole, whoever has given them up meanwhile."""
        try:
            while not self.why_lost:
                while self._outbox:
                    await self._send(self._outbox.popleft())
                self._filled = trio.Event()
                await self._filled.wait()
        except OSError as error:
            self.lose(_reason(error))

    async def greeting(self) -> QmpGreeting:
        """Wait for QEMU's first words.

        Raises:
            GoneError: there were none.
        """
        await self._greeted.wait()
        if self._greeting is None:
            raise GoneError(self.why_lost)
        return self._greeting

    async def execute(self, command: str, arguments: Mapping[str, Any] | None, seconds: float) -> Any:
        """Have a command carried out; see `Monitor.execute`."""
        if self.why_lost:
            raise GoneError(self.why_lost)
        try:
            number, data = self._session.command(command, arguments)
        except TooManyUnansweredError as error:
            raise UnansweredError(f"{command} was not sent: {error}") from None
        call = self._waiting[number] = _QmpCall(command)
        self._outbox.append(data)
        self._filled.set()
        try:
            with trio.move_on_after(seconds):
                await call.over.wait()
        finally:
            if self._waiting.pop(number, None) is not None:
                self._session.give_up(number)
        match call.outcome:
            case QmpAnswer(result=result):
                return result
            case QmpRefusal(kind=kind, text=text):
                raise RefusedError(command, kind, text)
        if self.why_lost:
            raise GoneError(self.why_lost)
        raise UnansweredError(f"QEMU did not answer {command} within {seconds:g} s")

    async def next_event(self) -> QmpEvent:
        """Wait for the next event.

        Raises:
            GoneError: the monitor was lost, and all events that came before were taken.
        """
        try:
            return await self._untaken.receive()
        except trio.EndOfChannel:
            raise GoneError(self.why_lost) from None

    def pending_events(self) -> list[QmpEvent]:
        """Take the events that are here already, also those that the kernel holds."""
        try:
            # Whoever never stops sending has sent more than one long line by now.
            for _ in range(2 * LINE_MAX // _CHUNK):
                if self.why_lost:
                    break
                self._receive()
        except BlockingIOError:
            pass
        except (QmpProtocolError, OSError) as error:
            self.lose(_reason(error))
        found: list[QmpEvent] = []
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            while True:
                found.append(self._untaken.receive_nowait())
        return found

    def lose(self, why: str) -> None:
        """Tell everybody that waits that there is no QEMU any more.

        Args:
            why: for people.
        """
        if self.why_lost:
            return
        self.why_lost = why
        self.lost.set()
        self._greeted.set()
        self._filled.set()
        for call in self._waiting.values():
            call.over.set()
        self._told.close()

    def close(self) -> None:
        """Close the socket."""
        self.lose("the monitor was closed")
        trio.lowlevel.notify_closing(self._sock)
        with suppress(OSError):  # the peer has gone already
            self._sock.shutdown(socket.SHUT_RDWR)
        # What is still unread may hold descriptors of others, and goes with it.
        ForeignFd(self._sock.detach()).close()

    async def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._sock.send(rest, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)

    def _receive(self) -> int:
        """Take what is there, up to a chunk; returns how many messages it was.

        Raises:
            BlockingIOError: nothing is there.
            QmpProtocolError: it is no QMP, or too much of it.
            OSError: the peer has gone.
        """
        data, numbers, _, _ = socket.recv_fds(self._sock, _CHUNK, _FDS_MAX, _RECEIVE)
        if numbers:
            # Left to the kernel, it would close them here and now, which takes as long as their owner likes.
            close_fds([ForeignFd(number) for number in numbers])
            raise QmpProtocolError("descriptors, which QEMU does not send")
        if not data:
            raise ConnectionResetError("QEMU closed the monitor")
        self._session.receive_data(data)
        count = 0
        while (message := self._session.next_message()) is not None:
            count += 1
            self._take(message)
        return count

    def _take(self, message: QmpMessage) -> None:
        match message:
            case QmpEvent():
                self._tell(message)
            case QmpGreeting():
                self._greeting = message
                self._greeted.set()
            case QmpAnswer() | QmpRefusal():
                call = self._waiting.pop(message.id)
                call.outcome = message
                call.over.set()
                # At once: what tells of a change may be in the same bytes.
                self._listening = self._listening or call.command == STATUS

    def _tell(self, event: QmpEvent) -> None:
        if not self._listening:
            return
        try:
            self._told.send_nowait(event)
        except trio.WouldBlock:
            raise QmpProtocolError(f"more than {EVENTS_MAX} events that nobody has read") from None


class _QmpCall:
    """A command that waits for its answer."""

    __slots__ = ("command", "outcome", "over")

    def __init__(self, command: str) -> None:
        self.command = command
        self.outcome: QmpAnswer | QmpRefusal | None = None
        self.over = trio.Event()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"the monitor broke: {error.strerror}"
    return str(error)
