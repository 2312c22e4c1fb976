"""The runner of a VM's migration, with QEMU, carrier and functions in memory: its stories, and all that goes wrong."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from vfiouser_oob.vm.bundle import FunctionState, pack, unpack
from vfiouser_oob.vm.carriers.desk import Done, Offered, Refused
from vfiouser_oob.vm.carriers.interface import AnswerDue, GoAsked, LogChanged, SaveAsked, StateLoaded, StopAsked
from vfiouser_oob.vm.events import QemuGone
from vfiouser_oob.vm.record import CarrierKind, Deed
from vmkit import VmBed, vm_bed

V, F = CarrierKind.DBUS_VMSTATE, CarrierKind.VHOST_USER_FS
LIVE = ("setup", "active")
NAMES = ("f0", "f1")


async def settled() -> None:
    """Wait until nothing goes on any more."""
    await trio.testing.wait_all_tasks_blocked()


def bundle(*names: str) -> bytes:
    """What a source would send."""
    return pack([FunctionState(name, f"the state of {name} there".encode()) for name in names or NAMES])


async def saved(bed: VmBed) -> bytes:
    """A source up to the moment when QEMU has its state."""
    await bed.qemu()
    await bed.says(*LIVE, "STOP")
    answers = bed.asks(SaveAsked())
    await settled()
    [answer] = answers
    assert isinstance(answer, Offered)
    return bytes(answer.state)


async def loaded(bed: VmBed) -> None:
    """A destination up to the moment when its state is loaded."""
    await bed.qemu("inmigrate")
    await bed.says(*LIVE)
    answers = bed.asks(StateLoaded(bundle()))
    await settled()
    assert answers == [Done()]


# Stories


async def test_a_vm_leaves() -> None:
    """Its functions are recorded while it runs, stand, give their states, and go on standing."""
    async with vm_bed() as bed:
        await bed.qemu()
        assert (bed.phase, bed.runs) == ("running", [True, True])
        await bed.says(*LIVE)
        assert bed.phase == "armed"
        assert all(function.recorded and function.runs for function in bed.functions)
        assert [function.began for function in bed.functions] == [1000.0] * 2
        await bed.says("STOP")
        assert (bed.phase, bed.runs) == ("stopped", [False, False])
        answers = bed.asks(SaveAsked())
        await settled()
        assert isinstance(answers[0], Offered)
        states = unpack(answers[0].state, NAMES)
        assert [states[name].stream for name in NAMES] == [b"the state of f0", b"the state of f1"]
        assert all(function.handed_over for function in bed.functions)
        await bed.says("device", "completed")
        assert (bed.phase, bed.runs) == ("away", [False, False])


async def test_a_vm_comes() -> None:
    """Its functions may do DMA early, take their states before QEMU goes on, and run when the VM does."""
    async with vm_bed() as bed:
        await bed.qemu("inmigrate")
        assert bed.carriers[V].expects
        assert [line for line in bed.monitor.commands if line.startswith("o /h")] == ["o /h 0xcfc 0x4"] * 2
        await bed.says(*LIVE)
        answers = bed.asks(StateLoaded(bundle()))
        await settled()
        assert (answers, bed.phase, bed.runs) == ([Done()], "ready", [False, False])
        await bed.says("completed")
        assert bed.runs == [False, False]
        await bed.says("RESUME")
        assert (bed.phase, bed.runs) == ("running", [True, True])
        assert bed.functions[0].state == b"the state of f0 there"
        assert bed.carriers[V].expects is None


async def test_a_vm_goes_on_to_a_third_host() -> None:
    """What has come can leave again, also before it ever ran here."""
    async with vm_bed() as bed:
        await loaded(bed)
        await bed.says("completed", *LIVE)
        answers = bed.asks(SaveAsked())
        await settled()
        assert isinstance(answers[0], Offered)
        assert unpack(answers[0].state, NAMES)["f1"].stream == b"the state of f1 there"
        assert all(Deed.RESUME not in function.deeds for function in bed.functions)


async def test_a_companion_with_a_driver() -> None:
    """Functions stand before QEMU goes on with its last pass, and tell what they wrote; the guest runs after them."""
    async with vm_bed(kinds=[V, F]) as bed:
        marked: list[tuple[int, int]] = []

        class Log:
            def mark(self, address: int, length: int) -> None:
                marked.append((address, length))

        await bed.qemu(kind=F)
        await bed.says(*LIVE)
        await bed.carriers[F].tell(LogChanged(Log()))
        for function in bed.functions:
            function.held[Deed.STOP] = trio.Event()
        bed.monitor.answers["query-status"] = {"status": "finish-migrate"}
        holds = bed.asks(StopAsked(), kind=F)
        await settled()
        assert (holds, bed.phase) == ([], "holding")
        for function in bed.functions:
            function.held[Deed.STOP].set()
        await settled()
        assert (holds, bed.runs, marked) == ([Done()], [False, False], [(0x1000, 4096)] * 2)
        # It fails, and QEMU starts its vCPUs again: not before the functions run.
        bed.functions[0].held[Deed.RESUME] = trio.Event()
        goes = bed.asks(GoAsked(), kind=F)
        await settled()
        assert goes == []
        bed.functions[0].held[Deed.RESUME].set()
        await settled()
        assert (goes, bed.runs) == ([Done()], [True, True])


async def test_a_companion_loads_while_qemu_answers() -> None:
    """The answer waits for the replay's verdict; when QEMU waits for nothing else any more, it does not."""
    for due in (False, True):
        async with vm_bed(kinds=[F]) as bed:
            await bed.qemu("inmigrate", kind=F)
            await bed.says(*LIVE)
            bed.functions[1].verified = trio.Event()
            answers = bed.asks(StateLoaded(bundle(), free=True), kind=F)
            await settled()
            assert (answers, bed.phase) == ([], "loaded")
            if due:
                await bed.carriers[F].tell(AnswerDue())
                assert answers == [Done()]
                goes = bed.asks(GoAsked(), kind=F)
                await settled()
                assert (goes, bed.phase, bed.runs) == ([], "going", [False, False])
            bed.functions[1].verified.set()
            await settled()
            assert answers == [Done()]
            if due:
                assert (goes, bed.runs) == ([Done()], [True, True])


async def test_a_qemu_that_cannot_answer_before_it_has_started(autojump_clock: trio.testing.MockClock) -> None:
    """It is let go after a moment, and the functions wait until it has answered."""
    async with vm_bed(kinds=[F]) as bed:
        await bed.qemu("inmigrate", kind=F)
        await bed.says(*LIVE)
        bed.functions[0].verified = trio.Event()
        bed.asks(StateLoaded(bundle()), kind=F)
        await settled()
        goes = bed.asks(GoAsked(), kind=F)
        await trio.sleep(1)
        assert (goes, bed.phase, bed.runs) == ([Done()], "going", [False, False])
        bed.functions[0].verified.set()
        await settled()
        assert (bed.phase, bed.runs) == ("running", [True, True])


async def test_a_carrier_that_does_not_carry() -> None:
    """Where QEMU has both, the one that came last carries, and the other one nothing."""
    async with vm_bed(kinds=[V, F]) as bed:
        await bed.qemu(kind=F)
        await bed.carriers[V].tell(*())
        await bed.says(*LIVE, "STOP")
        nothing = bed.asks(SaveAsked(), kind=V)
        await settled()
        assert nothing == [Offered(b"")]
        state = bed.asks(SaveAsked(), kind=F)
        await settled()
        assert isinstance(state[0], Offered)
        assert state[0].state


async def test_the_monitor_is_heard_before_the_carrier() -> None:
    """A call that overtakes STOP finds the functions being stopped, not an unknown migration."""
    async with vm_bed() as bed:
        await bed.qemu()
        bed.monitor.say("MIGRATION", status="setup")
        bed.monitor.say("STOP")
        answers = bed.asks(SaveAsked())
        await settled()
        assert isinstance(answers[0], Offered)


# What goes wrong at the source

Trouble = Callable[[VmBed], Awaitable[None]]


async def cancelled(bed: VmBed) -> None:
    """It is cancelled, and QEMU resumes its VM."""
    await bed.says("cancelling", "RESUME", "cancelled")


async def failed(bed: VmBed) -> None:
    """It fails, and QEMU resumes its VM."""
    await bed.says("RESUME", "failed")


async def carrier_lost(bed: VmBed) -> None:
    """The carrier is lost; QEMU gives up."""
    await bed.loses_carrier()
    await bed.says("RESUME", "failed")


async def monitor_came_back(bed: VmBed) -> None:
    """The monitor is lost, and the VM runs again when it comes back."""
    bed.monitor.lose()
    await settled()
    await bed.qemu("running", migration="failed")


TROUBLES = (cancelled, failed, carrier_lost, monitor_came_back)


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("at", ["armed", "stopped", "saving", "saved"])
async def test_a_source_comes_back(at: str, trouble: Trouble, autojump_clock: trio.testing.MockClock) -> None:
    """Whatever ends the migration, and whenever: the functions run again, and the VM can leave later."""
    async with vm_bed() as bed:
        await bed.qemu()
        await bed.says(*LIVE)
        if at != "armed":
            await bed.says("STOP")
        if at == "saving":
            bed.functions[1].held[Deed.SAVE] = trio.Event()
        if at in ("saving", "saved"):
            bed.asks(SaveAsked())
            await settled()
        assert bed.phase == at
        await trouble(bed)
        bed.functions[1].held.clear()
        await trio.sleep(40)
        assert (bed.phase, bed.runs) == ("running", [True, True])
        assert not any(function.recorded for function in bed.functions)
        assert not any(function.handed_over for function in bed.functions)
        await bed.says(*LIVE, "STOP")
        answers = bed.asks(SaveAsked())
        await settled()
        assert isinstance(answers[0], Offered)


async def test_a_qemu_that_refuses_to_answer(autojump_clock: trio.testing.MockClock) -> None:
    """It is asked again now and then, and not as fast as it refuses; once it answers, the source comes back."""
    async with vm_bed() as bed:
        await saved(bed)
        del bed.monitor.answers["query-status"]
        bed.monitor.commands.clear()
        await bed.says("failed")
        await trio.sleep(20)
        assert 2 <= bed.monitor.commands.count("query-status") <= 20
        bed.monitor.answers["query-status"] = {"status": "running"}
        await trio.sleep(5)
        assert (bed.phase, bed.runs) == ("running", [True, True])


@pytest.mark.parametrize("deed", [Deed.STOP, Deed.SAVE])
async def test_a_function_that_does_not_follow(deed: Deed, autojump_clock: trio.testing.MockClock) -> None:
    """A function that cannot be stopped or saved fails the migration before anything leaves, and runs again."""
    async with vm_bed() as bed:
        bed.functions[1].fails[deed] = 1
        await bed.qemu()
        await bed.says(*LIVE, "STOP")
        answers = bed.asks(SaveAsked())
        await settled()
        if deed is Deed.STOP:
            assert "migrate_cancel" in bed.monitor.commands
        assert isinstance(answers[0], Refused)
        assert not any(function.handed_over for function in bed.functions)
        await bed.says("RESUME", "failed")
        await trio.sleep(10)
        assert bed.runs == [True, True]


async def test_a_function_that_does_not_resume_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """It is resumed again and again, with pauses."""
    async with vm_bed() as bed:
        bed.functions[0].fails[Deed.RESUME] = 5
        await saved(bed)
        await cancelled(bed)
        assert bed.runs == [False, True]
        await trio.sleep(30)
        assert bed.runs == [True, True]


async def test_what_cannot_go_well_is_given_up_early() -> None:
    """A migration without return-path is cancelled while nothing is lost; if it goes on, its save is refused."""
    async with vm_bed() as bed:
        await bed.qemu()
        bed.monitor.answers["query-migrate-capabilities"] = [{"capability": "return-path", "state": False}]
        await bed.says(*LIVE)
        assert "migrate_cancel" in bed.monitor.commands
        assert "return-path" in bed.runner.record.refused
        await bed.says("STOP")
        answers = bed.asks(SaveAsked())
        await settled()
        assert isinstance(answers[0], Refused)
        assert "return-path" in answers[0].reason


async def test_what_a_function_writes_has_to_be_known() -> None:
    """Else the migration is given up early, and its save refused."""
    async with vm_bed() as bed:
        bed.functions[1].unarmed = "nothing reports it"
        await bed.qemu()
        await bed.says(*LIVE)
        assert "migrate_cancel" in bed.monitor.commands
        assert bed.runner.record.refused == "f1: nothing reports it"
        await cancelled(bed)
        bed.functions[1].unarmed = ""
        await bed.says(*LIVE, "STOP")
        assert all(function.held_back for function in bed.functions)
        answers = bed.asks(SaveAsked())
        await settled()
        assert isinstance(answers[0], Offered)


async def test_a_state_that_is_too_large() -> None:
    """It is refused, and the source goes on."""
    async with vm_bed() as bed:
        bed.functions[0].state = bytes(2 << 20)
        await bed.qemu()
        await bed.says(*LIVE, "STOP")
        answers = bed.asks(SaveAsked())
        await settled()
        assert isinstance(answers[0], Refused)
        await failed(bed)
        assert bed.runs == [True, True]


@pytest.mark.parametrize("at", ["running", "armed", "stopped", "saved"])
async def test_qemu_ends_at_the_source(at: str) -> None:
    """Everything is left; what was handed over goes on standing, and the next QEMU is a new beginning."""
    async with vm_bed() as bed:
        if at == "saved":
            await saved(bed)
        else:
            await bed.qemu()
            await bed.says(*{"running": (), "armed": LIVE, "stopped": (*LIVE, "STOP")}[at])
        assert bed.phase == at
        bed.runner.feed(QemuGone())
        bed.monitor.lose()
        await settled()
        assert bed.phase == "absent"
        assert not any(function.recorded for function in bed.functions)
        assert bed.runs == [at in ("running", "armed")] * 2
        await bed.qemu("inmigrate", qemu="2")
        assert bed.phase == "incoming"


# What goes wrong at the destination


async def test_a_vm_that_comes_without_a_state() -> None:
    """Its functions never run, and the guest is told so."""
    async with vm_bed() as bed:
        await bed.qemu("inmigrate")
        await bed.says(*LIVE, "completed", "RESUME")
        assert (bed.phase, bed.runs) == ("barred", [False, False])
        assert all("without its functions' state" in function.barred for function in bed.functions)
        answers = bed.asks(SaveAsked())
        await settled()
        assert isinstance(answers[0], Refused)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (bundle("f0"), "has the functions f0, and the one here has f0, f1"),
        (bundle("f0", "f2"), "f0, f2"),
        (bundle("f0", "f0"), "f0"),
        (bundle()[:-1], "cut off"),
        (bundle() + b"x", "more arrived"),
        (b"rubbish" * 10, "not a state that this program saved for a VM"),
    ],
)
async def test_a_state_of_something_else(state: bytes, words: str) -> None:
    """It is refused with a reason that names both sides; nothing is loaded."""
    async with vm_bed() as bed:
        await bed.qemu("inmigrate")
        await bed.says(*LIVE)
        answers = bed.asks(StateLoaded(state))
        await settled()
        assert isinstance(answers[0], Refused)
        assert words in answers[0].reason
        assert all(not function.deeds for function in bed.functions)


async def test_a_function_that_does_not_take_its_state() -> None:
    """The load is refused, and no function runs, whatever QEMU says later."""
    async with vm_bed() as bed:
        bed.functions[1].fails[Deed.LOAD] = 1
        await bed.qemu("inmigrate")
        await bed.says(*LIVE)
        answers = bed.asks(StateLoaded(bundle()))
        await settled()
        assert isinstance(answers[0], Refused)
        assert "because the test says so" in answers[0].reason
        await bed.says("RESUME")
        assert (bed.phase, bed.runs) == ("barred", [False, False])


async def test_a_replay_that_is_not_as_it_should_be() -> None:
    """The functions do not run: QEMU has not of them what the guest believes in."""
    async with vm_bed() as bed:
        bed.functions[0].unreplayed = "0xb0020010+0 is 0 instead of 1"
        bed.functions[0].verified = trio.Event()
        await loaded(bed)
        await bed.says("completed", "RESUME")
        assert (bed.phase, bed.runs) == ("going", [False, False])
        bed.functions[0].verified.set()
        await settled()
        assert (bed.phase, bed.runs) == ("barred", [False, False])


@pytest.mark.parametrize("at", ["incoming", "loading", "loaded", "ready"])
async def test_qemu_ends_at_the_destination(at: str) -> None:
    """Nothing of it is left over for the next QEMU, which may take the VM."""
    async with vm_bed() as bed:
        await bed.qemu("inmigrate")
        await bed.says(*LIVE)
        if at == "loading":
            bed.functions[0].held[Deed.LOAD] = trio.Event()
        if at == "loaded":
            bed.functions[0].verified = trio.Event()
        if at != "incoming":
            bed.asks(StateLoaded(bundle()))
            await settled()
        assert bed.phase == at
        await bed.loses_carrier()
        bed.runner.feed(QemuGone())
        bed.monitor.lose()
        await settled()
        assert bed.phase == "absent"
        assert all(Deed.RESUME not in function.deeds for function in bed.functions)
        bed.functions[0].held.clear()
        bed.functions[0].verified.set()
        await bed.qemu("inmigrate", qemu="2")
        await bed.says(*LIVE)
        answers = bed.asks(StateLoaded(bundle()))
        await settled()
        assert answers == [Done()]
        await bed.says("RESUME")
        assert bed.runs == [True, True]


async def test_a_migration_to_here_that_fails_after_the_load() -> None:
    """The functions never run here, for the VM goes on at its source."""
    async with vm_bed() as bed:
        await loaded(bed)
        await bed.says("failed")
        assert (bed.phase, bed.runs) == ("barred", [False, False])
