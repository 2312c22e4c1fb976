"""The codec that is construct itself, following the declarations.

It serves the layouts that `codec_derived` leaves to it, and it is what the derived codecs are held against.
"""

from __future__ import annotations

from typing import TypeVar

from vfiouser_protocol.fields import Payload, items_of, layout_of
from vfiouser_protocol.messages import RegionIoFds
from vfiouser_protocol.messages_device import REGION_IO_FDS_FIXED

P = TypeVar("P", bound=Payload)


def build_declared(message: Payload) -> bytes:
    """Encode by the construct declaration, whatever derived codec there may be.

    Args:
        message: one of the classes of `messages`.

    Raises:
        ConstructError: a value does not fit; ValueError: the entries of a `RegionIoFds` do not fit its argsz.
    """
    values = message._asdict()
    nested = items_of(type(message))
    if nested is not None:
        field, _item = nested
        values[field] = [item._asdict() for item in values[field]]
    # Without entries it is a request, or a reply shortened because argsz was too small.
    if isinstance(message, RegionIoFds) and message.entries:
        _check_io_fds(message)
    built: bytes = layout_of(type(message)).build(values)
    return built


def parse_declared(cls: type[P], payload: bytes) -> P:
    """Decode by the construct declaration, whatever derived codec there may be.

    Args:
        cls: what the payload should be.
        payload: the bytes behind the header.

    Raises:
        ConstructError: the payload is too short; OverflowError or ValueError: it contradicts itself.
    """
    parsed = layout_of(cls).parse(payload)
    values = {name: parsed[name] for name in cls._fields}
    nested = items_of(cls)
    if nested is not None:
        field, item = nested
        # Short entries lack the fields that only long ones have.
        values[field] = tuple(
            item(**{name: entry[name] for name in item._fields if name in entry}) for entry in values[field] or ()
        )
    message = cls._make(values[name] for name in cls._fields)
    if isinstance(message, RegionIoFds) and message.count and len(payload) > REGION_IO_FDS_FIXED:
        _check_io_fds(message)
    return message


def _check_io_fds(message: RegionIoFds) -> None:
    """The entries have to be as many and of the form that argsz and count make of them."""
    entries = message.entries
    stride = 40 if all(entry.shadow_offset is None for entry in entries) else 48
    needed = REGION_IO_FDS_FIXED + stride * message.count
    if (len(entries), needed) != (message.count, message.argsz):
        raise ValueError(f"{len(entries)} entries do not make count {message.count} and argsz {message.argsz}")
