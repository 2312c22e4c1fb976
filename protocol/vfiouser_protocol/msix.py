"""The MSI-X table and pending bits of a device model, for clients that use them through the region.

QEMU keeps the guest's table itself and never forwards a write to it: an eventfd assigned by SET_IRQS is the
enable. So the masks in this table, all set after power-on, count only once a client has written the table
through the region. The function mask is a matter of config space; callers ask for both.

Spec: PCI Local Bus 3.0, 6.8.2.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from .errors import CommandError
from .pci_caps import MSIX_ENTRY_SIZE, msix_pba_size

#: Power-on value of an entry: no address, no data, masked.
_EMPTY_ENTRY = bytes(12) + b"\1\0\0\0"
#: What may be written: the message address in units of 4, data, and the mask bit.
_WRITABLE_ENTRY = b"\xfc" + b"\xff" * 11 + b"\1\0\0\0"
_CONTROL_OFFSET = 12


class MsixSnapshot(NamedTuple):
    """Table and pending bits at one moment.

    Args:
        table: the entries.
        pending: the pending bits.
        written: whether a client has written the table through the region.
    """

    table: bytes
    pending: bytes
    written: bool


class MsixTable:
    """Table and pending bits of one function.

    Args:
        vectors: number of entries.
    """

    __slots__ = ("_pending", "_table", "_writable", "vectors", "written")

    def __init__(self, vectors: int) -> None:
        self.vectors = vectors
        self._writable = _WRITABLE_ENTRY * vectors
        self._table = bytearray(_EMPTY_ENTRY * vectors)
        self._pending = bytearray(msix_pba_size(vectors))
        #: True once a client has written the table through the region.
        self.written = False

    @property
    def table_size(self) -> int:
        """Bytes of the table."""
        return len(self._table)

    @property
    def pba_size(self) -> int:
        """Bytes of the pending bits."""
        return len(self._pending)

    def read(self, offset: int, count: int) -> bytes:
        """Read the table.

        Args:
            offset: first byte, from the start of the table.
            count: bytes.

        Raises:
            CommandError: EINVAL if the range leaves the table.
        """
        return _part(self._table, "MSI-X table", offset, count)

    def read_pba(self, offset: int, count: int) -> bytes:
        """Read `count` bytes of the pending bits at `offset`; as `read`."""
        return _part(self._pending, "MSI-X pending bits", offset, count)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> list[int]:
        """Write the table through the region. (Writes to the pending bits have no effect; there is no
        method.)

        Args:
            offset: first byte, from the start of the table.
            data: what is written.

        Returns:
            Vectors with a pending interrupt that this write has unmasked, in order. They stay pending until
            `clear_pending`, since the function may be masked as a whole.

        Raises:
            CommandError: EINVAL if the range leaves the table.
        """
        end = offset + len(data)
        if not 0 <= offset <= end <= len(self._table):
            _refuse("MSI-X table", offset, len(data), len(self._table))
        if not data:
            return []
        touched = range(offset // MSIX_ENTRY_SIZE, (end - 1) // MSIX_ENTRY_SIZE + 1)
        were_masked = [vector for vector in touched if self.masked(vector) or not self.written]
        old = int.from_bytes(self._table[offset:end], "little")
        writable = int.from_bytes(self._writable[offset:end], "little")
        new = (old & ~writable) | (int.from_bytes(data, "little") & writable)
        self._table[offset:end] = new.to_bytes(len(data), "little")
        self.written = True
        return [vector for vector in were_masked if self.pending(vector) and not self.masked(vector)]

    def masked(self, vector: int) -> bool:
        """True if the vector's own mask holds its interrupts back."""
        return self.written and bool(self._table[vector * MSIX_ENTRY_SIZE + _CONTROL_OFFSET] & 1)

    def pending(self, vector: int) -> bool:
        """True if an interrupt is held back."""
        return bool(self._pending[vector >> 3] >> (vector & 7) & 1)

    def set_pending(self, vector: int) -> None:
        """Hold an interrupt back."""
        self._pending[vector >> 3] |= 1 << (vector & 7)

    def clear_pending(self, vector: int) -> None:
        """The interrupt was delivered, or is not wanted any more."""
        self._pending[vector >> 3] &= ~(1 << (vector & 7))

    def reset(self) -> None:
        """Go to the power-on state: every entry empty and masked, but not written, so that no mask counts."""
        self._table[:] = _EMPTY_ENTRY * self.vectors
        self._pending[:] = bytes(len(self._pending))
        self.written = False

    def snapshot(self) -> MsixSnapshot:
        """Copy the state."""
        return MsixSnapshot(bytes(self._table), bytes(self._pending), self.written)

    def check(self, snapshot: MsixSnapshot) -> None:
        """Refuse a `snapshot` that this table cannot have.

        Raises:
            ValueError: it has another size, bits that a client cannot write, or vectors that the table has not.
        """
        if len(snapshot.table) != len(self._table) or len(snapshot.pending) != len(self._pending):
            raise ValueError(f"snapshot of {len(snapshot.table)} bytes for an MSI-X table of {len(self._table)}")
        if int.from_bytes(snapshot.table, "little") & ~int.from_bytes(self._writable, "little"):
            raise ValueError("snapshot of an MSI-X table with reserved bits set")
        if int.from_bytes(snapshot.pending, "little") >> self.vectors:
            raise ValueError(f"snapshot of an MSI-X table with more than {self.vectors} vectors pending")

    def restore(self, snapshot: MsixSnapshot) -> None:
        """Take over a `snapshot`.

        Raises:
            ValueError: as `check`; nothing changed.
        """
        self.check(snapshot)
        self._table[:] = snapshot.table
        self._pending[:] = snapshot.pending
        self.written = snapshot.written

    def entry(self, vector: int) -> tuple[int, int, int]:
        """Message address, message data and vector control of an entry."""
        start = vector * MSIX_ENTRY_SIZE
        raw = self._table[start : start + MSIX_ENTRY_SIZE]
        return (
            int.from_bytes(raw[:8], "little"),
            int.from_bytes(raw[8:12], "little"),
            int.from_bytes(raw[12:], "little"),
        )


def _part(source: bytearray, what: str, offset: int, count: int) -> bytes:
    if not 0 <= offset <= offset + count <= len(source):
        _refuse(what, offset, count, len(source))
    return bytes(source[offset : offset + count])


def _refuse(what: str, offset: int, count: int, size: int) -> None:
    raise CommandError(f"{what} access of {offset:#x}+{count:#x}: it has {size:#x} bytes; not done", errno.EINVAL)
