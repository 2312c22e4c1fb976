"""Both carriers against stock QEMU: plain `migrate` between two machines, with a state in it."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import trio
import trio.testing

from carrierbed.hand import Hand
from carrierbed.machines import begin, machine, outcome, pause_before_switchover, status
from carrierbed.sides import KINDS, Kind, two_machines, two_sides
from vfiouser_oob.vm.carriers.interface import Lost, QemuAttached, SaveAsked, StateLoaded, StateTaken
from vmbed.assets import Assets

pytestmark = pytest.mark.vm
MIB = 1 << 20


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each of them."""
    return KINDS[request.param]


def noise(size: int) -> bytes:
    """Bytes of which no piece comes twice."""
    source = random.Random(size)
    return b"".join(source.randbytes(min(MIB, size - at)) for at in range(0, size, MIB))


@pytest.mark.parametrize("size", [0, 1, MIB - 32, MIB, 16 * MIB, 256 * MIB])
async def test_a_state_travels_in_the_stream(kind: Kind, assets: Assets, workdir: Path, size: int) -> None:
    """What is offered at the source is what the destination is asked to load, before either side is done."""
    async with two_sides(kind, workdir, noise(size), max(size, 16 * MIB)) as (
        source,
        destination,
    ):
        async with two_machines(assets, workdir, source, destination) as (a, b):
            start = time.monotonic()
            await begin(a, b, workdir)
            assert [await outcome(b), await outcome(a)] == ["completed", "completed"]
            print(f"{size} bytes: {time.monotonic() - start:.3f} s")  # noqa: T201
        loaded = await destination.hand.until(StateLoaded)
        assert bytes(loaded.state) == source.hand.state
        assert [type(event) for event in source.hand.events[:3]] == [QemuAttached, SaveAsked, StateTaken]


async def test_a_veto_is_a_clean_failure(kind: Kind, assets: Assets, workdir: Path) -> None:
    """A refused save fails the migration before anything left; QEMU says why, and the same QEMU migrates later."""
    async with (
        two_sides(kind, workdir, b"state") as (source, destination),
        two_machines(assets, workdir, source, destination) as (a, b),
    ):
        source.hand.refuses = (SaveAsked,)
        await begin(a, b, workdir)
        assert await outcome(a) == "failed"
        assert (await a.qmp.execute("query-status"))["status"] == "running"
        assert (Hand.reason in a.process.log.read_text()) == kind.says_why
        await b.process.wait()
        assert not source.hand.told(StateTaken)
        assert not destination.hand.told(StateLoaded)
        await destination.hand.until(Lost)
        source.hand.refuses = ()
        async with machine(assets, workdir, "c", destination.arguments, incoming=True) as c:
            await begin(a, c, workdir)
            assert await outcome(a) == "completed"


async def test_a_destination_that_refuses_lets_the_source_go_on(kind: Kind, assets: Assets, workdir: Path) -> None:
    """A state that must not be loaded fails the migration on both sides; the source runs, and can be saved again."""
    async with two_sides(kind, workdir, b"state") as (source, destination):
        destination.hand.refuses = (StateLoaded,)
        async with two_machines(assets, workdir, source, destination) as (a, b):
            await begin(a, b, workdir)
            assert await outcome(a) == "failed"
            await b.process.wait()
            assert (Hand.reason in b.process.log.read_text()) == kind.says_why
            assert (await a.qmp.execute("query-status"))["status"] == "running"
            await destination.hand.until(Lost)
            destination.hand.refuses = ()
            async with machine(assets, workdir, "c", destination.arguments, incoming=True) as c:
                await begin(a, c, workdir)
                assert await outcome(a) == "completed"
        assert len(source.hand.told(SaveAsked)) == 2


async def test_an_unprepared_destination_refuses(kind: Kind, assets: Assets, workdir: Path) -> None:
    """A daemon that expects nothing asks its VM to save, which it does not; nothing is loaded."""
    async with two_sides(kind, workdir, b"state") as (source, destination):
        destination.hand.carrier.reset()
        destination.hand.refuses = (SaveAsked,)
        async with two_machines(assets, workdir, source, destination) as (a, b):
            await begin(a, b, workdir)
            assert await outcome(a) == "failed"
            await b.process.wait()
        assert not destination.hand.told(StateLoaded)


async def test_a_cancelled_migration_asks_nothing(kind: Kind, assets: Assets, workdir: Path) -> None:
    """A migration that is cancelled before the switchover takes no state, and the next one carries it."""
    async with (
        two_sides(kind, workdir, b"state") as (source, destination),
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
        async with machine(assets, workdir, "c", destination.arguments, incoming=True) as c:
            await begin(a, c, workdir)
            assert await outcome(a) == "completed"
        assert bytes((await destination.hand.until(StateLoaded)).state) == b"state"


async def test_a_cancel_while_the_state_is_asked_for(kind: Kind, assets: Assets, workdir: Path) -> None:
    """QEMU hears of it when it is late: the destination has loaded everything, whether the source resumes or not.

    Nobody runs twice only because the destination is started with -S, as libvirt does it, and is thrown away.
    """
    async with two_sides(kind, workdir, b"state") as (source, destination):
        source.hand.ignores = (SaveAsked,)
        async with (
            machine(assets, workdir, "a", source.arguments) as a,
            machine(assets, workdir, "b", [*destination.arguments, "-S"], incoming=True) as b,
        ):
            await begin(a, b, workdir)
            await source.hand.until(SaveAsked)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.qmp.execute, "migrate_cancel")
                await trio.testing.wait_all_tasks_blocked()
                assert source.hand.carrier.offer(b"state")
            end = await outcome(a)
            assert end in ("cancelled", "completed")
            assert await outcome(b) == "completed"
            assert (await a.qmp.execute("query-status"))["running"] == (end == "cancelled")
            assert not (await b.qmp.execute("query-status"))["running"]
        assert source.hand.told(StateTaken)
        assert destination.hand.told(StateLoaded)


async def test_a_destination_that_is_killed_while_it_loads(kind: Kind, assets: Assets, workdir: Path) -> None:
    """The question goes with its QEMU; an answer that comes later goes nowhere, and the source runs."""
    async with two_sides(kind, workdir, b"state") as (source, destination):
        destination.hand.ignores = (StateLoaded,)
        async with two_machines(assets, workdir, source, destination) as (a, b):
            await begin(a, b, workdir)
            await destination.hand.until(StateLoaded)
            await b.kill()
            await destination.hand.until(Lost)
            assert not destination.hand.carrier.answer()
            assert await outcome(a) == "failed"
            assert (await a.qmp.execute("query-status"))["status"] == "running"
