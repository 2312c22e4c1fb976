"""What `snippet` prints, given to the real thing: QEMU starts, uses the function, and meets monitor and carrier."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from carrierbed.sides import KINDS
from libvirtbed.domain import NAME
from libvirtbed.host import SHARED, HostConfig, why_not
from libvirtbed.hosts import place
from libvirtbed.snippets import awaited, met, printed
from vfiouser_oob.control.client import ControlClient
from vmbed.assets import Assets
from vmbed.assets.libvirt import locate_libvirt
from vmbed.assets.store import default_cache
from vmbed.processes import logged_process
from vmbed.stack import service, soc_and_daemon

pytestmark = pytest.mark.vm
#: A group that every Debian has, in the place of `kvm`.
GROUP = "users"


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


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
async def test_qemu_as_libvirts_own_user(assets: Assets, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its group is all that lets it in: the sockets' default mode is enough for function, monitor and carrier."""
    config = HostConfig(user="libvirt-qemu", group=GROUP)
    async with place("A", assets, locate_libvirt(default_cache()), workdir, config) as here:
        sockets = here.host.shared
        domain = workdir / "domain.xml"
        domain.write_text(printed(capsys, workdir, SHARED, "dbus-vmstate", "libvirt", "--domain-type", "qemu"))
        text = (workdir / "config.toml").read_text().replace(str(SHARED), str(sockets))
        for table in ("[[vm]]\n", "[[function]]\n"):
            text = text.replace(table, f'{table}socket_group = "{GROUP}"\n')
        control = sockets / "control"
        (sockets / "config.toml").write_text(f'[daemon]\ncontrol_socket = "{control}"\n{text}')
        async with service(sockets, "daemon", ["serve", "--config", str(sockets / "config.toml")]):
            await here.host.virsh("define", str(domain))
            await here.host.virsh("start", NAME, "--paused")
            with ControlClient(control) as client:
                (vm,) = client.status()["vms"]
            assert vm["qemu"] is not None
            assert vm["qemu"]["uid"] not in {0, os.geteuid()}
            assert vm["carriers"] == ["dbus-vmstate"]
            await here.host.virsh("destroy", NAME)
