"""Carrier F against stock QEMU, with a driver bound to its device: stop, dirty log and go.

The driver is played over qtest, so there is no guest.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import trio
import trio.testing

from carrierbed.machines import begin, machine, outcome, pause_before_switchover, status
from carrierbed.sides import KINDS, Kind, Side, two_machines, two_sides
from carrierbed.virtiofs import VirtioFs
from vfiouser_oob.vm.carriers.interface import (
    GoAsked,
    LogChanged,
    Lost,
    QemuAttached,
    SaveAsked,
    StateLoaded,
    StopAsked,
)
from vfiouser_oob.vm.carriers.vhost_user_fs import VhostUserFs, companion_arguments
from vmbed.assets import Assets
from vmbed.qemu import Qemu

pytestmark = pytest.mark.vm
COMPANION = KINDS["vhost-user-fs"]
PAGE = 0x0140_0000
#: Operations of FUSE.
INIT, FORGET = 26, 2


def write_behind_its_back(qemu: Qemu, address: int, data: bytes) -> None:
    """Write guest memory as a device does: through the memory's file, so that QEMU does not know of it."""
    folder = Path(f"/proc/{qemu.process.pid}/fd")
    (link,) = {
        path.resolve(): path for path in folder.iterdir() if "memory-backend-memfd" in os.readlink(path)
    }.values()
    with link.open("r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(data)


async def answered(side: Side) -> None:
    """Give the answer that the test kept back."""
    assert side.hand.carrier.answer()


@pytest.mark.parametrize("marked", [True, False])
async def test_what_is_logged_reaches_the_destination(assets: Assets, workdir: Path, marked: bool) -> None:
    """Memory that is written after the stop was asked travels if it is marked before the answer, and else does not."""
    async with (
        two_sides(COMPANION, workdir, b"state") as (source, destination),
        two_machines(assets, workdir, source, destination) as (a, b),
    ):
        await VirtioFs(a.qtest).bind()
        await source.hand.until(GoAsked)
        await a.qtest.write(PAGE, b"old!")
        source.hand.ignores = (StopAsked,)
        await begin(a, b, workdir)
        assert (await source.hand.until(StopAsked)).sure
        write_behind_its_back(a, PAGE, b"new!")
        log = source.hand.told(LogChanged)[-1].log
        assert log is not None
        if marked:
            log.mark(PAGE, 4)
        await answered(source)
        assert await outcome(a) == "completed"
        assert await b.qtest.read(PAGE, 4) == (b"new!" if marked else b"old!")
        kinds = [type(event) for event in source.hand.events]
        assert kinds.index(StopAsked) < kinds.index(SaveAsked)


async def test_the_guest_does_not_run_before_the_go(assets: Assets, workdir: Path) -> None:
    """At the destination the go is asked inside `cont`, after the load, and `cont` waits for it."""
    async with two_sides(COMPANION, workdir, b"state") as (source, destination):
        destination.hand.ignores = (GoAsked,)
        async with (
            machine(assets, workdir, "a", source.arguments) as a,
            machine(assets, workdir, "b", [*destination.arguments, "-S"], incoming=True) as b,
        ):
            await VirtioFs(a.qtest).bind()
            await begin(a, b, workdir)
            assert [await outcome(a), await outcome(b)] == ["completed", "completed"]
            assert not destination.hand.told(GoAsked)
            done = trio.Event()

            async def resume() -> None:
                await b.qmp.execute("cont")
                done.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(resume)
                await destination.hand.until(GoAsked)
                await trio.testing.wait_all_tasks_blocked(0.2)
                assert not done.is_set()
                await answered(destination)
            kinds = [type(event) for event in destination.hand.events]
            assert kinds.index(StateLoaded) < kinds.index(GoAsked)


async def test_a_load_finds_the_main_loop_free(assets: Assets, workdir: Path) -> None:
    """While the last byte is held back the destination's monitor answers, as it answers DMA messages."""
    async with (
        two_sides(COMPANION, workdir, os.urandom(1 << 20)) as (source, destination),
        two_machines(assets, workdir, source, destination) as (a, b),
    ):
        await begin(a, b, workdir)
        assert await outcome(a) == "completed"
        assert (await destination.hand.until(StateLoaded)).free


@pytest.mark.parametrize("refused", [StopAsked, SaveAsked])
async def test_a_source_that_is_refused_goes_on(
    assets: Assets, workdir: Path, refused: type[StopAsked] | type[SaveAsked]
) -> None:
    """It says so by asking for the go again, and migrates the next time."""
    async with (
        two_sides(COMPANION, workdir, b"state") as (source, destination),
        two_machines(assets, workdir, source, destination) as (a, b),
    ):
        await VirtioFs(a.qtest).bind()
        source.hand.refuses = (refused,)
        await begin(a, b, workdir)
        assert await outcome(a) == "failed"
        await source.hand.until(GoAsked, 2)
        await b.process.wait()
        await destination.hand.until(Lost)
        source.hand.refuses = ()
        async with machine(assets, workdir, "c", destination.arguments, incoming=True) as c:
            await begin(a, c, workdir)
            assert await outcome(a) == "completed"


async def test_a_cancelled_source_goes_on(assets: Assets, workdir: Path) -> None:
    """After the stop, before the state: the log ends, and the go is asked."""
    async with (
        two_sides(COMPANION, workdir, b"state") as (source, destination),
        two_machines(assets, workdir, source, destination) as (a, b),
    ):
        await VirtioFs(a.qtest).bind()
        await pause_before_switchover(a, True)
        await begin(a, b, workdir)
        await status(a, "pre-switchover")
        assert (await source.hand.until(StopAsked)).sure
        await a.qmp.execute("migrate_cancel")
        assert await outcome(a) == "cancelled"
        await source.hand.until(GoAsked, 2)
        assert not source.hand.told(SaveAsked)


async def test_a_driver_that_goes_asks_for_a_stop_that_is_none(assets: Assets, workdir: Path) -> None:
    """The VM runs on; only the monitor knows, so the question says that it is not sure."""
    async with (
        two_sides(COMPANION, workdir) as (source, _),
        machine(assets, workdir, "a", source.arguments) as a,
    ):
        driver = VirtioFs(a.qtest)
        await driver.bind()
        await source.hand.until(GoAsked)
        await driver.unbind()
        assert not (await source.hand.until(StopAsked)).sure
        await driver.bind()
        await source.hand.until(GoAsked, 2)


async def test_a_mount_fails_at_once(assets: Assets, workdir: Path) -> None:
    """Each request of a file system is given back with an error, before and after a migration, and FORGET without."""
    async with (
        two_sides(COMPANION, workdir, b"state") as (source, destination),
        two_machines(assets, workdir, source, destination) as (a, b),
    ):
        driver = VirtioFs(a.qtest)
        await driver.bind()
        await source.hand.until(GoAsked)
        await driver.request(1, INIT, 2)
        await given_back(driver, 1, 1)
        assert await driver.answer(1) == (16, -5, 2)
        await driver.request(0, FORGET, 3, room=0)
        await given_back(driver, 0, 1)
        await begin(a, b, workdir)
        assert await outcome(a) == "completed"
        await destination.hand.until(GoAsked)
        driver.move(b.qtest)
        await driver.request(1, INIT, 4)
        await given_back(driver, 1, 2)
        assert await driver.answer(1) == (16, -5, 4)


async def given_back(driver: VirtioFs, queue: int, count: int) -> None:
    """Wait until the device has given back so many requests: a driver without interrupts has to look."""
    with trio.fail_after(30):
        while await driver.used(queue) != count:
            pass


async def test_a_daemon_that_comes_back_goes_on(assets: Assets, workdir: Path) -> None:
    """Where QEMU listens, a second daemon takes up what the first one had told it, without a word from QEMU."""
    calls = Kind(
        lambda path: VhostUserFs(None, path),
        lambda path: companion_arguments(path, listens=True, addr="0x10"),
        says_why=False,
    )
    async with two_sides(calls, workdir, b"state") as (source, destination):
        async with machine(assets, workdir, "a", source.arguments) as a:
            await VirtioFs(a.qtest).bind()
            await source.hand.until(GoAsked)
            first = source.hand.carrier
            assert isinstance(first, VhostUserFs)
            source.stop()
            await trio.testing.wait_all_tasks_blocked()
            standing = first.standing
            assert standing is not None
            assert standing.runs
            source.kind = dataclasses.replace(calls, make=lambda path: VhostUserFs(None, path, before=standing))
            await source.start(b"state of the second")
            await source.hand.until(QemuAttached)
            async with machine(assets, workdir, "b", destination.arguments, incoming=True) as b:
                await begin(a, b, workdir)
                assert await outcome(a) == "completed"
            assert (await source.hand.until(StopAsked)).sure
        assert bytes((await destination.hand.until(StateLoaded)).state) == b"state of the second"
