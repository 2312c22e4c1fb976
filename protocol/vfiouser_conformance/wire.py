"""Messages as bytes: packed and cut apart by hand, checked against the golden vectors of `vectors`."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vfiouser_protocol.constants import Command, HeaderFlags

HEADER = struct.Struct("<HHIII")
INFO = struct.Struct("<IIII")
REGION_INFO = struct.Struct("<IIIIQQ")
ACCESS = struct.Struct("<QII")
DMA_MAP = struct.Struct("<IIQQQ")
DMA_UNMAP = struct.Struct("<IIQQ")
SET_IRQS = struct.Struct("<IIIII")
DMA_ACCESS = struct.Struct("<QQ")
FEATURE = struct.Struct("<II")
MIG_DATA = struct.Struct("<II")
MULTI_ENTRY = struct.Struct("<QII8s")
DIRTY_RANGE = struct.Struct("<QQQQ")
LOG_REPORT = struct.Struct("<QQQ")

HEADER_SIZE = HEADER.size
COMMAND, REPLY = 0, 1
NO_REPLY = int(HeaderFlags.NO_REPLY)
ERROR = int(HeaderFlags.ERROR)
TYPE_MASK = int(HeaderFlags.TYPE_MASK)
PAGE = 4096
#: What a side that announces nothing takes in one transfer, in bytes.
DEFAULT_TRANSFER = 1 << 20
U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Received:
    """A message that came from the server, taken apart but not judged.

    Args:
        msg_id: the header's message id.
        command: the header's command.
        size: the header's msg_size.
        flags: the header's flags.
        error: the header's error.
        payload: what followed the header.
        fds: descriptors that came with it.
        fds_in_header: whether they came with the read of the header.
    """

    msg_id: int
    command: int
    size: int
    flags: int
    error: int
    payload: bytes
    fds: tuple[int, ...] = ()
    fds_in_header: bool = True

    @property
    def is_reply(self) -> bool:
        """Whether the type bits say reply."""
        return self.flags & TYPE_MASK == REPLY

    @property
    def failed(self) -> bool:
        """Whether this is an error reply."""
        return bool(self.flags & ERROR)

    def __str__(self) -> str:
        what = "reply" if self.is_reply else "command"
        bad = f" error {self.error}" if self.failed else ""
        return f"{what} {command_name(self.command)} id {self.msg_id} of {self.size} bytes{bad}"


def command_name(number: int) -> str:
    """Return the name of a command number, or ``command N`` for a number that has none.

    Args:
        number: the header's command.
    """
    try:
        return Command(number).name
    except ValueError:
        return f"command {number}"


def pack(command: int, payload: bytes = b"", *, msg_id: int = 0, flags: int = 0, error: int = 0) -> bytes:
    """Return a whole message, with its true size in the header.

    Args:
        command: the header's command.
        payload: what follows the header.
        msg_id: the header's message id.
        flags: the header's flags.
        error: the header's error, an errno.
    """
    return HEADER.pack(msg_id, command, HEADER_SIZE + len(payload), flags, error) + payload


def capabilities(members: Mapping[str, Any]) -> bytes:
    """Return VERSION's JSON with its NUL, spaced as QEMU writes it.

    Args:
        members: what the object ``capabilities`` holds.
    """
    return json.dumps({"capabilities": dict(members)}).encode() + b"\0"


def version(data: bytes = b"", *, major: int = 0, minor: int = 0) -> bytes:
    """Return a VERSION payload.

    Args:
        data: the version data: JSON and its NUL, as `capabilities` makes it; empty for none.
        major: the major version.
        minor: the minor version.
    """
    return struct.pack("<HH", major, minor) + data


def info(argsz: int = 16, flags: int = 0, third: int = 0, fourth: int = 0) -> bytes:
    """Return the 16 bytes that GET_INFO, GET_IRQ_INFO and GET_REGION_IO_FDS share.

    Args:
        argsz: bytes that the reply may have.
        flags: the payload's flags.
        third: the field at byte 8: num_regions of GET_INFO, index of the two others.
        fourth: the field at byte 12: num_irqs of GET_INFO, count of the two others.
    """
    return INFO.pack(argsz, flags, third, fourth)


def region_info(index: int, argsz: int = 32) -> bytes:
    """Return a GET_REGION_INFO payload.

    Args:
        index: the region.
        argsz: bytes that the reply may have; 32 is the reply without capabilities.
    """
    return REGION_INFO.pack(argsz, 0, index, 0, 0, 0)


def access(region: int, offset: int, count: int, data: bytes = b"") -> bytes:
    """Return a REGION_READ or REGION_WRITE payload.

    Args:
        region: the region's index.
        offset: bytes from the start of the region.
        count: bytes to read or write.
        data: the bytes to write; empty for a read. Need not be `count` long.
    """
    return ACCESS.pack(offset, region, count) + data


def dma_map(address: int, size: int, offset: int = 0, flags: int = 3, argsz: int = 32) -> bytes:
    """Return a DMA_MAP payload.

    Args:
        address: first DMA address.
        size: bytes.
        offset: where the memory starts in the file that goes with the message, in bytes.
        flags: DmaMapFlags; readable and writable unless given.
        argsz: bytes that the payload claims to have.
    """
    return DMA_MAP.pack(argsz, flags, offset, address, size)


def dma_unmap(address: int, size: int, flags: int = 0, argsz: int = 24) -> bytes:
    """Return a DMA_UNMAP payload without the fields that ask for a bitmap.

    Args:
        address: first DMA address.
        size: bytes.
        flags: DmaUnmapFlags.
        argsz: bytes that the reply may have.
    """
    return DMA_UNMAP.pack(argsz, flags, address, size)


def set_irqs(flags: int, index: int, start: int, count: int, data: bytes = b"", argsz: int | None = None) -> bytes:
    """Return a SET_IRQS payload.

    Args:
        flags: IrqSetFlags: one kind of data and one action.
        index: the IRQ index.
        start: first vector.
        count: vectors.
        data: one byte per vector for the kind ``DATA_BOOL``; else empty.
        argsz: bytes that the payload claims to have; what it has unless given.
    """
    return SET_IRQS.pack(20 + len(data) if argsz is None else argsz, flags, index, start, count) + data


def feature(flags: int, data: bytes = b"", argsz: int | None = None) -> bytes:
    """Return a DEVICE_FEATURE payload.

    Args:
        flags: the feature's number, with the bits for GET, SET and PROBE.
        data: what follows the flags.
        argsz: bytes that the reply may have; those of this payload unless given.
    """
    return FEATURE.pack(8 + len(data) if argsz is None else argsz, flags) + data


def mig_data(size: int, data: bytes = b"", argsz: int | None = None) -> bytes:
    """Return a MIG_DATA_READ or MIG_DATA_WRITE payload.

    Args:
        size: bytes of device state to read or write.
        data: the bytes to write; empty for a read. Need not be `size` long.
        argsz: bytes of the payload with its data; 8 + `size` unless given.
    """
    return MIG_DATA.pack(8 + size if argsz is None else argsz, size) + data


def write_multi(writes: Sequence[tuple[int, int, bytes]], wr_cnt: int | None = None) -> bytes:
    """Return a REGION_WRITE_MULTI payload.

    Args:
        writes: (region, offset, data) of each write; data of up to 8 bytes.
        wr_cnt: how many writes the payload claims to hold; what it holds unless given.
    """
    entries = b"".join(MULTI_ENTRY.pack(offset, region, len(data), data) for region, offset, data in writes)
    return struct.pack("<Q", len(writes) if wr_cnt is None else wr_cnt) + entries


def log_report(address: int, length: int, page_size: int, argsz: int | None = None) -> bytes:
    """Return a DEVICE_FEATURE payload that gets DMA_LOGGING_REPORT.

    Args:
        address: first DMA address of the range.
        length: bytes of the range.
        page_size: bytes per bit.
        argsz: bytes that the reply may have; what it needs unless given.
    """
    size = 32 + bitmap_bytes(length, page_size or PAGE) if argsz is None else argsz
    return feature(0x10008, LOG_REPORT.pack(address, length, page_size), size)


def bitmap_bytes(length: int, page_size: int) -> int:
    """Return the bytes of a bitmap with a bit per page, in whole 64-bit words.

    Args:
        length: bytes of the range.
        page_size: bytes per bit.
    """
    return (-(-length // page_size) + 63) // 64 * 8


def dirty_get(
    address: int, size: int, pgsize: int = PAGE, argsz: int | None = None, bitmap: int | None = None
) -> bytes:
    """Return a DIRTY_PAGES payload that gets a bitmap.

    Args:
        address: first DMA address of the range.
        size: bytes of the range.
        pgsize: bytes per bit.
        argsz: bytes that the reply may have; what it needs unless given.
        bitmap: bytes of the bitmap; what the range needs unless given.
    """
    bitmap = bitmap_bytes(size, pgsize) if bitmap is None else bitmap
    size_in_full = 40 + bitmap
    head = FEATURE.pack(size_in_full if argsz is None else argsz, 4)
    return head + DIRTY_RANGE.pack(address, size, pgsize, bitmap)
