"""Messages packed by hand, for clients and servers that share no code with ours.

What attacks start with: nothing but the standard library is imported, so that a process which needs no more begins at
once.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

HEADER = struct.Struct("<HHIII")
QEMU_CAPABILITIES = (
    b'{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, '
    b'"max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, '
    b'"write_multiple": true}}\0'
)
VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, REGION_INFO, IO_FDS, IRQ_INFO, SET_IRQS = range(1, 9)
REGION_READ, REGION_WRITE, DMA_READ, DMA_WRITE, RESET, DIRTY_PAGES, WRITE_MULTI, FEATURE = range(9, 17)
MIG_DATA_READ, MIG_DATA_WRITE = 17, 18
CONFIG = 7
NO_REPLY = 0x10


class Answer(NamedTuple):
    """One message from the server."""

    msg_id: int
    command: int
    size: int
    flags: int
    error: int
    payload: bytes
    fds: list[int]


def map_request(address: int, size: int, offset: int = 0, flags: int = 3) -> bytes:
    """Pack a DMA_MAP payload."""
    return struct.pack("<IIQQQ", 32, flags, offset, address, size)


def memfd(size: int, name: str = "test-memory") -> int:
    """A file of memory; the caller closes it."""
    fd = os.memfd_create(name)
    os.ftruncate(fd, size)
    return fd
