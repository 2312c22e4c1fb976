"""Random lives of a VM between two hosts: QEMU, carrier, functions, monitors and daemons do what they may at any time.

The QEMUs are modelled as QEMU is: their events come in order but late, a carrier's call blocks them, and exactly one of
them may run the VM. What is checked is that the functions follow it: never two of one, never one without its state, and
always the one whose VM runs, once everybody has done what they owe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vfiouser_oob.vm import events as ev
from vfiouser_oob.vm.machine import advance
from vfiouser_oob.vm.record import CarrierKind, Deed, VmFunction, VmPhase, VmRecord

NAMES = ("f0", "f1")
TROUBLE = ("pause", "go on", "cancel", "die", "fail", "half", "again", "unreplayed", "lose", "restart")


class Device:
    """What a function really does."""

    def __init__(self) -> None:
        self.runs = True
        #: It has the guest's state.
        self.live = False
        self.barred = False
        self.saved = False

    def take(self, deed: Deed) -> None:
        """Do it."""
        match deed:
            case Deed.STOP:
                self.runs = False
            case Deed.LOAD:
                self.runs, self.live = False, True
            case Deed.RESUME:
                assert not self.barred
                self.runs, self.saved = True, False
            case Deed.BAR:
                self.runs, self.barred = False, True
            case Deed.SAVE:
                assert not self.runs, "saved while it runs"
                self.saved = True


class Call(Enum):
    """What the carrier waits for."""

    SAVE = "save"
    LOAD = "load"


@dataclass
class Host:
    """A QEMU, the daemon beside it, and the functions."""

    carrier: CarrierKind
    serial: int = 0
    record: VmRecord = field(default_factory=VmRecord)
    devices: dict[str, Device] = field(default_factory=dict)
    # QEMU
    alive: bool = False
    runstate: str = ""
    status: str = ""
    monitor: bool = False
    queue: list[ev.VmEvent] = field(default_factory=list)
    call: Call | None = None
    answer: bool | None = None
    was_running: bool = True
    # Effects that are still to be carried out.
    deeds: list[ev.DoDeed] = field(default_factory=list)
    due: list[str] = field(default_factory=list)
    questions: int = 0
    replays: int = 0
    #: The VM is this side's: it never left, or QEMU has said since then that it runs here.
    granted: bool = False

    @property
    def runs(self) -> bool:
        """Whether the VM does."""
        return self.alive and self.runstate == "running"

    def feed(self, event: ev.VmEvent) -> None:
        """The daemon takes an event."""
        match event:
            case ev.Resumed() | ev.CarrierGoes() | ev.RunstateIs(runstate="running") | ev.QemuCame(runstate="running"):
                self.granted = True
        self.record, effects = advance(self.record, event)
        assert self.record == VmRecord.from_json(self.record.to_json()) or any(f.waits for f in self.record.functions)
        for effect in effects:
            match effect:
                case ev.DoDeed():
                    assert effect.deed is not Deed.RESUME or self.granted, "resumed without QEMU's word"
                    assert effect.deed is not Deed.RESUME or not self.replays, "resumed before the replay was read"
                    self.deeds.append(effect)
                case ev.Later(function=name):
                    self.due.append(name)
                case ev.AskRunstate():
                    self.questions += 1
                case ev.Replay():
                    self.replays += 1
                case ev.AnswerSave():
                    self.granted = False
                    assert not self.deeds, "answered while something is done"
                    assert not any(device.runs for device in self.devices.values()), "given while it runs"
                    assert all(device.saved for device in self.devices.values()), "given without having been saved"
                    self._answered(Call.SAVE, True)
                case ev.RefuseSave():
                    self._answered(Call.SAVE, False)
                case ev.AnswerLoad():
                    assert all(device.live for device in self.devices.values()), "loaded without its state"
                    self._answered(Call.LOAD, True)
                case ev.RefuseLoad():
                    self._answered(Call.LOAD, False)
                case ev.LeaveFunctions():
                    self.deeds.clear()
                    self.due.clear()

    def _answered(self, call: Call, answer: bool) -> None:
        if self.call is call and self.answer is None:
            self.answer = answer

    # QEMU

    def start(self, runstate: str) -> None:
        """A QEMU starts, with fresh functions behind it."""
        self.serial += 1
        self.alive, self.runstate, self.status, self.call, self.answer = True, runstate, "", None, None
        self.granted = runstate == "running"
        self.queue.clear()
        self.devices = {name: Device() for name in NAMES}
        for device in self.devices.values():
            device.live = runstate == "running"
        if not self.record.functions:
            self.record = VmRecord(functions=tuple(map(VmFunction, NAMES)), carrier=self.carrier)
        self.connect()

    def connect(self) -> None:
        """Its monitor comes."""
        self.monitor = True
        self.queue.clear()
        self.feed(ev.QemuCame(str(self.serial), self.runstate, self.status))

    def disconnect(self) -> None:
        """It goes, and what was not read yet with it."""
        self.monitor = False
        self.queue.clear()
        self.questions = 0
        self.feed(ev.MonitorLost())

    def end(self) -> None:
        """QEMU ends, and nothing of its functions can be reached any more."""
        self.alive, self.call, self.runstate = False, None, ""
        self.queue.clear()
        self.questions = self.replays = 0
        if self.monitor:
            self.disconnect()
        self.feed(ev.QemuGone())
        # What the fence does: they stand until another client resets them.
        for device in self.devices.values():
            device.runs, device.live = False, False

    def tell(self, event: ev.VmEvent) -> None:
        """QEMU sends an event."""
        if self.monitor:
            self.queue.append(event)

    def is_(self, status: str) -> None:
        """The migration has another status."""
        self.status = status
        self.tell(ev.MigrationIs(status))

    def stop(self, runstate: str) -> None:
        """The vCPUs stop."""
        if self.runs:
            self.tell(ev.Stopped())
        self.runstate = runstate

    def resume(self) -> None:
        """The vCPUs start."""
        self.runstate = "running"
        self.tell(ev.Resumed())

    def asks(self, call: Call) -> None:
        """The carrier is asked; the daemon reads what the monitor has told before."""
        self.call, self.answer = call, None
        self.read_all()
        self.feed(ev.CarrierSaves() if call is Call.SAVE else ev.CarrierLoads())

    def read(self) -> None:
        """The daemon reads one event."""
        if self.queue:
            self.feed(self.queue.pop(0))

    def read_all(self) -> None:
        """The daemon reads what is there."""
        while self.queue:
            self.read()

    # The daemon

    def work(self, index: int, fate: int) -> None:
        """One deed ends: done, failed, or failed and yet done."""
        deed = self.deeds.pop(index % len(self.deeds))
        if fate != 1 and self.alive:
            self.devices[deed.function].take(deed.deed)
        done: ev.VmEvent = ev.Did(deed.function, deed.deed)
        self.feed(done if fate == 0 else ev.Failed(deed.function, deed.deed, "no"))

    def answer_question(self) -> None:
        """QEMU says whether it runs; not while it waits for the carrier."""
        if self.questions and self.monitor and self.call is None:
            self.questions -= 1
            self.read_all()
            self.feed(ev.RunstateIs(self.runstate))

    def replayed(self, well: bool) -> None:
        """The replay was read back."""
        self.replays -= 1
        self.feed(ev.Replayed("" if well else "BAR 0"))

    def restart(self) -> None:
        """The daemon dies, and another one goes on; what was under way may have been done or not."""
        for deed in self.deeds[::2]:
            self.devices[deed.function].take(deed.deed)
        self.deeds.clear()
        self.due.clear()
        self.queue.clear()
        self.questions = self.replays = 0
        self.monitor = False
        self.record = VmRecord.from_json(self.record.to_json())
        if self.call is not None and self.answer is None:
            self.answer = False
        self.feed(ev.DaemonStarted())

    def quiet(self) -> None:
        """Everybody does what they owe."""
        if self.alive and not self.monitor:
            self.connect()
        for _ in range(60):
            self.read_all()
            for name in list(self.due):
                self.due.remove(name)
                self.feed(ev.Due(name))
            self.answer_question()
            if self.replays:
                self.replayed(True)
            if self.deeds:
                self.work(0, 0)


class Lives(RuleBasedStateMachine):
    """A VM's source and destination. Most of the time things go their way; now and then somebody disturbs them."""

    def __init__(self) -> None:
        super().__init__()
        self.source = Host(CarrierKind.DBUS_VMSTATE)
        self.destination = Host(CarrierKind.DBUS_VMSTATE)
        self.paused_start = False
        self.source.start("running")

    @property
    def hosts(self) -> list[Host]:
        """Both."""
        return [self.source, self.destination]

    @property
    def migrating(self) -> bool:
        """Whether a migration is under way."""
        return self.source.alive and self.source.status in {"setup", "active", "device"}

    @rule(early=st.booleans(), carried=st.sampled_from([True, True, True, False]))
    def forward(self, early: bool, carried: bool) -> None:
        """What comes next in a life without trouble, but for a carrier that may be missing."""
        source, destination = self.source, self.destination
        if not source.alive:
            if destination.alive:
                self._turn_round()
            else:
                source.start("running")
        elif not destination.alive:
            self._prepare(early)
        elif source.call is Call.SAVE:
            self._saved()
        elif destination.call is Call.LOAD:
            self._loaded()
        elif destination.runstate == "inmigrate":
            self._migrate() if not self.migrating else self._switch_over(carried)
        elif destination.runstate == "paused" and not source.runs:
            destination.resume()
        else:
            source.end()

    @rule(
        at_source=st.booleans(),
        count=st.integers(1, 6),
        index=st.integers(0, 3),
        fate=st.sampled_from([0, 0, 0, 0, 0, 0, 1, 2]),
    )
    def tend(self, at_source: bool, count: int, index: int, fate: int) -> None:
        """A daemon does some of what it has to; the first of it may fail."""
        host = self.source if at_source else self.destination
        for _ in range(count):
            host.read()
            if host.deeds:
                host.work(index, fate)
                fate = 0
            host.answer_question()
        if host.replays:
            host.replayed(True)

    @rule(
        at_source=st.booleans(),
        what=st.sampled_from(
            ["pause", "go on", "cancel", "die", "fail", "half", "again", "unreplayed", "lose", "restart"]
        ),
    )
    def disturb(self, at_source: bool, what: str) -> None:
        """Something comes between."""
        host = self.source if at_source else self.destination
        idle = self.source.alive and self.source.call is None and self.source.status != "device"
        match what:
            case "pause" if idle and self.source.runs:
                self.source.stop("paused")
            case "go on" if idle and self.source.runstate == "paused":
                self.source.resume()
            case "go on" if idle and self.source.runstate == "postmigrate" and not self.destination.alive:
                self.source.resume()
            case "cancel" if self.migrating and self.source.call is None and self.destination.call is None:
                self._fail("cancelling", "cancelled")
            case "die" if host.alive:
                self._die(host)
            case "fail" | "half" if host.deeds:
                host.work(0, 1 if what == "fail" else 2)
            case "again" if host.due:
                host.feed(ev.Due(host.due.pop(0)))
            case "unreplayed" if host.replays:
                host.replayed(False)
            case "lose" if host.alive and host.monitor:
                host.disconnect()
            case "lose" if host.alive and host.call is None:
                host.connect()
            case "restart" if host.alive:
                host.restart()

    def _prepare(self, early: bool) -> None:
        """A destination is started; a source that has moved is taken back first, or ends."""
        if self.source.runstate == "postmigrate":
            self.source.resume() if early else self.source.end()
        else:
            self.paused_start = early
            self.source.status = self.source.status if self.source.status != "device" else ""
            self.destination.start("inmigrate")

    def _migrate(self) -> None:
        for host in self.hosts:
            host.is_("setup")
            host.is_("active")

    def _switch_over(self, carried: bool) -> None:
        """The source stops, and asks for the state, if there is a carrier."""
        self.source.was_running = self.source.runs
        self.source.stop("finish-migrate")
        self.source.is_("device")
        if carried:
            self.source.asks(Call.SAVE)
        else:
            self._complete()

    def _saved(self) -> None:
        """The source has its answer, and the destination asks for the load, or the source fails."""
        if self.source.answer is None:
            return
        self.source.call = None
        if not self.source.answer or self.destination.runstate != "inmigrate":
            self._fail()
        else:
            self.destination.asks(Call.LOAD)

    def _loaded(self) -> None:
        """The destination has its answer, and both complete, or both fail."""
        if self.destination.answer is None:
            return
        self.destination.call = None
        if not self.destination.answer:
            self._fail()
        else:
            self._complete()

    def _complete(self) -> None:
        if self.paused_start:
            self.destination.runstate = "paused"
        else:
            self.destination.resume()
        self.destination.is_("completed")
        self.source.runstate = "postmigrate"
        self.source.is_("completed")

    def _fail(self, first: str = "failing", last: str = "failed") -> None:
        """The source gets its VM back, and the destination ends."""
        if self.migrating:
            self.source.is_(first)
            if self.source.runstate == "finish-migrate":
                if self.source.was_running:
                    self.source.resume()
                else:
                    self.source.runstate = "paused"
            self.source.is_(last)
        if self.destination.alive and self.destination.runstate == "inmigrate":
            self.destination.is_("failed")
            self.destination.read_all()
            self.destination.end()

    def _die(self, host: Host) -> None:
        host.end()
        if host is self.destination:
            if self.migrating and self.source.call is None:
                self._fail()
        elif self.destination.alive and self.destination.runstate == "inmigrate":
            self._fail()

    def _turn_round(self) -> None:
        """The next migration is from where it is."""
        if self.destination.runstate in {"running", "paused"}:
            self.source, self.destination = self.destination, self.source
            self.source.status = ""

    # What must be true

    @invariant()
    def never_two(self) -> None:
        """A function with the guest's state runs on one side only."""
        for name in NAMES:
            running = [
                host for host in self.hosts if host.devices and host.devices[name].runs and host.devices[name].live
            ]
            assert len(running) <= 1, f"two copies of {name} run"

    @invariant()
    def never_without_its_state(self) -> None:
        """A function that may run has its state."""
        for host in self.hosts:
            if host.record.phase in {VmPhase.RUNNING, VmPhase.ARMED}:
                assert all(device.live for device in host.devices.values()) or not host.alive

    def teardown(self) -> None:
        """It ends well, whatever came before."""
        self.quiet()

    @rule()
    def quiet(self) -> None:
        """Once everybody has done what they owe, the functions follow their VM."""
        for host in self.hosts:
            host.quiet()
        for host in self.hosts:
            if not host.alive or host.call is not None:
                continue
            whole = all(device.live and not device.barred for device in host.devices.values())
            if host.runs and whole and host.record.phase is not VmPhase.BARRED:
                assert all(device.runs for device in host.devices.values()), host.record
            if host.record.phase is VmPhase.BARRED:
                assert not any(device.runs for device in host.devices.values())
            if host.runstate == "postmigrate":
                assert not any(device.runs for device in host.devices.values())


Lives.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestLives = Lives.TestCase
