"""Whatever ends a migration: the guest goes on where it is, with its functions and verified I/O, and moves at last."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from vmbed.assets import Assets
from vmbed.hosts import Carrier, Host, HostConfig, finished, host, make_disk, migrate, shown
from vmbed.load import quiet
from vmbed.loops import begin_loops, loops_go_on
from vmbed.qemu import Qemu
from vmbed.troubles import TROUBLES, UNSTARTED, Scene, Trouble, is_refused, possible, restored

pytestmark = [pytest.mark.vm, pytest.mark.slow]
BY_ITSELF = ("-incoming", "defer")
WAITING = (*BY_ITSELF, "-S")


async def endure(scene: Scene, trouble: Trouble) -> None:
    """Have a migration end before its time, and see that the guest goes on where it is, and nowhere else."""
    print(trouble.__name__)  # noqa: T201
    await scene.there.phase("incoming")
    await trouble(scene)
    await restored(scene.qemu)
    await scene.here.phase("running")
    assert await shown(scene.qemu) == "running"
    assert await scene.there.phase("absent", "barred") != "running"
    await loops_go_on(scene.qemu.guest)


async def endure_all(
    assets: Assets, here: Host, there: Host, qemu: Qemu, troubles: Sequence[Trouble], incoming: Sequence[str]
) -> None:
    """Have one migration after the other end before its time."""
    for trouble in possible(troubles):
        async with there.machine(assets, incoming=incoming) as other:
            await endure(Scene(here, there, qemu, other, there.folder / "stream"), trouble)


@pytest.mark.parametrize(
    ("carrier", "incoming", "troubles"),
    [
        ("dbus-vmstate", WAITING, TROUBLES),
        pytest.param("dbus-vmstate", BY_ITSELF, UNSTARTED, marks=pytest.mark.long),
        ("vhost-user-fs", WAITING, TROUBLES),
        pytest.param("vhost-user-fs", BY_ITSELF, UNSTARTED, marks=pytest.mark.long),
    ],
)
async def test_a_source_comes_back(
    assets: Assets, workdir: Path, carrier: Carrier, incoming: Sequence[str], troubles: Sequence[Trouble]
) -> None:
    """One guest goes through all of it. At last it moves, and what is left of the source does not run again."""
    disk = make_disk(workdir)
    config = HostConfig(carrier, listens=True)
    async with host(workdir, "a", disk, config) as a, host(workdir, "b", disk, config) as b, AsyncExitStack() as stack:
        qemu = await stack.enter_async_context(a.machine(assets))
        await qemu.guest.ready()
        await begin_loops(qemu.guest)
        await endure_all(assets, a, b, qemu, troubles, incoming)
        async with b.machine(assets, incoming=incoming, carrier=False) as other:
            await endure(Scene(a, b, qemu, other, b.folder / "stream"), is_refused)
        await quiet(qemu.guest)
        other = await stack.enter_async_context(b.machine(assets, incoming=incoming))
        await b.phase("incoming")
        await migrate(qemu, other, workdir / "stream")
        assert await finished(qemu) == "completed"
        if incoming is WAITING:
            await other.qmp.execute("cont")
        await loops_go_on(other.guest)
        await quiet(other.guest)
        await other.kill()  # after the VM ran there: its source may not go on as if it had not
        await b.phase("absent")
        assert await a.phase("away") == "away"
        assert await shown(qemu) == "postmigrate"


#: Destinations that a state does not fit.
WRONG = {"firmware": HostConfig(soc=("--firmware", "0.9")), "names": HostConfig(prefix="g")}


async def test_a_destination_refuses(assets: Assets, workdir: Path) -> None:
    """One whose agent does not answer, or whose functions are others, refuses the state; the guest goes on."""
    disk = make_disk(workdir)
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(host(workdir, "a", disk, HostConfig()))
        qemu = await stack.enter_async_context(a.machine(assets))
        await qemu.guest.ready()
        await begin_loops(qemu.guest)
        for name, config in WRONG.items():
            async with (
                host(workdir, name, disk, config) as there,
                there.machine(assets, incoming=WAITING) as other,
            ):
                await endure(Scene(a, there, qemu, other, workdir / "stream"), is_refused)
        b = await stack.enter_async_context(host(workdir, "b", disk, HostConfig()))
        async with b.machine(assets, incoming=WAITING) as other:
            await b.phase("incoming")
            b.agent.send_signal(signal.SIGSTOP)
            await endure(Scene(a, b, qemu, other, workdir / "stream"), is_refused)
            b.agent.send_signal(signal.SIGCONT)
        await quiet(qemu.guest)
