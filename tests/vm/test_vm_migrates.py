"""Plain `migrate` of stock QEMU moves a VM with its functions, under verified I/O."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from vmbed.assets import Assets
from vmbed.hosts import Carrier, HostConfig, finished, host, make_disk, migrate, shown
from vmbed.load import quiet
from vmbed.loops import begin_loops, loops_go_on

pytestmark = [pytest.mark.vm, pytest.mark.slow]
BY_ITSELF = ("-incoming", "defer")
WAITING = (*BY_ITSELF, "-S")


@pytest.mark.parametrize("carrier", ["dbus-vmstate", "vhost-user-fs"])
async def test_a_vm_hops(assets: Assets, workdir: Path, carrier: Carrier) -> None:
    """A guest is moved to and fro while it writes and reads back: every byte is right, and its driver never waits.

    The last destination goes on by itself, without being told.
    """
    disk, config = make_disk(workdir), HostConfig(carrier)
    async with host(workdir, "a", disk, config) as a, host(workdir, "b", disk, config) as b, AsyncExitStack() as boot:
        here, there = a, b
        qemu = await boot.enter_async_context(here.machine(assets))
        await qemu.guest.ready()
        await begin_loops(qemu.guest)
        for incoming in (WAITING, WAITING, BY_ITSELF):
            other = await boot.enter_async_context(there.machine(assets, incoming=incoming))
            await there.phase("incoming")
            await migrate(qemu, other, workdir / "stream")
            assert await finished(qemu) == "completed"
            assert await finished(other) == "completed"
            if incoming is WAITING:
                await other.qmp.execute("cont")
            await loops_go_on(other.guest)
            await quiet(other.guest)
            assert await shown(qemu) == "postmigrate"
            await qemu.kill()
            qemu, here, there = other, there, here
            await here.phase("running")
