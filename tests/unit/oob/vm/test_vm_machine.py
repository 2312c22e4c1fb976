"""The VM's machine, row by row: what each story of QEMU, carrier and functions leads to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from vfiouser_oob.vm import events as ev
from vfiouser_oob.vm.machine import _HANDLERS, advance
from vfiouser_oob.vm.record import CarrierKind, Deed, FunctionPlace, Migration, VmFunction, VmPhase, VmRecord
from vfiouser_oob.vm.table import DONE, REFUSALS, ROUTES, ROWS, UNDONE, WANTED, Act, Cue

V, F = CarrierKind.DBUS_VMSTATE, CarrierKind.VHOST_USER_FS
RUNNING = ev.QemuCame("1", "running")
INCOMING = ev.QemuCame("1", "inmigrate")
SETUP, ACTIVE, DEVICE = (ev.MigrationIs(status) for status in ("setup", "active", "device"))
CANCELLING, CANCELLED = ev.MigrationIs("cancelling"), ev.MigrationIs("cancelled")
FAILING, FAILED, COMPLETED = (ev.MigrationIs(status) for status in ("failing", "failed", "completed"))
STOP, RESUME, SAVE, LOAD, HOLD, GO = (
    ev.Stopped(),
    ev.Resumed(),
    ev.CarrierSaves(),
    ev.CarrierLoads(),
    ev.CarrierHolds(),
    ev.CarrierGoes(),
)
RUNS, STANDS = ev.RunstateIs("running"), ev.RunstateIs("paused")
OK = ev.Replayed()


def did(deed: Deed, name: str = "f0") -> ev.Did:
    """A function is there."""
    return ev.Did(name, deed)


def failed(deed: Deed, name: str = "f0") -> ev.Failed:
    """A function is not."""
    return ev.Failed(name, deed, "no")


STOPPED, SAVED, LOADED, RESUMED, BARRED = (
    did(deed) for deed in (Deed.STOP, Deed.SAVE, Deed.LOAD, Deed.RESUME, Deed.BAR)
)
STOP_IT, SAVE_IT, LOAD_IT, RESUME_IT, BAR_IT = (
    ev.DoDeed("f0", deed) for deed in (Deed.STOP, Deed.SAVE, Deed.LOAD, Deed.RESUME, Deed.BAR)
)
MOVED = ev.QemuCame("1", "postmigrate", "completed")
DOUBTED = ev.TellPeople(
    True, "the daemon was started again during the migration, and what carries the functions' state was lost with it"
)
#: How a phase is reached.
TO_ARMED = (RUNNING, SETUP, ACTIVE)
TO_STOPPED = (*TO_ARMED, STOP, STOPPED)
TO_SAVING = (*TO_STOPPED, SAVE)
TO_SAVED = (*TO_SAVING, SAVED)
TO_AWAY = (*TO_SAVED, DEVICE, COMPLETED)
TO_LOADING = (INCOMING, SETUP, ACTIVE, LOAD)
TO_LOADED = (*TO_LOADING, LOADED)
TO_READY = (*TO_LOADED, OK)
REACHED: dict[VmPhase, tuple[ev.VmEvent, ...]] = {
    VmPhase.ABSENT: (),
    VmPhase.RUNNING: (RUNNING,),
    VmPhase.ARMED: TO_ARMED,
    VmPhase.HOLDING: (*TO_ARMED, HOLD),
    VmPhase.STOPPED: TO_STOPPED,
    VmPhase.SAVING: TO_SAVING,
    VmPhase.SAVED: TO_SAVED,
    VmPhase.AWAY: TO_AWAY,
    VmPhase.INCOMING: (INCOMING,),
    VmPhase.LOADING: TO_LOADING,
    VmPhase.LOADED: TO_LOADED,
    VmPhase.READY: TO_READY,
    VmPhase.GOING: (*TO_LOADED, RESUME),
    VmPhase.BARRED: (INCOMING, RESUME, BARRED),
}


def tell(story: Sequence[ev.VmEvent], carrier: CarrierKind = V, names: Sequence[str] = ("f0",)) -> VmRecord:
    """The record after a story."""
    record = VmRecord(functions=tuple(map(VmFunction, names)), carrier=carrier)
    for event in story:
        record, _ = advance(record, event)
    return record


def last(story: Sequence[ev.VmEvent], carrier: CarrierKind = V) -> tuple[VmRecord, list[ev.VmEffect]]:
    """The record after a story, and what its last event led to."""
    record, effects = advance(tell(story[:-1], carrier), story[-1])
    return record, list(effects)


@pytest.mark.parametrize("phase", VmPhase)
def test_phases_are_reached(phase: VmPhase) -> None:
    """Each phase is where its story leads; the record can be written down and read back there."""
    record = tell(REACHED[phase])
    assert record.phase is phase
    assert record == VmRecord.from_json(record.to_json())


# Story, phase, effects of the last event.
Case = tuple[Sequence[ev.VmEvent], VmPhase, list[ev.VmEffect]]
SOURCE: dict[str, Case] = {
    "a VM": ((RUNNING,), VmPhase.RUNNING, []),
    "paused by its user": ((RUNNING, STOP), VmPhase.RUNNING, []),
    "goes on": ((RUNNING, STOP, RESUME), VmPhase.RUNNING, []),
    "armed": ((RUNNING, SETUP), VmPhase.ARMED, [ev.Arm(), ev.Judge()]),
    "armed once": (TO_ARMED, VmPhase.ARMED, []),
    "seen late": ((RUNNING, ACTIVE), VmPhase.ARMED, [ev.Arm(), ev.Judge()]),
    "judged well": ((*TO_ARMED, ev.Judged(())), VmPhase.ARMED, []),
    "given up early": ((*TO_ARMED, CANCELLING, CANCELLED), VmPhase.RUNNING, [ev.Disarm()]),
    "stopped": ((*TO_ARMED, STOP), VmPhase.STOPPED, [STOP_IT]),
    "paused and resumed on the way": ((*TO_STOPPED, RESUME), VmPhase.ARMED, [RESUME_IT]),
    "resumed before it stood": ((*TO_ARMED, STOP, RESUME, STOPPED), VmPhase.ARMED, [RESUME_IT]),
    "saving": (TO_SAVING, VmPhase.SAVING, [SAVE_IT]),
    "saving before it stood": ((*TO_ARMED, STOP, SAVE, STOPPED), VmPhase.SAVING, [SAVE_IT]),
    "saving a VM that was paused": ((*TO_ARMED, SAVE), VmPhase.SAVING, [STOP_IT]),
    "saved": (TO_SAVED, VmPhase.SAVED, [ev.AnswerSave()]),
    "asked again": ((*TO_SAVED, SAVE), VmPhase.SAVED, [ev.AnswerSave()]),
    "moved": (TO_AWAY, VmPhase.AWAY, []),
    "moved by postcopy": ((*TO_SAVED, ev.MigrationIs("postcopy-active")), VmPhase.AWAY, []),
    "resumed, perhaps": ((*TO_SAVED, CANCELLING, RESUME), VmPhase.SAVED, [ev.AskRunstate()]),
    "resumed long ago": ((*TO_SAVED, RESUME, STANDS), VmPhase.SAVED, []),
    "resumed indeed": ((*TO_SAVED, CANCELLING, RESUME, RUNS), VmPhase.ARMED, [RESUME_IT]),
    "cancelled": (
        (*TO_SAVED, CANCELLING, RESUME, RUNS, RESUMED, CANCELLED),
        VmPhase.RUNNING,
        [ev.Disarm()],
    ),
    "failed": ((*TO_SAVED, FAILING, RESUME, RUNS, FAILED), VmPhase.RUNNING, [ev.Disarm()]),
    "failed, and told late": ((*TO_SAVED, FAILED, RUNS), VmPhase.RUNNING, [ev.Disarm(), RESUME_IT]),
    "cancelled while paused": ((*TO_SAVED, CANCELLED, STANDS), VmPhase.SAVED, []),
    "the same before it was saved": ((*TO_STOPPED, CANCELLED, STANDS), VmPhase.STOPPED, []),
    "and resumed at last": ((*TO_STOPPED, CANCELLED, STANDS, RESUME), VmPhase.RUNNING, [ev.Disarm(), RESUME_IT]),
    "and migrated again": ((*TO_STOPPED, CANCELLED, SETUP), VmPhase.STOPPED, [ev.Arm(), ev.Judge()]),
    "saved, cancelled, migrated again": ((*TO_SAVED, CANCELLED, SETUP), VmPhase.STOPPED, [ev.Arm(), ev.Judge()]),
    "and saved again": ((*TO_SAVED, CANCELLED, SETUP, SAVE), VmPhase.SAVED, [ev.AnswerSave()]),
    "taken back": (
        (*TO_AWAY, RESUME),
        VmPhase.RUNNING,
        [ev.TellPeople(False, "the VM is taken back after it had moved"), ev.Disarm(), RESUME_IT],
    ),
    "resumed while saving": (
        (*TO_SAVING, RESUME, RUNS),
        VmPhase.ARMED,
        [ev.RefuseSave("the VM runs again")],
    ),
    "and then saved": ((*TO_SAVING, RESUME, RUNS, SAVED), VmPhase.ARMED, [RESUME_IT]),
    "given up while saving": (
        (*TO_SAVING, CANCELLING, CANCELLED),
        VmPhase.STOPPED,
        [ev.RefuseSave("the migration was given up"), ev.AskRunstate()],
    ),
    "moved without its state": (
        (*TO_STOPPED, COMPLETED),
        VmPhase.AWAY,
        [
            ev.TellPeople(
                True,
                "the VM has moved without its functions' state, which QEMU did not ask for: is the carrier's object "
                "missing?",
            )
        ],
    ),
    "words of the migration to here": ((*TO_READY, RESUME, RESUMED, COMPLETED), VmPhase.RUNNING, []),
    "a word that is not known": ((RUNNING, ev.MigrationIs("teleporting")), VmPhase.RUNNING, []),
    "judged ill": (
        (*TO_ARMED, ev.Judged(("no return-path", "too old"))),
        VmPhase.ARMED,
        [ev.Cancel("no return-path; too old"), ev.TellPeople(True, "no return-path; too old")],
    ),
    "judged ill, and asked all the same": (
        (*TO_ARMED, ev.Judged(("no return-path",)), STOP, SAVE),
        VmPhase.STOPPED,
        [ev.RefuseSave("no return-path")],
    ),
    "judged ill, and asked at once": (
        (*TO_ARMED, ev.Judged(("no return-path",)), SAVE),
        VmPhase.ARMED,
        [ev.RefuseSave("no return-path")],
    ),
    "judged late": ((*TO_SAVED, ev.Judged(("x",))), VmPhase.SAVED, [ev.Cancel("x"), ev.TellPeople(True, "x")]),
    "judged while saving": (
        (*TO_SAVING, ev.Judged(("x",))),
        VmPhase.STOPPED,
        [ev.RefuseSave("x"), ev.Cancel("x"), ev.TellPeople(True, "x")],
    ),
    "judged ill the last time": ((*TO_ARMED, ev.Judged(("x",)), CANCELLED, SETUP, STOP, SAVE), VmPhase.SAVING, []),
    "asked without a migration": (
        (RUNNING, SAVE),
        VmPhase.RUNNING,
        [ev.RefuseSave("no migration from here is under way")],
    ),
    "asked while QEMU could not tell": ((RUNNING, ev.MonitorLost(), SAVE), VmPhase.SAVING, [ev.Arm(), STOP_IT]),
    "asked of a QEMU that tells nothing": (
        (ev.QemuCame("1", "running", tells=False), SAVE),
        VmPhase.SAVING,
        [ev.Arm(), STOP_IT],
    ),
    "and it comes back": (
        (RUNNING, ev.MonitorLost(), SAVE, STOPPED, SAVED, RUNNING),
        VmPhase.RUNNING,
        [ev.Disarm(), RESUME_IT],
    ),
    "asked without QEMU": ((SAVE,), VmPhase.ABSENT, [ev.RefuseSave("this VM has no state to be saved")]),
}
HOLDS: dict[str, Case] = {
    "a device is reset": ((RUNNING, HOLD), VmPhase.RUNNING, [ev.AnswerHold()]),
    "held": ((*TO_ARMED, HOLD), VmPhase.HOLDING, [STOP_IT]),
    "stands": ((*TO_ARMED, HOLD, STOPPED), VmPhase.STOPPED, [ev.AnswerHold(), ev.AskRunstate()]),
    "only a device was reset": ((*TO_ARMED, HOLD, STOPPED, RUNS), VmPhase.ARMED, [RESUME_IT]),
    "held while it stands": ((*TO_STOPPED, HOLD), VmPhase.STOPPED, [ev.AnswerHold(), ev.AskRunstate()]),
    "held blindly": ((RUNNING, ev.MonitorLost(), HOLD), VmPhase.HOLDING, [ev.Arm(), STOP_IT]),
    "does not stand": (
        (*TO_ARMED, HOLD, failed(Deed.STOP)),
        VmPhase.STOPPED,
        [ev.RefuseHold("f0: no"), ev.Cancel("f0: no"), ev.TellPeople(True, "f0: no"), ev.Later("f0")],
    ),
    "the carrier starts it": ((*TO_SAVED, GO), VmPhase.ARMED, [RESUME_IT]),
    "held when saved": ((*TO_SAVED, HOLD), VmPhase.SAVED, [ev.AnswerHold()]),
    "held without QEMU": ((HOLD,), VmPhase.ABSENT, [ev.AnswerHold()]),
}
UNASKED = "the VM has moved without its functions' state, which QEMU did not ask for: is the carrier's object missing?"
UNLOADED = "the VM came without its functions' state, so they must not run: had its source no carrier, or no daemon?"
DESTINATION: dict[str, Case] = {
    "waits": ((INCOMING,), VmPhase.INCOMING, [ev.Prepare()]),
    "its migration begins": ((INCOMING, SETUP, ACTIVE), VmPhase.INCOMING, []),
    "loading": (TO_LOADING, VmPhase.LOADING, [LOAD_IT]),
    "resumed without a load": ((INCOMING, RESUME), VmPhase.BARRED, [ev.TellPeople(True, UNLOADED), BAR_IT]),
    "completed without a load": (
        (INCOMING, ACTIVE, COMPLETED),
        VmPhase.BARRED,
        [ev.TellPeople(True, UNLOADED), BAR_IT],
    ),
    "seen running without a load": (
        (INCOMING, ev.MonitorLost(), RUNNING),
        VmPhase.BARRED,
        [ev.TellPeople(True, UNLOADED), BAR_IT],
    ),
    "failed without a load": (
        (INCOMING, ACTIVE, FAILED),
        VmPhase.BARRED,
        [ev.TellPeople(False, "the migration to here has failed"), BAR_IT],
    ),
    "barred for good": ((INCOMING, RESUME, BARRED, STOP, RESUME), VmPhase.BARRED, []),
    "barred, and asked to load": (
        (INCOMING, RESUME, BARRED, LOAD),
        VmPhase.BARRED,
        [ev.RefuseLoad("no migration to here is under way")],
    ),
    "barred, and to be migrated": (
        (INCOMING, RESUME, BARRED, SETUP),
        VmPhase.BARRED,
        [
            ev.Cancel("its functions do not have the guest's state"),
            ev.TellPeople(True, "its functions do not have the guest's state"),
        ],
    ),
    "cannot be barred": (
        (INCOMING, RESUME, failed(Deed.BAR)),
        VmPhase.BARRED,
        [ev.TellPeople(True, "f0: no"), ev.Later("f0")],
    ),
    "and is barred later": ((INCOMING, RESUME, failed(Deed.BAR), ev.Due("f0")), VmPhase.BARRED, [BAR_IT]),
    "load refused": (
        (*TO_LOADING, failed(Deed.LOAD)),
        VmPhase.BARRED,
        [ev.RefuseLoad("f0: no"), ev.TellPeople(True, "f0: no"), BAR_IT],
    ),
    "resumed while loading": (
        (*TO_LOADING, RESUME),
        VmPhase.BARRED,
        [
            ev.RefuseLoad("the VM resumed before its functions' state was loaded, so they must not run"),
            ev.TellPeople(True, "the VM resumed before its functions' state was loaded, so they must not run"),
        ],
    ),
    "and then loaded": ((*TO_LOADING, RESUME, LOADED), VmPhase.BARRED, [BAR_IT]),
    "carrier lost while loading": (
        (*TO_LOADING, ev.CarrierReset(), LOADED),
        VmPhase.BARRED,
        [BAR_IT],
    ),
    "given up while loading": (
        (*TO_LOADING, FAILED),
        VmPhase.BARRED,
        [
            ev.RefuseLoad("the migration to here has failed"),
            ev.TellPeople(False, "the migration to here has failed"),
        ],
    ),
    "ready": (TO_READY, VmPhase.READY, []),
    "complete": ((*TO_READY, COMPLETED), VmPhase.READY, []),
    "runs": ((*TO_READY, COMPLETED, RESUME), VmPhase.RUNNING, [RESUME_IT]),
    "runs by the carrier's word": ((*TO_READY, GO), VmPhase.RUNNING, [RESUME_IT]),
    "resumed before the replay was read": ((*TO_LOADED, RESUME), VmPhase.GOING, []),
    "and it is right": ((*TO_LOADED, RESUME, OK), VmPhase.RUNNING, [RESUME_IT]),
    "and it is wrong": (
        (*TO_LOADED, RESUME, ev.Replayed("BAR 0")),
        VmPhase.BARRED,
        [ev.TellPeople(True, "BAR 0"), BAR_IT],
    ),
    "and it is paused again": ((*TO_LOADED, RESUME, STOP, OK), VmPhase.READY, []),
    "failed after the load": (
        (*TO_READY, FAILED),
        VmPhase.BARRED,
        [ev.TellPeople(False, "the migration to here has failed"), BAR_IT],
    ),
    "goes on to another host": ((*TO_READY, COMPLETED, SETUP), VmPhase.STOPPED, [ev.Arm(), ev.Judge()]),
    "and is saved": ((*TO_READY, COMPLETED, SETUP, SAVE), VmPhase.SAVING, [SAVE_IT]),
    "and comes back without ever having run": (
        (*TO_READY, COMPLETED, SETUP, SAVE, SAVED, CANCELLED, STANDS),
        VmPhase.SAVED,
        [],
    ),
    "asked to load without QEMU": ((LOAD,), VmPhase.ABSENT, [ev.RefuseLoad("no migration to here is under way")]),
    "asked to load a VM that runs": (
        (RUNNING, LOAD),
        VmPhase.RUNNING,
        [ev.RefuseLoad("no migration to here is under way")],
    ),
    "asked to save a VM that comes": (
        (INCOMING, SAVE),
        VmPhase.INCOMING,
        [ev.RefuseSave("no migration from here is under way")],
    ),
}
TROUBLE: dict[str, Case] = {
    "cannot stop": (
        (*TO_ARMED, STOP, failed(Deed.STOP)),
        VmPhase.STOPPED,
        [ev.Cancel("f0: no"), ev.TellPeople(True, "f0: no"), ev.Later("f0")],
    ),
    "and is stopped later": ((*TO_ARMED, STOP, failed(Deed.STOP), ev.Due("f0")), VmPhase.STOPPED, [STOP_IT]),
    "and is told to run": ((*TO_ARMED, STOP, failed(Deed.STOP), RESUME), VmPhase.ARMED, [RESUME_IT]),
    "and is to be saved": (
        (*TO_ARMED, STOP, failed(Deed.STOP), SAVE),
        VmPhase.STOPPED,
        [ev.RefuseSave("f0: no")],
    ),
    "cannot be saved": (
        (*TO_SAVING, failed(Deed.SAVE)),
        VmPhase.STOPPED,
        [ev.RefuseSave("f0: no"), ev.TellPeople(True, "f0: no")],
    ),
    "and comes back": (
        (*TO_SAVING, failed(Deed.SAVE), FAILING, RESUME, FAILED),
        VmPhase.RUNNING,
        [ev.Disarm()],
    ),
    "cannot resume": (
        (*TO_STOPPED, RESUME, failed(Deed.RESUME)),
        VmPhase.ARMED,
        [ev.TellPeople(True, "f0: no"), ev.Later("f0")],
    ),
    "and is resumed later": ((*TO_STOPPED, RESUME, failed(Deed.RESUME), ev.Due("f0")), VmPhase.ARMED, [RESUME_IT]),
    "a word about what nobody asked": ((RUNNING, did(Deed.STOP)), VmPhase.RUNNING, []),
    "a failure of what nobody asked": ((RUNNING, failed(Deed.STOP)), VmPhase.RUNNING, []),
    "a word about a stranger": ((RUNNING, did(Deed.STOP, "f9"), ev.Due("f9")), VmPhase.RUNNING, []),
    "a carrier lost while nothing is under way": ((RUNNING, ev.CarrierReset()), VmPhase.RUNNING, [ev.RepairCarrier()]),
    "lost in a migration": ((*TO_ARMED, ev.CarrierReset()), VmPhase.ARMED, []),
    "made anew afterwards": (
        (*TO_ARMED, ev.CarrierReset(), FAILED),
        VmPhase.RUNNING,
        [ev.Disarm(), ev.RepairCarrier()],
    ),
    "lost while saving": ((*TO_SAVING, ev.CarrierReset()), VmPhase.STOPPED, [ev.AskRunstate()]),
    "lost without QEMU": ((ev.CarrierReset(),), VmPhase.ABSENT, []),
    "QEMU ends": ((RUNNING, ev.QemuGone()), VmPhase.ABSENT, [ev.LeaveFunctions()]),
    "QEMU ends when the state has left": (
        (*TO_SAVED, ev.QemuGone()),
        VmPhase.ABSENT,
        [
            ev.TellPeople(
                False,
                "QEMU ended after the state was handed over: the functions may run elsewhere, and stay stopped",
            ),
            ev.LeaveFunctions(),
        ],
    ),
    "QEMU has ended twice": ((RUNNING, ev.QemuGone(), ev.QemuGone()), VmPhase.ABSENT, []),
    "another QEMU": (
        (*TO_STOPPED, ev.QemuCame("2", "running")),
        VmPhase.RUNNING,
        [ev.LeaveFunctions()],
    ),
    "a monitor that comes back to the same": ((RUNNING, ev.MonitorLost(), RUNNING), VmPhase.RUNNING, []),
    "in a migration": (
        (*TO_ARMED, ev.MonitorLost(), ev.QemuCame("1", "running", "active")),
        VmPhase.ARMED,
        [ev.Judge()],
    ),
    "that began meanwhile": (
        (RUNNING, ev.MonitorLost(), ev.QemuCame("1", "running", "active")),
        VmPhase.ARMED,
        [ev.Arm(), ev.Judge()],
    ),
    "that stopped meanwhile": (
        (*TO_ARMED, ev.MonitorLost(), ev.QemuCame("1", "finish-migrate", "device")),
        VmPhase.STOPPED,
        [ev.Judge(), STOP_IT],
    ),
    "that was completed meanwhile": (
        (*TO_SAVED, ev.MonitorLost(), ev.QemuCame("1", "postmigrate", "completed")),
        VmPhase.AWAY,
        [],
    ),
    "that was asked for its state and completed meanwhile, after another": (
        (*TO_READY, COMPLETED, RESUME, RESUMED, ev.MonitorLost(), SAVE, STOPPED, SAVED, MOVED),
        VmPhase.AWAY,
        [],
    ),
    "that began and was completed meanwhile, without the functions": (
        (RUNNING, ev.MonitorLost(), MOVED),
        VmPhase.AWAY,
        [ev.TellPeople(True, UNASKED), STOP_IT],
    ),
    "that failed meanwhile": (
        (*TO_SAVED, ev.MonitorLost(), ev.QemuCame("1", "running", "failed")),
        VmPhase.RUNNING,
        [ev.AskRunstate(), ev.Disarm(), RESUME_IT],
    ),
    "that was completed here meanwhile": (
        (*TO_READY, ev.MonitorLost(), ev.QemuCame("1", "running", "completed")),
        VmPhase.RUNNING,
        [RESUME_IT],
    ),
    "that waits here still": ((*TO_READY, ev.MonitorLost(), INCOMING), VmPhase.READY, []),
    "found in the switchover": (
        (ev.QemuCame("1", "finish-migrate", "device"),),
        VmPhase.STOPPED,
        [ev.Arm(), ev.Judge(), STOP_IT],
    ),
    "found moved": ((ev.QemuCame("1", "postmigrate", "completed"),), VmPhase.AWAY, [STOP_IT]),
    "found with an old failure": ((ev.QemuCame("1", "running", "failed"),), VmPhase.RUNNING, []),
    "found paused": ((ev.QemuCame("1", "paused", ""),), VmPhase.RUNNING, []),
    "started anew": ((*TO_STOPPED, ev.DaemonStarted()), VmPhase.STOPPED, [DOUBTED]),
    "started anew with nothing": ((ev.DaemonStarted(),), VmPhase.ABSENT, []),
    "started anew while stopping": ((*TO_ARMED, STOP, ev.DaemonStarted()), VmPhase.STOPPED, [DOUBTED, STOP_IT]),
    "started anew while saving": ((*TO_SAVING, ev.DaemonStarted()), VmPhase.STOPPED, [DOUBTED, STOP_IT]),
    "started anew while loading": (
        (*TO_LOADING, ev.DaemonStarted()),
        VmPhase.BARRED,
        [ev.TellPeople(True, "the daemon was started again while it loaded the state"), BAR_IT],
    ),
    "started anew before the replay was read": ((*TO_LOADED, ev.DaemonStarted()), VmPhase.LOADED, []),
    "started anew, and QEMU makes its end anew": (
        (RUNNING, ev.DaemonStarted(), RUNNING),
        VmPhase.RUNNING,
        [ev.RepairCarrier()],
    ),
}
CASES = {**SOURCE, **HOLDS, **DESTINATION, **TROUBLE}


@pytest.mark.parametrize("name", CASES)
def test_story(name: str) -> None:
    """A story ends in its phase, and its last event asks for its effects."""
    story, phase, effects = CASES[name]
    record, found = last(story)
    if name != "judged ill the last time":
        assert found == effects
    assert record.phase is phase


@pytest.mark.parametrize(
    ("story", "early", "late"),
    [
        (TO_LOADED, [ev.Replay(), ev.AnswerLoad()], [ev.Replay()]),
        (TO_READY, [], [ev.AnswerLoad()]),
        (
            (*TO_LOADED, ev.Replayed("BAR 0")),
            [ev.TellPeople(True, "BAR 0"), BAR_IT],
            [ev.RefuseLoad("BAR 0"), ev.TellPeople(True, "BAR 0"), BAR_IT],
        ),
    ],
)
def test_when_a_load_is_answered(
    story: Sequence[ev.VmEvent], early: list[ev.VmEffect], late: list[ev.VmEffect]
) -> None:
    """The one carrier is answered once the replay is on its way, the other once it was read back."""
    assert early == last(story, V)[1]
    assert late == last(story, F)[1]


def test_all_functions_together() -> None:
    """The state is given when the last one is saved; one that fails spoils it for all, and all come back."""
    names = ("f0", "f1")
    record = tell((*TO_ARMED, STOP, STOPPED, did(Deed.STOP, "f1"), SAVE, SAVED), names=names)
    assert record.phase is VmPhase.SAVING
    done, effects = advance(record, did(Deed.SAVE, "f1"))
    assert (done.phase, effects) == (VmPhase.SAVED, (ev.AnswerSave(),))
    spoilt, _ = advance(record, failed(Deed.SAVE, "f1"))
    back, effects = advance(spoilt, RESUME)
    assert back.phase is VmPhase.ARMED
    assert effects == (ev.DoDeed("f0", Deed.RESUME), ev.DoDeed("f1", Deed.RESUME))


def test_a_vm_without_functions() -> None:
    """Nobody has to be waited for."""
    record, effects = advance(tell((*TO_ARMED, STOP), names=()), SAVE)
    assert (record.phase, effects) == (VmPhase.SAVED, (ev.AnswerSave(),))


def test_what_failed_waits() -> None:
    """What has failed is attempted again when it is due, and not because something else happens."""
    record = tell((*TO_STOPPED, RESUME, failed(Deed.RESUME)))
    record, effects = advance(record, CANCELLING)
    assert effects == ()
    _, effects = advance(record, ev.Due("f0"))
    assert effects == (RESUME_IT,)


def test_the_last_error_is_kept() -> None:
    """It is known as long as the daemon lives."""
    record = tell((INCOMING, RESUME, ev.QemuGone()))
    assert record.last_error == UNLOADED


# The tables themselves.


def test_every_event_has_a_handler() -> None:
    """No event is unknown to the machine."""
    events = {each for each in vars(ev).values() if isinstance(each, type) and issubclass(each, ev.VmEvent)}
    assert events - {ev.VmEvent} == set(_HANDLERS)


def test_every_phase_has_its_rows() -> None:
    """No phase is without rows and wants."""
    assert set(ROWS) == set(WANTED) == set(VmPhase)
    assert set(ROUTES) == set(WANTED.values()) - {None}


@pytest.mark.parametrize("wanted", ROUTES)
@pytest.mark.parametrize("place", FunctionPlace)
def test_routes_arrive(wanted: FunctionPlace, place: FunctionPlace) -> None:
    """From every place the routes end, if every step is taken; only what is barred is never brought to run again."""
    seen = []
    while (deed := ROUTES[wanted][place]) is not None:
        assert place not in seen
        seen.append(place)
        place = DONE[deed]
    if wanted is FunctionPlace.RUNS:
        assert place in {FunctionPlace.RUNS, FunctionPlace.FRESH, FunctionPlace.BARRED}
    elif wanted is FunctionPlace.STANDS:
        assert place not in {FunctionPlace.RUNS, FunctionPlace.FRESH, FunctionPlace.UNSURE}
    elif wanted is FunctionPlace.SAVED:
        assert place in {FunctionPlace.SAVED, FunctionPlace.BARRED}
    else:
        assert place is wanted
    assert set(UNDONE) == set(Deed)


@pytest.mark.parametrize("phase", VmPhase)
@pytest.mark.parametrize("carrier", CarrierKind)
@pytest.mark.parametrize("cue", [HOLD, SAVE, LOAD], ids=["hold", "save", "load"])
def test_a_carrier_is_answered(phase: VmPhase, carrier: CarrierKind, cue: ev.VmEvent) -> None:
    """Whatever a carrier asks in whatever phase, it is answered, once the functions have done what they are told."""
    record = tell(REACHED[phase], carrier)
    record, effects = advance(record, cue)
    found = list(effects)
    for _ in range(5):
        doing = [ev.Did(each.name, each.doing) for each in record.functions if each.doing is not None]
        for event in (*doing, *([OK] if ev.Replay() in found and record.phase is VmPhase.LOADED else ())):
            record, effects = advance(record, event)
            found += effects
    answers = (ev.AnswerHold, ev.RefuseHold, ev.AnswerSave, ev.RefuseSave, ev.AnswerLoad, ev.RefuseLoad)
    assert any(isinstance(each, answers) for each in found)


#: Rows that lead to where functions run.
INTO_RUNNING = {
    (phase, cue)
    for phase, rows in ROWS.items()
    for cue, row in rows.items()
    if row.to in {VmPhase.RUNNING, VmPhase.ARMED}
}


def test_ways_into_running() -> None:
    """Functions are brought to run by QEMU's word alone, and never out of a phase without their state."""
    words = {Cue.RESUME, Cue.RUNS, Cue.GO}
    for phase, cue in INTO_RUNNING:
        assert phase not in {VmPhase.INCOMING, VmPhase.LOADING, VmPhase.BARRED}
        if WANTED[phase] is not FunctionPlace.RUNS:
            assert cue in words or (phase, cue) == (VmPhase.GOING, Cue.REPLAYED)
    # Once the state may have left, the monitor's RESUME alone is not believed.
    assert {(VmPhase.SAVING, Cue.RESUME), (VmPhase.SAVED, Cue.RESUME)}.isdisjoint(INTO_RUNNING)


def test_no_way_out_of_barred() -> None:
    """Only the end of QEMU leads out."""
    assert [] == [row for row in ROWS[VmPhase.BARRED].values() if row.to not in {None, VmPhase.BARRED}]


@pytest.mark.parametrize("act", Act)
def test_every_act_is_used(act: Act) -> None:
    """No act is there for nothing."""
    rows = [row for rows in ROWS.values() for row in rows.values()] + list(REFUSALS.values())
    assert any(act in row.acts for row in rows)


# The record.


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"version": 2}',
        '{"version": 1}',
        '{"version": 1, "functions": 3}',
        VmRecord().to_json().replace("absent", "here"),
        VmRecord().to_json().replace('"qemu": ""', '"qemu": 3'),
        VmRecord(functions=(VmFunction("f"),)).to_json().replace("fresh", "stale"),
        VmRecord(functions=(VmFunction("f"),)).to_json().replace('"f"', "7"),
    ],
)
def test_damaged_records(text: str) -> None:
    """A record that makes no sense is refused."""
    with pytest.raises(ValueError, match="record of a VM"):
        VmRecord.from_json(text)


def test_record_is_written_whole() -> None:
    """Every field comes back, but for what a pause was about."""
    record = VmRecord(
        functions=(VmFunction("f0", FunctionPlace.UNSURE, Deed.STOP), VmFunction("f1", FunctionPlace.SAVED)),
        carrier=F,
        phase=VmPhase.SAVING,
        migration=Migration.ENDING,
        qemu="12:34",
        connected=True,
        tells=True,
        refused="no",
        carrier_lost=True,
        last_error="yes",
    )
    assert record == VmRecord.from_json(record.to_json())
    defaults = VmRecord()
    for field in dataclasses.fields(VmRecord):
        assert getattr(record, field.name) != getattr(defaults, field.name), field.name
