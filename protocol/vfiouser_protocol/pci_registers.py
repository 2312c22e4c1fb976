"""Registers of a PCI function as three equal-sized byte arrays: values, what may be written, what 1s clear.

Everything that config space does to a write is in these arrays, so BAR sizing needs no code: the address bits
below a BAR's size are simply not writable, and all-ones reads back as the size mask.
"""

from __future__ import annotations


class Registers:
    """A little-endian register file that is filled at construction time and copied into a config space.

    Args:
        size: length in bytes.
    """

    __slots__ = ("clearable", "size", "values", "writable")

    def __init__(self, size: int) -> None:
        self.size = size
        self.values = bytearray(size)
        #: Bits that take the written value.
        self.writable = bytearray(size)
        #: Bits that a written 1 clears (RW1C).
        self.clearable = bytearray(size)

    def define(self, offset: int, width: int, value: int, writable: int = 0, clearable: int = 0) -> None:
        """Set up one register.

        Args:
            offset: its first byte.
            width: its length in bytes.
            value: what it holds after power-on.
            writable: bits that take the written value.
            clearable: bits that a written 1 clears.
        """
        end = offset + width
        self.values[offset:end] = value.to_bytes(width, "little")
        self.writable[offset:end] = writable.to_bytes(width, "little")
        self.clearable[offset:end] = clearable.to_bytes(width, "little")
