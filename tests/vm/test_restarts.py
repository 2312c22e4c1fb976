"""A real guest does verified I/O while the daemon under it is restarted and killed; one boot for all of it."""

from __future__ import annotations

import os
import random
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from vmbed.assets import Assets
from vmbed.qemu import QemuConfig, VfioUserDevice, start_qemu
from vmbed.stack import Stack, soc_and_daemon

pytestmark = [pytest.mark.vm, pytest.mark.slow]

IO_MIB = 16
#: Restarts and kills, in turn; and 20 of each.
TIMES = (6, pytest.param(40, marks=pytest.mark.long))


def disturb(stack: Stack, number: int) -> None:
    """Restart the daemon in order, or kill it."""
    keeper = stack.daemon.pid
    if number % 2:
        (daemon,) = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        os.kill(int(daemon), signal.SIGKILL)
    else:
        os.kill(keeper, signal.SIGUSR2)


def _lives(log: Path) -> int:
    return log.read_text(errors="replace").count(" ready ")


async def ready(log: Path, count: int) -> None:
    """Wait until so many daemons were ready."""
    with trio.fail_after(60):
        while _lives(log) < count:  # noqa: ASYNC110 - a file tells nobody
            await trio.sleep(0.02)


@pytest.mark.parametrize("times", TIMES)
async def test_a_guest_notices_nothing_but_time(assets: Assets, workdir: Path, times: int) -> None:
    """What is written during restarts and kills reads back equal; the driver has reset nothing, and no I/O failed."""
    moments = random.Random(11)
    async with AsyncExitStack() as exits:
        stack = await exits.enter_async_context(soc_and_daemon(workdir, keep=True))
        # A start of the daemon takes a second, and longer on a machine that is busy; stock QEMU waits for five.
        config = QemuConfig([VfioUserDevice(stack.socket, properties={"x-msg-timeout": 30_000})])
        qemu = await exits.enter_async_context(start_qemu(assets, config, workdir))
        await qemu.guest.ready()
        for number in range(times):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(qemu.guest.io, number, IO_MIB)
                await trio.sleep(moments.random() * 0.5)
                disturb(stack, number)
            await ready(workdir / "daemon.log", number + 2)
            await qemu.guest.verify(seed=number, mib=IO_MIB)
        kernel = "\n".join((await qemu.guest.check("sh dmesg")).lines)
        assert "timeout" not in kernel.lower()
        assert "reset controller" not in kernel
        assert "I/O error" not in kernel
        assert (await qemu.guest.check("state")).lines == ("live",)
        assert await qemu.guest.power_off() == 0
