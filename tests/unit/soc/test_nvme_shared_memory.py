"""What a client can map: polled doorbells and the controller memory buffer."""

from __future__ import annotations

import mmap
import struct

import pytest
import trio

from nvmebed import CommandFailed, Machine, machine, make_function
from vfiouser_oob.devices.memfd import SharedMemory
from vfiouser_oob.devices.model import ResetKind
from vfiouser_soc.nvme.config import ControllerIdentity
from vfiouser_soc.nvme.doorbells import PolledDoorbells, PollTimes
from vfiouser_soc.nvme.function import NvmeSettings

READ, WRITE, FLUSH = 2, 1, 0
CMBLOC, CMBSZ, CMBMSC, CMBSTS = 0x38, 0x3C, 0x50, 0x58
CMB = 2 << 20
BASE = 0x40_0000_0000


def map_region(m: Machine, index: int, size: int) -> mmap.mmap:
    """Map a region as a client does with the descriptor that it received."""
    region = m.function.regions[index]
    assert region.memory is not None
    return mmap.mmap(region.memory.fileno(), size)


async def test_polled_doorbells_need_no_access() -> None:
    """Doorbells written into the mapped page alone are noticed; commands complete and queues wrap."""
    async with machine(make_function(polled=True)) as m:
        area = m.function.regions[0].areas
        assert [(0x1000, 0x1000)] == [(part.offset, part.size) for part in area]
        with map_region(m, 0, 0x4000) as bar:
            m.driver.doorbell = lambda number, value: struct.pack_into(  # type: ignore[method-assign]
                "<I", bar, 0x1000 + 4 * number, value
            )
            for number in range(150):
                await m.driver.write_blocks(number, bytes([number]) * 512)
                m.driver._next = 0x30_0000
            assert bytes([149]) * 512 == await m.driver.read_blocks(149, 1)
            assert 0 == m.function.controller.state.counters.error_entries


async def test_trapped_writes_work_beside_polling() -> None:
    """A client that does not map the page writes doorbells by messages, and can read them back."""
    async with machine(make_function(polled=True)) as m:
        assert bytes(512) == await m.driver.read_blocks(0, 1)
        assert 1 == m.driver.read32(0x1008)


async def test_doorbells_are_cleared_with_their_queues() -> None:
    """Creating a queue and enabling the controller zero the shared doorbells: nothing old counts."""
    async with machine(make_function(polled=True)) as m:
        for _ in range(3):
            await m.driver.io(FLUSH)
        assert 3 == m.driver.read32(0x1008)
        await m.driver.admin(0, cdw10=1)
        await m.driver.admin(4, cdw10=1)
        await m.driver.create_queue()
        assert (0, 0) == (m.driver.read32(0x1008), m.driver.read32(0x100C))
        await m.driver.io(FLUSH)
        await m.driver.disable()
        await m.driver.enable()
        assert 0 == m.driver.read32(0x1008)
        await m.driver.create_queue()
        assert 0 == await m.driver.io(FLUSH)


async def test_polling_backs_off_when_idle(autojump_clock: trio.testing.MockClock) -> None:
    """An idle page is looked at seldom, a disabled controller's never."""
    looks: list[float] = []

    class Counting(PolledDoorbells):
        def poll(self) -> bool:
            looks.append(trio.current_time())
            return super().poll()

    memory = SharedMemory("test-doorbells", 0x4000)
    rung: list[tuple[int, int]] = []
    doorbells = Counting(lambda *ring: rung.append(ring), 64, memory, PollTimes(0, 0.001, 0.016))
    with trio.move_on_after(1.0):
        await doorbells.watch(lambda: False)
    assert 60 <= len(looks) <= 70
    assert pytest.approx(0.016) == looks[-1] - looks[-2]
    looks.clear()
    with trio.move_on_after(0.1):
        await doorbells.watch(lambda: True)  # commands under way: as often as possible
    assert 100 == pytest.approx(len(looks), abs=2)
    struct.pack_into("<I", memory.view, 0x1000 + 4 * 63, 7)
    struct.pack_into("<I", memory.view, 0x1000, 5)
    assert doorbells.poll()
    assert [(0, 5), (63, 7)] == rung
    doorbells.close()
    memory.close()


async def test_disabled_controller_does_not_poll(autojump_clock: trio.testing.MockClock) -> None:
    """With CC.EN = 0 no task wakes up."""
    async with machine(make_function(polled=True), io_queue=False) as m:
        await m.driver.disable()
        started = trio.current_time()
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(3600):
            await m.host.interrupt()
        assert 3600 == trio.current_time() - started


async def test_buffer_is_announced_only_when_asked_for() -> None:
    """CMBLOC and CMBSZ read as zero until CMBMSC.CRE is set; then they name BAR2 and the size."""
    async with machine(make_function(cmb_size=CMB)) as m:
        assert 1 == m.driver.read64(0) >> 57 & 1
        assert (0, 0) == (m.driver.read32(CMBLOC), m.driver.read32(CMBSZ))
        m.driver.write64(CMBMSC, 1)
        assert (2, 0) == (m.driver.read32(CMBLOC) & 7, m.driver.read32(CMBLOC) >> 12)
        size = m.driver.read32(CMBSZ)
        assert (0x1F, 0, 512) == (size & 0x1F, size >> 8 & 0xF, size >> 12)
        await m.driver.disable()
        assert 1 == m.driver.read64(CMBMSC)
        m.driver.write64(CMBMSC, 0)
        assert (0, 0) == (m.driver.read32(CMBLOC), m.driver.read32(CMBSZ))


def enable_buffer(m: Machine) -> None:
    """What Linux does: high half first."""
    m.driver.write32(CMBMSC, 1)
    m.driver.write32(CMBMSC + 4, BASE >> 32)
    m.driver.write32(CMBMSC, BASE & 0xFFFFFFFF | 3)


async def test_queues_lists_and_data_in_the_buffer() -> None:
    """Submission queue, PRP list and data in the buffer never reach the client's memory."""
    async with machine(make_function(cmb_size=CMB), io_queue=False) as m:
        enable_buffer(m)
        driver = m.driver
        with map_region(m, 2, CMB) as cmb:
            queue = driver._new_queue(1, 16)
            await driver.admin(5, prp1=queue.cq, cdw10=15 << 16 | 1, cdw11=1 << 16 | 3)
            await driver.admin(1, prp1=BASE, cdw10=15 << 16 | 1, cdw11=1 << 16 | 1)
            driver.put_entry = lambda queue, entry: cmb.__setitem__(  # type: ignore[method-assign]
                slice(queue.tail * 64, queue.tail * 64 + 64), entry
            )
            data = bytes(range(256)) * 64
            for number in range(4):
                cmb[0x10000 + 0x2000 * number : 0x11000 + 0x2000 * number] = data[4096 * number :][:4096]
            cmb[0x8000:0x8018] = struct.pack("<3Q", *(BASE + 0x12000 + 0x2000 * i for i in range(3)))
            m.host.memory.accesses.clear()
            await driver.io(WRITE, prp1=BASE + 0x10000, prp2=BASE + 0x8000, cdw12=31)
            assert [("write", queue.cq, 16)] == m.host.memory.accesses
            cmb[0x10000:0x20000] = bytes(0x10000)
            await driver.io(READ, prp1=BASE + 0x20000, prp2=BASE + 0x8000, cdw12=31)
            assert data[:4096] == cmb[0x20000:0x21000]
            assert data[4096:8192] == cmb[0x12000:0x13000]


async def test_buffer_is_found_at_its_bar_address() -> None:
    """Without CMBMSC too, addresses of the BAR are the buffer's, while memory decoding is on."""
    async with machine(make_function(cmb_size=CMB)) as m:
        m.function.config.write(0x18, struct.pack("<Q", BASE))
        m.host.memory.accesses.clear()
        await m.driver.io(READ, prp1=BASE + 0x1000)
        assert not [access for access in m.host.memory.accesses if access[1] >= BASE]
        m.driver.pci_command(4)
        with pytest.raises(CommandFailed) as caught:
            await m.driver.io(READ, prp1=BASE + 0x1000)
        assert 0x04 == caught.value.status


async def test_access_across_the_end_of_the_buffer() -> None:
    """A transfer that leaves the buffer goes on in the client's memory, where that is mapped."""
    async with machine(make_function(cmb_size=CMB), size=16 << 20) as m:
        low = m.driver.alloc(CMB + (1 << 20), 1 << 20)
        m.driver.write64(CMBMSC, low | 3)
        pattern = bytes(range(256)) * 32
        await m.driver.write_blocks(0, pattern)
        end = low + CMB
        await m.driver.io(READ, prp1=end - 4096, prp2=end, cdw12=15)
        assert pattern[:4096] == m.function.region_read(2, CMB - 4096, 4096)
        assert pattern[4096:] == m.host.memory.peek(end, 4096)
        assert bytes(4096) == m.host.memory.peek(end - 4096, 4096)


async def test_window_that_wraps_is_refused() -> None:
    """CMBSTS.CBAI tells that the address cannot be used."""
    async with machine(make_function(cmb_size=CMB), io_queue=False) as m:
        m.driver.write64(CMBMSC, 0xFFFF_FFFF_FFFF_F003)
        assert 1 == m.driver.read32(CMBSTS)
        enable_buffer(m)
        assert 0 == m.driver.read32(CMBSTS)


async def test_bar_of_the_buffer_is_ordinary_memory() -> None:
    """Trapped accesses and the mapping see the same bytes; a function reset clears them."""
    async with machine(make_function(cmb_size=3 << 20)) as m:
        assert 4 << 20 == m.function.regions[2].size
        with map_region(m, 2, 4 << 20) as cmb:
            m.function.region_write(2, 0x1234, b"hello")
            assert b"hello" == cmb[0x1234:0x1239] == m.function.region_read(2, 0x1234, 5)
            m.function.reset(ResetKind.DEVICE)
            assert bytes(5) == cmb[0x1234:0x1239]


@pytest.mark.parametrize("size", [1, 4096, (2 << 20) - 4096, (2 << 20) + 1])
def test_impossible_buffer_sizes(size: int) -> None:
    """Less than 2 MiB or parts of pages are refused."""
    with pytest.raises(ValueError, match="controller memory buffer"):
        NvmeSettings(ControllerIdentity("s", "nqn"), cmb_size=size)
