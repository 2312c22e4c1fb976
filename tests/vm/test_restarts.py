"""A real guest does verified I/O while the daemon under it is restarted and killed; one boot for all of it."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pytest
import trio

import systemdbed
from vmbed.assets import Assets
from vmbed.qemu import QemuConfig, VfioUserDevice, start_qemu
from vmbed.stack import IMPORT_ROOTS, PROGRAM, SocConfig, service, soc_and_daemon

pytestmark = [pytest.mark.vm, pytest.mark.slow]

IO_MIB = 16
#: Restarts the daemon in order, or kills it, as the number says.
Disturb: TypeAlias = Callable[[int], Awaitable[None]]
#: The daemon's socket in a folder, and what disturbs it.
Supervisor: TypeAlias = Callable[[Path], AbstractAsyncContextManager[tuple[Path, Disturb]]]
UNIT = """
[Unit]
StartLimitIntervalSec=0
[Service]
Type=notify
NotifyAccess=main
Environment=PYTHONPATH={path}
ExecStart={program} serve --control-socket none --socket-path {place}/vmm.sock --device vfio-user:{place}/soc/f0.sock
StandardError=append:{place}/daemon.log
FileDescriptorStoreMax=64
Restart=on-failure
RestartSec=100ms
"""


def child_of(pid: int) -> int:
    """The only child of a process."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@asynccontextmanager
async def keeper(workdir: Path) -> AsyncIterator[tuple[Path, Disturb]]:
    """`vfiouser-oob keep` starts the daemon again."""
    async with soc_and_daemon(workdir, keep=True) as stack:
        parent = stack.daemon.pid

        async def disturb(number: int) -> None:
            if number % 2:
                os.kill(child_of(parent), signal.SIGKILL)
            else:
                os.kill(parent, signal.SIGUSR2)

        yield stack.socket, disturb


@asynccontextmanager
async def systemd(workdir: Path) -> AsyncIterator[tuple[Path, Disturb]]:
    """A real systemd does."""
    for folder in ("soc", "systemd"):
        (workdir / folder).mkdir()
    simulate = ["simulate-soc", "--socket-dir", str(workdir / "soc"), *SocConfig().arguments()]
    path = os.pathsep.join(map(str, IMPORT_ROOTS))
    unit = UNIT.format(place=workdir, path=path, program=" ".join(PROGRAM))
    async with (
        service(workdir, "soc", simulate),
        systemdbed.started(workdir / "systemd", {"oob.service": unit}, "oob.service") as manager,
    ):

        async def disturb(number: int) -> None:
            verb = ("kill", "--signal=KILL") if number % 2 else ("restart",)
            await trio.to_thread.run_sync(partial(manager.ctl, *verb, "oob.service"))

        yield workdir / "vmm.sock", disturb


#: Who starts the daemon again, and how often it has to: restarts and kills in turn; in the long run, 20 of each.
RUNS = [
    pytest.param(supervisor, times, marks=[*marks, *slow], id=f"{supervisor.__name__}-{times}")
    for supervisor, marks in (
        (keeper, ()),
        (systemd, (pytest.mark.skipif(systemdbed.why_not() is not None, reason=str(systemdbed.why_not())),)),
    )
    for times, slow in ((6, ()), (40, (pytest.mark.long,)))
]


def _lives(log: Path) -> int:
    return log.read_text(errors="replace").count(" ready ")


async def ready(log: Path, count: int) -> None:
    """Wait until so many daemons were ready."""
    with trio.fail_after(60):
        while _lives(log) < count:  # noqa: ASYNC110 - a file tells nobody
            await trio.sleep(0.02)


@pytest.mark.parametrize(("supervisor", "times"), RUNS)
async def test_a_guest_notices_nothing_but_time(
    assets: Assets, workdir: Path, supervisor: Supervisor, times: int
) -> None:
    """What is written during restarts and kills reads back equal; the driver has reset nothing, and no I/O failed."""
    moments = random.Random(11)
    async with AsyncExitStack() as exits:
        socket, disturb = await exits.enter_async_context(supervisor(workdir))
        # A start of the daemon takes a second, and longer on a machine that is busy; stock QEMU waits for five.
        config = QemuConfig([VfioUserDevice(socket, properties={"x-msg-timeout": 30_000})])
        qemu = await exits.enter_async_context(start_qemu(assets, config, workdir))
        await qemu.guest.ready()
        for number in range(times):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(qemu.guest.io, number, IO_MIB)
                await trio.sleep(moments.random() * 0.5)
                await disturb(number)
            await ready(workdir / "daemon.log", number + 2)
            await qemu.guest.verify(seed=number, mib=IO_MIB)
        kernel = "\n".join((await qemu.guest.check("sh dmesg")).lines)
        assert "timeout" not in kernel.lower()
        assert "reset controller" not in kernel
        assert "I/O error" not in kernel
        assert (await qemu.guest.check("state")).lines == ("live",)
        assert await qemu.guest.power_off() == 0
