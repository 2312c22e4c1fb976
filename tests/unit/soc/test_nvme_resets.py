"""Resets and lost clients under I/O: nothing that was asked for before touches memory after."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from nvmebed import Machine, machine, make_function
from nvmebed.driver import CommandFailed
from vfiouser_oob.devices.model import ResetKind
from vfiouser_soc.nvme.stores import FileStore

READ, WRITE = 2, 1
CSTS, CC = 0x1C, 0x14
RDY, CFS = 1, 2
EVENT_CONFIG, TIMESTAMP = 0xB, 0xE
ERROR_LOG, SMART_LOG = 1, 2


def controller_reset(m: Machine) -> None:
    """CC.EN = 0."""
    m.driver.write32(CC, 0)


def device_reset(m: Machine) -> None:
    """DEVICE_RESET."""
    m.function.config.reset()
    m.function.reset(ResetKind.DEVICE)


def function_level_reset(m: Machine) -> None:
    """FLR by the guest."""
    m.function.config.reset()
    m.function.reset(ResetKind.FUNCTION_LEVEL)


def disconnect(m: Machine) -> None:
    """The client goes; what the framework does is done in its order."""
    m.function.config.clear_bus_master()
    m.function.disconnected()


def new_client(m: Machine) -> None:
    """The client goes, and another one comes."""
    disconnect(m)
    m.function.config.reset()
    m.function.reset(ResetKind.NEW_CLIENT)


RESETS = [controller_reset, device_reset, function_level_reset, disconnect, new_client]


async def restart(m: Machine) -> None:
    """Set everything up again, as a driver does that finds the function in any state."""
    m.driver.pci_command(6)
    m.driver.enable_msix()
    await m.driver.disable()
    await m.driver.enable()
    await m.driver.create_queue()


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("held", ["fetch", "data", "completion"])
async def test_nothing_touches_memory_after_a_reset(reset: Callable[[Machine], None], held: str) -> None:
    """Commands are stopped wherever they wait; memory stays as it is; I/O works after a new set-up."""
    async with machine() as m:
        driver = m.driver
        page = driver.alloc(4096)
        where = {"fetch": m.io.sq, "data": page, "completion": m.io.cq}[held]
        gate = m.host.memory.hold(where, 64 * 64)
        cids = [driver.submit(m.io, READ, nsid=1, prp1=page, cdw12=7, ring=False) for _ in range(20)]
        driver.ring(m.io)
        assert cids
        await trio.testing.wait_all_tasks_blocked()
        reset(m)
        m.driver.pci_command(6)  # so that only the controller itself holds back
        before = bytes(m.host.memory.ram)
        m.host.memory.accesses.clear()
        interrupts = dict(m.host.interrupts)
        gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert ([], interrupts) == (m.host.memory.accesses, dict(m.host.interrupts))
        assert before == bytes(m.host.memory.ram)
        m.host.memory.gates.clear()
        await restart(m)
        assert bytes(512) == await driver.read_blocks(0, 1)


async def test_reset_between_the_pieces_of_a_transfer() -> None:
    """A task that cannot be cancelled at once is stopped at its next access, amid a transfer."""
    async with machine() as m:
        driver = m.driver
        prp1, prp2, pieces = driver.prps(8 * 4096)
        confirm = m.host.memory.hold_confirmation(pieces[3][0], 4096)
        driver.submit(m.io, READ, nsid=1, prp1=prp1, prp2=prp2, cdw12=63)
        await trio.testing.wait_all_tasks_blocked()
        controller_reset(m)
        confirm.set()
        await driver.status(RDY, 0)
        written = [address for kind, address, _ in m.host.memory.accesses if kind == "write"]
        assert [address for address, _ in pieces[:4]] == written[-4:]


async def test_ready_falls_only_when_the_last_write_to_the_image_is_done(tmp_path: Path) -> None:
    """A write in a thread cannot be stopped, so the host must not be told that all is quiet before it is."""
    go, begun = threading.Event(), threading.Event()

    class Slow(FileStore):
        def _pwrite(self, offset: int, data: bytes | memoryview) -> None:
            begun.set()
            assert go.wait(10)
            super()._pwrite(offset, data)

    async with machine(make_function(Slow(tmp_path / "image", 1 << 20))) as m:
        page = m.driver.alloc(4096)
        m.host.memory.poke(page, b"x" * 512)
        m.driver.submit(m.io, WRITE, nsid=1, prp1=page)
        await trio.to_thread.run_sync(begun.wait)
        controller_reset(m)
        await trio.testing.wait_all_tasks_blocked()
        assert RDY == m.driver.read32(CSTS)
        go.set()
        await m.driver.status(RDY, 0)
        await restart(m)
        assert b"x" * 512 == await m.driver.read_blocks(0, 1)


async def test_old_queues_are_never_used_with_new_memory() -> None:
    """After a disconnect, doorbells and bus mastering alone start nothing; enabling anew does."""
    async with machine() as m:
        driver = m.driver
        before = [m.function.region_read(0, offset, 8) for offset in (0x24, 0x28, 0x30)]
        for _ in range(3):
            driver.submit(m.io, READ, nsid=1, prp1=driver.alloc(4096), ring=False)
        disconnect(m)
        m.host.memory.accesses.clear()
        m.function.connected()
        driver.pci_command(6)
        driver.ring(m.io)
        driver.doorbell(0, 5)
        await trio.testing.wait_all_tasks_blocked()
        assert [] == m.host.memory.accesses
        assert RDY | CFS == driver.read32(CSTS)  # registers stay; the driver is told that it has to reset
        assert before == [m.function.region_read(0, offset, 8) for offset in (0x24, 0x28, 0x30)]
        await restart(m)
        assert bytes(512) == await driver.read_blocks(0, 1)


async def test_disconnect_while_disabled_leaves_no_trace() -> None:
    """A function that nobody enabled is not in a fatal state for the next client."""
    async with machine(io_queue=False) as m:
        await m.driver.disable()
        disconnect(m)
        assert 0 == m.driver.read32(CSTS)
        m.driver.pci_command(6)
        await m.driver.enable()
        assert 4096 == len(await m.driver.identify(1))


async def test_data_survives_every_reset() -> None:
    """Resets are about the controller; what was written stays."""
    async with machine() as m:
        await m.driver.write_blocks(4, b"stay" * 128)
        for reset in RESETS:
            reset(m)
            await restart(m)
            assert b"stay" * 128 == await m.driver.read_blocks(4, 1)


async def test_deleting_a_queue_waits_for_its_commands() -> None:
    """Delete completes after the last command of the queue; unfetched ones are dropped."""
    async with machine() as m:
        driver = m.driver
        page = driver.alloc(4096)
        gate = m.host.memory.hold(page, 4096)
        running = driver.submit(m.io, READ, nsid=1, prp1=page)
        await trio.testing.wait_all_tasks_blocked()
        admin = driver.queues[0]
        deletion = driver.submit(admin, 0, cdw10=1)
        await trio.testing.wait_all_tasks_blocked()
        driver.collect(admin)
        assert deletion not in admin.done
        gate.set()
        await driver.wait(admin, deletion)
        await driver.wait(m.io, running)
        driver.doorbell(2, 7)
        await trio.testing.wait_all_tasks_blocked()
        assert 0 == driver.collect(m.io)


async def test_shutdown_waits_for_commands_in_flight() -> None:
    """SHST = complete means that nothing is under way any more."""
    async with machine() as m:
        page = m.driver.alloc(4096)
        gate = m.host.memory.hold(page, 4096)
        cid = m.driver.submit(m.io, READ, nsid=1, prp1=page)
        await trio.testing.wait_all_tasks_blocked()
        m.driver.write32(CC, m.driver.cc | 1 << 14)
        await trio.testing.wait_all_tasks_blocked()
        assert 1 << 2 == m.driver.read32(CSTS) & 0xC
        gate.set()
        await m.driver.status(0xC, 2 << 2)
        await m.driver.wait(m.io, cid)


async def test_a_new_client_finds_no_features_and_no_logs_of_the_last() -> None:
    """Saved features, the timestamp, errors, counters and hours are those of a controller that nobody has used."""
    async with machine() as m:
        pristine = await m.driver.log_page(SMART_LOG, 512)
        await m.driver.set_feature(EVENT_CONFIG, 1 << 8, save=True)
        page = m.driver.alloc(4096)
        m.host.memory.poke(page, (1 << 40).to_bytes(8, "little"))
        await m.driver.admin(0x09, prp1=page, cdw10=TIMESTAMP)
        await m.driver.write_blocks(0, bytes(512))
        with pytest.raises(CommandFailed):
            await m.driver.log_page(0x7F, 16)
        assert bytes(64) != await m.driver.log_page(ERROR_LOG, 64)
        new_client(m)
        await restart(m)
        assert pristine == await m.driver.log_page(SMART_LOG, 512)
        assert bytes(64) == await m.driver.log_page(ERROR_LOG, 64)
        assert 0 == await m.driver.get_feature(EVENT_CONFIG)
        await m.driver.admin(0x0A, prp1=page, cdw10=TIMESTAMP)
        assert bytes(8) == m.host.memory.peek(page, 8)
