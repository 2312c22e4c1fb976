"""Registers, enabling, resets and shutdown."""

from __future__ import annotations

import pytest
import trio

from nvmebed import CommandFailed, Driver, Host, Queue, machine, make_function
from vfiouser_oob.devices.model import ResetKind
from vfiouser_protocol.errors import CommandError
from vfiouser_soc.nvme.function import NvmeFunction

CAP, VS, INTMS, INTMC, CC, CSTS, NSSR, AQA, ASQ, ACQ = 0, 8, 0xC, 0x10, 0x14, 0x1C, 0x20, 0x24, 0x28, 0x30
CMBLOC, CMBSZ, CMBMSC = 0x38, 0x3C, 0x50
RDY, CFS, SHST = 1, 2, 0xC


def idle_driver(function: NvmeFunction | None = None) -> Driver:
    """A driver on a function whose controller was never enabled, and which no task runs."""
    function = function or make_function()
    return Driver(function, Host(function))


def test_capabilities_and_version() -> None:
    """What a driver reads first is what the model can do."""
    driver = idle_driver()
    cap = driver.read64(CAP)
    assert 1023 == cap & 0xFFFF  # entries, 0's based
    assert 1 == cap >> 16 & 1  # contiguous queues required
    assert 40 == cap >> 24 & 0xFF  # 20 s
    assert 0 == cap >> 32 & 0xF  # doorbell stride 4 bytes
    assert 1 == cap >> 37 & 0xFF  # NVM command set
    assert (0, 4) == (cap >> 48 & 0xF, cap >> 52 & 0xF)  # pages of 4 to 64 KiB
    assert 0 == cap >> 57 & 1  # no controller memory buffer
    assert 0x10400 == driver.read32(VS)
    assert 0 == driver.read32(NSSR)
    driver.function.close()


@pytest.mark.parametrize("register", [CAP, VS, CSTS, NSSR, CMBLOC, CMBSZ, CMBMSC, 0x60, 0xFFC])
def test_read_only_registers_keep_their_value(register: int) -> None:
    """Nothing that a host writes changes a register that is not its own."""
    driver = idle_driver()
    before = driver.read32(register)
    driver.write32(register, ~before & 0xFFFFFFFF)
    assert before == driver.read32(register)
    driver.function.close()


@pytest.mark.parametrize("widths", [(8,), (4, 4), (2, 2, 2, 2), (1,) * 8])
def test_wide_registers_take_any_access_width(widths: tuple[int, ...]) -> None:
    """ASQ is the same written at once or piecemeal, low or high part first; low bits are fixed."""
    value = 0x1234_5678_9ABC_DEF0.to_bytes(8, "little")
    for order in (1, -1):
        driver = idle_driver()
        pieces = []
        at = 0
        for width in widths:
            pieces.append((at, value[at : at + width]))
            at += width
        for offset, data in pieces[::order]:
            driver.function.region_write(0, ASQ + offset, data)
        assert 0x1234_5678_9ABC_D000 == driver.read64(ASQ)
        driver.function.close()


def test_whole_bar_can_be_read() -> None:
    """A read over all pages of BAR0 returns what the single reads return."""
    driver = idle_driver()
    whole = driver.function.region_read(0, 0, 0x4000)
    assert 0x4000 == len(whole)
    assert driver.read32(VS) == int.from_bytes(whole[VS : VS + 4], "little")
    assert driver.function.region_read(0, 0x200C, 4) == whole[0x200C:0x2010] == b"\1\0\0\0"  # masked vector
    with pytest.raises(CommandError):
        driver.function.region_read(2, 0, 4)
    driver.function.close()


def test_interrupt_mask_registers_set_and_clear_bits() -> None:
    """INTMS sets and INTMC clears the bits written as 1; both read as the mask."""
    driver = idle_driver()
    driver.write32(INTMS, 0x0F0F)
    driver.write32(INTMC, 0x0003)
    driver.function.region_write(0, INTMC + 1, b"\x01")
    assert (0x0E0C, 0x0E0C) == (driver.read32(INTMS), driver.read32(INTMC))
    driver.function.close()


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (CC, 0x460001 | 5 << 7),  # pages of 128 KiB
        (CC, 0x460001 | 1 << 4),  # another command set
        (CC, 0x460001 | 1 << 11),  # weighted round robin
        (AQA, 0x0000_001F),  # one completion entry
        (CC, 0x460001 | 1 << 7),  # 8 KiB pages: ACQ is not aligned
    ],
)
async def test_impossible_configuration_is_fatal_until_disabled(register: int, value: int) -> None:
    """Enabling with nonsense sets CSTS.CFS instead of RDY; a reset makes a good configuration work."""
    async with machine(io_queue=False) as m:
        driver = m.driver
        await driver.disable()
        driver.write32(AQA, 0x1F001F)
        driver.write64(ASQ, 0x100000)
        driver.write64(ACQ, 0x101000)
        driver.write32(register, value)
        driver.write32(CC, value if register == CC else 0x460001)
        assert CFS == driver.read32(CSTS) & (RDY | CFS)
        driver.write32(CC, 0)
        assert 0 == driver.read32(CSTS)
        await driver.enable()
        assert 4096 == len(await driver.identify(1))


async def test_controller_reset_keeps_admin_queue_registers() -> None:
    """CC.EN = 0 clears status and masks, and leaves AQA, ASQ and ACQ."""
    async with machine() as m:
        driver = m.driver
        before = driver.read32(AQA), driver.read64(ASQ), driver.read64(ACQ)
        driver.write32(INTMS, 1)
        await driver.disable()
        assert before == (driver.read32(AQA), driver.read64(ASQ), driver.read64(ACQ))
        assert (0, 0) == (driver.read32(CSTS), driver.read32(INTMS))
        await driver.enable()
        await driver.create_queue()
        assert bytes(512) == await driver.read_blocks(0, 1)


async def test_reenabled_at_once() -> None:
    """A host that does not wait for RDY to fall gets a working controller all the same."""
    async with machine() as m:
        m.driver.write32(CC, 0)
        await m.driver.enable()
        await m.driver.create_queue()
        assert bytes(512) == await m.driver.read_blocks(0, 1)


@pytest.mark.parametrize("kind", [ResetKind.DEVICE, ResetKind.FUNCTION_LEVEL])
async def test_function_reset_is_power_on(kind: ResetKind) -> None:
    """DEVICE_RESET and FLR put every register back; the function works again after a new set-up."""
    async with machine() as m:
        fresh = make_function()
        initial = fresh.region_read(0, 0, 0x100)
        fresh.close()
        m.function.config.reset()
        m.function.reset(kind)
        assert initial == m.function.region_read(0, 0, 0x100)
        m.driver.pci_command(6)
        m.driver.enable_msix()
        await m.driver.enable()
        await m.driver.create_queue()
        assert bytes(512) == await m.driver.read_blocks(0, 1)


@pytest.mark.parametrize("how", [1, 2])
async def test_shutdown_completes_and_stops_commands(how: int) -> None:
    """Normal and abrupt shutdown end with SHST = complete; nothing is executed until the next reset."""
    async with machine() as m:
        m.driver.write32(CC, m.driver.cc | how << 14)
        await m.driver.status(SHST, 2 << 2)
        assert m.driver.read32(CSTS) & RDY
        m.driver.submit(m.io, 0, nsid=1)
        await trio.testing.wait_all_tasks_blocked()
        assert 0 == m.driver.collect(m.io)
        await m.driver.disable()
        assert 0 == m.driver.read32(CSTS)
        await m.driver.enable()
        assert 4096 == len(await m.driver.identify(1))


async def test_shutdown_of_a_disabled_controller_completes() -> None:
    """A host may shut down what it never enabled."""
    async with machine(io_queue=False) as m:
        await m.driver.disable()
        m.driver.write32(CC, 1 << 14)
        await m.driver.status(SHST, 2 << 2)


async def test_larger_pages() -> None:
    """With CC.MPS = 1 (8 KiB) PRPs advance by 8 KiB."""
    async with machine(io_queue=False) as m:
        driver = m.driver
        await driver.disable()
        await driver.enable(page_shift=13)
        page = driver.alloc(8192, 8192)
        await driver.admin(0x06, prp1=page + 4096, cdw10=1)
        assert b"bed" == m.host.memory.peek(page + 4096 + 4, 3)


async def test_unreachable_admin_queue_is_fatal() -> None:
    """A submission queue that cannot be read sets CSTS.CFS, stops everything, and a reset helps."""
    async with machine(io_queue=False) as m:
        driver = m.driver
        await driver.disable()
        driver.write32(AQA, 0x1F001F)
        driver.write64(ASQ, 0xDEAD_0000_0000)
        driver.write64(ACQ, 0xDEAD_0000_1000)
        driver.write32(CC, driver.cc)
        await driver.status(RDY, RDY)
        driver.doorbell(0, 1)
        await driver.status(CFS, CFS)
        await driver.disable()
        await driver.enable()
        assert 4096 == len(await driver.identify(1))


async def test_unwritable_completion_queue_is_fatal() -> None:
    """Completions that cannot be delivered are as fatal as commands that cannot be read."""
    async with machine(io_queue=False) as m:
        m.driver.write32(CC, 0)
        await m.driver.status(RDY, 0)
        m.driver.write64(ACQ, 0xDEAD_0000_0000)
        m.driver.write32(CC, m.driver.cc)
        await m.driver.status(RDY, RDY)
        m.driver.queues[0].tail = 0
        m.driver.submit(m.driver.queues[0], 0x06, prp1=m.driver.alloc(4096), cdw10=1)
        await m.driver.status(CFS, CFS)


async def test_bus_master_off_is_a_fault_not_a_crash() -> None:
    """A guest that clears bus mastering under I/O sees CSTS.CFS."""
    async with machine() as m:
        m.driver.pci_command(2)
        m.driver.submit(m.io, 0, nsid=1)
        await m.driver.status(CFS, CFS)
        m.driver.pci_command(6)
        await m.driver.disable()
        await m.driver.enable()
        with pytest.raises(CommandFailed):
            await m.driver.admin(0x7F)


@pytest.mark.parametrize("how", [1, 2])
async def test_enabled_after_a_shutdown_while_disabled(how: int) -> None:
    """A shutdown of a disabled controller is forgotten when it is enabled, whether SHN is cleared by that or stays."""
    async with machine(io_queue=False) as m:
        for kept in (0, how << 14):
            await m.driver.disable()
            m.driver.write32(CC, 0x460000 | how << 14)
            await m.driver.status(SHST, 2 << 2)
            m.driver.queues[0] = Queue(0, 32, m.driver.read64(ASQ), m.driver.read64(ACQ))
            m.host.memory.poke(m.driver.read64(ACQ), bytes(32 * 16))
            m.driver.write32(CC, 0x460001 | kept)
            await m.driver.status(RDY | SHST, RDY)
            assert 4096 == len(await m.driver.identify(1))


async def test_shutdown_in_the_write_that_disables() -> None:
    """EN cleared and SHN set at once: the controller is reset, and the shutdown completes."""
    async with machine() as m:
        m.driver.write32(CC, m.driver.cc & ~1 | 1 << 14)
        await m.driver.status(RDY | SHST, 2 << 2)


async def test_shutdown_in_the_write_that_enables() -> None:
    """EN and SHN set at once: the controller becomes ready, and is shut down."""
    async with machine(io_queue=False) as m:
        await m.driver.disable()
        m.driver.write32(CC, m.driver.cc | 1 << 14)
        await m.driver.status(RDY | SHST, RDY | 2 << 2)


async def test_shutdown_goes_on_when_the_reset_keeps_shn() -> None:
    """A host that clears EN and leaves SHN set, and waits for SHST, does not wait for ever."""
    async with machine() as m:
        m.driver.write32(CC, m.driver.cc | 1 << 14)
        await m.driver.status(SHST, 2 << 2)
        m.driver.write32(CC, m.driver.cc & ~1 | 1 << 14)
        await m.driver.status(RDY | SHST, 2 << 2)


async def test_shutdown_completes_after_a_fatal_error() -> None:
    """A fatal error while the shutdown waits for commands: CFS is set and the shutdown completes all the same."""
    async with machine() as m:
        page = m.driver.alloc(4096)
        m.host.memory.hold(page, 4096)
        m.driver.submit(m.io, 0x02, nsid=1, prp1=page)
        await trio.testing.wait_all_tasks_blocked()
        m.driver.write32(CC, m.driver.cc | 1 << 14)
        await trio.testing.wait_all_tasks_blocked()
        assert 1 << 2 == m.driver.read32(CSTS) & SHST
        m.function.disconnected()
        await m.driver.status(CFS | SHST, CFS | 2 << 2)


async def test_page_size_is_fixed_while_enabled() -> None:
    """Memory page size, command set and arbitration keep their values while EN is set."""
    async with machine() as m:
        m.driver.write32(CC, m.driver.cc | 15 << 7 | 7 << 4 | 7 << 11)
        assert m.driver.cc == m.driver.read32(CC)
        assert 4096 == len(await m.driver.identify(1))
