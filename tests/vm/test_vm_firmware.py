"""A VM moves while its guest sets its functions up, or its firmware has not yet, or not again."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from vmbed.assets import Assets
from vmbed.firmware import set_up, turn_ecam_on
from vmbed.guest import Guest
from vmbed.hosts import SLOT, Carrier, HostConfig, finished, host, make_disk, migrate
from vmbed.load import quiet
from vmbed.nvme import PAGE, NvmeDriver
from vmbed.pci import PciFunction
from vmbed.qemu import Qemu

pytestmark = [pytest.mark.vm, pytest.mark.slow]
#: Bytes per second at which the memory of a guest takes far longer than what it does meanwhile; and that of a machine
#: without one, which is nothing but zeros.
SLOWLY, QTEST_SLOWLY = 1 << 16, 10_000
VECTOR = 1


async def works(qemu: Qemu) -> None:
    """Do what firmware and a driver do, and read from the disk."""
    await turn_ecam_on(qemu.qtest)
    function = PciFunction(qemu.qtest, SLOT)
    await set_up(function, VECTOR)
    driver = NvmeDriver(function)
    await driver.enable()
    await driver.create_io_queues(VECTOR)
    assert await driver.read_blocks(0, PAGE) == bytes(PAGE)


@pytest.mark.parametrize("carrier", ["dbus-vmstate", pytest.param("vhost-user-fs", marks=pytest.mark.long)])
async def test_a_vm_moves_before_its_firmware_has_begun(assets: Assets, workdir: Path, carrier: Carrier) -> None:
    """First it has never begun; then it begins anew in mid-migration, since the guest is reset. It works each time.

    The guest is played over qtest.
    """
    disk, config = make_disk(workdir), HostConfig(carrier, accel="qtest")
    async with AsyncExitStack() as stack:
        here, there = [await stack.enter_async_context(host(workdir, name, disk, config)) for name in "ab"]
        qemu = await stack.enter_async_context(here.machine(assets))
        await here.phase("running")
        for resets in (False, True):
            other = await stack.enter_async_context(there.machine(assets, incoming=("-incoming", "defer", "-S")))
            await there.phase("incoming")
            await migrate(qemu, other, workdir / "stream", bandwidth=QTEST_SLOWLY)
            await here.phase("armed")
            if resets:
                await qemu.qmp.execute("system_reset")
                await qemu.qmp.event("RESET")
            await qemu.qmp.execute("migrate-set-parameters", max_bandwidth=1 << 30)
            assert [await finished(qemu), await finished(other)] == ["completed", "completed"]
            await other.qmp.execute("cont")
            await there.phase("running")
            await works(other)
            await qemu.kill()
            (workdir / "stream").unlink(missing_ok=True)
            qemu, here, there = other, there, here


async def rebound(guest: Guest) -> None:
    """The driver goes and comes again."""
    await guest.check("rebind")


async def unbound(guest: Guest) -> None:
    """The driver goes."""
    await guest.check("sh echo 0000:00:10.0 >/sys/bus/pci/drivers/nvme/unbind")


async def bound(guest: Guest) -> None:
    """The driver comes again."""
    await guest.check("sh echo 0000:00:10.0 >/sys/bus/pci/drivers/nvme/bind")


async def nothing(guest: Guest) -> None:
    """Nothing happens."""


async def rebooted(guest: Guest) -> None:
    """The guest begins anew."""
    await guest.start("reboot")


async def ready(guest: Guest) -> None:
    """It has begun."""
    await guest.ready()


@pytest.mark.parametrize("carrier", ["dbus-vmstate", pytest.param("vhost-user-fs", marks=pytest.mark.long)])
async def test_a_guest_sets_its_functions_up_in_mid_migration(assets: Assets, workdir: Path, carrier: Carrier) -> None:
    """Its driver is unbound and bound, it moves without one, and it is reset and moves before it has booted."""
    disk, config = make_disk(workdir), HostConfig(carrier)
    async with AsyncExitStack() as stack:
        here, there = [await stack.enter_async_context(host(workdir, name, disk, config)) for name in "ab"]
        qemu = await stack.enter_async_context(here.machine(assets))
        await qemu.guest.ready()
        for seed, (during, after) in enumerate([(rebound, nothing), (unbound, bound), (rebooted, ready)], 1):
            other = await stack.enter_async_context(there.machine(assets, incoming=("-incoming", "defer", "-S")))
            await there.phase("incoming")
            await migrate(qemu, other, workdir / "stream", bandwidth=SLOWLY)
            await here.phase("armed")
            await during(qemu.guest)
            if during is rebooted:
                await qemu.qmp.event("RESET")
            await qemu.qmp.execute("migrate-set-parameters", max_bandwidth=1 << 30)
            assert [await finished(qemu), await finished(other)] == ["completed", "completed"]
            await other.qmp.execute("cont")
            await there.phase("running")
            await after(other.guest)
            await other.guest.io(seed, 2)
            await quiet(other.guest)
            await qemu.kill()
            (workdir / "stream").unlink(missing_ok=True)
            qemu, here, there = other, there, here
