"""The part of vhost-user that a companion needs: its messages, and what each may bring.

Spec: QEMU, docs/interop/vhost-user.rst.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, IntFlag
from types import MappingProxyType
from typing import Annotated, NamedTuple

from construct import Array, Int64ul, Struct, this

from vfiouser_protocol.fields import U32, U64, Payload, least_size

VERSION = 1
#: Bits of a header's flags.
VERSION_MASK = 0x3
REPLY = 0x4
NEED_REPLY = 0x8
#: Bytes of the largest payload that a message of these has: a table of eight regions.
PAYLOAD_MAX = 8 + 8 * 32
REGIONS_MAX = 8


class VhostRequest(IntEnum):
    """What the front-end asks for."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    SET_VRING_ENABLE = 18
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class VhostFeatures(IntFlag):
    """Virtio's features, and vhost's among them."""

    LOG_ALL = 1 << 26
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32


class ProtocolFeatures(IntFlag):
    """What of vhost-user is spoken."""

    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    DEVICE_STATE = 1 << 19


class Direction(IntEnum):
    """Which way a state goes, seen from QEMU."""

    SAVE = 0
    LOAD = 1


#: In the reply to SET_DEVICE_STATE_FD: no descriptor comes back, QEMU's own is used.
NO_FD = 1 << 8
#: In a descriptor's message: which vring it is for. Whether there is one is seen.
VRING_MASK = 0xFF


class VhostHeader(NamedTuple):
    """What stands in front of each message."""

    request: U32
    flags: U32
    size: U32


class Nothing(NamedTuple):
    """No payload."""


class Number(NamedTuple):
    """A number: feature bits, a vring with its flag, the result of what was asked."""

    value: U64


class VringState(NamedTuple):
    """A vring and a number that belongs to it."""

    index: U32  # type: ignore[assignment]
    number: U32


class VringAddress(NamedTuple):
    """Where a vring's parts are, in QEMU's own addresses; `log` is the used ring's guest physical address."""

    index: U32  # type: ignore[assignment]
    flags: U32
    descriptors: U64
    used: U64
    available: U64
    log: U64


class LogArea(NamedTuple):
    """Where the log lies in the file that comes with it, in bytes."""

    size: U64
    offset: U64


class VhostRegion(NamedTuple):
    """A piece of guest memory."""

    guest_address: Annotated[int, Int64ul]
    size: Annotated[int, Int64ul]
    user_address: Annotated[int, Int64ul]
    offset: Annotated[int, Int64ul]


class MemoryTable(NamedTuple):
    """Guest memory, a descriptor for each region."""

    count: U32  # type: ignore[assignment]
    padding: U32
    regions: Annotated[
        tuple[VhostRegion, ...],
        Array(
            this.count,
            Struct("guest_address" / Int64ul, "size" / Int64ul, "user_address" / Int64ul, "offset" / Int64ul),
        ),
    ]


class StateTransfer(NamedTuple):
    """Which way a state goes through the descriptor that comes with it."""

    direction: U32
    phase: U32


class Row(NamedTuple):
    """What a request may bring.

    Args:
        payload: its payload.
        fds_least: descriptors that have to come with it.
        fds_most: and that may.
        own_reply: it has a reply of its own, whatever its flags say.
    """

    payload: type[Payload]
    fds_least: int = 0
    fds_most: int = 0
    own_reply: bool = False


REQUESTS: Mapping[VhostRequest, Row] = MappingProxyType(
    {
        VhostRequest.GET_FEATURES: Row(Nothing, own_reply=True),
        VhostRequest.SET_FEATURES: Row(Number),
        VhostRequest.SET_OWNER: Row(Nothing),
        VhostRequest.RESET_OWNER: Row(Nothing),
        VhostRequest.SET_MEM_TABLE: Row(MemoryTable, 0, REGIONS_MAX),
        VhostRequest.SET_LOG_BASE: Row(LogArea, 1, 1, own_reply=True),
        VhostRequest.SET_VRING_NUM: Row(VringState),
        VhostRequest.SET_VRING_ADDR: Row(VringAddress),
        VhostRequest.SET_VRING_BASE: Row(VringState),
        VhostRequest.GET_VRING_BASE: Row(VringState, own_reply=True),
        VhostRequest.SET_VRING_KICK: Row(Number, 0, 1),
        VhostRequest.SET_VRING_CALL: Row(Number, 0, 1),
        VhostRequest.SET_VRING_ERR: Row(Number, 0, 1),
        VhostRequest.GET_PROTOCOL_FEATURES: Row(Nothing, own_reply=True),
        VhostRequest.SET_PROTOCOL_FEATURES: Row(Number),
        VhostRequest.SET_VRING_ENABLE: Row(VringState),
        VhostRequest.SET_DEVICE_STATE_FD: Row(StateTransfer, 1, 1, own_reply=True),
        VhostRequest.CHECK_DEVICE_STATE: Row(Nothing, own_reply=True),
    }
)

HEADER_SIZE = least_size(VhostHeader)
