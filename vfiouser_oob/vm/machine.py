"""One VM's migration with stock QEMU as a pure function: of a record and an event come a new record and what is to do.

There is no clock in here, no I/O and no waiting. What is done about what happens is in the tables of `table`; here they
are interpreted: an event becomes a cue, the cue's row a phase and acts, and what the phase wants of the functions one
step for each of them after the other.

Rule 1: *QEMU's word is the only one*. Nobody knows the other side. A source whose state has left comes back when its
        QEMU says that the VM runs, and a destination's functions run only when its QEMU says so.
Rule 2: *never two running copies*. Functions are wanted running in two phases only, and there is no way into those from
        a VM that came without their state.
Rule 3: *a carrier that waits is always answered*, for QEMU stands still meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from vfiouser_oob.vm import events as ev
from vfiouser_oob.vm.record import FunctionPlace, Migration, VmFunction, VmPhase, VmRecord
from vfiouser_oob.vm.table import (
    ANSWERED_EARLY,
    BEGINNINGS,
    DONE,
    ENDING_WITH_US,
    FAREWELLS,
    MIGRATION_CUES,
    REFUSALS,
    ROUTES,
    ROWS,
    STATUSES,
    UNDONE,
    WANTED,
    Act,
    Cue,
)

_INCOMING = "inmigrate"
#: What a QEMU that comes back has done meanwhile, by its runstate; in any other one its vCPUs stand.
_RETURNS: Mapping[str, Cue] = MappingProxyType({"running": Cue.RUNS, "postmigrate": Cue.MOVED})
_RUNNING = "running"
#: Migrations for which what the functions write is recorded.
_UNDER_WAY = frozenset({Migration.LIVE, Migration.ENDING})
#: Phases of a migration that may still be given up from here.
_TO_BE_JUDGED = frozenset({VmPhase.ARMED, VmPhase.STOPPED})
#: Phases in which nobody may know what QEMU has of the functions.
_UNREAD = frozenset({VmPhase.LOADED, VmPhase.GOING})


def advance(record: VmRecord, event: ev.VmEvent) -> tuple[VmRecord, tuple[ev.VmEffect, ...]]:
    """Take an event.

    Args:
        record: what is known so far.
        event: what has happened.

    Returns:
        What is known now, and what is to be done about it, in order.
    """
    turn = _Turn(record)
    _HANDLERS[type(event)](turn, event)
    turn.settle()
    return turn.record, tuple(turn.effects)


class _Turn:
    """The work on one event."""

    def __init__(self, record: VmRecord) -> None:
        self.record = record
        self.effects: list[ev.VmEffect] = []

    def set(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)

    def do(self, effect: ev.VmEffect) -> None:
        self.effects.append(effect)

    def cue(self, cue: Cue, reason: str = "") -> None:
        """Do what the table says."""
        row = ROWS[self.record.phase].get(cue) or REFUSALS.get(cue)
        if row is None:
            return
        if row.to is not None:
            self.enter(row.to)
        text = ": ".join(filter(None, (row.text, reason)))
        for act in row.acts:
            _ACTS[act](self, text)

    def enter(self, phase: VmPhase) -> None:
        """Be in a phase; what it wants anew is attempted at once, whatever has failed before."""
        if WANTED[phase] is not WANTED[self.record.phase]:
            self.set(functions=tuple(replace(each, waits=False) for each in self.record.functions))
        self.set(phase=phase)

    def settle(self) -> None:
        """Take the functions to where the phase wants them, as far as that goes by itself."""
        while self._arrived():
            self.cue(Cue.ARRIVED)
        if self.record.phase is VmPhase.ARMED and self.record.migration not in _UNDER_WAY:
            self.enter(VmPhase.RUNNING)
            self.set(refused="")
            self.do(ev.Disarm())
        if self.record.phase is VmPhase.RUNNING and self.record.carrier_lost and self.record.connected:
            self.set(carrier_lost=False)
            self.do(ev.RepairCarrier())
        for function in self.record.functions:
            self._step(function)

    def _arrived(self) -> bool:
        """Whether all functions are where a phase wants them that waits for it."""
        wanted = WANTED[self.record.phase]
        return Cue.ARRIVED in ROWS[self.record.phase] and all(
            each.doing is None and wanted is not None and ROUTES[wanted][each.place] is None
            for each in self.record.functions
        )

    def _step(self, function: VmFunction) -> None:
        wanted = WANTED[self.record.phase]
        deed = None if wanted is None else ROUTES[wanted][function.place]
        if deed is not None and function.doing is None and not function.waits:
            self.record = self.record.with_function(replace(function, doing=deed))
            self.do(ev.DoDeed(function.name, deed))

    # Acts

    def refuse(self, effect: ev.VmEffect, reason: str) -> None:
        """The migration must not go through any more."""
        self.set(refused=self.record.refused or reason)
        self.do(effect)

    def tell(self, error: bool, text: str) -> None:
        if error:
            self.set(last_error=text)
        self.do(ev.TellPeople(error, text))


def _arm(turn: _Turn, text: str) -> None:
    turn.set(refused="")
    turn.do(ev.Arm())


def _doubt(turn: _Turn, text: str) -> None:
    if turn.record.carrier in ENDING_WITH_US and turn.record.migration in _UNDER_WAY:
        turn.set(refused=turn.record.refused or text)
        turn.tell(True, text)


def _early(turn: _Turn, effect: ev.VmEffect) -> None:
    if turn.record.carrier in ANSWERED_EARLY:
        turn.do(effect)


def _late(turn: _Turn, effect: ev.VmEffect) -> None:
    if turn.record.carrier not in ANSWERED_EARLY:
        turn.do(effect)


_ACTS: Mapping[Act, Callable[[_Turn, str], None]] = MappingProxyType(
    {
        Act.ARM: _arm,
        Act.JUDGE: lambda turn, text: turn.do(ev.Judge()),
        Act.CANCEL: lambda turn, text: turn.refuse(ev.Cancel(text), text),
        Act.DOUBT: _doubt,
        Act.PREPARE: lambda turn, text: turn.do(ev.Prepare()),
        Act.ASK: lambda turn, text: turn.do(ev.AskRunstate()),
        Act.ANSWER_HOLD: lambda turn, text: turn.do(ev.AnswerHold()),
        Act.REFUSE_HOLD: lambda turn, text: turn.refuse(ev.RefuseHold(text), text),
        Act.ANSWER_SAVE: lambda turn, text: turn.do(ev.AnswerSave()),
        Act.REFUSE_SAVE: lambda turn, text: turn.refuse(ev.RefuseSave(text), text),
        Act.REPLAY: lambda turn, text: turn.do(ev.Replay()),
        Act.ANSWER_LOAD_EARLY: lambda turn, text: _early(turn, ev.AnswerLoad()),
        Act.ANSWER_LOAD_LATE: lambda turn, text: _late(turn, ev.AnswerLoad()),
        Act.REFUSE_LOAD_LATE: lambda turn, text: _late(turn, ev.RefuseLoad(text)),
        Act.REFUSE_LOAD: lambda turn, text: turn.do(ev.RefuseLoad(text)),
        Act.INFO: lambda turn, text: turn.tell(False, text),
        Act.ERROR: lambda turn, text: turn.tell(True, text),
    }
)


def _started(turn: _Turn, event: ev.DaemonStarted) -> None:
    """What was being done is given up; the carrier's connection ended with the other daemon, and what kept a barred
    function's client out."""
    record = turn.record
    functions = tuple(
        replace(each, place=FunctionPlace.UNSURE if _in_doubt(each) else each.place, doing=None, waits=False)
        for each in record.functions
    )
    alive = record.phase is not VmPhase.ABSENT
    turn.set(functions=functions, connected=False, carrier_lost=alive and record.carrier in ENDING_WITH_US)
    turn.cue(Cue.STARTED)


def _in_doubt(function: VmFunction) -> bool:
    return function.doing is not None or function.place is FunctionPlace.BARRED


def _qemu_came(turn: _Turn, event: ev.QemuCame) -> None:
    if turn.record.phase is not VmPhase.ABSENT and turn.record.qemu != event.qemu:
        _qemu_gone(turn, ev.QemuGone())
    known = turn.record.phase is not VmPhase.ABSENT
    turn.set(qemu=event.qemu, connected=True, tells=event.tells)
    if not known:
        phase, place = BEGINNINGS.get(event.runstate, (VmPhase.RUNNING, FunctionPlace.FRESH))
        turn.set(functions=tuple(VmFunction(each.name, place) for each in turn.record.functions))
        turn.enter(phase)
        if phase is VmPhase.INCOMING:
            turn.do(ev.Prepare())
    if event.runstate != _INCOMING:  # else what it says is about the migration to here, of which the carrier tells
        _at_home(turn, event, known)
    if known and turn.record.phase in _UNREAD:
        turn.do(ev.Replay())


def _at_home(turn: _Turn, event: ev.QemuCame, known: bool) -> None:
    """Take what a QEMU says of its VM, which is there."""
    before = turn.record.migration
    _migration_is(turn, ev.MigrationIs(event.migration))
    if known:
        turn.cue(_RETURNS.get(event.runstate, Cue.STOP))
        if before is turn.record.migration is Migration.LIVE and turn.record.phase in _TO_BE_JUDGED:
            # What was judged, or told to QEMU, may have been lost with the monitor.
            turn.do(ev.Cancel(turn.record.refused) if turn.record.refused else ev.Judge())


def _monitor_lost(turn: _Turn, event: ev.MonitorLost) -> None:
    turn.set(connected=False)


def _qemu_gone(turn: _Turn, event: ev.QemuGone) -> None:
    record = turn.record
    if record.phase is VmPhase.ABSENT:
        return
    if record.phase in FAREWELLS:
        turn.do(ev.TellPeople(False, FAREWELLS[record.phase]))
    turn.record = VmRecord(
        functions=tuple(VmFunction(each.name) for each in record.functions),
        carrier=record.carrier,
        last_error=record.last_error,
    )
    turn.do(ev.LeaveFunctions())


def _migration_is(turn: _Turn, event: ev.MigrationIs) -> None:
    """Only a change of class is a cue: a migration that is under way says so in several words."""
    now = STATUSES.get(event.status)
    if now is None or now is turn.record.migration:
        return
    turn.set(migration=now)
    if now in MIGRATION_CUES:
        turn.cue(MIGRATION_CUES[now])


def _runstate_is(turn: _Turn, event: ev.RunstateIs) -> None:
    turn.cue(Cue.RUNS if event.runstate == _RUNNING else Cue.STANDS)


def _judged(turn: _Turn, event: ev.Judged) -> None:
    if event.reasons:
        turn.cue(Cue.JUDGED, "; ".join(event.reasons))


def _carrier_came(turn: _Turn, event: ev.CarrierCame) -> None:
    turn.set(carrier=event.kind, carrier_lost=False)


def _hold_asked(turn: _Turn, event: ev.CarrierHolds) -> None:
    turn.cue(Cue.HOLD if turn.record.hears else Cue.HOLD_BLIND)


def _save_asked(turn: _Turn, event: ev.CarrierSaves) -> None:
    if turn.record.refused:
        turn.cue(Cue.SAVE_REFUSED, turn.record.refused)
    else:
        turn.cue(Cue.SAVE if turn.record.hears else Cue.SAVE_BLIND)


def _carrier_reset(turn: _Turn, event: ev.CarrierReset) -> None:
    turn.set(carrier_lost=turn.record.phase is not VmPhase.ABSENT and turn.record.carrier in ENDING_WITH_US)
    turn.cue(Cue.CARRIER_RESET)


def _did(turn: _Turn, event: ev.Did) -> None:
    function = turn.record.function(event.function)
    if function is not None and function.doing is event.deed:
        turn.record = turn.record.with_function(VmFunction(function.name, DONE[event.deed]))


def _failed(turn: _Turn, event: ev.Failed) -> None:
    function = turn.record.function(event.function)
    if function is None or function.doing is not event.deed:
        return
    turn.record = turn.record.with_function(VmFunction(function.name, UNDONE[event.deed], waits=True))
    turn.cue(Cue.FELL, f"{event.function}: {event.reason}")
    after = turn.record.function(event.function)
    if after is not None and after.waits:
        turn.do(ev.Later(function.name))


def _due(turn: _Turn, event: ev.Due) -> None:
    function = turn.record.function(event.function)
    if function is not None:
        turn.record = turn.record.with_function(replace(function, waits=False))


def _replayed(turn: _Turn, event: ev.Replayed) -> None:
    turn.cue(Cue.UNREPLAYED if event.failure else Cue.REPLAYED, event.failure)


_HANDLERS: Mapping[type[ev.VmEvent], Callable[[_Turn, Any], None]] = MappingProxyType(
    {
        ev.DaemonStarted: _started,
        ev.QemuCame: _qemu_came,
        ev.MonitorLost: _monitor_lost,
        ev.QemuGone: _qemu_gone,
        ev.Stopped: lambda turn, event: turn.cue(Cue.STOP),
        ev.Resumed: lambda turn, event: turn.cue(Cue.RESUME),
        ev.MigrationIs: _migration_is,
        ev.RunstateIs: _runstate_is,
        ev.Judged: _judged,
        ev.CarrierCame: _carrier_came,
        ev.CarrierHolds: _hold_asked,
        ev.CarrierSaves: _save_asked,
        ev.CarrierLoads: lambda turn, event: turn.cue(Cue.LOAD),
        ev.CarrierGoes: lambda turn, event: turn.cue(Cue.GO),
        ev.CarrierReset: _carrier_reset,
        ev.Did: _did,
        ev.Failed: _failed,
        ev.Due: _due,
        ev.Replayed: _replayed,
    }
)
