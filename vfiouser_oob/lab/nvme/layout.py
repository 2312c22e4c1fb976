"""The numbers and layouts of NVM Express that a driver needs, named as in the specification (1.4)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from vfiouser_protocol.errors import VfioUserError

PAGE_SIZE = 4096
SQE_SIZE = 64
CQE_SIZE = 16
#: opcode, flags, command id, nsid, reserved, metadata, PRP 1, PRP 2, dwords 10 to 15.
SQE = struct.Struct("<BBHIQQQQIIIIII")
#: dword 0, dword 1, SQ head, SQ id, command id, status with the phase in bit 0.
CQE = struct.Struct("<IIHHHH")
CQE_STATUS = struct.Struct("<H")
CQE_STATUS_OFFSET = 14
PRP_ENTRY = struct.Struct("<Q")
PRPS_PER_PAGE = PAGE_SIZE // PRP_ENTRY.size

CAP = 0x00
VS = 0x08
CC = 0x14
CSTS = 0x1C
AQA = 0x24
ASQ = 0x28
ACQ = 0x30
DOORBELLS = 0x1000

CC_ENABLE = 1
#: Queue entry sizes as powers of two: 64 bytes (6) and 16 bytes (4).
CC_ENTRY_SIZES = 6 << 16 | 4 << 20
CC_SHUTDOWN_NORMAL = 1 << 14
CC_SHUTDOWN_MASK = 3 << 14
CSTS_READY = 1
CSTS_FATAL = 2
CSTS_SHUTDOWN_MASK = 3 << 2
CSTS_SHUTDOWN_COMPLETE = 2 << 2

FEATURE_NUMBER_OF_QUEUES = 0x07
QUEUE_CONTIGUOUS = 1
QUEUE_INTERRUPTS = 2


class AdminOpcode(IntEnum):
    """Commands of the admin queue."""

    DELETE_SQ = 0x00
    CREATE_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_CQ = 0x04
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    SET_FEATURES = 0x09


class IoOpcode(IntEnum):
    """Commands of the I/O queues."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    WRITE_ZEROES = 0x08


class IdentifyWhat(IntEnum):
    """CNS of IDENTIFY."""

    NAMESPACE = 0x00
    CONTROLLER = 0x01
    ACTIVE_NAMESPACES = 0x02


class DriverError(VfioUserError):
    """A command ended with an error status, or the controller does not behave.

    Args:
        message: what happened.
        status: status code type and code (bits 10:8 and 7:0); 0 when it was no command.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ControllerCapabilities(NamedTuple):
    """The register CAP, taken apart.

    Args:
        max_entries: entries of the largest queue.
        timeout_s: how long enabling and disabling may take, seconds.
        doorbell_stride: bytes between two doorbells.
        min_page_size: smallest memory page size, bytes.
    """

    max_entries: int
    timeout_s: float
    doorbell_stride: int
    min_page_size: int

    @classmethod
    def parse(cls, value: int) -> ControllerCapabilities:
        """Take the register's value apart."""
        return cls(
            max_entries=(value & 0xFFFF) + 1,
            timeout_s=(value >> 24 & 0xFF) * 0.5,
            doorbell_stride=4 << (value >> 32 & 0xF),
            min_page_size=4096 << (value >> 48 & 0xF),
        )


class IdentifyController(NamedTuple):
    """What IDENTIFY says of the controller.

    Args:
        serial: serial number.
        model: model number.
        firmware: firmware revision.
        max_transfer: bytes of the largest transfer; 0 means no limit.
        namespaces: highest namespace id.
    """

    serial: str
    model: str
    firmware: str
    max_transfer: int
    namespaces: int

    @classmethod
    def parse(cls, data: bytes, min_page_size: int) -> IdentifyController:
        """Take the 4096 bytes of IDENTIFY apart; MDTS counts in pages of `min_page_size`."""
        mdts = data[77]
        return cls(
            serial=_text(data[4:24]),
            model=_text(data[24:64]),
            firmware=_text(data[64:72]),
            max_transfer=min_page_size << mdts if mdts else 0,
            namespaces=int.from_bytes(data[516:520], "little"),
        )


class IdentifyNamespace(NamedTuple):
    """What IDENTIFY says of a namespace.

    Args:
        nsid: namespace id.
        blocks: size in logical blocks.
        block_size: bytes of a logical block.
    """

    nsid: int
    blocks: int
    block_size: int

    @property
    def size(self) -> int:
        """Bytes of the namespace."""
        return self.blocks * self.block_size

    @classmethod
    def parse(cls, nsid: int, data: bytes) -> IdentifyNamespace:
        """Take the 4096 bytes of IDENTIFY apart."""
        form = data[26] & 0xF
        shift = data[128 + 4 * form + 2]
        return cls(nsid, int.from_bytes(data[0:8], "little"), 1 << shift)


def _text(raw: bytes) -> str:
    return raw.decode("ascii", "replace").strip(" \0")
