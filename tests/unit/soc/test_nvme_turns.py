"""No command of one function holds up the event loop, however long it is and however many there are."""

from __future__ import annotations

import gc
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from nvmebed import Machine, machine, make_function
from vfiouser_soc.nvme.stores import MemoryStore

SIZE = 64 << 20
BLOCKS = SIZE >> 9
QUEUES = 8
ENTRIES = 64
#: Seconds of this process's own time that one pass of the event loop may take; a slice takes 2 ms.
LIMIT_S = 0.05


class Passes(trio.abc.Instrument):
    """How much processor time each pass of the event loop takes."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._began: float | None = None

    def after_io_wait(self, timeout: float) -> None:
        """A pass begins."""
        self._began = time.thread_time()

    def before_io_wait(self, timeout: float) -> None:
        """A pass ends."""
        if self._began is not None:
            self.longest = max(self.longest, time.thread_time() - self._began)


@contextmanager
def measured() -> Iterator[Passes]:
    """Look at the passes of a block, from its first checkpoint on."""
    passes = Passes()
    gc.disable()  # a look through all objects that the tests have made takes longer than anything here
    trio.lowlevel.add_instrument(passes)
    try:
        yield passes
    finally:
        trio.lowlevel.remove_instrument(passes)
        gc.enable()


async def fill_queues(m: Machine, opcode: int, **fields: int) -> None:
    """Put as many commands into all queues as they take, and wait until all are completed."""
    for qid in range(1, QUEUES + 1):
        for _ in range(ENTRIES - 1):
            m.driver.submit(m.driver.queues[qid], opcode, nsid=1, ring=False, **fields)
    for qid in range(1, QUEUES + 1):
        m.driver.ring(m.driver.queues[qid])
    done = 0
    while done < QUEUES * (ENTRIES - 1):
        done += sum(m.driver.collect(m.driver.queues[qid]) for qid in range(1, QUEUES + 1))
        await trio.lowlevel.checkpoint()
    assert {0} == {status for qid in range(1, QUEUES + 1) for status, _ in m.driver.queues[qid].done.values()}


@pytest.mark.parametrize("opcode", [0x0C, 0x05, 0x01, 0x08], ids=["verify", "compare", "write", "write zeroes"])
async def test_full_queues(opcode: int) -> None:
    """Queues full of the longest commands that there are."""
    store = MemoryStore(SIZE)
    await store.write(0, bytes(SIZE))
    async with machine(make_function(store), io_queue=False, size=16 << 20) as m:
        for qid in range(1, QUEUES + 1):
            await m.driver.create_queue(qid, ENTRIES, vector=1)
        blocks = 1024 if opcode in (0x05, 0x01) else 16384
        prp1, prp2, _ = m.driver.prps(512 << 10)
        with measured() as passes, trio.fail_after(120):
            await fill_queues(m, opcode, prp1=prp1, prp2=prp2, cdw12=blocks - 1)
    assert passes.longest < LIMIT_S


async def test_deallocation_of_the_whole_namespace_256_times() -> None:
    """One command with 256 ranges that are all of a namespace whose memory is all in use."""
    store = MemoryStore(16 * SIZE)
    for start in range(0, store.size, SIZE):
        await store.write(start, b"\1" * SIZE)
    async with machine(make_function(store)) as m:
        ranges = m.driver.alloc(4096)
        m.host.memory.poke(ranges, struct.pack("<IIQ", 0, 16 * BLOCKS, 0) * 256)
        with measured() as passes, trio.fail_after(60):
            await m.driver.io(0x09, prp1=ranges, cdw10=255, cdw11=4)
        assert bytes(4096) == await m.driver.read_blocks(16 * BLOCKS - 8, 8)
    assert passes.longest < LIMIT_S


async def test_ranges_of_a_deallocation() -> None:
    """Ranges that overlap, touch, repeat or are empty: exactly their blocks read as zeros afterwards."""
    async with machine() as m:
        await m.driver.write_blocks(0, b"\1" * (64 << 9))
        ranges = [(8, 4), (10, 4), (14, 2), (40, 1), (40, 1), (50, 0), (9, 1)]
        page = m.driver.alloc(4096)
        m.host.memory.poke(page, b"".join(struct.pack("<IIQ", 0, count, start) for start, count in ranges))
        await m.driver.io(0x09, prp1=page, cdw10=len(ranges) - 1, cdw11=4)
        data = await m.driver.read_blocks(0, 64)
        zero = {block for block in range(64) if data[block << 9 : block + 1 << 9] == bytes(512)}
        assert zero == {block for start, count in ranges for block in range(start, start + count)}


async def test_doorbells_that_do_not_exist_count_as_one() -> None:
    """A write over the whole doorbell page reports the page behind the last doorbell once, not a thousand times."""
    async with machine() as m:
        before = m.function.controller.state.counters.error_entries
        m.function.region_write(0, 0x1000 + 4 * 64, b"\1" * (4096 - 4 * 64))
        assert before + 1 == m.function.controller.state.counters.error_entries
