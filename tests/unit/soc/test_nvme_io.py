"""NVM commands: what they do to the blocks, and every way to get them wrong."""

from __future__ import annotations

import errno
import struct
from typing import Unpack

import pytest
import trio

from nvmebed import CommandFailed, Machine, machine, make_function
from nvmebed.driver import Fields
from vfiouser_soc.nvme.config import ControllerLimits
from vfiouser_soc.nvme.stores import BackingStore, MemoryStore

FLUSH, WRITE, READ, COMPARE, ZEROES, DSM, VERIFY = 0, 1, 2, 5, 8, 9, 0xC
BLOCKS = (4 << 20) // 512


def pattern(count: int, seed: int = 1) -> bytes:
    """Bytes of which no two sectors are alike."""
    return b"".join(struct.pack("<QQ", seed, number) for number in range(count // 16))


async def failure(m: Machine, opcode: int, **fields: Unpack[Fields]) -> int:
    """Execute a command that must fail; returns its status."""
    with pytest.raises(CommandFailed) as caught:
        await m.driver.io(opcode, **fields)
    return caught.value.status


class Recorder(MemoryStore):
    """A store that can be told to fail, and that counts flushes."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.error: int | None = None
        self.flushes = 0

    def _fail(self) -> None:
        if self.error is not None:
            raise OSError(self.error, "broken on purpose")

    async def read(self, offset: int, count: int) -> bytes:
        """Read, unless broken."""
        self._fail()
        return await super().read(offset, count)

    async def write(self, offset: int, data: bytes) -> None:
        """Write, unless broken."""
        self._fail()
        await super().write(offset, data)

    async def discard(self, offset: int, count: int) -> None:
        """Discard, unless broken."""
        self._fail()
        await super().discard(offset, count)

    async def flush(self) -> None:
        """Count, unless broken."""
        self._fail()
        self.flushes += 1


@pytest.mark.parametrize(("count", "offset"), [(1, 0), (8, 0), (8, 512), (16, 0), (17, 4), (512, 0), (1024, 2048)])
async def test_written_blocks_are_read_back(count: int, offset: int) -> None:
    """One PRP, two, and lists, from any dword offset; the neighbours stay as they were."""
    async with machine() as m:
        data = pattern(count * 512)
        await m.driver.write_blocks(7, data, offset=offset)
        assert data == await m.driver.read_blocks(7, count, offset=offset ^ 8)
        assert bytes(512) == await m.driver.read_blocks(6, 1)
        assert bytes(512) == await m.driver.read_blocks(7 + count, 1)


async def test_contiguous_pages_are_one_access() -> None:
    """PRPs of adjacent pages are transferred together."""
    async with machine() as m:
        buffer = m.driver.alloc(16 * 4096)
        table = m.driver.alloc(4096)
        m.host.memory.poke(table, struct.pack("<15Q", *range(buffer + 4096, buffer + 65536, 4096)))
        m.host.memory.accesses.clear()
        await m.driver.io(READ, prp1=buffer, prp2=table, cdw12=127)
        written = [access for access in m.host.memory.accesses if access[0] == "write"]
        assert [("write", buffer, 65536)] == written[:1]


async def test_last_block_and_beyond() -> None:
    """The last block works; one more is out of range, also where the sum wraps."""
    async with machine() as m:
        await m.driver.write_blocks(BLOCKS - 1, pattern(512))
        page = m.driver.alloc(4096)
        for slba, count in ((BLOCKS, 1), (BLOCKS - 1, 2), (2**64 - 1, 1), (2**64 - 1, 2)):
            fields = {"cdw10": slba & 0xFFFFFFFF, "cdw11": slba >> 32, "cdw12": count - 1, "prp1": page}
            for opcode in (READ, WRITE, COMPARE, ZEROES, VERIFY):
                assert 0x80 == await failure(m, opcode, **fields)


@pytest.mark.parametrize("nsid", [0, 2, 0xFFFFFFFF])
async def test_wrong_namespace(nsid: int) -> None:
    """Only namespace 1 exists; the broadcast id is for Flush only."""
    async with machine() as m:
        for opcode in (READ, WRITE, COMPARE, ZEROES, DSM, VERIFY):
            assert 0x0B == await failure(m, opcode, nsid=nsid, prp1=m.driver.alloc(4096))
        if nsid != 0xFFFFFFFF:
            assert 0x0B == await failure(m, FLUSH, nsid=nsid)


async def test_transfer_limit() -> None:
    """More than MDTS is refused before any memory is touched; commands without data have no such limit."""
    async with machine(make_function(limits=ControllerLimits(mdts=1))) as m:
        await m.driver.write_blocks(0, pattern(8192))
        page = m.driver.alloc(4096)
        for opcode in (READ, WRITE, COMPARE):
            assert 0x02 == await failure(m, opcode, prp1=page, prp2=page, cdw12=16)
        await m.driver.io(ZEROES, cdw12=16)
        await m.driver.io(VERIFY, cdw12=0xFFF)


@pytest.mark.parametrize(
    ("prp1", "prp2", "count"),
    [(2, 0, 1), (0, 512, 16), (0, 4, 17), (4, 512, 8)],
)
async def test_prp_offsets(prp1: int, prp2: int, count: int) -> None:
    """Entries with offsets that they must not have are refused."""
    async with machine() as m:
        fields = {
            "prp1": m.driver.alloc(4096) + prp1,
            "prp2": m.driver.alloc(4096) + prp2,
            "cdw12": count - 1,
        }
        assert 0x13 == await failure(m, READ, **fields)
        assert 0x13 == await failure(m, WRITE, **fields)


async def test_list_entry_with_an_offset() -> None:
    """Every entry of a list must be page aligned."""
    async with machine() as m:
        page, table = m.driver.alloc(4096), m.driver.alloc(4096)
        m.host.memory.poke(table, struct.pack("<2Q", page, page + 8))
        assert 0x13 == await failure(m, READ, prp1=page, prp2=table, cdw12=23)


async def test_data_that_cannot_be_reached() -> None:
    """A wrong data address fails the command, which may be retried, and nothing else."""
    async with machine() as m:
        for opcode in (READ, WRITE, COMPARE):
            with pytest.raises(CommandFailed) as caught:
                await m.driver.io(opcode, prp1=0x1000)
            assert (0x04, False) == (caught.value.status, caught.value.do_not_retry)
        assert 0x04 == await failure(m, READ, prp1=m.driver.alloc(4096), prp2=0xDEAD000, cdw12=100)
        assert bytes(512) == await m.driver.read_blocks(0, 1)


async def test_compare() -> None:
    """Equal blocks compare, different ones do not."""
    async with machine() as m:
        data = pattern(4096)
        await m.driver.write_blocks(3, data)
        page = m.driver.alloc(4096)
        m.host.memory.poke(page, data)
        await m.driver.io(COMPARE, prp1=page, cdw10=3, cdw12=7)
        m.host.memory.poke(page + 4095, b"!")
        assert 0x285 == await failure(m, COMPARE, prp1=page, cdw10=3, cdw12=7)


@pytest.mark.parametrize(("slba", "count"), [(0, 1), (1, 6), (8, 8), (5, 30), (0, 100)])
async def test_write_zeroes(slba: int, count: int) -> None:
    """Exactly the named blocks become zeros, whether or not they fill pages."""
    async with machine() as m:
        data = pattern(100 * 512)
        await m.driver.write_blocks(0, data)
        await m.driver.io(ZEROES, cdw10=slba, cdw12=count - 1)
        expected = data[: slba * 512] + bytes(count * 512) + data[(slba + count) * 512 :]
        assert expected == await m.driver.read_blocks(0, 100)


async def test_dataset_management() -> None:
    """Deallocated ranges read as zeros; hints alone change nothing."""
    async with machine() as m:
        data = pattern(64 * 512)
        await m.driver.write_blocks(0, data)
        page = m.driver.alloc(4096)
        m.host.memory.poke(page, struct.pack("<IIQIIQIIQ", 0, 4, 2, 0, 0, 5, 0, 8, 16))
        await m.driver.io(DSM, prp1=page, cdw10=2, cdw11=1)
        assert data == await m.driver.read_blocks(0, 64)
        await m.driver.io(DSM, prp1=page, cdw10=2, cdw11=4)
        expected = data[:1024] + bytes(2048) + data[3072:8192] + bytes(4096) + data[12288:]
        assert expected == await m.driver.read_blocks(0, 64)
        m.host.memory.poke(page, struct.pack("<IIQIIQ", 0, 1, 40, 0, 1, BLOCKS))
        assert 0x80 == await failure(m, DSM, prp1=page, cdw10=1, cdw11=4)
        assert expected == await m.driver.read_blocks(0, 64)


async def test_flush_and_forced_unit_access() -> None:
    """Flush, FUA, and any write with the cache switched off reach the medium before they complete."""
    store, second = Recorder(), Recorder()
    async with machine(make_function(store, second)) as m:
        await m.driver.write_blocks(0, pattern(512))
        assert 0 == store.flushes
        await m.driver.write_blocks(0, pattern(512), fua=True)
        assert 1 == store.flushes
        await m.driver.io(FLUSH)
        assert (2, 0) == (store.flushes, second.flushes)
        await m.driver.io(FLUSH, nsid=0xFFFFFFFF)
        assert (3, 1) == (store.flushes, second.flushes)
        await m.driver.set_feature(6, 0)
        await m.driver.write_blocks(0, pattern(512))
        assert 4 == store.flushes


@pytest.mark.parametrize(("error", "statuses"), [(errno.EIO, (0x281, 0x280)), (errno.ENOSPC, (0x81, 0x81))])
async def test_broken_medium(error: int, statuses: tuple[int, int]) -> None:
    """Errors of the store become media errors of the command; the controller lives on."""
    store = Recorder()
    async with machine(make_function(store)) as m:
        store.error = error
        page = m.driver.alloc(4096)
        assert statuses[0] == await failure(m, READ, prp1=page)
        for opcode in (WRITE, ZEROES, FLUSH):
            assert statuses[1] == await failure(m, opcode, prp1=page)
        store.error = None
        assert bytes(512) == await m.driver.read_blocks(0, 1)


async def test_many_commands_at_once() -> None:
    """A full queue is executed and completed once each, whatever order the memory answers in."""
    async with machine() as m:
        m.host.memory.yields = True
        driver = m.driver
        pages = [driver.alloc(4096) for _ in range(63)]
        for round_ in range(5):
            cids = []
            for number, page in enumerate(pages):
                m.host.memory.poke(page, pattern(4096, number + round_))
                cids.append(driver.submit(m.io, WRITE, nsid=1, prp1=page, cdw10=number * 8, cdw12=7, ring=False))
            driver.ring(m.io)
            for cid in cids:
                await driver.wait(m.io, cid)
        for number in range(63):
            assert pattern(4096, number + 4) == await driver.read_blocks(number * 8, 8)


async def test_waiting_commands_do_not_hold_up_others() -> None:
    """A command whose memory does not answer is overtaken by the next ones of its queue."""
    async with machine() as m:
        slow, fast = m.driver.alloc(4096), m.driver.alloc(4096)
        gate = m.host.memory.hold(slow, 4096)
        first = m.driver.submit(m.io, READ, nsid=1, prp1=slow)
        second = m.driver.submit(m.io, READ, nsid=1, prp1=fast)
        await m.driver.wait(m.io, second)
        assert first not in m.io.done
        gate.set()
        await m.driver.wait(m.io, first)


async def test_commands_in_flight_are_bounded() -> None:
    """However much is submitted, at most 64 commands are taken from a queue before one is completed."""
    async with machine(io_queue=False) as m:
        queue = await m.driver.create_queue(entries=256)
        page = m.driver.alloc(4096)
        gate = m.host.memory.hold(page, 4096)
        cids = [m.driver.submit(queue, READ, nsid=1, prp1=page, ring=False) for _ in range(200)]
        m.driver.ring(queue)
        await trio.testing.wait_all_tasks_blocked()
        assert 64 == len(m.function.controller.state.submission_queues[1].inflight)
        gate.set()
        for cid in cids:
            await m.driver.wait(queue, cid)


async def test_full_completion_queue_waits_for_the_host() -> None:
    """Without room nothing is written or lost; acknowledging makes room."""
    async with machine(io_queue=False) as m:
        driver = m.driver
        queue = driver._new_queue(1, 4)
        await driver.admin(5, prp1=queue.cq, cdw10=3 << 16 | 1, cdw11=1 << 16 | 3)
        big = driver.alloc(4096)
        await driver.admin(1, prp1=big, cdw10=63 << 16 | 1, cdw11=1 << 16 | 1)
        for cid in range(20):
            m.host.memory.poke(big + cid * 64, struct.pack("<BBHI56x", FLUSH, 0, cid, 1))
        driver.doorbell(2, 20)
        await trio.testing.wait_all_tasks_blocked()
        assert 3 == driver.collect(queue, acknowledge=False)
        driver.doorbell(3, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert 1 == driver.collect(queue, acknowledge=False)
        with trio.fail_after(5):
            while len(queue.order) < 20:
                driver.doorbell(3, queue.head)
                await trio.testing.wait_all_tasks_blocked()
                driver.collect(queue, acknowledge=False)
        assert list(range(20)) == sorted(queue.order)


async def test_completion_comes_after_data_and_interrupt_after_both() -> None:
    """The order of accesses to memory is data, completion entry; the interrupt is last."""
    async with machine() as m:
        page = m.driver.alloc(4096)
        entry = m.io.cq + m.io.head * 16
        before = m.host.interrupts[1]
        gate = m.host.memory.hold(entry, 16)
        m.host.memory.accesses.clear()
        cid = m.driver.submit(m.io, READ, nsid=1, prp1=page, cdw12=7)
        await trio.testing.wait_all_tasks_blocked()
        assert ("write", page, 4096) in m.host.memory.accesses
        assert before == m.host.interrupts[1]
        gate.set()
        await m.driver.wait(m.io, cid)
        assert [("write", page, 4096), ("write", entry, 16)] == m.host.memory.accesses[-2:]
        assert before + 1 == m.host.interrupts[1]


async def test_batch_is_one_fetch_one_completion_write_one_interrupt() -> None:
    """Ten commands announced by one doorbell cost three accesses to the queues, not thirty."""
    async with machine() as m:
        before = m.host.interrupts[1]
        m.host.memory.accesses.clear()
        cids = [m.driver.submit(m.io, FLUSH, nsid=1, ring=False) for _ in range(10)]
        m.driver.ring(m.io)
        for cid in cids:
            await m.driver.wait(m.io, cid)
        # Trio runs what is due in any order, so the last commands may find their completions under way.
        fetch, *completions = m.host.memory.accesses
        assert ("read", m.io.sq, 640) == fetch
        assert 160 == sum(size for _, _, size in completions)
        assert len(completions) in (1, 2)
        assert before < m.host.interrupts[1] <= before + len(completions)


async def test_host_is_faster_than_the_confirmation() -> None:
    """The host may consume an entry, reuse its id and submit before our write of it is confirmed."""
    async with machine() as m:
        driver = m.driver
        confirm = m.host.memory.hold_confirmation(m.io.cq, 16)
        driver.submit(m.io, FLUSH, nsid=1, cid=5)
        await trio.testing.wait_all_tasks_blocked()
        assert 1 == driver.collect(m.io)
        assert (0, 0) == m.io.done.pop(5)
        assert 0 == m.function.controller.state.counters.error_entries
        driver.submit(m.io, FLUSH, nsid=1, cid=5)
        await trio.testing.wait_all_tasks_blocked()
        confirm.set()
        assert 0 == await driver.wait(m.io, 5)


def test_recorder_is_a_store() -> None:
    """The store of these tests keeps to the interface of the others."""
    store = Recorder()
    assert isinstance(store, BackingStore)
    store.close()
