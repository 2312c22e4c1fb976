"""libvirt itself, between two hosts on this machine: what `virsh migrate` does with our functions.

One guest serves the tests of a module where that is possible: a boot costs more than all else.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from libvirtbed.domain import NAME, Domain
from libvirtbed.host import CONFIG, SHARED, Said, why_not
from libvirtbed.hosts import Place, place, start_domain
from libvirtbed.snippets import awaited, met, printed
from vfiouser_oob.cli.vm_snippet import qemu_words
from vfiouser_oob.config.load import load_config
from vfiouser_oob.control.client import ControlClient
from vmbed.assets import Assets
from vmbed.assets.libvirt import Libvirt, locate_libvirt
from vmbed.assets.store import default_cache
from vmbed.guest import Guest
from vmbed.hosts import Host as ServingHost
from vmbed.hosts import HostConfig as ServingConfig
from vmbed.hosts import host, make_disk
from vmbed.load import begin_load, goes_on, quiet
from vmbed.stack import soc_and_daemon

pytestmark = [pytest.mark.vm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


#: What OpenStack's and KubeVirt's migrations ask for, beside what every one here does.
NOVA = ("--undefinesource", "--persistent")
KUBEVIRT = ("--persistent",)


@pytest.fixture
def libvirt() -> Libvirt:
    """libvirt's tree; a missing one is an error that names `make vm-assets`."""
    return locate_libvirt(default_cache())


async def test_a_guest_moves_between_two_hosts(assets: Assets, libvirt: Libvirt, workdir: Path) -> None:
    """Without a function of ours, so that what fails with one is not the bed's fault."""
    async with place("A", assets, libvirt, workdir) as here, place("B", assets, libvirt, workdir) as there:
        guest = await start_domain(here, assets, Domain())
        await guest.check("sh echo kept > /tmp/kept")
        said = await here.migrate(there)
        assert said.status == 0, said.text
        moved = await there.guest()
        assert (await moved.check("sh cat /tmp/kept")).lines == ("kept",)
        assert await there.host.virsh("domstate", NAME) == "running"


async def test_the_hook_refuses_a_vm_in_words(
    assets: Assets, libvirt: Libvirt, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who asked for the migration reads why; nothing was begun, and the VM stays where it is."""
    async with place("A", assets, libvirt, workdir) as here, place("B", assets, libvirt, workdir) as there:
        sockets = here.host.shared
        domain = workdir / "domain.xml"
        text = printed(capsys, workdir, SHARED, "dbus-vmstate", "libvirt", "--domain-type", "qemu")
        domain.write_text(text)
        (there.host.shared / CONFIG.name).write_text((workdir / "config.toml").read_text().replace("f0", "g0"))
        async with soc_and_daemon(sockets), awaited(sockets, "dbus-vmstate") as (monitor, side):
            await here.host.virsh("define", str(domain))
            await here.host.virsh("start", NAME, "--paused")
            await met(monitor, side, here.host.process)
            said = await here.migrate(there)
            assert said.status == 1
            assert f"no [[vm]] on this host has the functions f0 (it has {NAME}: g0)" in said.text
            assert await here.host.virsh("domstate", NAME) == "paused"
            await here.host.virsh("destroy", NAME)


@asynccontextmanager
async def two_hosts(
    assets: Assets, libvirt: Libvirt, workdir: Path
) -> AsyncIterator[tuple[Place, Place, ServingHost, ServingHost]]:
    """Two hosts with libvirt and a daemon each, whose functions share a disk. The sockets' paths differ."""
    disk = make_disk(workdir)
    async with (
        place("A", assets, libvirt, workdir) as here,
        place("B", assets, libvirt, workdir) as there,
        host(here.host.shared.parent, here.host.shared.name, disk, ServingConfig()) as serving,
        host(there.host.shared.parent, there.host.shared.name, disk, ServingConfig()) as waiting,
    ):
        yield here, there, serving, waiting


def domain_for(serving: ServingHost) -> Domain:
    """A domain with what `snippet` says that a host's VM needs."""
    config = load_config(serving.folder / "config.toml")
    (vm,) = config.vms
    words = [word for option in qemu_words(vm, config.functions, config.reply_budget_s) for word in option]
    return Domain(words, memory_mib=128, cpus=1)


def checked(source: ServingHost, destination: ServingHost) -> dict[str, Any]:
    """What `migrate-check` finds out."""
    with ControlClient(destination.folder / "control") as there, ControlClient(source.folder / "control") as here:
        offer = there.ask("migrate-check", vm="guest")["offer"]
        found: dict[str, Any] = here.ask("migrate-check", vm="guest", destination=json.dumps(offer))
    return found


async def give_up(here: Place, there: Place, serving: ServingHost) -> None:
    """Begin a migration that takes long, and have it given up in the middle."""
    said: list[Said] = []

    async def move() -> None:
        said.append(await here.migrate(there, "--bandwidth", "1"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(move)
        await there.guest()  # of the QEMU that waits, and ends with it
        await serving.phase("armed", seconds=60)
        await here.host.virsh("domjobabort", NAME)
    assert said[0].status == 1
    assert "aborted" in said[0].text
    assert await serving.phase("running") == "running"


async def save_and_restore(at: Place, serving: ServingHost, guest: Guest) -> Guest:
    """Save the VM into a file, which ends its QEMU, and have it go on from there."""
    await goes_on(guest)
    saved = SHARED / "saved"
    if (said := await at.host.ask("save", NAME, str(saved))).status != 0:
        # A VM that stands is saved in a moment. QEMU answers nothing after it, so the daemon may be too late to ask it,
        # and refuses. The VM goes on, and what was asked for then is there the next time.
        assert "pre-save failed: dbus-vmstate" in said.text, said.text
        assert "did not answer" in at.host.qemu_log(NAME).read_text()
        await serving.phase("running")
        await goes_on(guest)
        await at.host.virsh("save", NAME, str(saved))
    await serving.phase("absent")
    await at.host.virsh("restore", str(saved))
    restored = await at.guest()
    await serving.phase("running")
    await goes_on(restored)
    await quiet(restored)
    return restored


@pytest.mark.parametrize("hops", [2, pytest.param(10, marks=pytest.mark.long)])
async def test_virsh_migrate_moves_our_functions(assets: Assets, libvirt: Libvirt, workdir: Path, hops: int) -> None:
    """Under verified I/O, with the flags of those who use libvirt, and nothing wrapped around it.

    One is given up in the middle first.
    """
    async with two_hosts(assets, libvirt, workdir) as (here, there, serving, waiting):
        guest = await start_domain(here, assets, domain_for(serving))
        await begin_load(guest)
        found = checked(serving, waiting)
        assert found["migratable"], found["reasons"]
        assert {each["weight"] for each in found["reasons"]} <= {"advice"}
        await give_up(here, there, serving)
        await goes_on(guest)
        for flags in (NOVA, KUBEVIRT) * (hops // 2):
            said = await here.migrate(there, *flags)
            assert said.status == 0, said.text
            guest = await there.guest()
            await goes_on(guest)
            await quiet(guest)
            assert await there.host.virsh("domstate", NAME) == "running"
            here, there, serving, waiting = there, here, waiting, serving
            assert await serving.phase("running") == "running"
        await save_and_restore(here, serving, guest)
