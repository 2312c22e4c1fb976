"""What `snippet` prints, given to the real thing: QEMU starts, uses the function, and meets monitor and carrier."""

from __future__ import annotations

import json
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from carrierbed.sides import KINDS, Side
from libvirtbed.domain import NAME
from libvirtbed.host import SHARED, why_not
from libvirtbed.hosts import place
from vfiouser_oob.cli.main import main
from vfiouser_oob.vm.carriers.interface import QemuAttached
from vmbed.assets import Assets
from vmbed.assets.libvirt import locate_libvirt
from vmbed.assets.store import default_cache
from vmbed.lines import LineListener
from vmbed.processes import LoggedProcess, deadline, logged_process
from vmbed.stack import soc_and_daemon

pytestmark = pytest.mark.vm
START_S = 60.0


def printed(capsys: pytest.CaptureFixture[str], workdir: Path, sockets: Path, carrier: str, *arguments: str) -> str:
    """What `snippet` prints for a VM whose sockets are in a folder."""
    config = workdir / "config.toml"
    config.write_text(
        f'[[vm]]\nname = "{NAME}"\nfunctions = ["f0"]\ncarrier = "{carrier}"\nmonitor = "{sockets}/monitor"\n'
        f'{carrier.replace("-", "_")} = "{sockets}/carrier"\n'
        f'[[function]]\nname = "f0"\nsocket = "{sockets}/vmm.sock"\ndevice = {{ kind = "model", model = "nvme" }}\n'
    )
    capsys.readouterr()
    assert main(["snippet", *arguments, NAME, "--config", str(config), "--memory", "64M"]) == 0
    return capsys.readouterr().out


@asynccontextmanager
async def awaited(sockets: Path, carrier: str) -> AsyncIterator[tuple[LineListener, Side]]:
    """What such a QEMU connects to, beside the function: a monitor's listener and a carrier."""
    async with trio.open_nursery() as nursery, LineListener(sockets / "monitor") as monitor:
        side = Side(KINDS[carrier], nursery, sockets / "carrier")
        await side.start()
        yield monitor, side
        nursery.cancel_scope.cancel()


async def met(monitor: LineListener, side: Side, process: LoggedProcess) -> None:
    """Wait until a QEMU has greeted by the monitor and opened the carrier."""
    with deadline(START_S, "greeting of QEMU's monitor", process.log):
        greeting = json.loads(await (await monitor.accept(process)).receive())
    assert greeting["QMP"]["version"]["qemu"]["major"] >= 11
    await side.hand.until(QemuAttached)


@pytest.mark.parametrize("carrier", list(KINDS))
async def test_qemu_starts_with_it(
    assets: Assets, workdir: Path, capsys: pytest.CaptureFixture[str], carrier: str
) -> None:
    """A shell's words are all that it needs beside a machine to run."""
    words = shlex.split(printed(capsys, workdir, workdir, carrier, "qemu").replace("\\\n", ""))
    argv = [*assets.qemu_command, *words, "-accel", "qtest", "-nodefaults", "-display", "none"]
    async with (
        soc_and_daemon(workdir) as stack,
        awaited(workdir, carrier) as (monitor, side),
        logged_process("qemu", argv, workdir / "qemu.log", env=assets.qemu_environment) as process,
    ):
        await met(monitor, side, process)
        assert await stack.messages("DEVICE_GET_INFO") == 1


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
async def test_libvirt_starts_it(assets: Assets, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`virsh define` takes the domain as it is printed, and `virsh start` brings it up, under libvirt's own user."""
    carrier = "dbus-vmstate"
    async with place("A", assets, locate_libvirt(default_cache()), workdir) as here:
        sockets = here.host.shared
        domain = workdir / "domain.xml"
        domain.write_text(printed(capsys, workdir, SHARED, carrier, "libvirt", "--domain-type", "qemu"))
        async with soc_and_daemon(sockets) as stack, awaited(sockets, carrier) as (monitor, side):
            await here.host.virsh("define", str(domain))
            await here.host.virsh("start", NAME, "--paused")
            await met(monitor, side, here.host.process)
            assert await stack.messages("DEVICE_GET_INFO") == 1
            await here.host.virsh("destroy", NAME)
