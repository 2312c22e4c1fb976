"""The MSI-X table model: which masks count, and what is pending."""

from __future__ import annotations

import errno
import struct

import pytest

from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.msix import MsixTable


def entry(control: int, address: int = 0xFEE00000, data: int = 0x41) -> bytes:
    """One table entry as a driver writes it."""
    return struct.pack("<QII", address, data, control)


def test_power_on() -> None:
    """Every entry is masked and empty, yet no mask counts, since no client has written the table."""
    table = MsixTable(3)
    assert (bytes(12) + b"\1\0\0\0") * 3 == table.read(0, 48)
    assert (48, 8) == (table.table_size, table.pba_size)
    assert [False] * 3 == [table.masked(vector) for vector in range(3)]
    assert not table.written


def test_masks_count_once_the_table_was_written() -> None:
    """One write through the region shows that this client keeps its masks here, for every vector."""
    table = MsixTable(3)
    assert [] == table.write(16, entry(0))
    assert [True, False, True] == [table.masked(vector) for vector in range(3)]
    assert (0xFEE00000, 0x41, 0) == table.entry(1)


def test_unmasking_reports_what_is_pending() -> None:
    """A pending vector is told when its own mask falls; it stays pending until it is cleared."""
    table = MsixTable(4)
    table.write(0, entry(1) * 4)
    table.set_pending(1)
    table.set_pending(3)
    assert [] == table.write(0, entry(0))
    assert [1] == table.write(28, b"\0\0\0\0")
    assert table.pending(1)
    assert [] == table.write(28, b"\0\0\0\0")
    table.clear_pending(1)
    assert [] == table.write(28, b"\0\0\0\0")
    assert [3] == table.write(0, entry(0) * 4)
    assert [] == table.write(0, b"")


def test_only_what_may_be_written_is_written() -> None:
    """Address bits 0 and 1 and the reserved control bits stay 0, for each width and across entries."""
    table = MsixTable(2)
    table.write(0, b"\xff" * 32)
    assert (0xFFFFFFFFFFFFFFFC, 0xFFFFFFFF, 1) == table.entry(0) == table.entry(1)
    table.write(12, b"\0\0\0\0\0\0\0\0")
    assert (0xFFFFFFFFFFFFFFFC, 0xFFFFFFFF, 0) == table.entry(0)
    assert (0xFFFFFFFF00000000, 0xFFFFFFFF, 1) == table.entry(1)
    table.write(1, b"\x12")
    assert 0x12FC == int.from_bytes(table.read(0, 2), "little")


def test_pending_bits_are_readable() -> None:
    """Bit n of the array is vector n, in whole 64-bit words."""
    table = MsixTable(70)
    for vector in (0, 9, 69):
        table.set_pending(vector)
    assert 1 | 1 << 9 | 1 << 69 == int.from_bytes(table.read_pba(0, 16), "little")
    assert b"\x02" == table.read_pba(1, 1)
    assert 16 == table.pba_size


def test_reset_forgets_everything() -> None:
    """After reset the table is as at power-on: nothing pending and no mask that counts."""
    table = MsixTable(2)
    table.write(0, entry(1) * 2)
    table.set_pending(1)
    table.reset()
    assert MsixTable(2).read(0, 32) == table.read(0, 32)
    assert (False, False, bytes(8)) == (table.masked(0), table.written, table.read_pba(0, 8))


@pytest.mark.parametrize(("offset", "count"), [(32, 1), (31, 2), (-1, 1), (0, 33), (1 << 40, 4)])
def test_accesses_outside_are_refused(offset: int, count: int) -> None:
    """Past the end of the table or of the pending bits is EINVAL, and nothing is written."""
    table = MsixTable(2)
    for access in (
        lambda: table.read(offset, count),
        lambda: table.read_pba(offset, count),
        lambda: table.write(offset, bytes(count)),
    ):
        with pytest.raises(CommandError) as info:
            access()
        assert errno.EINVAL == info.value.errno
    assert not table.written
