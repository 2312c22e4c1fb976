"""DirtyLog against a set of page numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from vfiouser_protocol import dirty as dirty_module
from vfiouser_protocol.dirty import DirtyLog, bitmap_size
from vfiouser_protocol.dirty_bits import fold, replicate

ARENA = 1 << 8


class NaiveLog:
    """Dirty pages as a set; reports ask for each page of the answer whether a dirty page touches it."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: set[int] = set()

    def mark(self, iova: int, length: int) -> None:
        """Every page that contains a byte of the range."""
        self.pages |= {address // self.page_size for address in range(iova, iova + length)}

    def report(self, iova: int, length: int, page_size: int) -> set[int]:
        """Numbers of the set bits; pages wholly inside the range become clean."""
        end = iova + length
        bits = set()
        for page in self.pages:
            start = max(page * self.page_size, iova)
            stop = min((page + 1) * self.page_size, end)
            bits |= {(address - iova) // page_size for address in range(start, stop)}
        self.discard(iova, length)
        return bits

    def discard(self, iova: int, length: int) -> None:
        """Pages wholly inside the range become clean."""
        self.pages = {
            page
            for page in self.pages
            if not iova <= page * self.page_size <= (page + 1) * self.page_size <= iova + length
        }


def set_bits(bitmap: bytes) -> set[int]:
    """Numbers of the bits that are set, by the rule of the wire."""
    return {n for n in range(8 * len(bitmap)) if bitmap[n // 8] >> n % 8 & 1}


class DirtyLogMachine(RuleBasedStateMachine):
    """Small pages and chunks of 16 pages, so that each boundary is crossed often."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for name, value in (
            ("_CHUNK_SHIFT", 4),
            ("_CHUNK_PAGES", 16),
            ("_CHUNK_MASK", 15),
            ("_FULL_CHUNK", 0xFFFF),
            ("_BITMAP_STEP", 3),
        ):
            self.patch.setattr(dirty_module, name, value)

    @initialize(page_size=st.sampled_from([1, 2, 8, 32]))
    def start(self, page_size: int) -> None:
        """Begin with an empty log."""
        self.log = DirtyLog(page_size)
        self.naive = NaiveLog(page_size)

    def teardown(self) -> None:
        """Give the module its chunk size back."""
        self.patch.undo()

    @rule(iova=st.integers(0, ARENA), length=st.integers(0, 40) | st.integers(0, ARENA))
    def mark(self, iova: int, length: int) -> None:
        """The device writes."""
        self.log.mark(iova, length)
        self.naive.mark(iova, length)

    @rule(iova=st.integers(0, ARENA), shift=st.integers(0, 5), bitmap=st.binary(max_size=32))
    def mark_bitmap(self, iova: int, shift: int, bitmap: bytes) -> None:
        """Another log, of pages of another size and alignment, reports what it saw."""
        bitmap = bitmap[: ARENA >> shift >> 3]
        self.log.mark_bitmap(iova, 1 << shift, bitmap)
        for bit in set_bits(bitmap):
            self.naive.mark(iova + (bit << shift), 1 << shift)

    @rule(
        iova=st.integers(0, ARENA),
        length=st.integers(1, 2 * ARENA),
        shift=st.integers(0, 9),
        delivered=st.sampled_from([True, True, False]),
    )
    def report(self, iova: int, length: int, shift: int, delivered: bool) -> None:
        """A report of any range in any page size; an undelivered one changes nothing."""
        page_size = 1 << shift
        if page_size > length:
            return
        before = set(self.naive.pages)
        bitmap = self.log.report(iova, length, page_size)
        assert bitmap_size(length, page_size) == len(bitmap)
        assert self.naive.report(iova, length, page_size) == set_bits(bitmap)
        if not delivered:
            self.log.undo_report()
            self.naive.pages = before

    @rule(iova=st.integers(0, ARENA), length=st.integers(0, ARENA))
    def discard(self, iova: int, length: int) -> None:
        """A range is unmapped."""
        self.log.discard(iova, length)
        self.naive.discard(iova, length)

    @rule()
    def everything(self) -> None:
        """The whole arena, page by page, clears both."""
        size = self.naive.page_size
        length = -(-3 * ARENA // size) * size
        expected = self.naive.report(0, length, size)
        assert expected == set_bits(self.log.report(0, length, size))
        assert not self.log


DirtyLogMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)
TestDirtyLogAgainstNaive = DirtyLogMachine.TestCase


@given(
    logged=st.integers(0, 6),
    marks=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 20)), min_size=1, max_size=8),
    iova=st.integers(0, 300),
    length=st.integers(1, 500),
    reported=st.integers(0, 8),
)
@settings(max_examples=300, deadline=None)
def test_one_report_of_anything(
    logged: int, marks: list[tuple[int, int]], iova: int, length: int, reported: int
) -> None:
    """Any combination of page sizes and alignments gives exactly the naive bits."""
    log, naive = DirtyLog(1 << logged), NaiveLog(1 << logged)
    for start, count in marks:
        log.mark(start, count)
        naive.mark(start, count)
    page_size = min(1 << reported, 1 << length.bit_length() - 1)
    assert naive.report(iova, length, page_size) == set_bits(log.report(iova, length, page_size))
    assert naive.report(0, 1 << 10, 1) == set_bits(log.report(0, 1 << 10, 1))


@given(bitmap=st.binary(max_size=40), shift=st.integers(0, 6))
@settings(deadline=None)
def test_fold_and_replicate_bit_by_bit(bitmap: bytes, shift: int) -> None:
    """Folding ORs groups of bits, replicating repeats each."""
    factor = 1 << shift
    bits = set_bits(bitmap)
    assert {bit // factor for bit in bits} == set_bits(fold(bitmap, factor))
    assert {bit * factor + i for bit in bits for i in range(factor)} == set_bits(replicate(bitmap, factor))
