"""Dirty reports that are made in steps: nothing is lost of what is marked meanwhile, and no step is long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_protocol.dirty import DirtyLog, bitmap_size, fill_in_steps

PAGE = 4096
CHUNK = 4096 * PAGE
#: Pages all over three chunks, and at their edges.
PAGES = st.one_of(st.integers(0, 3 * 4096 - 1), st.sampled_from([0, 4095, 4096, 8191, 8192, 12287]))


def dirty_in(bitmap: bytes | bytearray, page_size: int) -> set[int]:
    """Addresses that a bitmap names."""
    digits = f"{int.from_bytes(bitmap, 'little'):b}"
    return {bit * page_size for bit, digit in enumerate(reversed(digits)) if digit == "1"}


@given(
    before=st.sets(PAGES, max_size=12),
    during=st.lists(PAGES, max_size=12),
    page_size=st.sampled_from([512, PAGE, 4 * PAGE]),
    stop=st.one_of(st.none(), st.integers(0, 20)),
)
def test_what_is_marked_between_the_steps(
    before: set[int], during: list[int], page_size: int, stop: int | None
) -> None:
    """It is in this report or in the next one; a report that is given up has told nothing."""
    log = DirtyLog(PAGE)
    for page in before:
        log.mark(page * PAGE, 1)
    marked = set(before)
    steps = log.report_in_steps(0, 3 * CHUNK, page_size)
    waiting = list(during)
    told: set[int] = set()
    for count in range(1 << 20):
        if count == stop:
            steps.close()
            break
        try:
            next(steps)
        except StopIteration as end:
            told = dirty_in(end.value, page_size)
            break
        if waiting:
            page = waiting.pop()
            log.mark(page * PAGE, 1)
            marked.add(page)
    again = dirty_in(log.report(0, 3 * CHUNK, PAGE), PAGE)
    coarse = max(page_size, PAGE)
    assert {page * PAGE // coarse for page in marked} <= {address // coarse for address in told | again}
    assert {address // coarse for address in told | again} <= {page * PAGE // coarse for page in marked}


@given(
    shift=st.integers(0, 2 * PAGE),
    ranges=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 1 << 19)), max_size=4),
    page_size=st.sampled_from([1024, PAGE, 16 * PAGE]),
)
def test_ranges_that_are_dirty_as_a_whole(shift: int, ranges: list[tuple[int, int]], page_size: int) -> None:
    """Filling a bitmap sets what marking the range sets."""
    iova, length = shift, (1 << 20) + (1 << 19)
    bitmap = bytearray(bitmap_size(length, page_size))
    expected = set()
    for start, size in ranges:
        for _ in fill_in_steps(bitmap, iova, page_size, iova + start, iova + start + size):
            pass
        expected |= set(range(start // page_size, -(-(start + size) // page_size)))
    assert {address // page_size for address in dirty_in(bitmap, page_size)} == expected


@pytest.mark.parametrize("page_size", [1, 512, PAGE, 2 << 20])
@pytest.mark.parametrize("lead", [0, 1, PAGE])
def test_no_step_is_long(page_size: int, lead: int) -> None:
    """However much is dirty and however small the pages are, each step is a small part of all the work."""
    log = DirtyLog(PAGE)
    length = 16 * CHUNK if page_size < PAGE else 256 * CHUNK
    log.mark(0, length)
    times = []
    steps = log.report_in_steps(lead, length - lead - page_size, page_size)
    while True:
        began = time.thread_time()
        try:
            next(steps)
        except StopIteration:
            break
        times.append(time.thread_time() - began)
    assert len(times) >= 16
    # The longest is taken leniently: what else the machine does costs processor time as well.
    assert sorted(times)[len(times) * 9 // 10] < 0.02


def test_a_bitmap_of_large_pages_costs_no_more_than_what_it_says() -> None:
    """An agent's bitmap of 2 MiB pages is noted in one pass over the pages that it stands for."""
    log = DirtyLog(PAGE)
    log.mark_bitmap(0, 2 << 20, b"\xff" * 512)
    other = DirtyLog(PAGE)
    other.mark(0, 512 * 8 * (2 << 20))
    assert log.report(0, 8 << 30, PAGE) == other.report(0, 8 << 30, PAGE)
