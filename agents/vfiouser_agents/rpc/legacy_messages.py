"""The protocol of the 2022 plug-in example: one header for everything, and answers to some of the requests.

    u32 request, u32 size, u64 value

    1 UPDATE_PENDING                         → header 6, size 8, value = bytes left
    2 SET_STATE     size 8, value = state    → nothing
    3 GET_STATE                              → header 6, size 8, value = state
    4 SAVE_BUFFER   size = bytes wanted      → that many bytes, without a header
    5 LOAD_BUFFER   size = bytes that follow → nothing
    7 FINISH                                 → the server closes the connection

The states are those of VFIO's first migration protocol. The byte order is that of the machine that the server was
compiled for.

Spec: raolei-intel/vfio-lm-plugin-example, plugin.h and plugin_server.c; linux/vfio.h up to 5.16 for the states.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from construct import FormatField, Struct

from vfiouser_protocol.packed import packed

DEFAULT_PORT = 3333
#: Bytes of the value of a reply.
VALUE_SIZE = 8
#: Bytes that one SAVE_BUFFER or LOAD_BUFFER carries at most, as in the series.
MAX_CHUNK = 1 << 20


class LegacyRequest(IntEnum):
    """What a header is."""

    UPDATE_PENDING = 1
    SET_STATE = 2
    GET_STATE = 3
    SAVE_BUFFER = 4
    LOAD_BUFFER = 5
    MESSAGE_REPLY = 6
    FINISH = 7


class V1State(IntFlag):
    """States of VFIO's first migration protocol, bits that are combined."""

    STOPPED = 0
    RUNNING = 1
    SAVING = 2
    RESUMING = 4
    #: Both at once make no sense, and stand for a device that is broken.
    ERROR = 6


def header_layout(order: str) -> Struct:
    """Return the layout of every header.

    Args:
        order: ``<`` for little-endian, ``>`` for big-endian.
    """
    u32, u64 = FormatField(order, "L"), FormatField(order, "Q")
    return Struct("request" / u32, "size" / u32, "value" / u64)


HEADERS = {"little": packed(header_layout("<")), "big": packed(header_layout(">"))}
