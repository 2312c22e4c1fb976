"""Dirty logging: when it starts, what a second start may say, what may be reported."""

from __future__ import annotations

import errno

import pytest

from vfiouser_protocol.dma_logging import EVERYTHING, DmaLogging, require_unmap_bitmap
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.messages import DmaUnmap, LoggingRange

PAGE = 4096
TOP = 1 << 64


@pytest.fixture
def logging() -> DmaLogging:
    """A log that runs for everything, with pages of 4 KiB."""
    log = DmaLogging()
    assert PAGE == log.start(PAGE)
    return log


def refused(number: int, call: object, *args: object, **kwargs: object) -> str:
    """Proves that a call is refused with an errno; returns why."""
    with pytest.raises(CommandError) as info:
        call(*args, **kwargs)  # type: ignore[operator]
    assert number == info.value.errno
    return str(info.value)


def test_nothing_runs_at_first() -> None:
    """Stop is legal all the same, and marks go nowhere."""
    log = DmaLogging()
    log.stop()
    log.mark(0, PAGE)
    log.undo_report()
    assert (False, 0, ()) == (log.active, log.page_size, log.ranges)
    refused(errno.EINVAL, log.report, 0, PAGE, PAGE)


@pytest.mark.parametrize("page_size", [0, 3000])
def test_impossible_page_sizes_do_not_start(page_size: int) -> None:
    """EINVAL, and nothing runs."""
    log = DmaLogging()
    refused(errno.EINVAL, log.start, page_size)
    assert not log.active


def test_a_hint_is_answered_with_what_is_used() -> None:
    """Pages of one byte become pages of 4 KiB; saying the same again, or what was answered, goes on."""
    log = DmaLogging()
    assert PAGE == log.start(1)
    log.mark(0, 1)
    assert PAGE == log.start(1)
    assert PAGE == log.start(PAGE)
    assert 1 == log.report(0, PAGE, PAGE)[0]


@pytest.mark.parametrize("page_size", [2048, 8192])
def test_a_second_start_with_another_page_size(logging: DmaLogging, page_size: int) -> None:
    """EINVAL, and the log goes on: also for a size that would have been rounded to the one in use."""
    logging.mark(PAGE, 1)
    refused(errno.EINVAL, logging.start, page_size)
    assert 2 == logging.report(0, 2 * PAGE, PAGE)[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], EVERYTHING),
        ([(0, TOP)], EVERYTHING),
        ([(0x1800, 1)], [(0x1000, 0x1000)]),
        ([(0x9000, 0x1000), (0x1000, 0x1000)], [(0x1000, 0x1000), (0x9000, 0x1000)]),
        ([(0x1000, 0x1000), (0x2000, 0x1000)], [(0x1000, 0x2000)]),
        ([(0x1000, 0x8000), (0x2000, 0x1000)], [(0x1000, 0x8000)]),
        ([(TOP - 1, 1)], [(TOP - 0x1000, 0x1000)]),
    ],
)
def test_ranges_become_whole_pages(given: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    """Sorted, merged where they touch, never less than was asked for."""
    log = DmaLogging()
    log.start(PAGE, [LoggingRange(*item) for item in given])
    assert tuple(expected) == log.ranges


@pytest.mark.parametrize("bad", [(0, 0), (TOP - 1, 2), (0x1000, TOP)])
def test_impossible_ranges_do_not_start(bad: tuple[int, int]) -> None:
    """Empty, or past the end of the address space."""
    log = DmaLogging()
    refused(errno.EINVAL, log.start, PAGE, [LoggingRange(0, PAGE), LoggingRange(*bad)])
    assert not log.active


def test_a_second_start_may_ask_for_what_is_logged() -> None:
    """Part of it is granted; what reaches beyond is refused, since the agent logs what it was told at first."""
    log = DmaLogging()
    log.start(PAGE, [LoggingRange(0x1000, 0x4000), LoggingRange(0x9000, 0x1000)])
    log.start(PAGE, [LoggingRange(0x2000, 0x1000), LoggingRange(0x9000, 0x1000)])
    for beyond in ((0, 0x1000), (0x4000, 0x2000), (0x6000, 0x1000), (0x9000, 0x1001)):
        refused(errno.EINVAL, log.start, PAGE, [LoggingRange(*beyond)])
    refused(errno.EINVAL, log.start, PAGE)
    assert ((0x1000, 0x4000), (0x9000, 0x1000)) == log.ranges


def test_plan_does_not_start() -> None:
    """The agent can be asked first."""
    log = DmaLogging()
    assert (PAGE, EVERYTHING) == log.plan(1)
    assert not log.active


def test_order_of_refusals(logging: DmaLogging) -> None:
    """Nothing mapped is ENOENT even while nothing is logged; then logging counts."""
    refused(errno.ENOENT, logging.require_report, 0, PAGE, mapped=False)
    logging.require_report(0, PAGE, mapped=True)
    logging.stop()
    refused(errno.ENOENT, logging.require_report, 0, PAGE, mapped=False)
    refused(errno.EINVAL, logging.require_report, 0, PAGE, mapped=True)


def test_reports_clear_and_can_be_undone(logging: DmaLogging) -> None:
    """Read and clear; a report that was not delivered counts again."""
    logging.mark(3 * PAGE + 5, PAGE)
    assert 0x18 == logging.report(0, 8 * PAGE, PAGE)[0]
    assert 0 == logging.report(0, 8 * PAGE, PAGE)[0]
    logging.mark(PAGE, 1)
    logging.report(0, 8 * PAGE, PAGE)
    logging.undo_report()
    assert 0x02 == logging.report(0, 8 * PAGE, PAGE)[0]


def test_stop_and_start_forget(logging: DmaLogging) -> None:
    """Old bits are gone, another page size is fine."""
    logging.mark(0, PAGE)
    logging.stop()
    assert 65536 == logging.start(65536)
    assert 0 == logging.report(0, 65536, 65536)[0]


def test_unmapped_memory_is_forgotten(logging: DmaLogging) -> None:
    """What is mapped there later starts clean."""
    logging.mark(0, 4 * PAGE)
    logging.unmapped(PAGE, 2 * PAGE)
    assert 0x09 == logging.report(0, 8 * PAGE, PAGE)[0]


def test_an_agents_bitmap_counts(logging: DmaLogging) -> None:
    """Pages of another size are converted."""
    logging.mark_bitmap(16 * PAGE, 2 * PAGE, b"\x02")
    assert 0x0C == logging.report(16 * PAGE, 8 * PAGE, PAGE)[0]


def unmap(size: int, pgsize: int, bitmap: int) -> DmaUnmap:
    """A DMA_UNMAP with a bitmap, with the argsz of the v1 fork of QEMU."""
    return DmaUnmap(48, 1, 0, size, pgsize, bitmap)


def test_unmap_with_a_bitmap(logging: DmaLogging) -> None:
    """The bitmap's size counts, not argsz; other pages than the logged are converted."""
    require_unmap_bitmap(unmap(128 * PAGE, PAGE, 16), logging)
    require_unmap_bitmap(unmap(128 * PAGE, 2 * PAGE, 8), logging)
    for bad in (unmap(128 * PAGE, PAGE, 8), unmap(128 * PAGE, 0, 0), unmap(PAGE, 2 * PAGE, 8)):
        refused(errno.EINVAL, require_unmap_bitmap, bad, logging)
    logging.stop()
    refused(errno.EINVAL, require_unmap_bitmap, unmap(128 * PAGE, PAGE, 16), logging)
