"""Stock QEMU and a real guest whose function has an agent that is gone: the VM does not notice."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from vmbed.assets import Assets
from vmbed.qemu import QemuConfig, VfioUserDevice, start_qemu
from vmbed.stack import Stack, soc_and_daemon

pytestmark = [pytest.mark.vm, pytest.mark.slow]

TOUCH_MIB = 8


async def migration_of(stack: Stack) -> Any:
    """What `status` says of the function's migration."""
    return (await stack.status())["functions"][0]["migration"]


async def test_a_vm_without_its_agent(assets: Assets, workdir: Path) -> None:
    """Paused, let go on, reset by its guest and as a machine, with the agent killed: I/O is right each time."""
    async with AsyncExitStack() as exits:
        stack = await exits.enter_async_context(soc_and_daemon(workdir, agent=True))
        qemu = await exits.enter_async_context(start_qemu(assets, QemuConfig([VfioUserDevice(stack.socket)]), workdir))
        await qemu.guest.ready()
        await qemu.guest.io(seed=1, mib=TOUCH_MIB)
        assert stack.agent is not None
        assert "agent" == (await migration_of(stack))["capabilities"]["source"]
        await stack.agent.kill()
        for _ in range(3):
            await qemu.qmp.execute("stop")
            await qemu.qmp.execute("cont")
            await qemu.guest.verify(seed=1, mib=TOUCH_MIB)
        await qemu.guest.check("reset")
        await qemu.guest.io(seed=2, mib=TOUCH_MIB)
        await qemu.qmp.execute("system_reset")
        await qemu.guest.ready()
        await qemu.guest.verify(seed=2, mib=TOUCH_MIB)
        await qemu.guest.io(seed=3, mib=TOUCH_MIB)
        found = await migration_of(stack)
        assert ("RUNNING", True, False) == (found["state"], found["known"], found["reset_due"])
        assert await qemu.guest.power_off() == 0
