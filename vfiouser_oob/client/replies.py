"""What a reply must look like before its contents are believed."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from vfiouser_oob.client.calls import Reply
from vfiouser_oob.client.errors import BadReply
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.codec import decode
from vfiouser_protocol.constants import Command
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.header import command_name
from vfiouser_protocol.messages import Payload, RegionReadReply, RegionWriteReply

P = TypeVar("P", bound=Payload)

#: A plain number for the hot path.
_REGION_READ = int(Command.REGION_READ)

#: Where the dirty bitmap starts in the payloads of DMA_UNMAP and DIRTY_PAGES.
DIRTY_BITMAP_OFFSET = 40


def decode_reply(kind: type[P], command: int, reply: Reply) -> P:
    """Decode a reply's payload.

    Args:
        kind: the payload's class.
        command: the command, for the error's text.
        reply: the reply.

    Raises:
        BadReply: it cannot be decoded.
    """
    return decode_reply_part(kind, command, reply.payload)


def decode_reply_part(kind: type[P], command: int, payload: bytes) -> P:
    """Decode a payload inside a reply's payload; arguments as for `decode_reply`."""
    try:
        return decode(kind, payload)
    except CommandError as error:
        raise BadReply(f"the server's reply to {command_name(command)} is malformed: {error}") from error


def region_data(reply: Reply, offset: int, region: int, count: int) -> bytes:
    """Return the data of a REGION_READ reply: 1 to `count` bytes of what was asked for, none for a count of
    0.

    Raises:
        BadReply: it answers another question, or brings no or too much data.
    """
    if not count:
        return b""  # libvfio-user leaves out the whole payload
    read_offset, read_region, read_count, data = decode_reply_part(RegionReadReply, _REGION_READ, reply.payload)
    if read_offset != offset or read_region != region or not 0 < read_count <= count:
        raise BadReply(
            f"the server answered a read of {count} bytes at {region}:{offset:#x} "
            f"with {read_count} bytes at {read_region}:{read_offset:#x}",
            errno.EIO,
        )
    return data


def check_written(reply: Reply, count: int) -> None:
    """Check that a REGION_WRITE reply confirms all `count` bytes.

    Raises:
        BadReply: fewer or more were written.
    """
    if not reply.payload:
        return  # some servers confirm a write by a bare header, and QEMU takes it as well
    written = decode_reply(RegionWriteReply, Command.REGION_WRITE, reply).count
    if written != count:
        raise BadReply(f"the server wrote {written} of {count} bytes", errno.EIO)


def check_length(command: int, payload: bytes, most: int) -> None:
    """Check the length of a reply that begins with its argsz, before any of the rest is looked at.

    Args:
        command: what was asked.
        payload: the reply's payload.
        most: bytes that such a reply can have.

    Raises:
        BadReply: it is longer, or says that it would be.
    """
    claimed = max(len(payload), int.from_bytes(payload[:4], "little"))
    if claimed > most:
        raise BadReply(f"the server's reply to {command_name(command)} has {claimed} bytes, of at most {most}")


def bitmap_size(length: int, page_size: int) -> int:
    """Bytes of the dirty bitmap of a range: one bit per page, in whole 64-bit words."""
    pages = -(-length // page_size)
    return -(-pages // 64) * 8


def checked_bitmap(bitmap: bytes, room: int, command: int) -> bytes:
    """Return a dirty bitmap if it has the right size.

    Raises:
        BadReply: it has not.
    """
    if len(bitmap) != room:
        raise BadReply(f"the server's bitmap in {command_name(command)} has {len(bitmap)} bytes, not {room}")
    return bitmap


def close_all(fds: Sequence[OwnedFd]) -> None:
    """Close descriptors."""
    for fd in fds:
        fd.close()


@contextmanager
def closing_on_error(fds: Sequence[OwnedFd]) -> Iterator[None]:
    """Close descriptors when the block fails; otherwise they are the caller's."""
    try:
        yield
    except BaseException:
        close_all(fds)
        raise
