"""The 16 bytes in front of every message, in both directions.

The layout is declared once, in `HEADER_LAYOUT`; `pack_header` and `unpack_header`, through which every message
passes, do with `struct` what it says.
"""

from __future__ import annotations

from errno import errorcode
from struct import error as struct_error
from typing import NamedTuple

from construct import Int16ul, Int32ul, Struct

from vfiouser_protocol.constants import HEADER_SIZE, Command, HeaderFlags, MessageType
from vfiouser_protocol.errors import LocalProtocolError
from vfiouser_protocol.packed import packed

HEADER_LAYOUT = Struct(
    "msg_id" / Int16ul,
    "command" / Int16ul,
    "msg_size" / Int32ul,
    "flags" / Int32ul,
    "error" / Int32ul,
)

TYPE_MASK = int(HeaderFlags.TYPE_MASK)
NO_REPLY = int(HeaderFlags.NO_REPLY)
ERROR = int(HeaderFlags.ERROR)
COMMAND = int(MessageType.COMMAND)
REPLY = int(MessageType.REPLY)

_packed = packed(HEADER_LAYOUT)
_pack = _packed.pack
_unpack = _packed.unpack
_new_tuple = tuple.__new__


class Header(NamedTuple):
    """The header's fields as they are on the wire.

    Args:
        msg_id: chosen by the sender of a command and echoed in its reply; it may repeat.
        command: command number, repeated in the reply.
        msg_size: bytes of the whole message, these 16 included.
        flags: type in bits 0–3, NO_REPLY, ERROR; other bits are ignored.
        error: error number of an error reply; ignored in a command.

    Spec: vfio-user, "Header".
    """

    msg_id: int
    command: int
    msg_size: int
    flags: int
    error: int = 0

    @property
    def type(self) -> int:
        """The type bits; values other than those of `MessageType` are undefined."""
        return self.flags & TYPE_MASK

    @property
    def is_command(self) -> bool:
        """Whether this is a command."""
        return self.flags & TYPE_MASK == COMMAND

    @property
    def is_reply(self) -> bool:
        """Whether this is a reply."""
        return self.flags & TYPE_MASK == REPLY

    @property
    def no_reply(self) -> bool:
        """Whether this is a command that must not be answered."""
        return self.flags & (NO_REPLY | TYPE_MASK) == NO_REPLY

    @property
    def is_error(self) -> bool:
        """Whether this is an error reply; the bit has no meaning on a command."""
        return self.flags & (ERROR | TYPE_MASK) == ERROR | REPLY

    @property
    def payload_size(self) -> int:
        """Bytes that follow the header."""
        return self.msg_size - HEADER_SIZE


def pack_header(msg_id: int, command: int, msg_size: int, flags: int, error: int = 0) -> bytes:
    """Return the 16 header bytes.

    Args:
        msg_id: message id, 16 bits.
        command: command number, 16 bits.
        msg_size: bytes of the whole message, header included.
        flags: type and flag bits.
        error: error number, for error replies.

    Returns:
        The bytes.

    Raises:
        LocalProtocolError: a value does not fit its field.

    Spec: vfio-user, "Header".
    """
    try:
        return _pack(msg_id, command, msg_size, flags, error)
    except struct_error as exc:
        raise LocalProtocolError(
            f"header ({msg_id}, {command}, {msg_size}, {flags:#x}, {error}) does not fit ({exc}); not sent"
        ) from exc


def unpack_header(buf: bytes | bytearray | memoryview) -> Header:
    """Return the header in `buf`, without judging it.

    Args:
        buf: exactly 16 bytes.

    Returns:
        The header's fields.

    Raises:
        LocalProtocolError: `buf` is not 16 bytes long.
    """
    try:
        # Header(*values) would do the same; this spares a Python frame for every message.
        return _new_tuple(Header, _unpack(buf))
    except struct_error as exc:
        raise LocalProtocolError(f"a header has {HEADER_SIZE} bytes, got {len(buf)}; not parsed") from exc


def error_reply(header: Header, errno: int) -> bytes:
    """Return the 16-byte error reply to a command.

    Args:
        header: the command's header.
        errno: positive error number.

    Returns:
        The whole message; an error reply never has a payload.

    Spec: vfio-user, "Header"; libvfio-user appends a payload to some error replies, which fixed-size readers
    take for the next header.
    """
    return _pack(header.msg_id, header.command, HEADER_SIZE, REPLY | ERROR, errno)


def command_name(command: int) -> str:
    """Return what a command number is called, for logs and errors.

    Args:
        command: any number.

    Returns:
        The specification's name without its prefix, such as ``DMA_MAP``, or ``command 99``.
    """
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


def errno_text(errno: int) -> str:
    """Return the name of an error number, or the number.

    Args:
        errno: any number; 0 is legal in an error reply.
    """
    return errorcode.get(errno, f"errno={errno}")
