"""The codec that follows the construct declarations themselves, and the tables of the manual made from them.

It serves what is rare; for what is hot it is what the twins in `codec_hot` are measured against.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from construct import ConstructError, IfThenElse, Struct

from vfiouser_protocol.messages import LAYOUTS, NESTED, Payload, RegionIoFds
from vfiouser_protocol.messages_device import REGION_IO_FDS_FIXED

P = TypeVar("P", bound=Payload)


def build_declared(message: Payload) -> bytes:
    """Encode by the construct declaration, whatever twin there may be.

    Args:
        message: one of the classes of `messages`.

    Raises:
        ConstructError: a value does not fit; ValueError: the entries of a `RegionIoFds` do not fit its argsz.
    """
    values = message._asdict()
    nested = NESTED.get(type(message))
    if nested is not None:
        field, _item = nested
        values[field] = [item._asdict() for item in values[field]]
    # Without entries it is a request, or a reply shortened because argsz was too small.
    if isinstance(message, RegionIoFds) and message.entries:
        _check_io_fds(message)
    built: bytes = LAYOUTS[type(message)].build(values)
    return built


def parse_declared(cls: type[P], payload: bytes) -> P:
    """Decode by the construct declaration, whatever twin there may be.

    Args:
        cls: what the payload should be.
        payload: the bytes behind the header.

    Raises:
        ConstructError: the payload is too short; OverflowError or ValueError: it contradicts itself.
    """
    parsed = LAYOUTS[cls].parse(payload)
    values = {name: parsed[name] for name in cls._fields}
    nested = NESTED.get(cls)
    if nested is not None:
        field, item = nested
        # Short entries lack the fields that only long ones have.
        values[field] = tuple(
            item(**{name: entry[name] for name in item._fields if name in entry}) for entry in values[field] or ()
        )
    message = cls(**values)
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


class LayoutRow(NamedTuple):
    """One field of a layout.

    Args:
        offset: bytes from the start of the payload.
        size: bytes, or None if it varies.
        name: the field's name.
    """

    offset: int
    size: int | None
    name: str


def layout_table(what: type[Payload] | Struct) -> list[LayoutRow]:
    """Return the rows of a layout table, derived from its construct declaration.

    Args:
        what: a payload class, or a layout such as `HEADER_LAYOUT`.

    Returns:
        The fields in order; only the last may vary in size. A field that is there only under a condition (the
        bitmap fields) is listed as if it were there.
    """
    layout = LAYOUTS[what] if isinstance(what, type) else what
    rows = []
    offset = 0
    for field in layout.subcons:
        if field.name is None:
            continue
        content = field.subcon
        if isinstance(content, IfThenElse):
            content = content.thensubcon
        try:
            size = content.sizeof()
        except ConstructError:
            size = None
        rows.append(LayoutRow(offset, size, field.name))
        offset += size or 0
    return rows
