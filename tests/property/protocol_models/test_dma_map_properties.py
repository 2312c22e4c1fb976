"""The DMA map against a naive list of ranges, under random sequences of operations."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vfiouser_protocol import dma as dma_module
from vfiouser_protocol.dma import DmaTable
from vfiouser_protocol.errors import CommandError, DmaFault

T = TypeVar("T")
TOP = 1 << 64
LIMIT = 24
MAX_SIZE = 0x40

# A small arena and the top of the address space: neighbours, overlaps and the end at 2^64 all happen often.
addresses = st.integers(0, 0x100) | st.integers(TOP - 0x40, TOP - 1)
sizes = st.integers(0, MAX_SIZE + 2)
flag_values = st.sampled_from([0, 1, 2, 3, 3, 3, 4, 7, 11, 16])
files = st.sampled_from([None, "a", "b"])
offsets = st.sampled_from([0, 0x1000])

Entry = tuple[int, int, int, int, str | None]


def attempt(call: Callable[[], T]) -> tuple[int, T | None]:
    """The errno of the call's refusal and None, or 0 and its result."""
    try:
        return 0, call()
    except (CommandError, DmaFault) as error:
        return error.errno, None


class NaiveMap:
    """The rules written as scans over a list."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def map_result(self, new: Entry) -> int | None:
        """The errno of the refusal, 0 for a new mapping, None for an identical one."""
        address, size, flags, _, file = new
        if size == 0 or address + size > TOP or flags > 15 or (flags > 3 and file is None):
            return errno.EINVAL
        if size > MAX_SIZE:
            return errno.ENOSPC
        if new in self.entries:
            return None
        if any(address < a + s and a < address + size for a, s, *_ in self.entries):
            return errno.EEXIST
        if len(self.entries) >= LIMIT:
            return errno.ENOSPC
        return 0

    def at(self, address: int) -> Entry | None:
        """The entry that contains the address."""
        return next((e for e in self.entries if e[0] <= address < e[0] + e[1]), None)


class DmaMapMachine(RuleBasedStateMachine):
    """Runs both maps side by side; leaves of four entries make splits and merges common."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(dma_module, "_LEAF_CAPACITY", 4)
        self.dma = DmaTable(max_regions=LIMIT, max_region_size=MAX_SIZE)
        self.naive = NaiveMap()

    def teardown(self) -> None:
        """Give the module its leaf size back."""
        self.patch.undo()

    @initialize(step=st.sampled_from([0x8, 0x10]), count=st.integers(0, 24))
    def fill(self, step: int, count: int) -> None:
        """Begin with a row of adjacent regions."""
        for i in range(count):
            self.map(i * step, step, 3, 0, None)

    @rule(address=addresses, size=sizes, flags=flag_values, offset=offsets, file=files)
    def map(self, address: int, size: int, flags: int, offset: int, file: str | None) -> None:
        """Map anything; result and errno must be the naive ones."""
        new = (address, size, flags, offset, file)
        expected = self.naive.map_result(new)
        failure, region = attempt(lambda: self.dma.map(address, size, flags, offset=offset, file=file, owner=new))
        assert (expected or 0) == failure
        if expected == 0:
            assert region is not None
            assert new == region.owner
            self.naive.entries.append(new)
        else:
            assert region is None

    @rule(data=st.data())
    def map_again(self, data: st.DataObject) -> None:
        """Repeat an existing mapping."""
        if self.naive.entries:
            self.map(*data.draw(st.sampled_from(self.naive.entries)))

    @rule(address=addresses, size=sizes)
    def unmap_anything(self, address: int, size: int) -> None:
        """Unmap a random range; only an exact match works."""
        match = [e for e in self.naive.entries if e[:2] == (address, size)]
        failure, region = attempt(lambda: self.dma.unmap(address, size))
        assert (0 if match else errno.ENOENT) == failure
        if region is not None:
            assert match == [region.owner]
            self.naive.entries.remove(region.owner)

    @rule(data=st.data())
    def unmap_existing(self, data: st.DataObject) -> None:
        """Unmap a region that is there."""
        if self.naive.entries:
            entry = data.draw(st.sampled_from(self.naive.entries))
            self.unmap_anything(entry[0], entry[1])

    @rule(start=st.integers(0, 23), count=st.integers(2, 12))
    def unmap_run(self, start: int, count: int) -> None:
        """Unmap neighbours, as when memory is unplugged: whole leaves go away."""
        for entry in sorted(self.naive.entries)[start : start + count]:
            self.unmap_anything(entry[0], entry[1])

    @rule()
    def unmap_all(self) -> None:
        """Everything comes back, in order."""
        assert sorted(self.naive.entries) == [r.owner for r in self.dma.unmap_all()]
        self.naive.entries.clear()

    @rule(address=addresses, count=st.integers(0, 0x80), write=st.booleans())
    def access(self, address: int, count: int, write: bool) -> None:
        """segments() is the byte-by-byte walk, grouped by region."""
        need = 2 if write else 1
        expected: list[tuple[Entry, int, int]] = []
        fault = 0
        for position in range(address, address + count):
            entry = self.naive.at(position)
            if entry is None:
                fault = errno.EFAULT
                break
            if not entry[2] & need:
                fault = errno.EPERM
                break
            if expected and expected[-1][0] == entry:
                expected[-1] = (entry, expected[-1][1], expected[-1][2] + 1)
            else:
                expected.append((entry, position - entry[0], 1))
        failure, parts = attempt(lambda: self.dma.segments(address, count, write))
        assert fault == failure
        if parts is not None:
            assert expected == [(region.owner, offset, n) for region, offset, n in parts]

    @rule(address=addresses, size=st.integers(0, 0x200))
    def overlapping(self, address: int, size: int) -> None:
        """overlapping() is a scan for shared bytes."""
        expected = [e for e in sorted(self.naive.entries) if e[0] < address + size and address < e[0] + e[1]]
        if not size:
            expected = []
        assert expected == [r.owner for r in self.dma.overlapping(address, size)]

    @rule(address=addresses)
    def find(self, address: int) -> None:
        """find() is a scan for the address."""
        region = self.dma.find(address)
        assert self.naive.at(address) == (region.owner if region else None)

    @invariant()
    def same_content(self) -> None:
        """Both hold the same regions, in the same order."""
        assert sorted(self.naive.entries) == [r.owner for r in self.dma]
        assert len(self.naive.entries) == len(self.dma)


DmaMapMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestDmaMapAgainstNaive = DmaMapMachine.TestCase
