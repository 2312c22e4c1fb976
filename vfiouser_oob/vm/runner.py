"""Carries out what the VM's machine asks for: one per VM, which lives as long as the daemon.

The record is what is known, and `feed` is the only place that changes it. What takes time is done by tasks that end
with their QEMU; what is done to one function is done in order.

Rule 1: *the monitor first*. A carrier's call may overtake what QEMU said before it by its monitor, so whatever is there
        already is taken before the call is.
Rule 2: *a replay is sent before the answer*: QEMU carries it out before anything that it is told after that.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import trio

from vfiouser_oob.config.vms import VmConfig
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.vm import events as ev
from vfiouser_oob.vm.arming import Arming
from vfiouser_oob.vm.bundle import BundleError, FunctionState, pack, unpack
from vfiouser_oob.vm.carriers.interface import (
    AnswerDue,
    CarrierEvent,
    GoAsked,
    LogChanged,
    Lost,
    QemuAttached,
    SaveAsked,
    StateLoaded,
    StopAsked,
    VmCarrier,
)
from vfiouser_oob.vm.contact import AGAIN_MAX_S, AGAIN_S, PATIENCE_S, QemuContact
from vfiouser_oob.vm.jobs import QemuJobs
from vfiouser_oob.vm.machine import advance
from vfiouser_oob.vm.monitor import GoneError, MonitorError
from vfiouser_oob.vm.movable import FunctionTrouble, MovableFunction, Replaying, VmMonitor
from vfiouser_oob.vm.notes import VmNotes
from vfiouser_oob.vm.preflight import Moment, judge, refusals
from vfiouser_oob.vm.qmp import QmpEvent
from vfiouser_oob.vm.questions import Carriers, OpenQuestion
from vfiouser_oob.vm.record import CarrierKind, Deed, Migration, VmFunction, VmPhase, VmRecord
from vfiouser_oob.vm.replaying import prepare
from vfiouser_oob.vm.survey import survey
from vfiouser_oob.vm.table import ROUTES, WANTED
from vfiouser_oob.vm.topology import TopologyError
from vfiouser_protocol.errors import VfioUserError

#: Seconds for what is done to a function while a carrier waits, which gives up after 20.
DEED_S = 15.0
#: The phases of a QEMU whose VM has not come yet.
COMING = frozenset({VmPhase.INCOMING, VmPhase.LOADING, VmPhase.LOADED, VmPhase.READY, VmPhase.GOING})
#: Seconds for which a QEMU that is about to start its VM is kept from it while what was sent to it is not read back: it
#: may be unable to answer before it has started. The functions wait longer.
GO_S = 0.25
#: Phases in which it is not decided yet whether functions may run.
_UNDECIDED = frozenset({VmPhase.LOADING, VmPhase.LOADED, VmPhase.GOING})
#: Phases that last only until somebody has answered.
_PASSING = frozenset({VmPhase.HOLDING, VmPhase.SAVING, VmPhase.LOADING, VmPhase.LOADED, VmPhase.GOING})
_MONITOR_EVENTS: Mapping[str, Callable[[Mapping[str, Any]], ev.VmEvent]] = MappingProxyType(
    {
        "STOP": lambda data: ev.Stopped(),
        "RESUME": lambda data: ev.Resumed(),
        "MIGRATION": lambda data: ev.MigrationIs(str(data.get("status", ""))),
    }
)


class VmRunner:
    """The migration of one VM.

    Args:
        config: the VM.
        functions: its functions, in the order of the configuration.
        carriers: what may carry their state; at least one.
        events: where changes are announced.
        notes: where it is taken down for the daemon after this one, and what another one has left.
    """

    def __init__(
        self,
        config: VmConfig,
        functions: Sequence[MovableFunction],
        carriers: Mapping[CarrierKind, VmCarrier],
        events: EventHub,
        notes: VmNotes | None = None,
    ) -> None:
        self.config = config
        self.functions = {function.name: function for function in functions}
        self.carriers = Carriers(carriers, self._hear)
        self._log = log.get("vm").bind(vm=config.name)
        self._notes = notes or VmNotes(config, None, self._log)
        self._left = self._notes.left
        self.record = VmRecord(functions=tuple(map(VmFunction, self.functions)), carrier=self.carriers.kind)
        if self._left is not None:
            self.record = self._left.record
            self.carriers.carry_by(self.record.carrier)
        self._contact = QemuContact(self.carriers, self._log)
        self.since = time.time()
        self._events = events
        self._inbox: deque[ev.VmEvent] = deque()
        self._jobs: QemuJobs
        #: The watching of the functions that goes on.
        self._watching: list[trio.CancelScope] = []
        self._arming: Arming | None = None
        #: When the migration began that is under way, as QEMU says.
        self._began: float | None = None
        #: The question by which a QEMU is kept from starting its VM.
        self._kept: OpenQuestion | None = None
        self._failures: dict[str, int] = {}
        #: What was saved of each function, or has come.
        self._states: dict[str, FunctionState] = {} if self._left is None else dict(self._left.arrived)
        #: Set with each event that was taken.
        self._moved = trio.Event()
        self._deeds: Mapping[Deed, Callable[[MovableFunction], Any]] = MappingProxyType(
            {
                Deed.STOP: lambda function: function.stop(),
                Deed.SAVE: self._save,
                Deed.LOAD: lambda function: function.load(self._states[function.name]),
                Deed.RESUME: lambda function: function.resume(),
                Deed.BAR: lambda function: function.bar(self.record.last_error),
            }
        )
        self._effects: Mapping[type[ev.VmEffect], Callable[[Any], object]] = MappingProxyType(
            {
                ev.Arm: lambda effect: self._arm(),
                ev.Disarm: lambda effect: self._disarm(),
                ev.Judge: lambda effect: self._jobs.begin(self._judge),
                ev.Cancel: lambda effect: self._jobs.begin(self._contact.command, "migrate_cancel"),
                ev.AskRunstate: lambda effect: self._jobs.begin(self._ask_runstate),
                ev.DoDeed: lambda effect: self._jobs.begin_in_lane(effect.function, self._do, effect),
                ev.Later: lambda effect: self._jobs.begin(self._later, effect.function),
                ev.AnswerHold: lambda effect: self._answer(StopAsked),
                ev.RefuseHold: lambda effect: self._refuse(effect.reason, StopAsked),
                ev.AnswerSave: lambda effect: self._offer(),
                ev.RefuseSave: lambda effect: self._refuse(effect.reason, SaveAsked),
                ev.Prepare: lambda effect: self._prepare(),
                ev.Replay: lambda effect: self._replay(),
                ev.AnswerLoad: lambda effect: self._answer(StateLoaded),
                ev.RefuseLoad: lambda effect: self._refuse(effect.reason, StateLoaded),
                ev.RepairCarrier: lambda effect: self._jobs.begin(self._contact.repair),
                ev.LeaveFunctions: lambda effect: self._leave(),
                ev.TellPeople: self._tell,
            }
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the carriers until cancelled; the monitor comes by `attend`."""
        async with trio.open_nursery() as nursery:
            self._jobs = QemuJobs(nursery, self.functions)
            if self._left is not None:
                self._log.info("goes on after a restart", phase=self.record.phase.value)
                self.feed(ev.DaemonStarted())
            for kind in self.carriers.kinds:
                await nursery.start(self.carriers.run, kind)
            task_status.started()

    @property
    def monitor(self) -> VmMonitor | None:
        """QEMU's monitor, whenever it is connected."""
        return self._contact.monitor

    # What happens

    def feed(self, event: ev.VmEvent) -> None:
        """Take an event, and do what it asks for."""
        self._inbox.append(event)
        if len(self._inbox) > 1:  # whoever is at it takes this one as well
            return
        while self._inbox:
            before = self.record.phase
            self.record, effects = advance(self.record, self._inbox[0])
            self._notes.record(self.record)
            for effect in effects:
                self._effects[type(effect)](effect)
            if self.record.phase is not before:
                self._entered(before)
            self._inbox.popleft()
        self._let_go()
        self._moved.set()
        self._moved = trio.Event()

    async def come_to_rest(self) -> None:
        """Wait until no carrier waits, nothing is being done to a function, and QEMU has what it was sent."""
        while self.carriers.question is not None or self.record.phase in _PASSING or self._busy:
            await self._moved.wait()
        if self.record.phase is VmPhase.SAVED:  # else the migration fails, which costs nothing but could be spared
            await self.carriers.given()

    @property
    def _busy(self) -> bool:
        return any(each.doing is not None for each in self.record.functions)

    def _entered(self, before: VmPhase) -> None:
        phase = self.record.phase
        self.since = time.time()
        self._log.info("phase", phase=phase.value, before=before.value, migration=self.record.migration.value)
        self._events.publish("vm-phase", vm=self.config.name, phase=phase.value, before=before.value)
        if phase not in COMING:
            self.carriers.expect_no_more()
            self._notes.settled()
        if before in COMING and phase not in COMING and phase is not VmPhase.ABSENT:
            self._watch(coming=phase is not VmPhase.RUNNING)

    async def attend(self, monitor: VmMonitor, qemu: str) -> None:
        """Take what a QEMU says, until its monitor is lost.

        Args:
            monitor: its monitor, which has just come.
            qemu: what tells this QEMU from any other.
        """
        self._contact.came(monitor)
        found = monitor.found
        self.feed(ev.QemuCame(qemu, found.runstate, found.migration, found.tells))
        if not self._watching:
            self._watch(coming=self.record.phase in COMING)
        self._jobs.begin(self._contact.mend, lambda: self._mendable)
        try:
            while True:
                self._said(await monitor.next_event())
        except GoneError:
            pass
        finally:
            self._contact.lost()
            self.feed(ev.MonitorLost())

    def _said(self, event: QmpEvent) -> None:
        if event.name == "MIGRATION" and event.data.get("status") == "setup":
            self._began = event.seconds
        elif event.name == "STOP" and self.record.phase is VmPhase.ARMED:
            self._hold()
        make = _MONITOR_EVENTS.get(event.name)
        if make is not None:
            self.feed(make(event.data))

    def _listen_first(self) -> None:
        """Take what QEMU has said by its monitor until now."""
        for event in self.monitor.pending_events() if self.monitor is not None else ():
            self._said(event)

    def _hear(self, kind: CarrierKind, event: CarrierEvent) -> None:
        self._listen_first()
        if isinstance(event, QemuAttached) or kind is not self.record.carrier:
            self.feed(ev.CarrierCame(kind))
        if isinstance(event, StopAsked | SaveAsked) and self.record.phase is VmPhase.ARMED:
            self._hold()
        if isinstance(event, LogChanged | Lost):
            self._use_log()
        if isinstance(event, StateLoaded):
            self._unpack(event)
        elif isinstance(event, AnswerDue):
            if self.record.phase is VmPhase.LOADED:
                self._answer(StateLoaded)
        elif type(event) in _CARRIER_EVENTS:
            self.feed(_CARRIER_EVENTS[type(event)])

    def _unpack(self, event: StateLoaded) -> None:
        try:
            self._states = unpack(event.state, self.functions)
        except BundleError as error:
            self._tell(ev.TellPeople(True, f"the state that came is refused: {error}"))
            self._refuse(str(error), StateLoaded)
            return
        self._notes.arrived(self._states)
        self.feed(ev.CarrierLoads())

    # Functions

    async def _do(self, effect: ev.DoDeed) -> None:
        function, deed = self.functions[effect.function], effect.deed
        try:
            with trio.fail_after(DEED_S):
                await self._deeds[deed](function)
        except (FunctionTrouble, VfioUserError, trio.TooSlowError) as error:
            reason = str(error) or f"it took longer than {DEED_S:g} s"
            self._failures[effect.function] = self._failures.get(effect.function, 0) + 1
            self.feed(ev.Failed(effect.function, deed, f"{deed.value}: {reason}"))
        else:
            self._failures.pop(effect.function, None)
            self.feed(ev.Did(effect.function, deed))

    async def _later(self, name: str) -> None:
        await trio.sleep(min(AGAIN_MAX_S, AGAIN_S * 2 ** min(self._failures.get(name, 0), 8)))
        self.feed(ev.Due(name))

    async def _save(self, function: MovableFunction) -> None:
        self._states[function.name] = await function.save()

    def _watch(self, *, coming: bool) -> None:
        for scope in self._watching:
            scope.cancel()
        self._watching = [
            self._jobs.begin(partial(function.watch, coming=coming)) for function in self.functions.values()
        ]

    def _hold(self) -> None:
        """The vCPUs stand for a migration."""
        for function in self.functions.values():
            function.hold()

    def _use_log(self) -> None:
        for function in self.functions.values():
            function.use_log(self.carriers.log)

    def _arm(self) -> None:
        self._arming = Arming(self.functions, self._jobs, lambda: self.monitor, self._began)

    def _disarm(self) -> None:
        self._arming, self._began = None, None
        for function in self.functions.values():
            self._jobs.begin_in_lane(function.name, self._disarm_one, function)

    async def _disarm_one(self, function: MovableFunction) -> None:
        try:
            await function.disarm()
        except (FunctionTrouble, VfioUserError) as error:
            self._log.warning("a function goes on as during a migration", function=function.name, reason=error)

    def _replay(self) -> None:
        if not self.carriers.asked(StateLoaded):  # nobody waits, and the functions may not be back yet
            self._jobs.begin(self._replay_again)
            return
        try:
            sent = self._sent()
        except (FunctionTrouble, VfioUserError) as error:
            self.feed(ev.Replayed(str(error)))
            return
        self._jobs.begin(self._verify, sent)
        if self.carriers.question is None or self.carriers.question.due:
            self._answer(StateLoaded)

    def _sent(self) -> list[Replaying]:
        """Send the replays; once the VM may run, they are only read back."""
        sent = self.record.phase is not VmPhase.LOADED
        return [
            function.replay(self._states.get(name, FunctionState(name)), sent=sent)
            for name, function in self.functions.items()
        ]

    async def _replay_again(self) -> None:
        failure = ""
        with trio.move_on_after(DEED_S):
            while True:
                try:
                    sent = self._sent()
                    break
                except (FunctionTrouble, VfioUserError) as error:
                    failure = str(error)
                await trio.sleep(AGAIN_S)
            await self._verify(sent)
            return
        self.feed(ev.Replayed(failure or f"QEMU did not answer within {DEED_S:g} s"))

    async def _verify(self, sent: Sequence[Replaying]) -> None:
        failures = []
        for each in sent:
            try:
                await each.finish(lambda: self.record.phase is VmPhase.LOADED)
            except (FunctionTrouble, VfioUserError) as error:
                failures.append(str(error))
        self.feed(ev.Replayed("; ".join(failures)))

    def _leave(self) -> None:
        self._arming, self._began = None, None
        self._jobs.leave()
        self.carriers.reset()
        self._watching, self._states, self._failures = [], {}, {}

    # The carrier's questions

    def _answer(self, *kinds: type) -> None:
        if self.carriers.asked(*kinds):
            self.carriers.answer()

    def _refuse(self, reason: str, *kinds: type) -> None:
        if self.carriers.asked(*kinds):
            self._log.warning("QEMU is refused", reason=reason)
            self.carriers.refuse(reason)

    def _offer(self) -> None:
        if not self.carriers.asked(SaveAsked):
            return
        bundle = pack([self._states[name] for name in self.functions])
        self._log.info("the state is handed over", bytes=len(bundle))
        for function in self.functions.values():
            function.handed()
        self.carriers.offer(bundle)

    def _let_go(self) -> None:
        """Let QEMU start the VM once its functions run, or never will."""
        if not self.carriers.asked(GoAsked):
            return
        if self.record.phase in _UNDECIDED:
            if self._kept is not self.carriers.question:
                self._kept = self.carriers.question
                self._jobs.begin(self._let_go_unread, self._kept)
            return
        wanted = WANTED[self.record.phase]
        functions = self.record.functions
        if wanted is not None and any(each.doing is not None or each.waits for each in functions):
            return
        if wanted is not None and any(ROUTES[wanted][each.place] is not None for each in functions):
            return
        if self.record.phase is VmPhase.BARRED:
            self._refuse(self.record.last_error, GoAsked)
        else:
            self._answer(GoAsked)

    async def _let_go_unread(self, question: OpenQuestion) -> None:
        await trio.sleep(GO_S)
        if self.carriers.question is question and self.record.phase is VmPhase.GOING:
            self._log.warning("QEMU starts its VM before it reports its functions; they wait for that")
            self.carriers.answer()

    # The monitor

    @property
    def _mendable(self) -> bool:
        """Whether QEMU may make its end anew: not while its VM leaves, for it is among what is being sent."""
        leaving = self.record.migration in (Migration.LIVE, Migration.ENDING)
        return self.record.phase is VmPhase.INCOMING or (self.record.phase is VmPhase.RUNNING and not leaving)

    async def _judge(self) -> None:
        if self._arming is None:  # it was another daemon's
            self._arm()
        arming = self._arming
        if arming is not None:
            await arming.done()
        facts = tuple(function.facts() for function in self.functions.values())
        surveyed = await self._contact.asked(lambda monitor: survey(self.record, monitor, facts))
        if surveyed is not None:  # else whoever comes again is judged again
            found = judge(surveyed, Moment.SETUP)
            self.feed(ev.Judged((*refusals(found), *(() if arming is None else arming.failures))))

    async def _ask_runstate(self) -> None:
        answer = await self._contact.asked(lambda monitor: monitor.execute("query-status", seconds=PATIENCE_S))
        if answer is not None:
            status = answer.get("status") if isinstance(answer, dict) else None
            self._listen_first()
            self.feed(ev.RunstateIs(str(status)))

    def _prepare(self) -> None:
        self.carriers.expect(self.config.state_max)
        self._jobs.begin(self._let_master)

    async def _let_master(self) -> None:
        monitor = await self._contact.present()
        if monitor is None:
            return
        try:
            await prepare(monitor, tuple(self.functions))
        except (MonitorError, TopologyError) as error:
            self._tell(ev.TellPeople(True, f"cannot prepare the functions to take their state: {error}"))

    def _tell(self, effect: ev.TellPeople) -> None:
        (self._log.error if effect.error else self._log.info)(effect.text)
        self._events.publish("vm-told", vm=self.config.name, error=effect.error, text=effect.text)


_CARRIER_EVENTS: Mapping[type[CarrierEvent], ev.VmEvent] = MappingProxyType(
    {
        StopAsked: ev.CarrierHolds(),
        SaveAsked: ev.CarrierSaves(),
        GoAsked: ev.CarrierGoes(),
        Lost: ev.CarrierReset(),
    }
)
