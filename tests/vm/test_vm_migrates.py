"""Plain `migrate` of stock QEMU moves a VM with its functions, under verified I/O."""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from vmbed.assets import Assets
from vmbed.guest import Guest
from vmbed.hosts import (
    Carrier,
    HostConfig,
    capability,
    finished,
    host,
    make_disk,
    migrate,
    shown,
    status,
)
from vmbed.qemu import Qemu

pytestmark = [pytest.mark.vm, pytest.mark.slow]
WAITING = ("-incoming", "defer", "-S")
#: Loops side by side, each with a place on the disk of its own and two patterns in turn, that write past the page
#: cache, read back and compare, until something is wrong; they count how often it was right.
LOOPS = 4
LOAD = (
    "sh pattern 1 1 >/tmp/p0; pattern 2 1 >/tmp/p1; "
    f"for k in $(seq {LOOPS}); do (n=0; while "
    "dd if=/tmp/p$((n % 2)) of=/dev/nvme0n1 bs=64k count=8 seek=$((16 * k)) oflag=direct 2>/tmp/out.$k && "
    "dd if=/dev/nvme0n1 bs=64k count=8 skip=$((16 * k)) iflag=direct 2>/tmp/out.$k >/tmp/back.$k && "
    "dd if=/tmp/p$((n % 2)) bs=64k count=8 2>/tmp/out.$k | cmp - /tmp/back.$k; "
    "do n=$((n + 1)); echo $n >/tmp/new.$k; mv /tmp/new.$k /tmp/rounds.$k; done; "
    "echo loop $k wrong after $n >>/tmp/wrong) >/dev/null 2>&1 & done"
)


async def rounds(guest: Guest) -> list[int]:
    """How often each loop has read back what it wrote.

    Raises:
        BedError: once it was something else.
    """
    found = await guest.check("sh [ ! -e /tmp/wrong ] || { cat /tmp/wrong /tmp/out.*; false; }; cat /tmp/rounds.*")
    return [int(line) for line in found.lines]


async def goes_on(guest: Guest, more: int = 2) -> None:
    """Wait until every loop has come around again."""
    before = await rounds(guest)
    while any(now < then + more for now, then in zip(await rounds(guest), before, strict=True)):
        await guest.check("sh usleep 50000")


async def loaded(guest: Guest) -> None:
    """Begin the load, and wait for its first rounds."""
    await guest.check(LOAD)
    await guest.check(f"sh while [ $(ls /tmp | grep -c rounds) -lt {LOOPS} ]; do usleep 10000; done")
    await goes_on(guest)


async def quiet(guest: Guest) -> None:
    """The guest's driver has noticed nothing."""
    lines = (await guest.check("sh dmesg | grep -i 'timeout\\|abort\\|reset\\|down' | grep -i nvme; true")).lines
    assert not lines


@pytest.mark.parametrize("carrier", ["dbus-vmstate", "vhost-user-fs"])
async def test_a_vm_hops(assets: Assets, workdir: Path, carrier: Carrier) -> None:
    """A guest is moved to and fro while it writes and reads back: every byte is right, and its driver never waits."""
    disk, config = make_disk(workdir), HostConfig(carrier)
    async with host(workdir, "a", disk, config) as a, host(workdir, "b", disk, config) as b, AsyncExitStack() as boot:
        here, there = a, b
        qemu = await boot.enter_async_context(here.machine(assets))
        await qemu.guest.ready()
        await loaded(qemu.guest)
        for _ in range(3):
            other = await boot.enter_async_context(there.machine(assets, incoming=WAITING))
            await there.phase("incoming")
            await migrate(qemu, other, workdir / "stream")
            assert await finished(qemu) == "completed"
            assert await finished(other) == "completed"
            await other.qmp.execute("cont")
            await goes_on(other.guest)
            await quiet(other.guest)
            assert await shown(qemu) == "postmigrate"
            await qemu.kill()
            qemu, here, there = other, there, here
            await here.phase("running")


async def cancel_in_precopy(qemu: Qemu, other: Qemu, stream: Path) -> str:
    """It is given up while the guest runs."""
    await migrate(qemu, other, stream, bandwidth=1 << 16)
    await status(qemu, "active")
    await qemu.qmp.execute("migrate_cancel")
    return "cancelled"


async def cancel_before_the_switchover(qemu: Qemu, other: Qemu, stream: Path) -> str:
    """It is given up while the vCPUs stand, and the functions with them."""
    await capability(qemu, "pause-before-switchover", True)
    await migrate(qemu, other, stream)
    await status(qemu, "pre-switchover")
    await qemu.qmp.execute("migrate_cancel")
    return "cancelled"


async def kill_in_precopy(qemu: Qemu, other: Qemu, stream: Path) -> str:
    """The destination's QEMU ends."""
    await migrate(qemu, other, stream, bandwidth=1 << 16)
    await status(qemu, "active")
    await other.kill()
    return "failed"


async def without_return_path(qemu: Qemu, other: Qemu, stream: Path) -> str:
    """It is refused: the VM might be lost."""
    await capability(qemu, "return-path", False)
    await migrate(qemu, other, stream, bandwidth=1 << 16)
    return "cancelled"


async def test_a_source_comes_back(assets: Assets, workdir: Path) -> None:
    """Whatever ends a migration: the guest goes on with its functions where it is, and moves at last."""
    disk, config = make_disk(workdir), HostConfig()
    async with host(workdir, "a", disk, config) as a, host(workdir, "b", disk, config) as b, a.machine(assets) as qemu:
        await qemu.guest.ready()
        await loaded(qemu.guest)
        for trouble in (cancel_in_precopy, cancel_before_the_switchover, kill_in_precopy, without_return_path):
            async with b.machine(assets, incoming=WAITING) as other:
                await b.phase("incoming")
                wanted = await trouble(qemu, other, workdir / "stream")
                assert await finished(qemu) == wanted, trouble
            await capability(qemu, "pause-before-switchover", False)
            await capability(qemu, "return-path", True)
            await a.phase("running")
            await goes_on(qemu.guest)
        async with b.machine(assets, incoming=WAITING, carrier=False) as other:
            await b.phase("incoming")
            await migrate(qemu, other, workdir / "stream")
            assert await finished(qemu) == "failed"
        await goes_on(qemu.guest)
        async with b.machine(assets, incoming=WAITING) as other:
            await b.phase("incoming")
            b.agent.send_signal(signal.SIGSTOP)
            await migrate(qemu, other, workdir / "stream")
            assert await finished(qemu) == "failed"
            b.agent.send_signal(signal.SIGCONT)
        await goes_on(qemu.guest)
        await quiet(qemu.guest)
        async with b.machine(assets, incoming=WAITING) as other:
            await b.phase("incoming")
            await migrate(qemu, other, workdir / "stream")
            assert await finished(qemu) == "completed"
            await other.qmp.execute("cont")
            await goes_on(other.guest)
            await quiet(other.guest)
