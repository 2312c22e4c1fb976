"""One connection to the server under test: blocking, with a deadline on everything, recording all bytes."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vfiouser_conformance import wire
from vfiouser_conformance.case import CaseFailed, check, same
from vfiouser_conformance.wire import HEADER, HEADER_SIZE, Received
from vfiouser_protocol.constants import Command

_FDS_MAX = 253
_KEPT_BYTES = 4096
#: Of a transcript; a server that sends for seconds must not fill our memory.
_KEPT_RECORDS = 4096
#: More commands of the server than this on one connection are a flood, no DMA.
_COMMANDS_MAX = 20_000
#: No message of a server may be larger than this; the largest transfers that any client takes are of 64 MiB.
_SIZE_MAX = (64 << 20) + 4096


class TimedOut(CaseFailed):
    """The server did not answer in time."""


class NotThere(CaseFailed):
    """Nobody listens, or takes another client, in time."""


class OutOfTime(CaseFailed):
    """The case as a whole took longer than it may, whatever the server kept it busy with."""


class Closed(CaseFailed):
    """The server closed the connection, or reset it."""


@dataclass(slots=True)
class TranscriptEntry:
    """One thing in a transcript.

    Args:
        direction: ``>`` to the server, ``<`` from it.
        channel: which connection, e.g. ``1`` or ``1t`` for its twin socket.
        data: the first bytes.
        size: how many bytes there were.
        fds: how many descriptors went with them.
        at: seconds since the case began.
    """

    direction: str
    channel: str
    data: bytes
    size: int
    fds: int
    at: float


@dataclass(slots=True)
class Transcript:
    """What a case sent and received, the last of it if that is much, and the time that the case has.

    Args:
        records: in order.
        started: monotonic time of its begin, in seconds.
        ends: monotonic time at which the case has to be over, whatever comes, in seconds.
    """

    records: deque[TranscriptEntry] = field(default_factory=lambda: deque(maxlen=_KEPT_RECORDS))
    started: float = field(default_factory=time.monotonic)
    ends: float = float("inf")

    def add(self, direction: str, channel: str, data: bytes, fds: int) -> None:
        """Note a message or a piece of one.

        Args:
            direction: ``>`` to the server, ``<`` from it.
            channel: which connection, as in `TranscriptEntry`.
            data: all its bytes; the entry keeps the first of them.
            fds: how many descriptors went with them.
        """
        at = time.monotonic() - self.started
        self.records.append(TranscriptEntry(direction, channel, data[:_KEPT_BYTES], len(data), fds, at))

    def deadline(self, timeout: float) -> float:
        """Return when a wait that begins now ends: with its own time, or with the case's.

        Args:
            timeout: how long the wait may take, in seconds.

        Returns:
            Monotonic time, in seconds.

        Raises:
            OutOfTime: the case's time is over.
        """
        now = time.monotonic()
        if now >= self.ends:
            raise OutOfTime(f"the case was not over within {self.ends - self.started:.1f} s")
        return min(now + timeout, self.ends)


class RawLink:
    """A connection on which a case decides every byte, and which notes what passes.

    Args:
        sock: connected, of any blocking mode.
        transcript: where everything is noted.
        timeout: how long to wait for anything, in seconds.
        name: of the channel in the transcript.
    """

    def __init__(self, sock: socket.socket, transcript: Transcript, timeout: float, name: str = "1") -> None:
        self.sock = sock
        self.timeout = timeout
        self.name = name
        #: Called with each command that the server sends while we wait for a reply.
        self.on_command: Callable[[RawLink, Received], None] = refuse_command
        #: Commands of the server that were seen.
        self.commands: list[Received] = []
        #: The second socket for the server's commands, if it was granted.
        self.twin: RawLink | None = None
        #: Bytes of all data-less error replies were 16: False once one was longer.
        self.short_errors = True
        #: How many error replies came.
        self.refusals = 0
        self._transcript = transcript
        self._next_id = 0x4000
        self._fds: list[int] = []
        sock.setblocking(False)

    @property
    def closed(self) -> bool:
        """Whether the case has closed it."""
        return self.sock.fileno() < 0

    # Sending

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, descriptors with the first of them.

        Args:
            data: any bytes, whole messages or not.
            fds: the descriptors, which stay open here.

        Raises:
            TimedOut: the server stopped reading.
            Closed: the server closed the connection.
        """
        self._transcript.add(">", self.name, data, len(fds))
        rights = struct.pack(f"{len(fds)}i", *fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
        view = memoryview(data)
        deadline = self._transcript.deadline(self.timeout)
        while view:
            try:
                sent = self.sock.sendmsg([view], ancillary)
            except BlockingIOError:
                self._wait(deadline, "the server stopped reading", write=True)
                continue
            except OSError as error:
                raise Closed(f"the server closed the connection while it was sent to: {error}") from None
            view, ancillary = view[sent:], []

    def command(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0, msg_id: int | None = None
    ) -> int:
        """Send a command and wait for nothing.

        Args:
            command: its number.
            payload: what follows the header.
            fds: descriptors that go with it.
            flags: the header's flags.
            msg_id: the header's message id; the next free one unless given.

        Returns:
            Its message id.
        """
        if msg_id is None:
            self._next_id = msg_id = (self._next_id + 1) & 0xFFFF
        self.send(wire.pack(command, payload, msg_id=msg_id, flags=flags), fds)
        return msg_id

    # Receiving

    def receive(self, timeout: float | None = None) -> Received:
        """Take the next message, whatever it is.

        Args:
            timeout: how long to wait, in seconds; the link's own unless given.

        Raises:
            TimedOut: nothing, or only a part, came in time.
            Closed: the stream ended.
            CaseFailed: the header has an impossible size.
        """
        deadline = self._transcript.deadline(self.timeout if timeout is None else timeout)
        fds: list[int] = []
        head = self._exactly(HEADER_SIZE, deadline, fds)
        early = len(fds)
        msg_id, command, size, flags, error = HEADER.unpack(head)
        if not HEADER_SIZE <= size <= _SIZE_MAX:
            self._transcript.add("<", self.name, head, early)
            raise CaseFailed(f"the server sent a header with msg_size {size}: {head.hex(' ')}")
        try:
            payload = self._exactly(size - HEADER_SIZE, deadline, fds)
        except CaseFailed as failure:
            self._transcript.add("<", self.name, head, early)
            raise type(failure)(f"{failure} (inside a message that announced {size} bytes)") from None
        self._transcript.add("<", self.name, head + payload, len(fds))
        self._fds.extend(fds)
        return Received(msg_id, command, size, flags, error, payload, tuple(fds), early == len(fds))

    def reply(self, msg_id: int, command: int, timeout: float | None = None) -> Received:
        """Wait for the reply to a command; commands of the server are handled meanwhile.

        Args:
            msg_id: the command's message id.
            command: the command's number.
            timeout: how long to wait, in seconds; the link's own unless given.

        Raises:
            CaseFailed: another reply came, or its header is wrong.
        """
        deadline = self._transcript.deadline(self.timeout if timeout is None else timeout)
        while True:
            link = self._readable(deadline, f"no reply to {wire.command_name(command)} id {msg_id}")
            message = link.receive(max(0.01, deadline - time.monotonic()))
            if message.is_reply and link is self:
                break
            self._serve(link, message)
        same(msg_id, message.msg_id, "message id of the reply")
        same(command, message.command, "command of the reply")
        known = wire.REPLY | (wire.ERROR if message.failed else 0)
        same(hex(known), hex(message.flags), "flags of the reply")
        self.refusals += message.failed
        if message.failed and message.payload:
            self.short_errors = False
        return message

    def serve(self, seconds: float) -> bool:
        """Wait for a command of the server and handle it.

        Args:
            seconds: how long to wait.

        Returns:
            Whether one came in time.

        Raises:
            CaseFailed: a reply came that nobody waits for.
        """
        try:
            link = self._readable(self._transcript.deadline(seconds), "")
        except TimedOut:
            return False
        message = link.receive()
        check(not message.is_reply, f"a reply that nobody waits for: {message}")
        self._serve(link, message)
        return True

    def _serve(self, link: RawLink, message: Received) -> None:
        check(message.flags & wire.TYPE_MASK == wire.COMMAND, f"the server sent a message of no known type: {message}")
        link.commands.append(message)
        check(len(link.commands) <= _COMMANDS_MAX, f"the server sent more than {_COMMANDS_MAX} commands of its own")
        self.on_command(link, message)

    def call(
        self,
        command: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        timeout: float | None = None,
    ) -> Received:
        """Send a command and wait for its reply.

        Args:
            command: its number.
            payload: what follows the header.
            fds: descriptors that go with it.
            flags: the header's flags.
            timeout: how long to wait, in seconds; the link's own unless given.

        Returns:
            The reply, which may be an error.
        """
        return self.reply(self.command(command, payload, fds, flags=flags), command, timeout)

    def ok(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, timeout: float | None = None
    ) -> Received:
        """Send a command that has to succeed.

        Args:
            command: its number.
            payload: what follows the header.
            fds: descriptors that go with it.
            timeout: how long to wait for the reply, in seconds; the link's own unless given.

        Returns:
            The reply.

        Raises:
            CaseFailed: the server refused it.
        """
        reply = self.call(command, payload, fds, timeout=timeout)
        if reply.failed:
            raise CaseFailed(f"{wire.command_name(command)} failed with error {reply.error}; it must succeed")
        return reply

    def refused(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a command that has to fail with any error number.

        Args:
            command: its number.
            payload: what follows the header.
            fds: descriptors that go with it.

        Returns:
            The error number.

        Raises:
            CaseFailed: it succeeded, or the error number is not positive.
        """
        reply = self.call(command, payload, fds)
        if not reply.failed:
            raise CaseFailed(f"{wire.command_name(command)} succeeded; it must fail")
        check(reply.error < 1 << 31, f"the error number {reply.error:#x} is not positive")
        return reply.error

    def alive(self) -> None:
        """Check that the connection still answers, and knows GET_INFO."""
        reply = self.ok(Command.DEVICE_GET_INFO, wire.info())
        same(16, len(reply.payload), "payload of GET_INFO")

    def answers(self) -> None:
        """Check that the connection still answers, whatever: in some states of the device commands may be refused."""
        self.call(Command.DEVICE_GET_INFO, wire.info())

    def silent(self, seconds: float) -> None:
        """Check that nothing comes.

        Args:
            seconds: for how long.

        Raises:
            CaseFailed: the server sent something.
        """
        if self._poll(seconds):
            raise CaseFailed(f"the server had to send nothing, but sent: {self.receive()}")

    def ends(self, timeout: float | None = None) -> bool:
        """Wait for the server to close the connection; what still comes before is taken.

        Args:
            timeout: how long to wait, in seconds; the link's own unless given.

        Returns:
            Whether it did.
        """
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        try:
            while time.monotonic() < end:
                self.receive(max(0.01, end - time.monotonic()))
            return False
        except Closed:
            return True
        except CaseFailed:
            return False

    def close(self) -> None:
        """Close the connection and every descriptor that came."""
        if self.twin is not None:
            self.twin.close()
        self.sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    # Below

    def adopt_twin(self, fd: int) -> RawLink:
        """Use a received descriptor as the twin socket.

        Args:
            fd: the descriptor; the twin's from now on.

        Returns:
            The twin.
        """
        self._fds.remove(fd)
        self.twin = RawLink(socket.socket(fileno=fd), self._transcript, self.timeout, f"{self.name}t")
        return self.twin

    def _readable(self, deadline: float, why: str) -> RawLink:
        poller = select.poll()
        links = {link.sock.fileno(): link for link in (self, self.twin) if link is not None}
        for fd in links:
            poller.register(fd, select.POLLIN)
        left = deadline - time.monotonic()
        found = poller.poll(max(0.0, left) * 1000)
        # What is there after the end is not looked at: a server that never stops sending would never be left.
        if not found or left <= 0:
            self._transcript.deadline(0)
            raise TimedOut(f"{why} within {self.timeout:g} s")
        # The main socket first: the end of both must be seen there.
        return next((links[fd] for fd, _ in found if links[fd] is self), links[found[0][0]])

    def _poll(self, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self.sock.fileno(), select.POLLIN)
        return bool(poller.poll(max(0.0, seconds) * 1000))

    def _wait(self, deadline: float, why: str, *, write: bool = False) -> None:
        poller = select.poll()
        poller.register(self.sock.fileno(), select.POLLOUT if write else select.POLLIN)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            self._transcript.deadline(0)
            raise TimedOut(f"{why} for {self.timeout:g} s")

    def _exactly(self, count: int, deadline: float, fds: list[int]) -> bytes:
        data = bytearray()
        while len(data) < count:
            if data and time.monotonic() > deadline:
                raise TimedOut(f"the server sent {len(data)} of {count} bytes within {self.timeout:g} s")
            try:
                more, ancillary, _, _ = self.sock.recvmsg(
                    count - len(data), socket.CMSG_SPACE(_FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                self._wait(deadline, f"the server sent nothing (after {len(data)} of {count} bytes)")
                continue
            except OSError as error:
                raise Closed(f"the server reset the connection: {error}") from None
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.extend(struct.unpack(f"{len(content) // 4}i", content[: len(content) // 4 * 4]))
            if not more:
                self._fds.extend(fds)
                raise Closed(f"the server closed the connection (after {len(data)} of {count} bytes)")
            data += more
        return bytes(data)


def refuse_command(link: RawLink, message: Received) -> None:
    """Answer a command of the server as QEMU answers one that it cannot place: no such device.

    Args:
        link: the connection that it came on.
        message: the command.
    """
    if not message.flags & wire.NO_REPLY:
        link.send(wire.pack(message.command, msg_id=message.msg_id, flags=wire.REPLY | wire.ERROR, error=19))
