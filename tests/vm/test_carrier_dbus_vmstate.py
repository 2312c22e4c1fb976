"""Carrier V against stock QEMU: plain `migrate` between two machines, with a state in it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from carrierbed.hand import Hand
from carrierbed.machines import begin, machine, outcome, pause_before_switchover, status
from vfiouser_oob.transport.listener import listen_on_path
from vfiouser_oob.vm.carriers.dbus_vmstate import DbusVmstate, vmstate_object
from vfiouser_oob.vm.carriers.interface import Attached, Lost, SaveAsked, StateLoaded, Taken
from vmbed.assets import Assets
from vmbed.errors import BedError
from vmbed.qemu import Qemu

pytestmark = pytest.mark.vm
MIB = 1 << 20


def arguments(path: Path) -> list[str]:
    """What QEMU is told."""
    return ["-object", json.dumps(vmstate_object(path, "oobvmstate"))]


class Side:
    """A carrier with its hand, restartable."""

    def __init__(self, nursery: trio.Nursery, path: Path) -> None:
        self.path = path
        self._nursery = nursery
        self._scope = trio.CancelScope()
        self.hand: Hand

    async def start(self, state: bytes = b"") -> None:
        """Begin to listen, as a daemon that starts."""
        carrier = DbusVmstate(listen_on_path(self.path), self.path)
        self.hand = Hand(carrier, state)
        self._scope = trio.CancelScope()

        async def life(task_status: trio.TaskStatus[None]) -> None:
            with self._scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(self.hand.run)
                    await carrier.run(task_status=task_status)

        await self._nursery.start(life)

    def stop(self) -> None:
        """End, as a daemon that dies."""
        self._scope.cancel()


@asynccontextmanager
async def two_sides(workdir: Path, state: bytes = b"") -> AsyncIterator[tuple[Side, Side]]:
    """A source and a destination that expects a state."""
    async with trio.open_nursery() as nursery:
        source, destination = Side(nursery, workdir / "a.bus"), Side(nursery, workdir / "b.bus")
        await source.start(state)
        await destination.start()
        destination.hand.carrier.expect(256 * MIB if len(state) > 16 * MIB else 16 * MIB)
        yield source, destination
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def two_machines(assets: Assets, workdir: Path, source: Side, destination: Side) -> AsyncIterator[list[Qemu]]:
    """Their QEMUs."""
    async with (
        machine(assets, workdir, "a", arguments(source.path)) as a,
        machine(assets, workdir, "b", arguments(destination.path), incoming=True) as b,
    ):
        yield [a, b]


def numbered(size: int) -> bytes:
    """Bytes of which each piece differs."""
    return b"".join(number.to_bytes(8, "little") for number in range(-(-size // 8)))[:size]


@pytest.mark.parametrize("size", [0, 1, MIB - 32, MIB, 16 * MIB, 256 * MIB])
async def test_a_state_travels_in_the_stream(assets: Assets, workdir: Path, size: int) -> None:
    """What is offered at the source is what the destination is asked to load, before either side is done."""
    async with two_sides(workdir, numbered(size)) as (source, destination):
        async with two_machines(assets, workdir, source, destination) as (a, b):
            start = time.monotonic()
            await begin(a, b, workdir)
            assert [await outcome(b), await outcome(a)] == ["completed", "completed"]
            print(f"{size} bytes: {time.monotonic() - start:.3f} s")  # noqa: T201
        loaded = await destination.hand.until(StateLoaded)
        assert bytes(loaded.state) == source.hand.state
        assert [type(event) for event in source.hand.events[:3]] == [Attached, SaveAsked, Taken]
        assert not loaded.free


async def test_a_veto_is_a_clean_failure(assets: Assets, workdir: Path) -> None:
    """A refused save fails the migration before anything left; QEMU says why, and the same QEMU migrates later."""
    async with (
        two_sides(workdir, b"state") as (source, destination),
        two_machines(assets, workdir, source, destination) as (a, b),
    ):
        source.hand.refuses = (SaveAsked,)
        await begin(a, b, workdir)
        assert await outcome(a) == "failed"
        assert (await a.qmp.execute("query-status"))["status"] == "running"
        assert Hand.reason in a.process.log.read_text()
        await b.process.wait()
        assert not source.hand.told(Taken)
        assert not destination.hand.told(StateLoaded)
        await destination.hand.until(Lost)
        source.hand.refuses = ()
        async with machine(assets, workdir, "c", arguments(destination.path), incoming=True) as c:
            await begin(a, c, workdir)
            assert await outcome(a) == "completed"


async def test_a_destination_that_refuses_lets_the_source_go_on(assets: Assets, workdir: Path) -> None:
    """A state that must not be loaded fails the migration on both sides; the source runs, and can be saved again."""
    async with two_sides(workdir, b"state") as (source, destination):
        destination.hand.refuses = (StateLoaded,)
        async with two_machines(assets, workdir, source, destination) as (a, b):
            await begin(a, b, workdir)
            assert await outcome(a) == "failed"
            await b.process.wait()
            assert Hand.reason in b.process.log.read_text()
            assert (await a.qmp.execute("query-status"))["status"] == "running"
            await destination.hand.until(Lost)
            destination.hand.refuses = ()
            async with machine(assets, workdir, "c", arguments(destination.path), incoming=True) as c:
                await begin(a, c, workdir)
                assert await outcome(a) == "completed"
        assert len(source.hand.told(SaveAsked)) == 2


async def test_an_unprepared_destination_refuses(assets: Assets, workdir: Path) -> None:
    """A daemon that expects nothing asks its VM to save, which it does not; nothing is loaded."""
    async with two_sides(workdir, b"state") as (source, destination):
        destination.hand.carrier.reset()
        destination.hand.refuses = (SaveAsked,)
        async with two_machines(assets, workdir, source, destination) as (a, b):
            await begin(a, b, workdir)
            assert await outcome(a) == "failed"
            await b.process.wait()
        assert not destination.hand.told(StateLoaded)


async def test_a_cancelled_migration_asks_nothing(assets: Assets, workdir: Path) -> None:
    """A migration that is cancelled before the switchover takes no state, and the next one carries it."""
    async with (
        two_sides(workdir, b"state") as (source, destination),
        two_machines(assets, workdir, source, destination) as (a, b),
    ):
        await pause_before_switchover(a, True)
        await begin(a, b, workdir)
        await status(a, "pre-switchover")
        await a.qmp.execute("migrate_cancel")
        assert await outcome(a) == "cancelled"
        assert not source.hand.told(SaveAsked)
        await b.process.wait()
        await destination.hand.until(Lost)
        await pause_before_switchover(a, False)
        async with machine(assets, workdir, "c", arguments(destination.path), incoming=True) as c:
            await begin(a, c, workdir)
            assert await outcome(a) == "completed"
        assert bytes((await destination.hand.until(StateLoaded)).state) == b"state"


async def test_a_cancel_while_the_state_is_asked_for(assets: Assets, workdir: Path) -> None:
    """QEMU hears of it too late: the source resumes, and the destination has loaded everything all the same.

    Nobody runs twice only because the destination is started with -S, as libvirt does it, and is thrown away.
    """
    async with two_sides(workdir, b"state") as (source, destination):
        source.hand.ignores = (SaveAsked,)
        async with machine(assets, workdir, "a", arguments(source.path)) as a:
            async with machine(assets, workdir, "b", [*arguments(destination.path), "-S"], incoming=True) as b:
                await begin(a, b, workdir)
                await source.hand.until(SaveAsked)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(a.qmp.execute, "migrate_cancel")
                    await trio.testing.wait_all_tasks_blocked()
                    assert source.hand.carrier.offer(b"state")
                assert [await outcome(a), await outcome(b)] == ["cancelled", "completed"]
                assert (await a.qmp.execute("query-status"))["status"] == "running"
                assert (await b.qmp.execute("query-status"))["status"] == "paused"
            await destination.hand.until(Lost)
            source.hand.ignores = ()
            async with machine(assets, workdir, "c", arguments(destination.path), incoming=True) as c:
                await begin(a, c, workdir)
                assert await outcome(a) == "completed"
        assert len(destination.hand.told(StateLoaded)) == 2


async def test_a_destination_that_is_killed_while_it_loads(assets: Assets, workdir: Path) -> None:
    """The question goes with its QEMU; an answer that comes later goes nowhere, and the source runs."""
    async with two_sides(workdir, b"state") as (source, destination):
        destination.hand.ignores = (StateLoaded,)
        async with two_machines(assets, workdir, source, destination) as (a, b):
            await begin(a, b, workdir)
            await destination.hand.until(StateLoaded)
            await b.kill()
            await destination.hand.until(Lost)
            assert not destination.hand.carrier.answer()
            assert await outcome(a) == "failed"
            assert (await a.qmp.execute("query-status"))["status"] == "running"


async def test_a_lost_endpoint_is_repaired(assets: Assets, workdir: Path) -> None:
    """Without its daemon the source does not migrate; the repair's commands connect a new one, and then it does."""
    async with two_sides(workdir, b"state") as (source, destination):
        async with machine(assets, workdir, "a", arguments(source.path)) as a:
            await source.hand.until(Attached)
            source.stop()
            async with machine(assets, workdir, "b", arguments(destination.path), incoming=True) as b:
                await begin(a, b, workdir)
                assert await outcome(a) == "failed"
                assert (await a.qmp.execute("query-status"))["status"] == "running"
                await b.process.wait()
            await source.start(b"new state")
            for command in source.hand.carrier.repair():
                await a.qmp.execute(command.execute, **command.arguments)
            await source.hand.until(Attached)
            async with machine(assets, workdir, "c", arguments(destination.path), incoming=True) as c:
                await begin(a, c, workdir)
                assert await outcome(a) == "completed"
        assert bytes((await destination.hand.until(StateLoaded)).state) == b"new state"


async def test_qemu_does_not_start_without_its_carrier(assets: Assets, workdir: Path) -> None:
    """A QEMU whose carrier's socket is missing says so and ends."""
    with pytest.raises(BedError, match="failed to connect to DBus"):
        async with machine(assets, workdir, "a", arguments(workdir / "nobody.bus")):
            pass
