"""Dirty bitmaps: sizes, bit numbering, page sizes, and what a report clears."""

from __future__ import annotations

import errno

import pytest

from vfiouser_protocol.dirty import (
    MAX_PAGE_SIZE,
    DirtyLog,
    bitmap_size,
    logging_page_size,
)
from vfiouser_protocol.dirty_bits import fold, replicate
from vfiouser_protocol.errors import CommandError

PAGE = 4096
TOP = 1 << 64


def words(bitmap: bytes) -> list[int]:
    """The bitmap as the array of little-endian u64 that it is."""
    return [int.from_bytes(bitmap[i : i + 8], "little") for i in range(0, len(bitmap), 8)]


@pytest.mark.parametrize(
    ("length", "page_size", "expected"),
    [
        (0, PAGE, 0),
        (1, PAGE, 8),
        (PAGE, PAGE, 8),
        (64 * PAGE, PAGE, 8),
        (64 * PAGE + 1, PAGE, 16),
        (TOP, 1 << 40, 2**21),
    ],
)
def test_bitmap_size(length: int, page_size: int, expected: int) -> None:
    """One bit per page begun, in whole 64-bit words."""
    assert expected == bitmap_size(length, page_size)


@pytest.mark.parametrize(("wanted", "expected"), [(1, PAGE), (PAGE, PAGE), (65536, 65536), (1 << 40, MAX_PAGE_SIZE)])
def test_page_size_is_a_hint(wanted: int, expected: int) -> None:
    """Powers of two are granted within what can be logged sensibly."""
    assert expected == logging_page_size(wanted)


@pytest.mark.parametrize("wanted", [0, 3000, 4095, (1 << 63) + 1])
def test_page_size_must_be_a_power_of_two(wanted: int) -> None:
    """0 and anything else is EINVAL."""
    with pytest.raises(CommandError) as info:
        logging_page_size(wanted)
    assert errno.EINVAL == info.value.errno


def test_bit_n_is_page_n_of_the_range() -> None:
    """A write into page 3 sets bit 3 of byte 0; page 70 is bit 6 of byte 8; the second report is clean."""
    log = DirtyLog(PAGE)
    log.mark(0x10000 + 3 * PAGE + 17, 4)
    log.mark(0x10000 + 70 * PAGE, PAGE)
    expected = bytearray(16)
    expected[0] = 1 << 3
    expected[8] = 1 << 6
    assert expected == log.report(0x10000, 128 * PAGE, PAGE)
    assert bytes(16) == log.report(0x10000, 128 * PAGE, PAGE)
    assert not log


def test_write_across_a_page_boundary_marks_both() -> None:
    """Two bytes can dirty two pages; no bytes dirty none."""
    log = DirtyLog(PAGE)
    log.mark(2 * PAGE - 1, 2)
    log.mark(9 * PAGE, 0)
    assert [0b110] == words(log.report(0, 16 * PAGE, PAGE))


def test_other_page_sizes_fold_and_replicate() -> None:
    """Pages 1 and 3 dirty at 4096 are 0x03 at 8192; page 3 at 2048 is 0xc0."""
    log = DirtyLog(PAGE)
    log.mark(PAGE, 1)
    log.mark(3 * PAGE, 1)
    assert [0x03] == words(log.report(0, 4 * PAGE, 2 * PAGE))
    log.mark(3 * PAGE, 1)
    assert [0xC0] == words(log.report(0, 4 * PAGE, PAGE // 2))
    assert not log


def test_bits_beyond_the_range_are_zero() -> None:
    """A dirty page that only begins in the range has no bits after its end."""
    log = DirtyLog(PAGE)
    log.mark(0, 64 * PAGE)
    assert [0b11] == words(log.report(0, PAGE + 1, PAGE))
    assert [0b111] == words(log.report(PAGE, 3 * 512, 512))


def test_partly_covered_page_is_reported_and_stays_dirty() -> None:
    """A report over half a logged page must not lose the news for its other half."""
    log = DirtyLog(PAGE)
    log.mark(0, 1)
    assert [0b11] == words(log.report(0, 2048, 1024))
    assert [0b11] == words(log.report(2048, 2048, 1024))
    assert [0b1] == words(log.report(0, PAGE, PAGE))
    assert [0] == words(log.report(0, PAGE, PAGE))


def test_report_clears_only_its_range() -> None:
    """Sub-ranges and ranges over several mappings work; what lies outside stays dirty."""
    log = DirtyLog(PAGE)
    log.mark(0, 8 * PAGE)
    assert [0b11] == words(log.report(2 * PAGE, 2 * PAGE, PAGE))
    assert [0b11110011] == words(log.report(0, 8 * PAGE, PAGE))


def test_undelivered_report_is_undone() -> None:
    """What was cleared by a report that got lost is in the next one, with what came since."""
    log = DirtyLog(PAGE)
    log.mark(PAGE, PAGE)
    log.report(0, 4 * PAGE, PAGE)
    log.mark(3 * PAGE, 1)
    log.undo_report()
    log.undo_report()
    assert [0b1010] == words(log.report(0, 4 * PAGE, PAGE))


def test_discard_and_clear() -> None:
    """Unmapped pages are forgotten; clear() forgets all, also the report that could be undone."""
    log = DirtyLog(PAGE)
    log.mark(0, 4 * PAGE)
    log.discard(PAGE, 2 * PAGE)
    log.discard(PAGE, 10)
    assert [0b1001] == words(log.report(0, 4 * PAGE, PAGE))
    log.mark(0, PAGE)
    log.clear()
    log.undo_report()
    assert [0] == words(log.report(0, 4 * PAGE, PAGE))


@pytest.mark.parametrize(
    ("iova", "length", "page_size"),
    [
        pytest.param(0, PAGE, 0, id="page size 0"),
        pytest.param(0, 64 * PAGE, 3000, id="page size 3000"),
        pytest.param(0, PAGE, 2 * PAGE, id="page larger than the range"),
        pytest.param(0, 0, PAGE, id="length 0"),
        pytest.param(TOP - PAGE, 2 * PAGE, PAGE, id="past 2^64"),
        pytest.param(TOP, PAGE, PAGE, id="from 2^64 on"),
        pytest.param(0, 1 << 63, PAGE, id="bitmap over the limit"),
    ],
)
def test_report_refusals(iova: int, length: int, page_size: int) -> None:
    """Impossible reports are EINVAL and clear nothing."""
    log = DirtyLog(PAGE)
    log.mark(0, PAGE)
    with pytest.raises(CommandError) as info:
        log.report(iova, length, page_size)
    assert errno.EINVAL == info.value.errno
    assert [1] == words(log.report(0, PAGE, PAGE))


def test_enormous_ranges_and_pages_cost_what_is_dirty() -> None:
    """The whole address space in pages of 1 TiB, or a range as large as its bitmap may be, in a moment."""
    log = DirtyLog(PAGE)
    log.mark(5 << 40, 1)
    log.mark(TOP - 1, 1)
    bitmap = log.report(0, TOP, 1 << 40)
    assert 1 << 5 == bitmap[0]
    assert 0x80 == bitmap[-1]
    assert 2 == sum(byte.bit_count() for byte in bitmap)
    log.mark(0, 1 << 40)
    assert b"\xff" * (1 << 25) == log.report(0, 1 << 40, PAGE)
    log.mark(0, MAX_PAGE_SIZE)
    assert [1] == words(DirtyLog.report(log, 12345, 1 << 62, 1 << 62))


def test_page_size_limits_of_the_log() -> None:
    """A log with an impossible page size is a bug of the caller."""
    for page_size in (0, 3000, 2 * MAX_PAGE_SIZE):
        with pytest.raises(ValueError, match="power of two"):
            DirtyLog(page_size)


def test_fold_and_replicate_are_inverse() -> None:
    """Replicating and folding by the same factor changes nothing; odd lengths are padded."""
    bitmap = bytes(range(256))
    for factor in (1, 2, 8, 64):
        assert bitmap == fold(replicate(bitmap, factor), factor)
    assert b"\x0f" == fold(b"\x55", 2)
    assert b"\x03\x80" == fold(b"\x0f\x00\x00\x80", 2)
    assert b"\x33\xcc" == replicate(b"\xa5", 2)
