"""Daemons are killed and restarted in the middle of plain migrations, under verified I/O; one pair of hosts for all."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

from vmbed.assets import Assets
from vmbed.companion import unbind_companion
from vmbed.hosts import Carrier, Host, HostConfig, capability, finished, host, make_disk, migrate, status
from vmbed.load import begin_load, goes_on, quiet
from vmbed.processes import tail
from vmbed.qemu import Qemu

pytestmark = [pytest.mark.vm, pytest.mark.slow]
WAITING = ("-incoming", "defer", "-S")
#: Bytes per second at which a migration does not end by itself.
SLOW = 1 << 16


@dataclass
class Scene:
    """Two hosts with their QEMUs, before a migration.

    Attributes:
        here: where the VM runs.
        there: where it is to go.
        source: its QEMU.
        target: the other one, which waits.
        stream: the socket of the migration.
        kill: the daemon is killed, else restarted.
    """

    here: Host
    there: Host
    source: Qemu
    target: Qemu
    stream: Path
    kill: bool

    async def held(self) -> None:
        """Migrate as far as QEMU's vCPUs stand, and the functions with them."""
        await capability(self.source, "pause-before-switchover", True)
        await migrate(self.source, self.target, self.stream)
        await status(self.source, "pre-switchover")
        await self.here.phase("stopped")

    @asynccontextmanager
    async def saved(self) -> AsyncIterator[None]:
        """Migrate as far as the functions' state was handed over, and the other daemon does not load it."""
        await self.held()
        self.there.signal_daemon(signal.SIGSTOP)
        async with trio.open_nursery() as answer:  # which may come when all is over: QEMU does nothing else meanwhile
            answer.start_soon(partial(self.source.qmp.execute, "migrate-continue", state="pre-switchover"))
            await self.here.phase("saved")
            yield


async def source_armed(scene: Scene) -> str:
    """The source's daemon goes while the guest runs: nobody knows what was written meanwhile."""
    await migrate(scene.source, scene.target, scene.stream, bandwidth=SLOW)
    await status(scene.source, "active")
    await scene.here.phase("armed")
    async with scene.here.replaced(kill=scene.kill):
        pass
    return await finished(scene.source)


async def source_logged(scene: Scene) -> str:
    """The same, and the guest has a driver for the companion: QEMU sends once more all that the functions can write."""
    await migrate(scene.source, scene.target, scene.stream, bandwidth=SLOW)
    await status(scene.source, "active")
    await scene.here.phase("armed")
    async with scene.here.replaced(kill=scene.kill):
        pass
    await scene.source.qmp.execute("migrate-set-parameters", max_bandwidth=1 << 30)
    return await finished(scene.source)


async def source_stopped(scene: Scene) -> str:
    """It goes while the functions stand: the migration is given up, or fails for lack of a state."""
    await scene.held()
    async with scene.here.replaced(kill=scene.kill):
        pass
    return await finished(scene.source)


async def source_saved(scene: Scene) -> str:
    """It goes after the state was handed over, before anybody has loaded it.

    A restart waits until QEMU has it, so the migration goes on. Who is killed may have been too early for that.
    """
    async with scene.saved(), scene.here.replaced(kill=scene.kill):
        scene.there.signal_daemon(signal.SIGCONT)
        return await finished(scene.source)


async def source_saved_in_vain(scene: Scene) -> str:
    """The same, and the destination ends: the source runs again, by QEMU's word."""
    async with scene.saved(), scene.here.replaced(kill=scene.kill):
        await scene.target.kill()
        scene.there.signal_daemon(signal.SIGCONT)
        return await finished(scene.source)


async def destination_waiting(scene: Scene) -> str:
    """The destination's daemon goes before anything has come: QEMU makes its end of the carrier anew."""
    async with scene.there.replaced(kill=scene.kill):
        pass
    await scene.there.phase("incoming")
    await carrier_back(scene.there)
    await migrate(scene.source, scene.target, scene.stream)
    return await finished(scene.source)


async def destination_in_precopy(scene: Scene) -> str:
    """It goes while memory is being sent."""
    await migrate(scene.source, scene.target, scene.stream, bandwidth=SLOW)
    await status(scene.source, "active")
    async with scene.there.replaced(kill=scene.kill):
        pass
    await scene.there.phase("incoming")
    await carrier_back(scene.there)
    await scene.source.qmp.execute("migrate-set-parameters", max_bandwidth=1 << 30)
    return await finished(scene.source)


async def destination_ready(scene: Scene) -> str:
    """It goes after all has come, and before the VM runs there."""
    await migrate(scene.source, scene.target, scene.stream)
    ended = await finished(scene.source)
    if ended != "completed":
        return ended
    await scene.there.phase("ready")
    async with scene.there.replaced(kill=scene.kill):
        pass
    return ended


async def both(scene: Scene) -> str:
    """Both go after all has come."""
    ended = await destination_ready(scene)
    async with scene.here.replaced(kill=scene.kill):
        pass
    return ended


async def carrier_back(there: Host) -> None:
    """Wait until QEMU's end of the carrier is connected."""
    while not (await there.vm())["carriers"]:
        pass  # each look is a process of its own, and so takes its time


Trouble = Callable[[Scene], Awaitable[str]]
STAYS: tuple[Trouble, ...] = (source_armed, source_stopped, source_saved_in_vain)
GOES: tuple[Trouble, ...] = (destination_waiting, source_saved, destination_in_precopy, destination_ready, both)
#: Those after which only QEMU knows which it is, if the daemon was killed.
EITHER: tuple[Trouble, ...] = (source_saved,)
KILLS = [(trouble, True) for trouble in (*STAYS, *GOES)]
RESTARTS = [
    (trouble, False) for trouble in (source_armed, source_stopped, source_saved, destination_waiting, destination_ready)
]
#: The guest has no driver for the companion after `source_logged`.
PLANS: dict[Carrier, list[tuple[Trouble, bool]]] = {
    "dbus-vmstate": [*KILLS, *RESTARTS],
    "vhost-user-fs": [
        (source_logged, True),
        (source_armed, True),
        (destination_in_precopy, True),
        # A kill might hit the moment in which a message is answered, after which nothing connects the device anew.
        (source_saved, False),
        (source_saved_in_vain, False),
        (destination_ready, True),
    ],
}


@asynccontextmanager
async def guest(assets: Assets, workdir: Path, carrier: Carrier) -> AsyncIterator[tuple[Host, Host, Qemu]]:
    """Two hosts, and a guest on the first that writes and reads back."""
    disk, config = make_disk(workdir), HostConfig(carrier, keep=True)
    async with host(workdir, "a", disk, config) as a, host(workdir, "b", disk, config) as b, a.machine(assets) as qemu:
        await qemu.guest.ready()
        await begin_load(qemu.guest)
        yield a, b, qemu


@pytest.mark.parametrize("carrier", ["dbus-vmstate", "vhost-user-fs"])
async def test_daemons_come_and_go(assets: Assets, workdir: Path, carrier: Carrier) -> None:
    """Where the record lets the migration go on, it does; else it fails, and the guest goes on where it is.

    It can always migrate again, never runs twice, and its driver notices nothing.
    """
    async with guest(assets, workdir, carrier) as (here, there, qemu), AsyncExitStack() as machines:
        for trouble, kill in PLANS[carrier]:
            if carrier == "vhost-user-fs" and trouble is not source_logged:
                await unbind_companion(qemu.guest)
            target = await machines.enter_async_context(there.machine(assets, incoming=WAITING))
            await there.phase("incoming")
            ended = await trouble(Scene(here, there, qemu, target, workdir / "stream", kill))
            await capability(qemu, "pause-before-switchover", False)
            print(f"{trouble.__name__} {'killed' if kill else 'restarted'}: {ended}")  # noqa: T201
            if not (kill and trouble in EITHER):
                assert (ended == "completed") == (trouble not in STAYS), tail(here.daemon.log)
            if ended != "completed":
                await target.kill()
                await here.phase("running")
            else:
                assert await finished(target) == "completed"
                await there.phase("ready")
                await here.phase("away")
                await target.qmp.execute("cont")
                await there.phase("running")
                await qemu.kill()
                await here.phase("absent")
                qemu, here, there = target, there, here
            await carrier_back(here)
            await goes_on(qemu.guest)
            await quiet(qemu.guest)
