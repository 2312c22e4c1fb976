"""PRP walking against a naive walker that goes byte by byte through the specification's words."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from vfiouser_soc.nvme.prp import walk_prps
from vfiouser_soc.nvme.spec import NvmeError, StatusCode

PAGES = 64


def naive(memory: dict[int, int], prp1: int, prp2: int, length: int, page: int) -> list[int]:
    """The address of every byte of a transfer."""
    addresses: list[int] = []
    slot: int | None = None
    current = prp1
    pages_left = -(-(prp1 % page + length) // page)
    while True:
        while len(addresses) < length:
            addresses.append(current)
            current += 1
            if current % page == 0:
                break
        pages_left -= 1
        if pages_left == 0:
            return addresses
        if slot is None and pages_left == 1:
            current = prp2
            continue
        if slot is None:
            slot = prp2
        if slot % page == page - 8 and pages_left > 1:
            slot = memory[slot]
        current = memory[slot]
        slot += 8


@st.composite
def transfers(draw: st.DrawFn) -> tuple[dict[int, int], int, int, int, int]:
    """A correct description of a transfer: memory of list entries, PRP1, PRP2, length, page size."""
    page = draw(st.sampled_from([64, 128, 4096]))  # small pages make long chains; the rules are the same
    count = draw(st.integers(1, 40 * page))
    offset = draw(st.integers(0, page // 4 - 1)) * 4
    numbers = iter(draw(st.permutations(range(1, PAGES))) + list(range(PAGES, 4 * PAGES)))
    if draw(st.booleans()):
        numbers = iter(range(1, 4 * PAGES))
    needed = -(-(offset + count) // page)
    data = [next(numbers) * page for _ in range(needed)]
    if needed <= 2:
        return {}, data[0] + offset, data[-1] if needed == 2 else 0, count, page
    memory: dict[int, int] = {}
    start = slot = next(numbers) * page + draw(st.integers(0, page // 8 - 1)) * 8
    rest = data[1:]
    while rest:
        if slot % page == page - 8 and len(rest) > 1:
            memory[slot] = next(numbers) * page
            slot = memory[slot]
        memory[slot] = rest.pop(0)
        slot += 8
    return memory, data[0] + offset, start, count, page


def walk(memory: dict[int, int], prp1: int, prp2: int, length: int, page: int) -> list[tuple[int, int]]:
    """Run the real walker."""

    async def read(address: int, count: int) -> bytes:
        assert address // page == (address + count - 1) // page, "a list is read beyond its page"
        return struct.pack(f"<{count // 8}Q", *(memory[address + 8 * i] for i in range(count // 8)))

    async def run() -> list[tuple[int, int]]:
        return await walk_prps(read, prp1, prp2, length, page)

    return trio.run(run)


@settings(deadline=None)
@given(transfers())
def test_walker_agrees_with_the_naive_one(case: tuple[dict[int, int], int, int, int, int]) -> None:
    """The segments are exactly the bytes of the naive walk in its order, and adjacent ones are merged."""
    segments = walk(*case)
    assert naive(*case) == [address for start, count in segments for address in range(start, start + count)]
    assert all(start + count != following for (start, count), (following, _) in pairwise(segments))


@given(transfers(), st.data())
def test_misaligned_entries_are_refused(case: tuple[dict[int, int], int, int, int, int], data: st.DataObject) -> None:
    """Any list entry with an offset in its page is an invalid PRP offset."""
    memory, prp1, prp2, length, page = case
    if not memory:
        return
    slot = data.draw(st.sampled_from(sorted(memory)))
    broken = memory | {slot: memory[slot] + data.draw(st.integers(1, page - 1))}
    with pytest.raises(NvmeError) as caught:
        walk(broken, prp1, prp2, length, page)
    assert StatusCode.INVALID_PRP_OFFSET is caught.value.status
