"""Contents of guest memory that travel with a function's state, since QEMU does not know that they have changed."""

from __future__ import annotations

from dataclasses import dataclass

from construct import Int8ul, Int32ul, Int64ul, Padding, Struct

from vfiouser_protocol.dma import ADDRESS_SPACE
from vfiouser_protocol.packed import packed

_VERSION = 1
#: What travels: this, then as many parts as it says, each with its bytes behind it.
CONTENTS_LAYOUT = Struct("version" / Int8ul, Padding(3), "parts" / Int32ul)
PART_LAYOUT = Struct("address" / Int64ul, "length" / Int32ul)
_HEAD = packed(CONTENTS_LAYOUT)
_PART = packed(PART_LAYOUT)


@dataclass(frozen=True, slots=True)
class PageContents:
    """Pieces of guest memory; where two of them overlap, the later one counts.

    Args:
        parts: addresses and bytes, in the order in which they are written.
    """

    parts: tuple[tuple[int, bytes], ...] = ()

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return sum(len(data) for _, data in self.parts)

    def to_bytes(self) -> bytes:
        """Write it down."""
        body = b"".join(_PART.pack(address, len(data)) + data for address, data in self.parts)
        return _HEAD.pack(_VERSION, len(self.parts)) + body

    @classmethod
    def from_bytes(cls, payload: bytes) -> PageContents:
        """Read what `to_bytes` wrote.

        Args:
            payload: what came.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        if len(payload) < _HEAD.size:
            raise ValueError(f"contents of guest memory in {len(payload)} bytes")
        version, count = _HEAD.unpack_from(payload)
        if version != _VERSION:
            raise ValueError(f"contents of guest memory of version {version}; this daemon reads {_VERSION}")
        position = _HEAD.size
        parts = []
        for _ in range(count):
            if position + _PART.size > len(payload):
                raise ValueError("contents of guest memory that are cut off")
            address, length = _PART.unpack_from(payload, position)
            position += _PART.size
            if not length or position + length > len(payload) or address + length > ADDRESS_SPACE:
                raise ValueError(f"contents of guest memory whose part {address:#x}+{length:#x} leaves them")
            parts.append((address, bytes(payload[position : position + length])))
            position += length
        if position != len(payload):
            raise ValueError(f"contents of guest memory with {len(payload) - position} bytes behind them")
        return cls(tuple(parts))
