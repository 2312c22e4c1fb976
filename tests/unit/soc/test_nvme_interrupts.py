"""MSI-X with masks and pending bits, INTx as a level."""

from __future__ import annotations

import struct

import trio

from nvmebed import Machine, machine

FLUSH = 0
TABLE, PBA = 0x2000, 0x3000


async def flush(m: Machine) -> None:
    """Execute one command and let everything settle, without waiting for an interrupt."""
    m.driver.submit(m.io, FLUSH, nsid=1)
    await trio.testing.wait_all_tasks_blocked()


def mask_vector(m: Machine, vector: int, masked: bool) -> None:
    """Write an entry of the MSI-X table through the region."""
    entry = struct.pack("<QII", 0xFEE0_0000, vector, masked)
    m.function.region_write(0, TABLE + 16 * vector, entry)


async def test_vectors_fire_without_a_table() -> None:
    """QEMU writes no table: masks that were never written do not count."""
    async with machine() as m:
        await m.driver.create_queue(2, vector=7)
        before = m.host.interrupts.copy()
        await m.driver.io(FLUSH)
        await m.driver.io(FLUSH, m.driver.queues[2])
        assert (1, 1) == (m.host.interrupts[1] - before[1], m.host.interrupts[7] - before[7])


async def test_masked_vector_is_pending_and_fires_once_when_unmasked() -> None:
    """The pending bit shows it, unmasking delivers it, and clears it."""
    async with machine() as m:
        mask_vector(m, 0, False)
        mask_vector(m, 1, True)
        before = m.host.interrupts[1]
        await flush(m)
        await flush(m)
        assert (before, b"\x02") == (m.host.interrupts[1], m.function.region_read(0, PBA, 1))
        m.function.region_write(0, PBA, b"\x00")  # pending bits cannot be written
        mask_vector(m, 1, False)
        assert (before + 1, b"\x00") == (m.host.interrupts[1], m.function.region_read(0, PBA, 1))
        mask_vector(m, 1, False)
        assert before + 1 == m.host.interrupts[1]


async def test_function_mask_holds_back_every_vector() -> None:
    """The function mask in config space makes all vectors pending until it is cleared."""
    async with machine() as m:
        m.driver.enable_msix(masked=True)
        before = m.host.interrupts[1]
        await flush(m)
        assert (before, b"\x02") == (m.host.interrupts[1], m.function.region_read(0, PBA, 1))
        m.driver.enable_msix()
        assert (before + 1, b"\x00") == (m.host.interrupts[1], m.function.region_read(0, PBA, 1))


async def test_queue_without_interrupts_is_silent() -> None:
    """With IEN = 0 entries are written and nothing fires, not even the pin."""
    async with machine(io_queue=False) as m:
        queue = m.driver._new_queue(1, 16)
        await m.driver.admin(5, prp1=queue.cq, cdw10=15 << 16 | 1, cdw11=1 << 16 | 1)
        await m.driver.admin(1, prp1=queue.sq, cdw10=15 << 16 | 1, cdw11=1 << 16 | 1)
        before = m.host.interrupts.copy()
        await flush(m)
        assert 1 == m.driver.collect(m.io)
        assert (before, False) == (m.host.interrupts, m.host.intx)


def pin(m: Machine) -> bool:
    """Whether INTx is asserted now."""
    return m.host.intx


async def test_pin_is_asserted_while_entries_are_unacknowledged() -> None:
    """INTx rises with an entry and falls with the head doorbell that consumes the last one."""
    async with machine(msix=False) as m:
        assert not pin(m)
        await flush(m)
        await flush(m)
        assert pin(m)
        assert 1 << 3 == m.function.config.read(6, 2)[0] & 1 << 3  # PCI status
        m.driver.doorbell(3, 1)
        assert pin(m)
        m.driver.doorbell(3, 2)
        assert not pin(m)
        assert 0 == m.function.config.read(6, 2)[0] & 1 << 3


async def test_pin_obeys_the_mask_registers() -> None:
    """INTMS releases the pin although entries wait; INTMC asserts it again."""
    async with machine(msix=False) as m:
        await flush(m)
        m.driver.write32(0x0C, 1 << 1)
        assert not pin(m)
        m.driver.write32(0x10, 1 << 0)
        assert not pin(m)
        m.driver.write32(0x10, 1 << 1)
        assert pin(m)


async def test_pin_is_released_by_msix_and_by_resets() -> None:
    """Enabling MSI-X, disabling the controller and losing the client all release the pin."""
    async with machine(msix=False) as m:
        await flush(m)
        m.driver.enable_msix()
        assert not pin(m)
        at = m.function.config.capability_offset(0x11)
        assert at is not None
        m.function.config_changed(m.function.config.write(at + 2, b"\0\0"))
        assert pin(m)
        m.driver.write32(0x14, 0)
        assert not pin(m)
    async with machine(msix=False) as m:
        await flush(m)
        m.function.config.clear_bus_master()
        m.function.disconnected()
        assert not pin(m)
