"""One stream of vfio-user messages over a UNIX socket, with descriptors attached to the right ones.

The framer says how many bytes may be read next, and no more are read: reading ahead would hand the descriptors of one
message to another, since the kernel glues them to the first byte of the read that crosses them. Each send is one
message.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from struct import Struct
from typing import TypeAlias

import trio

from vfiouser_oob.transport.activity import BACK_TO_BACK_NS, Activity
from vfiouser_oob.transport.fds import ForeignFd, HasFileno, OwnedFd, close_fds
from vfiouser_oob.transport.reaper import STRANGERS, Account
from vfiouser_protocol.buffers import BufferPool
from vfiouser_protocol.constants import Command
from vfiouser_protocol.errors import StreamError
from vfiouser_protocol.framing import Framer, Message

#: The kernel carries at most 253 descriptors per message (SCM_MAX_FD).
_ANCILLARY_SIZE = socket.CMSG_SPACE(253 * 4)
#: Plain numbers: the enumeration's members cost a microsecond per use.
_RECEIVE = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
_TRUNCATED = int(socket.MSG_CTRUNC)
_SEND = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
_SOCKET_LEVEL = int(socket.SOL_SOCKET)
_RIGHTS = int(socket.SCM_RIGHTS)
_FD_SIZE = 4
_unpack_fd = Struct("i").unpack
#: A piece of state of so many bytes is read to where it stays.
LARGE = 64 << 10
_STATE = int(Command.MIG_DATA_WRITE)
#: Bytes read of a body at once; room for more than the socket holds would be made in vain each time.
_PIECE = 256 << 10
#: Bytes that the socket shall hold of what we send, if the system permits: with less than a portion of state, each
#: takes several turns with the peer.
_SEND_BUFFER = 2 << 20
#: Unsent bytes above which the side that produces them has to wait.
HIGH_WATER = 4 << 20


#: Part of a message.
Piece: TypeAlias = "bytes | memoryview"


class EndOfStream(Exception):
    """The peer closed the stream, or the connection broke.

    Args:
        reason: how it ended.
        clean: whether it ended between two messages.
    """

    def __init__(self, reason: str, clean: bool) -> None:
        super().__init__(reason)
        self.clean = clean


class MessageSocket:
    """A message stream that never blocks; one task reads, any task sends.

    The socket's flags are left as they are, since somebody else may hold the same socket: each call says that it must
    not wait.

    Args:
        sock: a connected AF_UNIX stream socket; owned from now on.
        max_message_size: bytes of the largest message to accept.
        activity: the daemon's sockets, for bounded spinning; None reads without spinning.
        account: where the peer's descriptors are counted.

    Raises:
        OSError: the socket cannot be watched; it is closed.
    """

    def __init__(
        self,
        sock: socket.socket,
        max_message_size: int,
        activity: Activity | None = None,
        account: Account = STRANGERS,
    ) -> None:
        self._sock = sock
        self._account = account
        self._fd = sock.fileno()
        self._framer = Framer(max_message_size)
        self._activity = activity
        self._back_to_back = False
        #: A piece of state on its way in, and how much of it is there.
        self._state: memoryview | None = None
        self._state_has = 0
        #: Its memory; only while pieces of state follow each other.
        self._pool: BufferPool | None = None
        self._corked = False
        self._held: list[bytes] = []
        self._outbox: deque[tuple[memoryview, Sequence[OwnedFd]]] = deque()
        self._outbox_bytes = 0
        self._outbox_filled = trio.Event()
        self._outbox_drained = trio.Event()
        self._closed = False
        if activity is not None:
            try:
                activity.register(self._fd)
            except OSError:
                with suppress(OSError):  # it may be the socket itself that is unusable
                    sock.close()
                raise

    def fileno(self) -> int:
        """Return the socket's descriptor number."""
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    # Receiving

    def try_receive(self) -> Message | None:
        """Read one whole message if it is there.

        Returns:
            The message, its descriptors owned by the caller; None when more bytes have to arrive first.

        Raises:
            EndOfStream: the peer has gone.
            StreamError: the bytes are no vfio-user stream, or descriptors were lost.
        """
        framer = self._framer
        sock = self._sock
        try:
            while True:
                wanted = framer.bytes_wanted
                if framer.in_body:
                    if wanted >= LARGE and framer.command == _STATE:
                        return self._receive_state(wanted)
                    piece = wanted if wanted < _PIECE else _PIECE
                    data, ancillary, flags, _ = sock.recvmsg(piece, _ANCILLARY_SIZE, _RECEIVE)
                    if ancillary or flags & _TRUNCATED:
                        self._discard(ancillary)
                    message = framer.feed(data) if data else None
                else:
                    data, ancillary, flags, _ = sock.recvmsg(wanted, _ANCILLARY_SIZE, _RECEIVE)
                    fds = self._owned(ancillary) if ancillary else ()
                    if flags & _TRUNCATED:
                        close_fds(fds)
                        raise StreamError(why_lost())
                    message = framer.feed(data, fds) if data else None
                if message is not None:
                    if self._pool is not None:
                        self._pool = None
                    return message
                if not data:
                    raise EndOfStream("the peer closed the connection", clean=framer.at_boundary)
        except BlockingIOError:
            return None
        except OSError as error:
            raise EndOfStream(f"the connection broke: {error.strerror}", clean=False) from error

    def _receive_state(self, size: int) -> Message:
        """Read a piece of state to where it stays, in memory that is used again.

        Nothing of it is given to the framer before it is whole, so it is not put together there.

        Args:
            size: bytes of the body; the framer has checked that so many are allowed.

        Raises:
            BlockingIOError: there is more to come.
            EndOfStream: the peer has gone.
        """
        if self._state is None:
            if self._pool is None:
                self._pool = BufferPool()
            self._state, self._state_has = self._pool.take(size), 0
        while self._state_has < size:
            count, ancillary, _, _ = self._sock.recvmsg_into(
                [self._state[self._state_has :]], _ANCILLARY_SIZE, _RECEIVE
            )
            if ancillary:
                self._discard(ancillary)
            if not count:
                raise EndOfStream("the peer closed the connection", clean=False)
            self._state_has += count
        state, self._state = self._state, None
        message = self._framer.feed(state.toreadonly())
        assert message is not None
        # The next one is not sent before this one is answered, and that takes longer than it is worth to spin.
        self._back_to_back = False
        return message

    def _owned(self, ancillary: list[tuple[int, int, bytes]]) -> list[ForeignFd]:
        """Take over the descriptors that came with a message.

        Raises:
            StreamError: what the peer sent before cannot be closed, and there is no room for more.
        """
        fds = [ForeignFd(fd, self._account) for fd in descriptors_in(ancillary)]
        if self._account.held_up:
            close_fds(fds)
            raise StreamError(
                f"{self._account.held} descriptors of this peer cannot be closed; the daemon accepts no more"
            )
        return fds

    def _discard(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        """Give up what came with a body: descriptors come with a message's first bytes.

        They are received all the same, since what the kernel discards it closes in the middle of our call.
        """
        close_fds(self._owned(ancillary))

    async def receive(self) -> Message:
        """Wait for one whole message.

        Returns:
            The message, its descriptors owned by the caller.

        Raises:
            EndOfStream: the peer has gone.
            StreamError: as for `try_receive`.
        """
        while True:
            message = self.try_receive()
            if message is not None:
                return message
            await self.wait_for_data()

    def spin(self) -> bool:
        """Look for the next message for a moment, if messages have been coming back to back.

        Returns:
            Whether there is data to read now.
        """
        if self._state is not None:
            return False
        return self._back_to_back and self._activity is not None and self._activity.spin(self._fd)

    async def wait_for_data(self) -> None:
        """Sleep until there is something to read; how long that takes decides whether to spin the next time.

        Raises:
            EndOfStream: the socket was closed on our side meanwhile.
        """
        start = time.perf_counter_ns()
        try:
            await trio.lowlevel.wait_readable(self._fd)
            self._back_to_back = time.perf_counter_ns() - start < BACK_TO_BACK_NS
        except (trio.ClosedResourceError, ValueError, OSError) as error:
            raise EndOfStream("the connection was closed on our side", clean=False) from error

    # What becomes of messages that came; only a stream that another process may have to go on with wants to know.

    #: Whether another process may go on with it.
    kept = False
    #: Whether an answer waits for room, so that nothing more may be executed.
    blocked = False

    def begin(self) -> None:
        """The first command that was not answered is about to be executed."""

    def answer(self, data: bytes, fds: Sequence[HasFileno] = ()) -> None:
        """Answer the first command that was not; otherwise like `send`.

        Args:
            data: the whole message; empty if nobody waits for one.
            fds: descriptors that go with it; they stay the caller's.
        """
        if data:
            self.send(data, fds)

    def settle(self) -> None:
        """The message that came last needs no answer."""

    # Sending

    def send(self, data: bytes, fds: Sequence[HasFileno] = ()) -> None:
        """Send one message, now or as soon as the peer takes it; never waits.

        Args:
            data: the whole message.
            fds: descriptors that go with its first byte; they stay the caller's and may be closed at once.

        Raises:
            EndOfStream: the peer has gone.
        """
        if self._corked:
            if not fds:
                self._held.append(data)
                return
            self.uncork()
        if self._closed:
            raise EndOfStream("the connection was closed on our side", clean=False)
        if self._outbox:
            self._put_off(memoryview(data), fds)
            return
        try:
            sent = self._send_some(data, fds) if fds else self._sock.send(data, _SEND)
        except BlockingIOError:
            self._put_off(memoryview(data), fds)
            return
        except OSError as error:
            raise EndOfStream(f"the connection broke: {error.strerror}", clean=False) from error
        if sent < len(data):
            self._put_off(memoryview(data)[sent:], ())

    def send_pieces(self, pieces: Sequence[Piece]) -> None:
        """Send one message that lies in several places, without copying it together; otherwise like `send`.

        Args:
            pieces: the message; what they lie in must not change any more.

        Raises:
            EndOfStream: the peer has gone.
        """
        if self._corked or self._closed or self._outbox:
            self.send(b"".join(pieces))
            return
        try:
            sent = self._sock.sendmsg(pieces, (), _SEND)
            if sent >= LARGE:
                # It takes the peer longer to read this than it is worth to spin.
                self._back_to_back = False
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise EndOfStream(f"the connection broke: {error.strerror}", clean=False) from error
        for piece in pieces:
            if sent < len(piece):
                self._put_off(memoryview(piece)[sent:], ())
            sent = max(0, sent - len(piece))

    def make_room(self) -> None:
        """Let the socket hold a whole portion of state."""
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        except OSError:  # then it takes more turns
            pass

    def cork(self) -> None:
        """Hold messages back until `uncork`, to send them in one piece; nothing may be awaited in between."""
        self._corked = True

    def uncork(self) -> None:
        """Send what was held back.

        Raises:
            EndOfStream: the peer has gone.
        """
        self._corked = False
        if self._held:
            held, self._held = self._held, []
            self.send(b"".join(held))

    @property
    def congested(self) -> bool:
        """Whether so much is unsent that producers should wait for `flushed`."""
        return self._outbox_bytes > HIGH_WATER

    async def flushed(self) -> None:
        """Wait until everything was handed to the kernel."""
        while self._outbox:
            await self._outbox_drained.wait()

    async def run_sender(self) -> None:
        """Send what `send` had to put off; one task per socket runs this until it is cancelled or the peer has gone."""
        while True:
            while self._outbox:
                data, fds = self._outbox[0]
                try:
                    sent = self._send_some(data, fds)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._fd)
                    continue
                except OSError as error:
                    raise EndOfStream(f"the connection broke: {error.strerror}", clean=False) from error
                self._outbox_bytes -= sent
                close_fds(fds)
                if sent < len(data):
                    self._outbox[0] = (data[sent:], ())
                else:
                    self._outbox.popleft()
            self._outbox_drained.set()
            self._outbox_filled = trio.Event()
            await self._outbox_filled.wait()

    def _send_some(self, data: bytes | memoryview, fds: Sequence[HasFileno]) -> int:
        if fds:
            return socket.send_fds(self._sock, [data], [fd.fileno() for fd in fds], _SEND)
        return self._sock.send(data, _SEND)

    def _put_off(self, data: memoryview, fds: Sequence[HasFileno]) -> None:
        # Whoever sent them is free to close them before their turn comes, so these are our own.
        copies = self._copies(fds) if fds else ()
        if not self._outbox:
            self._outbox_drained = trio.Event()
            self._outbox_filled.set()
        self._outbox.append((data, copies))
        self._outbox_bytes += len(data)

    def _copies(self, fds: Sequence[HasFileno]) -> Sequence[OwnedFd]:
        copies: list[OwnedFd] = []
        try:
            for fd in fds:
                copy = fd.duplicate() if isinstance(fd, OwnedFd) else OwnedFd(os.dup(fd.fileno()))
                copies.append(copy)
        except OSError as error:
            close_fds(copies)
            raise EndOfStream(f"cannot keep descriptors until the peer reads them: {error.strerror}", False) from error
        return copies

    def close(self) -> None:
        """Close the socket and every descriptor of a message that was not complete yet."""
        if self._closed:
            return
        self._closed = True
        close_fds(self._framer.pending_fds)
        for _, fds in self._outbox:
            close_fds(fds)
        self._outbox.clear()
        self._outbox_drained.set()
        if self._activity is not None:
            self._activity.unregister(self._fd)
        trio.lowlevel.notify_closing(self._sock)
        self._hang_up()
        # What is still unread goes with it, and with that the descriptors of others.
        ForeignFd(self._sock.detach(), self._account).close()

    def _hang_up(self) -> None:
        """Tell the peer that this is the end."""
        with suppress(OSError):  # the peer has gone already
            self._sock.shutdown(socket.SHUT_RDWR)


def why_lost() -> str:
    """Say why control data was truncated, although there is room for as many descriptors as the kernel carries."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"descriptors of a message were lost: the {limit} that this process may have are in use (LimitNOFILE=), or a "
        "security module refused them"
    )


def descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Descriptors that came with a message.

    Args:
        ancillary: what recvmsg said.
    """
    numbers: list[int] = []
    for level, kind, data in ancillary:
        if level == _SOCKET_LEVEL and kind == _RIGHTS:
            if len(data) == _FD_SIZE:  # usually it is one
                numbers += _unpack_fd(data)
            else:
                whole = len(data) - len(data) % _FD_SIZE
                numbers.extend(memoryview(data)[:whole].cast("i"))
    return numbers
