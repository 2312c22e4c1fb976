"""A message stream that another process can go on with at any moment, without its peer noticing.

    socket ──look──► message ──► answer ──► outbox ──one store: it counts──► message leaves the socket ──► sent

Rule 1: *a message is looked at, not taken* (MSG_PEEK), until it is answered. What a killed process had read is still
        there for its successor: whole, with its descriptors, also half a message.
Rule 2: *the kernel counts* how much of what was looked at is still there (SO_PEEK_OFF), so it is known whether a
        message that was answered has left.
Rule 3: *an answer goes by the outbox* (`stream_memory`), which is sent from where it lies. Only what carries
        descriptors, or is larger than the outbox, is sent in the usual way.
Rule 4: *descriptors belong to the message in which the first byte of their `sendmsg` lies*: they leave with that one. A
        look ends behind the first descriptors, the kernel sees to that; where it has several messages, a second look
        finds where that `sendmsg` begins.
Rule 5: *a message that a socket cannot hold is taken out of it*, when it is the first. Who is killed then loses the
        stream, and the memory says so.
"""

from __future__ import annotations

import fcntl
import select
import socket
import termios
import time
from array import array
from collections import deque
from collections.abc import Sequence

import trio

from vfiouser_oob.persist.held import HeldMessage, PutOff, begin_of_last
from vfiouser_oob.persist.stream_memory import CommandStage, StreamMemory, Torn
from vfiouser_oob.transport.activity import BACK_TO_BACK_NS, Activity
from vfiouser_oob.transport.fds import ForeignFd, HasFileno, close_fds
from vfiouser_oob.transport.message_socket import EndOfStream, MessageSocket, descriptors_in, why_lost
from vfiouser_oob.transport.reaper import STRANGERS, Account
from vfiouser_protocol.constants import HEADER_SIZE
from vfiouser_protocol.errors import StreamError
from vfiouser_protocol.framing import Message
from vfiouser_protocol.header import Header, unpack_header

_PEEK_OFF = getattr(socket, "SO_PEEK_OFF", 42)
_LOOK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_TAKE = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_CTRUNC)
_ANCILLARY_SIZE = socket.CMSG_SPACE(253 * 4)
#: Bytes that are looked at in one go: many register accesses; and all that a socket may hold.
_CHUNK = 4096
_ALL = 1 << 20
#: Bytes of a message that a socket holds beside others, with 208 KiB of room in Linux's accounts.
LARGEST_HELD = 80 << 10
#: Bytes of a message that goes by the outbox.
_LARGEST_PUT = 80 << 10


class KeptSocket(MessageSocket):
    """A message stream whose socket and memory outlive this process.

    Args:
        sock: a connected AF_UNIX stream socket; owned from now on. It is made not to wait.
        max_message_size: bytes of the largest message to accept.
        memory: its words and outbox; owned from now on.
        activity: the daemon's sockets, for bounded spinning.
        account: where the peer's descriptors are counted.

    Raises:
        OSError: the socket cannot be watched; it and the memory are closed.
    """

    kept = True

    def __init__(
        self,
        sock: socket.socket,
        max_message_size: int,
        memory: StreamMemory,
        activity: Activity | None = None,
        account: Account = STRANGERS,
    ) -> None:
        try:
            super().__init__(sock, max_message_size, activity, account)
        except BaseException:
            memory.close()
            raise
        sock.setblocking(False)
        self.memory = memory
        #: How far the first message was that another process has left here.
        self.inherited = memory.stage
        #: Left to another process: nothing is done with it any more.
        self.left = False
        self._max_size = max_message_size
        self._arrivals = select.epoll(1)
        self._arrivals.register(self._fd, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        self._take_what_was_answered()
        sock.setsockopt(socket.SOL_SOCKET, _PEEK_OFF, 0)
        #: Looked at and not given out; bytes that were given out; and bytes that were looked at and are in the socket.
        self._chunk = b""
        self._given = 0
        self._unconsumed = 0
        #: Descriptors, by how many bytes at least are given out when their message is.
        self._fds: deque[tuple[int, list[ForeignFd]]] = deque()
        self._entries: deque[HeldMessage] = deque()
        #: Nothing more is looked at before the last message has left.
        self._barrier = False
        self._large = False
        self._lifted = trio.Event()
        self._waiting: deque[PutOff] = deque()
        if memory.unsent:
            self._outbox_drained = trio.Event()
            self._outbox_filled.set()

    def _take_what_was_answered(self) -> None:
        """Take what another process has answered, and had no time to take."""
        left = self.memory.left_in_socket(self._sock.getsockopt(socket.SOL_SOCKET, _PEEK_OFF))
        self._sock.setsockopt(socket.SOL_SOCKET, _PEEK_OFF, 0)
        self._take_out(left)
        self.memory.consumed()

    # Receiving

    def try_receive(self) -> Message | None:
        """Look at one whole message if it is there; errors are those of `MessageSocket`."""
        if self._barrier or self.left:
            return None
        try:
            while not self._large:
                message = self._next()
                if message is not None or self._large:
                    break
                self._look()
            return self._receive_large() if self._large else message
        except BlockingIOError:
            return None
        except OSError as error:
            raise EndOfStream(f"the connection broke: {error.strerror}", clean=False) from error

    def _next(self) -> Message | None:
        """The first message of what was looked at, if it is whole."""
        chunk = self._chunk
        if len(chunk) < HEADER_SIZE:
            return None
        header = unpack_header(chunk[:HEADER_SIZE])
        size = header[2]
        if len(chunk) < size or size < HEADER_SIZE:
            if not HEADER_SIZE <= size <= self._max_size:
                self._framer.feed(chunk[:HEADER_SIZE])  # it knows what to say
                raise StreamError("the length of a message makes no sense")
            self._large = size > LARGEST_HELD
            return None
        return self._give(header, chunk, size)

    def _give(self, header: Header, chunk: bytes, size: int) -> Message:
        fds: list[ForeignFd] = []
        self._given += size
        while self._fds and self._fds[0][0] <= self._given:
            fds += self._fds.popleft()[1]
        self._chunk = chunk[size:]
        self._hold(HeldMessage(size, bool(fds)))
        return Message(header, chunk[HEADER_SIZE:size], list(fds))

    def _hold(self, entry: HeldMessage) -> None:
        self._entries.append(entry)
        if self._activity is not None:
            self._activity.holding.add(self._fd)

    def _look(self) -> None:
        """Look at more.

        Raises:
            BlockingIOError: there is no more.
            EndOfStream: the peer has gone.
        """
        data, fds = self._look_at(_CHUNK)
        if fds and len(data) == _CHUNK:
            # The kernel tells of descriptors also when they come behind what was looked at.
            close_fds(fds)
            self._sock.setsockopt(socket.SOL_SOCKET, _PEEK_OFF, self._unconsumed)
            data, fds = self._look_at(_ALL)
        if not data:
            raise EndOfStream("the peer closed the connection", clean=not self._chunk and not self._entries)
        at, before = self._unconsumed, len(self._chunk)
        self._unconsumed += len(data)
        self._chunk += data
        if fds:
            # Mostly there is one message, and so it is that one's.
            alone = len(self._chunk) < HEADER_SIZE or unpack_header(self._chunk[:HEADER_SIZE])[2] >= len(self._chunk)
            begin = 0 if alone else self._begin_of_sent(at, len(data))
            self._fds.append((self._given + before + begin + 1, fds))

    def _begin_of_sent(self, at: int, size: int) -> int:
        """Where the `sendmsg` begins, in a look of that size from there on, whose descriptors that look has told of."""
        self._sock.setsockopt(socket.SOL_SOCKET, _PEEK_OFF, at)
        begin = begin_of_last(self._sock, size)
        self._sock.setsockopt(socket.SOL_SOCKET, _PEEK_OFF, self._unconsumed)
        return begin

    def _look_at(self, size: int) -> tuple[bytes, list[ForeignFd]]:
        data, ancillary, flags, _ = self._sock.recvmsg(size, _ANCILLARY_SIZE, _LOOK)
        fds = self._owned(ancillary) if ancillary else []
        if flags & _TRUNCATED:
            close_fds(fds)
            raise StreamError(why_lost())
        return data, fds

    def _receive_large(self) -> Message | None:
        """Take a large message out of the socket, once it is the first."""
        if self._entries:
            self._barrier = True
            return None
        if self._chunk:
            self.memory.tear(Torn.RECEIVING)
            self._drop_fds()  # they come again
            self._chunk, self._unconsumed = b"", 0
            self._sock.setsockopt(socket.SOL_SOCKET, _PEEK_OFF, 0)
        message = super().try_receive()
        if message is not None:
            self._large = False
            self._barrier = True
            self._hold(HeldMessage(0, False))
        return message

    def spin(self) -> bool:
        """Look for the next message for a moment, unless others wait for their answers."""
        return not self._entries and super().spin()

    async def wait_for_data(self) -> None:
        """Sleep until there may be something to look at."""
        if self.left:
            await trio.sleep_forever()
        if self._barrier:
            self._lifted = trio.Event()
            await self._lifted.wait()
        elif not self._entries and not self._chunk:
            await super().wait_for_data()
        else:
            # There is something to read all the time, so only what arrives counts.
            start = time.perf_counter_ns()
            try:
                await trio.lowlevel.wait_readable(self._arrivals)
                self._arrivals.poll(0)
                self._back_to_back = time.perf_counter_ns() - start < BACK_TO_BACK_NS
            except (trio.ClosedResourceError, ValueError, OSError) as error:
                raise EndOfStream("the connection was closed on our side", clean=False) from error

    # Answering

    def begin(self) -> None:
        """The first command that was not answered is about to be executed."""
        self.memory.begin()

    def answer(self, data: bytes, fds: Sequence[HasFileno] = ()) -> None:
        """Answer the first command that was not."""
        if self.left:
            return
        if self._closed:
            raise EndOfStream("the connection was closed on our side", clean=False)
        if self._waiting or not self._put(data, fds):
            self._put_off_message(data, fds, answer=True)
            return
        self._answered()
        if not self._corked:
            self._flush()

    def settle(self) -> None:
        """The message that came last needs no answer."""
        if self._entries and not self.left:
            self._entries[-1].settled = True
            self._take_settled()

    def _put(self, data: bytes, fds: Sequence[HasFileno]) -> bool:
        """Put a message into the outbox, if it can go by that and there is room."""
        if fds or len(data) > _LARGEST_PUT or not self.memory.has_room(len(data)):
            return False
        if data:
            self.memory.put(data)
        return True

    def _answered(self) -> None:
        """The first message is a command that is answered now: it leaves."""
        entry = self._entries.popleft()
        memory = self.memory
        if entry.size:
            memory.consuming(entry.size, self._unconsumed, command=True)
        memory.commit()
        self._leave(entry)
        if not entry.size:
            memory.mend(Torn.RECEIVING)
        self._take_settled()

    def _take_settled(self) -> None:
        while self._entries and self._entries[0].settled:
            entry = self._entries.popleft()
            if entry.size:
                self.memory.consuming(entry.size, self._unconsumed, command=False)
            else:
                self.memory.mend(Torn.RECEIVING)
            self._leave(entry)

    def _leave(self, entry: HeldMessage) -> None:
        if entry.size:
            if self._take_out(entry.size) is not entry.with_fds:
                raise EndOfStream("descriptors came that belong to another message of the same sendmsg", clean=False)
            self.memory.consumed()
            self._unconsumed -= entry.size
        if not self._entries:
            if self._activity is not None:
                self._activity.holding.discard(self._fd)
            self._barrier = False
            self._lifted.set()

    def _take_out(self, size: int) -> bool:
        """Take bytes out of the socket; returns whether descriptors were attached to them."""
        with_fds = False
        while size:
            data, ancillary, _, _ = self._sock.recvmsg(size, _ANCILLARY_SIZE, _TAKE)
            if ancillary:
                with_fds = True
                close_fds([ForeignFd(fd, self._account) for fd in descriptors_in(ancillary)])
            if not data:
                break
            size -= len(data)
        return with_fds

    # Sending

    def send(self, data: bytes, fds: Sequence[HasFileno] = ()) -> None:
        """Send a message that is no answer."""
        if self.left:
            return
        if self._closed:
            raise EndOfStream("the connection was closed on our side", clean=False)
        if not self._waiting and self._put(data, fds):
            self.memory.publish()
            self._flush()
        else:
            self._put_off_message(data, fds, answer=False)

    def send_pieces(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Answer by a message that lies in several places."""
        self.answer(b"".join(pieces))

    def uncork(self) -> None:
        """Send what was held back."""
        self._corked = False
        self._flush()

    def _flush(self) -> None:
        memory = self.memory
        if self.left or not memory.unsent:
            return
        try:
            while memory.send(self._fd):
                pass
        except BlockingIOError:
            self._outbox_drained = trio.Event()
            self._outbox_filled.set()
        except OSError as error:
            raise EndOfStream(f"the connection broke: {error.strerror}", clean=False) from error

    def _put_off_message(self, data: bytes, fds: Sequence[HasFileno], *, answer: bool) -> None:
        """Send a message without the outbox, or when there is room."""
        waiting = PutOff(memoryview(data), self._copies(fds) if fds else (), answer)
        rest: PutOff | None = waiting
        if not self._waiting and not self.memory.unsent:
            rest = self._send_directly(waiting)
        if rest is not None:
            self._waiting.append(rest)
            self.blocked = True
            self._outbox_drained = trio.Event()
            self._outbox_filled.set()

    def _send_directly(self, waiting: PutOff) -> PutOff | None:
        """Send a message while the outbox is empty; returns what has to wait of it."""
        data, fds, answer = waiting
        memory = self.memory
        outbox = not fds and len(data) <= _LARGEST_PUT and memory.has_room(len(data))
        if outbox:
            memory.put(data)
        else:
            rest = self._send_past_outbox(waiting)
            if rest is not None:
                return rest
        if answer:
            self._answered()
        elif outbox:
            memory.publish()
        if len(data) and not fds:
            memory.mend(Torn.SENDING)
        if outbox:
            self._flush()
        return None

    def _send_past_outbox(self, waiting: PutOff) -> PutOff | None:
        data, fds, answer = waiting
        if len(data) > _LARGEST_PUT:
            self.memory.tear(Torn.SENDING)
        elif answer:
            self.memory.direct()
        try:
            sent = self._send_some(data, fds)
        except BlockingIOError:
            return waiting
        except OSError as error:
            raise EndOfStream(f"the connection broke: {error.strerror}", clean=False) from error
        close_fds(fds)
        return PutOff(data[sent:], (), answer) if sent < len(data) else None

    @property
    def congested(self) -> bool:
        """Whether so much is unsent that producers should wait for `flushed`."""
        return bool(self._waiting)

    async def flushed(self) -> None:
        """Wait until everything was handed to the kernel."""
        while (self._waiting or self.memory.unsent) and not self.left:
            await self._outbox_drained.wait()

    async def run_sender(self) -> None:
        """Send what could not be sent at once; one task per socket runs this until it is cancelled."""
        while True:
            while (self.memory.unsent or self._waiting) and not self.left:
                await trio.lowlevel.wait_writable(self._fd)
                self._send_more()
            self._outbox_drained.set()
            self._outbox_filled = trio.Event()
            await self._outbox_filled.wait()

    def _send_more(self) -> None:
        drained = self._outbox_drained
        self._flush()
        self._outbox_drained = drained
        while self._waiting and not self.memory.unsent:
            rest = self._send_directly(self._waiting.popleft())
            if rest is not None:
                self._waiting.appendleft(rest)
                break
        self.blocked = bool(self._waiting)

    async def answer_was_heard(self, within_s: float) -> None:
        """Find out what became of an answer with descriptors that another process may have sent: who has it, asks on.

        Args:
            within_s: how long to wait for that.
        """
        if self.inherited is not CommandStage.DIRECT:
            return
        head = self._sock.recv(HEADER_SIZE, _LOOK)
        size = unpack_header(head)[2] if len(head) == HEADER_SIZE else 0
        self.inherited = CommandStage.IDLE  # what has such answers does no more when it is done twice
        with trio.move_on_after(within_s):
            while self._unread() <= size:
                await trio.lowlevel.wait_readable(self._arrivals)
                self._arrivals.poll(0)
        self._sock.setsockopt(socket.SOL_SOCKET, _PEEK_OFF, size)
        if self._unread() > size > 0:
            self.memory.consuming(size, size, command=True)
            self.memory.commit()
            self._take_out(size)
            self.memory.consumed()
        self._sock.setsockopt(socket.SOL_SOCKET, _PEEK_OFF, 0)

    def _unread(self) -> int:
        count = array("i", [0])
        fcntl.ioctl(self._fd, termios.FIONREAD, count)
        return count[0]

    # The end

    def leave(self) -> None:
        """Leave the stream to another process as it is; nothing is done with it any more."""
        self.left = True

    def _hang_up(self) -> None:
        if not self.left:
            super()._hang_up()

    def close(self) -> None:
        """Close what is this process's; the peer notices nothing if the stream was left."""
        if self._closed:
            return
        trio.lowlevel.notify_closing(self._arrivals)
        super().close()
        self._arrivals.close()
        self._drop_fds()
        for waiting in self._waiting:
            close_fds(waiting.fds)
        self._waiting.clear()
        self._lifted.set()
        self.memory.close()

    def _drop_fds(self) -> None:
        for _, fds in self._fds:
            close_fds(fds)
        self._fds.clear()
