"""What `snippet` prints, given to the real thing: QEMU starts, uses the function, and meets monitor and carrier."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from carrierbed.sides import KINDS
from libvirtbed.domain import NAME
from libvirtbed.host import SHARED, why_not
from libvirtbed.hosts import place
from libvirtbed.snippets import awaited, met, printed
from vmbed.assets import Assets
from vmbed.assets.libvirt import locate_libvirt
from vmbed.assets.store import default_cache
from vmbed.processes import logged_process
from vmbed.stack import soc_and_daemon

pytestmark = pytest.mark.vm


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
