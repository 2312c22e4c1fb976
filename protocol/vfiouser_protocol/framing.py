"""From a byte stream to messages, each with the file descriptors that came with it.

File descriptors travel beside the bytes, attached to *some* byte of a `sendmsg`. Two facts make their
assignment a matter of how one reads:

* the kernel hands out descriptors with the read that takes the byte they are attached to;
* one read may glue the end of a message without descriptors to the start of the next one that has some.

A reader that takes "as much as is there" cannot know whose descriptors it got, and would map one guest range's
memory instead of another's. So the rule is: **never read past the end of a message.** `Framer` says how many
bytes may be read next (16, then exactly the body) and refuses to be fed more. Within that rule
any segmentation works.

Lengths are hostile. A message that claims less than its header or more than the limit ends the connection,
because nobody knows where the next message starts; nothing is ever allocated for a length that was only
claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from vfiouser_protocol.constants import HEADER_SIZE
from vfiouser_protocol.errors import LocalProtocolError, StreamError
from vfiouser_protocol.header import NO_REPLY, TYPE_MASK, Header, command_name, error_reply, unpack_header
from vfiouser_protocol.limits import ACCEPTED_MSG_FDS

_new = tuple.__new__
#: Whatever the transport makes of a file descriptor; nothing here looks into it.
Descriptor: TypeAlias = Any


class Message(NamedTuple):
    """A whole message.

    Args:
        header: its header.
        payload: the bytes behind the header, or a view of them.
        fds: the file descriptors that came with it, now owned by the receiver of this message.
    """

    header: Header
    payload: bytes
    fds: list[Descriptor]


class Framer:
    """Cuts one direction of one stream into messages.

    Call protocol: read at most `bytes_wanted` bytes with one `recvmsg`, hand what came to `feed`, take the
    message if there is one, repeat. At the end of the stream ask `at_boundary` whether it ended between two
    messages. Whenever the stream is given up, close `pending_fds`: those are received but not handed out. The
    framer itself never closes anything.

    Args:
        max_message_size: largest acceptable message, header included, in bytes.
        max_fds: most file descriptors acceptable for one message.

    Attributes:
        bytes_wanted: how many bytes may be read next; 0 once the stream has failed.
        in_body: whether the header is complete, so that no descriptors are expected any more.
        pending_fds: file descriptors of the message that is not complete yet.
    """

    __slots__ = ("_header", "_max_fds", "_max_message_size", "_pieces", "bytes_wanted", "in_body", "pending_fds")

    def __init__(self, max_message_size: int, max_fds: int = ACCEPTED_MSG_FDS) -> None:
        self._max_message_size = max_message_size
        self._max_fds = max_fds
        self._header: Header | None = None
        self._pieces: list[bytes | memoryview] = []
        self.bytes_wanted = HEADER_SIZE
        self.in_body = False
        self.pending_fds: list[Descriptor] = []

    def __repr__(self) -> str:
        part = "header" if self._header is None else f"body of {command_name(self._header.command)}"
        return f"<Framer: {self.bytes_wanted} bytes of {part} wanted, {len(self.pending_fds)} fds pending>"

    @property
    def command(self) -> int | None:
        """The command whose body is awaited; None before the header is complete."""
        return None if self._header is None else self._header.command

    @property
    def at_boundary(self) -> bool:
        """Whether no byte of a next message has come yet, so that the stream may end here."""
        return self._header is None and not self._pieces and not self.pending_fds and self.bytes_wanted > 0

    def feed(self, data: bytes | memoryview, fds: Sequence[Descriptor] = ()) -> Message | None:
        """Take the bytes of one read and the file descriptors that came with it.

        Args:
            data: at most `bytes_wanted` bytes; may be any smaller piece. A view of a whole body becomes the payload as
                it is.
            fds: file descriptors received by the same call; they belong to the message that `data` is a part
                of.

        Returns:
            The message, if it is complete now.

        Raises:
            LocalProtocolError: more was read than wanted, or the stream has already failed.
            StreamError: the length in the header is impossible, or too many descriptors came. `reply` is the
                error
                reply that tells the peer, None if it must not be answered.

        Spec: vfio-user, "Header" (msg_size); SCM_RIGHTS of unix(7).
        """
        if fds:
            self.pending_fds.extend(fds)
            if len(self.pending_fds) > self._max_fds:
                raise self._failed(f"more than {self._max_fds} file descriptors came with one message", None)
        length = len(data)
        if length != self.bytes_wanted:
            self._take_piece(data, length)
            return None
        if self._pieces:
            self._pieces.append(data)
            data = b"".join(self._pieces)
            self._pieces = []
        header = self._header
        if header is None:
            if length == 0:
                raise LocalProtocolError("the stream has failed; it cannot be fed any more")
            header = unpack_header(data)
            size = header[2]
            if size != HEADER_SIZE:
                if not HEADER_SIZE < size <= self._max_message_size:
                    raise self._misfit(header, size)
                self._header = header
                self.in_body = True
                self.bytes_wanted = size - HEADER_SIZE
                return None
            data = b""
        self._header = None
        self.in_body = False
        self.bytes_wanted = HEADER_SIZE
        fds_of_message = self.pending_fds
        self.pending_fds = []
        return _new(Message, (header, data, fds_of_message))

    def _take_piece(self, data: bytes | memoryview, length: int) -> None:
        if length > self.bytes_wanted:
            raise LocalProtocolError(
                f"{length} bytes were read where {self.bytes_wanted} were wanted; "
                "file descriptors could not be told apart, the connection ends"
            )
        if length:
            self._pieces.append(data)
            self.bytes_wanted -= length

    def _misfit(self, header: Header, size: int) -> StreamError:
        return self._failed(
            f"{command_name(header.command)} #{header.msg_id} claims {size} bytes, allowed are "
            f"{HEADER_SIZE} to {self._max_message_size}; the connection ends",
            # Replies and NO_REPLY commands are never answered.
            None if header.flags & (TYPE_MASK | NO_REPLY) else header,
        )

    def _failed(self, message: str, header: Header | None) -> StreamError:
        self.bytes_wanted = 0
        self._pieces = []
        error = StreamError(message)
        if header is not None:
            error.reply = error_reply(header, error.errno)
        return error
