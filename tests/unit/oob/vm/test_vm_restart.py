"""A daemon is killed at each step of a VM's migration: the next one goes on, or the migration fails and the VM does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from vfiouser_oob.vm.bundle import FunctionState, pack
from vfiouser_oob.vm.carriers.desk import Done, Offered, Refused
from vfiouser_oob.vm.carriers.interface import SaveAsked, StateLoaded
from vfiouser_oob.vm.events import QemuGone
from vfiouser_oob.vm.record import CarrierKind, Deed
from vmkit import VmBed, vm_bed

LIVE = ("setup", "active")
V, F = CarrierKind.DBUS_VMSTATE, CarrierKind.VHOST_USER_FS
#: How far a migration is when the daemon dies.
SOURCE = ("running", "armed", "stopped", "saving", "saved", "away")
DESTINATION = ("incoming", "loading", "loaded", "ready", "going", "barred")


async def settled() -> None:
    """Wait until nothing goes on any more."""
    await trio.testing.wait_all_tasks_blocked()


def bundle() -> bytes:
    """What a source would send."""
    return pack([FunctionState(name, b"there", registers=name.encode()) for name in ("f0", "f1")])


async def at_source(bed: VmBed, phase: str) -> None:
    """A source up to a phase."""
    await bed.qemu()
    if phase != "running":
        await bed.says(*LIVE)
    if phase not in ("running", "armed"):
        await bed.says("STOP")
    if phase == "saving":
        bed.functions[1].held[Deed.SAVE] = trio.Event()
    if phase in ("saving", "saved", "away"):
        bed.asks(SaveAsked())
        await settled()
    if phase == "away":
        await bed.says("completed")
    assert bed.phase == phase


async def at_destination(bed: VmBed, phase: str) -> None:
    """A destination up to a phase."""
    await bed.qemu("inmigrate")
    await bed.says(*LIVE)
    if phase == "barred":
        await bed.says("failed")
    if phase == "loading":
        bed.functions[1].held[Deed.LOAD] = trio.Event()
    if phase in ("loaded", "going"):
        bed.functions[1].verified = trio.Event()
    if phase not in ("incoming", "barred"):
        bed.asks(StateLoaded(bundle()))
        await settled()
    if phase == "going":
        await bed.says("RESUME")
    assert bed.phase == phase


@dataclass(frozen=True)
class Meanwhile:
    """What QEMU has done while there was no daemon, and what comes of it.

    Attributes:
        runstate: what it does.
        migration: what became of the migration.
        phase: where the VM is, once all is done.
        runs: whether its functions run.
        cancels: whether QEMU is told to give the migration up.
    """

    runstate: str
    migration: str
    phase: str
    runs: bool
    cancels: bool = False


FAILED = Meanwhile("running", "failed", "running", True)
MOVED = Meanwhile("postmigrate", "completed", "away", False)
#: Where the daemon died, and what QEMU did: no more than it can, given what it was told. What it can only do with a
#: state that nobody gave it, such as to complete a migration, is not done.
AT_SOURCE: Sequence[tuple[str, Meanwhile]] = (
    ("running", Meanwhile("running", "", "running", True)),
    ("running", Meanwhile("running", "active", "armed", True, cancels=False)),
    ("running", FAILED),
    ("armed", Meanwhile("running", "active", "armed", True, cancels=True)),
    ("armed", Meanwhile("finish-migrate", "active", "stopped", False, cancels=True)),
    ("armed", FAILED),
    ("stopped", Meanwhile("finish-migrate", "active", "stopped", False, cancels=True)),
    ("stopped", Meanwhile("running", "active", "armed", True, cancels=True)),
    ("stopped", FAILED),
    ("stopped", Meanwhile("running", "cancelled", "running", True)),
    ("saving", Meanwhile("finish-migrate", "device", "stopped", False, cancels=True)),
    ("saving", FAILED),
    ("saved", Meanwhile("finish-migrate", "device", "saved", False)),
    ("saved", FAILED),
    ("saved", Meanwhile("running", "cancelled", "running", True)),
    ("saved", MOVED),
    ("away", MOVED),
    ("away", Meanwhile("running", "completed", "running", True)),
)
AT_DESTINATION: Sequence[tuple[str, Meanwhile]] = (
    ("incoming", Meanwhile("inmigrate", "active", "incoming", True)),
    ("incoming", Meanwhile("running", "completed", "barred", False)),
    ("incoming", Meanwhile("paused", "completed", "barred", False)),
    ("loading", Meanwhile("inmigrate", "active", "barred", False)),
    ("loading", Meanwhile("running", "completed", "barred", False)),
    ("loaded", Meanwhile("inmigrate", "active", "ready", False)),
    ("loaded", Meanwhile("paused", "completed", "ready", False)),
    ("loaded", Meanwhile("running", "completed", "running", True)),
    ("loaded", Meanwhile("paused", "failed", "barred", False)),
    ("ready", Meanwhile("inmigrate", "active", "ready", False)),
    ("ready", Meanwhile("paused", "completed", "ready", False)),
    ("ready", Meanwhile("running", "completed", "running", True)),
    ("going", Meanwhile("running", "completed", "running", True)),
    ("barred", Meanwhile("running", "completed", "barred", False)),
)


@pytest.mark.parametrize(("phase", "meanwhile"), AT_SOURCE, ids=str)
async def test_a_source(phase: str, meanwhile: Meanwhile, autojump_clock: trio.testing.MockClock) -> None:
    """The VM's functions run exactly where QEMU says that it runs, whatever was under way; and it can leave later."""
    async with vm_bed() as bed:
        await at_source(bed, phase)
        await bed.kill()
        await bed.begin()
        runs = bed.runs
        await settled()
        assert bed.runs == runs or not any(bed.runs), "somebody runs before QEMU has said anything"
        await bed.qemu(meanwhile.runstate, migration=meanwhile.migration, carrier=False)
        await trio.sleep(5)
        assert (bed.phase, bed.runs) == (meanwhile.phase, [meanwhile.runs] * 2)
        assert ("migrate_cancel" in bed.monitor.commands) is meanwhile.cancels
        if meanwhile.phase == "away":
            return
        if bed.phase != "running":
            await bed.says("cancelling", "RESUME", "cancelled")
            await trio.sleep(5)
            assert (bed.phase, bed.runs) == ("running", [True, True])
        assert not any(function.handed_over for function in bed.functions)
        assert "object-add" in bed.monitor.commands, "QEMU's end of the carrier was not made anew"
        await bed.attaches()
        await bed.says(*LIVE, "STOP")
        answers = bed.asks(SaveAsked())
        await settled()
        assert isinstance(answers[0], Offered)


@pytest.mark.parametrize(("phase", "meanwhile"), AT_DESTINATION, ids=str)
async def test_a_destination(phase: str, meanwhile: Meanwhile, autojump_clock: trio.testing.MockClock) -> None:
    """Functions that have their states run when the VM does; those that do not, never."""
    async with vm_bed() as bed:
        await at_destination(bed, phase)
        await bed.kill()
        for function in bed.functions:
            function.replays.clear()
            function.verified.set()
            function.deeds.clear()
        await bed.begin()
        await bed.qemu(meanwhile.runstate, migration=meanwhile.migration, carrier=False)
        await trio.sleep(5)
        assert (bed.phase, bed.runs) == (meanwhile.phase, [meanwhile.runs] * 2)
        if meanwhile.phase == "barred":
            assert all(function.deeds[-1] is Deed.BAR for function in bed.functions)
        if phase in ("loaded", "going") and meanwhile.phase != "barred":
            # Once the VM may run, nothing is written any more.
            assert [function.replays for function in bed.functions] == [[meanwhile.runs]] * 2
        if meanwhile.phase == "ready":
            await bed.says("RESUME")
            assert (bed.phase, bed.runs) == ("running", [True, True])


async def test_a_destination_that_waits_takes_its_state_from_the_next_daemon() -> None:
    """QEMU makes its end of the carrier anew, and the state is expected as before."""
    async with vm_bed() as bed:
        await at_destination(bed, "incoming")
        await bed.kill()
        await bed.begin()
        assert bed.carriers[V].expects
        await bed.qemu("inmigrate", migration="active", carrier=False)
        assert "object-add" in bed.monitor.commands
        assert [line for line in bed.monitor.commands if line.startswith("o /h")] == ["o /h 0xcfc 0x4"] * 2
        await bed.attaches()
        answers = bed.asks(StateLoaded(bundle()))
        await settled()
        assert (answers, bed.phase) == ([Done()], "ready")


async def test_qemu_keeps_its_end_while_it_migrates() -> None:
    """The object is among what migrates, so it is made anew only when that is over."""
    async with vm_bed() as bed:
        await at_source(bed, "armed")
        await bed.kill()
        await bed.begin()
        await bed.qemu(migration="active", carrier=False)
        assert "object-add" not in bed.monitor.commands
        await bed.says("cancelling")
        assert "object-add" not in bed.monitor.commands
        await bed.says("cancelled")
        assert "object-add" in bed.monitor.commands


async def test_a_migration_in_doubt_is_refused_to_the_end() -> None:
    """QEMU goes on although it was told to give up: it gets no state."""
    async with vm_bed() as bed:
        await at_source(bed, "armed")
        await bed.kill()
        await bed.begin()
        await bed.qemu(migration="active")
        await bed.says("STOP")
        answers = bed.asks(SaveAsked())
        await settled()
        assert isinstance(answers[0], Refused)
        assert "started again" in answers[0].reason
        assert "started again" in bed.runner.record.last_error
        assert not any(function.handed_over for function in bed.functions)


@pytest.mark.parametrize("unarmed", ["", "nobody knows what it wrote"])
async def test_a_carrier_that_outlives_the_daemon(unarmed: str) -> None:
    """What the functions write is recorded anew; whether that is enough, they say."""
    async with vm_bed(kinds=[F]) as bed:
        await bed.qemu(kind=F)
        await bed.says(*LIVE)
        await bed.kill()
        bed.functions[0].unarmed = unarmed
        await bed.begin()
        await bed.qemu(kind=F, migration="active")
        assert bed.functions[1].recorded
        assert ("migrate_cancel" in bed.monitor.commands) is bool(unarmed)
        await bed.says("STOP")
        answers = bed.asks(SaveAsked(), kind=F)
        await settled()
        assert isinstance(answers[0], Refused if unarmed else Offered)


@pytest.mark.parametrize("phase", [*SOURCE, *DESTINATION])
async def test_qemu_has_ended_meanwhile(phase: str) -> None:
    """Nothing of it is left, and functions that may run elsewhere are not started."""
    async with vm_bed() as bed:
        await (at_source if phase in SOURCE else at_destination)(bed, phase)
        await bed.kill()
        deeds = [list(function.deeds) for function in bed.functions]
        await bed.begin()
        bed.runner.feed(QemuGone())
        await settled()
        assert bed.phase == "absent"
        new = [function.deeds[len(old) :] for function, old in zip(bed.functions, deeds, strict=True)]
        assert not any(Deed.RESUME in each for each in new)
        await bed.qemu(qemu="2")
        assert (bed.phase, bed.runs) == ("running", [True, True])


async def test_another_qemu_comes() -> None:
    """What was known of the one before does not count for it."""
    async with vm_bed() as bed:
        await at_source(bed, "saved")
        await bed.kill()
        await bed.begin()
        await bed.qemu(qemu="2")
        assert (bed.phase, bed.runs) == ("running", [True, True])


async def test_it_is_killed_again_and_again(autojump_clock: trio.testing.MockClock) -> None:
    """Each daemon goes on where the one before it was, also where that had heard nothing yet."""
    async with vm_bed() as bed:
        await at_source(bed, "saved")
        for _ in range(3):
            await bed.kill()
            await bed.begin()
        await bed.qemu("running", migration="failed", carrier=False)
        await trio.sleep(5)
        assert (bed.phase, bed.runs) == ("running", [True, True])


@pytest.mark.parametrize("phase", ["holding", "saving", "loading", "loaded"])
async def test_a_daemon_leaves_when_nobody_waits(phase: str) -> None:
    """A passing phase is waited for; whoever leaves has then nothing in doubt."""
    async with vm_bed() as bed:
        function = bed.functions[1]
        if phase == "holding":
            await bed.qemu()
            await bed.says(*LIVE)
            function.held[Deed.STOP] = trio.Event()
            await bed.says("STOP")
        else:
            await (at_source if phase == "saving" else at_destination)(bed, phase)
        left = trio.Event()

        async def leave() -> None:
            await bed.runner.come_to_rest()
            left.set()

        bed.nursery.start_soon(leave)
        await settled()
        assert not left.is_set()
        for event in (*function.held.values(), function.verified):
            event.set()
        await settled()
        assert left.is_set()


async def test_a_daemon_leaves_when_qemu_has_the_state() -> None:
    """What was offered and is on its way would be cut off, and the migration would fail for that."""
    async with vm_bed() as bed:
        await at_source(bed, "saved")
        carrier = bed.carriers[bed.runner.carriers.kind]
        carrier.delivers(True)
        left = trio.Event()

        async def leave() -> None:
            await bed.runner.come_to_rest()
            left.set()

        bed.nursery.start_soon(leave)
        await settled()
        assert not left.is_set()
        carrier.delivers(False)
        await left.wait()
