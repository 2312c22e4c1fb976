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
    """The name of a command number, or the number."""
    try:
        return Command(number).name
    except ValueError:
        return f"command {number}"


def pack(command: int, payload: bytes = b"", *, msg_id: int = 0, flags: int = 0, error: int = 0) -> bytes:
    """A whole message with the size that it has."""
    return HEADER.pack(msg_id, command, HEADER_SIZE + len(payload), flags, error) + payload


def capabilities(members: Mapping[str, Any]) -> bytes:
    """VERSION's JSON with its NUL, spaced as QEMU writes it."""
    return json.dumps({"capabilities": dict(members)}).encode() + b"\0"


def version(data: bytes = b"", *, major: int = 0, minor: int = 0) -> bytes:
    """A VERSION payload."""
    return struct.pack("<HH", major, minor) + data


def info(argsz: int = 16, flags: int = 0, third: int = 0, fourth: int = 0) -> bytes:
    """The 16 bytes that GET_INFO, GET_IRQ_INFO and GET_REGION_IO_FDS share."""
    return INFO.pack(argsz, flags, third, fourth)


def region_info(index: int, argsz: int = 32) -> bytes:
    """A GET_REGION_INFO payload."""
    return REGION_INFO.pack(argsz, 0, index, 0, 0, 0)


def access(region: int, offset: int, count: int, data: bytes = b"") -> bytes:
    """A REGION_READ or REGION_WRITE payload."""
    return ACCESS.pack(offset, region, count) + data


def dma_map(address: int, size: int, offset: int = 0, flags: int = 3, argsz: int = 32) -> bytes:
    """A DMA_MAP payload."""
    return DMA_MAP.pack(argsz, flags, offset, address, size)


def dma_unmap(address: int, size: int, flags: int = 0, argsz: int = 24) -> bytes:
    """A DMA_UNMAP payload."""
    return DMA_UNMAP.pack(argsz, flags, address, size)


def set_irqs(flags: int, index: int, start: int, count: int, data: bytes = b"", argsz: int | None = None) -> bytes:
    """A SET_IRQS payload; argsz is its size unless given."""
    return SET_IRQS.pack(20 + len(data) if argsz is None else argsz, flags, index, start, count) + data


def feature(flags: int, data: bytes = b"", argsz: int | None = None) -> bytes:
    """A DEVICE_FEATURE payload; argsz is its size unless given."""
    return FEATURE.pack(8 + len(data) if argsz is None else argsz, flags) + data


def mig_data(size: int, data: bytes = b"", argsz: int | None = None) -> bytes:
    """A MIG_DATA_READ or MIG_DATA_WRITE payload."""
    return MIG_DATA.pack(8 + size if argsz is None else argsz, size) + data


def write_multi(writes: Sequence[tuple[int, int, bytes]], wr_cnt: int | None = None) -> bytes:
    """A REGION_WRITE_MULTI payload of (region, offset, data) entries."""
    entries = b"".join(MULTI_ENTRY.pack(offset, region, len(data), data) for region, offset, data in writes)
    return struct.pack("<Q", len(writes) if wr_cnt is None else wr_cnt) + entries


def log_report(address: int, length: int, page_size: int, argsz: int | None = None) -> bytes:
    """A DEVICE_FEATURE payload that gets DMA_LOGGING_REPORT."""
    size = 32 + bitmap_bytes(length, page_size or PAGE) if argsz is None else argsz
    return feature(0x10008, LOG_REPORT.pack(address, length, page_size), size)


def bitmap_bytes(length: int, page_size: int) -> int:
    """Bytes of a bitmap with a bit per page, in whole 64-bit words."""
    return (-(-length // page_size) + 63) // 64 * 8


def dirty_get(
    address: int, size: int, pgsize: int = PAGE, argsz: int | None = None, bitmap: int | None = None
) -> bytes:
    """A DIRTY_PAGES payload that gets a bitmap."""
    bitmap = bitmap_bytes(size, pgsize) if bitmap is None else bitmap
    size_in_full = 40 + bitmap
    head = FEATURE.pack(size_in_full if argsz is None else argsz, 4)
    return head + DIRTY_RANGE.pack(address, size, pgsize, bitmap)
