"""Plain `migrate` of stock QEMU moves a VM with its functions, under verified I/O."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from vmbed.assets import Assets
from vmbed.guest import Guest
from vmbed.hosts import Carrier, HostConfig, finished, host, make_disk, migrate, shown

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
    await guest.check(f"sh while [ ! -e /tmp/rounds.{LOOPS} -o ! -e /tmp/rounds.1 ]; do usleep 10000; done")
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
