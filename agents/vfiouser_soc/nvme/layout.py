"""A tiny packer for the sparse structures of Identify and the log pages."""

from __future__ import annotations

import struct
from collections.abc import Iterable

Field = tuple[int, str, int | bytes]


def pack_fields(size: int, fields: Iterable[Field]) -> bytes:
    """Pack fields into a zeroed structure.

    Args:
        size: bytes of the structure.
        fields: (offset, format letter as of `struct`, or "s" for bytes as they are, value).

    Returns:
        The structure.
    """
    data = bytearray(size)
    for offset, letter, value in fields:
        if isinstance(value, bytes):
            data[offset : offset + len(value)] = value
        elif letter == "O":  # 16-byte integers, which struct does not have
            data[offset : offset + 16] = value.to_bytes(16, "little")
        else:
            struct.pack_into(f"<{letter}", data, offset, value)
    return bytes(data)


def ascii_field(text: str, size: int) -> bytes:
    """Make a text field as NVMe has it: ASCII, cut or filled with spaces."""
    return text.encode("ascii", "replace")[:size].ljust(size)
