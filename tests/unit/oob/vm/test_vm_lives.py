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
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vfiouser_oob.vm import events as ev
from vfiouser_oob.vm.machine import advance
from vfiouser_oob.vm.record import Carrier, Deed, Function, Phase, Place, Record

NAMES = ("f0", "f1")


class Device:
    """What a function really does."""

    def __init__(self) -> None:
        self.runs = True
        #: It has the guest's state.
        self.live = False
        self.barred = False

    def take(self, deed: Deed) -> None:
        """Do it."""
        match deed:
            case Deed.STOP:
                self.runs = False
            case Deed.LOAD:
                self.runs, self.live = False, True
            case Deed.RESUME:
                assert not self.barred
                self.runs = True
            case Deed.BAR:
                self.runs, self.barred = False, True
            case Deed.SAVE:
                assert not self.runs, "saved while it runs"


class Call(Enum):
    """What the carrier waits for."""

    SAVE = "save"
    LOAD = "load"


@dataclass
class Host:
    """A QEMU, the daemon beside it, and the functions."""

    carrier: Carrier
    serial: int = 0
    record: Record = field(default_factory=Record)
    devices: dict[str, Device] = field(default_factory=dict)
    # QEMU
    alive: bool = False
    runstate: str = ""
    status: str = ""
    monitor: bool = False
    queue: list[ev.Event] = field(default_factory=list)
    call: Call | None = None
    answer: bool | None = None
    was_running: bool = True
    # Effects that are still to be carried out.
    deeds: list[ev.Do] = field(default_factory=list)
    due: list[str] = field(default_factory=list)
    questions: int = 0
    replays: int = 0

    @property
    def runs(self) -> bool:
        """Whether the VM does."""
        return self.alive and self.runstate == "running"

    def feed(self, event: ev.Event) -> None:
        """The daemon takes an event."""
        self.record, effects = advance(self.record, event)
        assert self.record == Record.from_json(self.record.to_json()) or any(f.waits for f in self.record.functions)
        for effect in effects:
            match effect:
                case ev.Do():
                    self.deeds.append(effect)
                case ev.Later(function=name):
                    self.due.append(name)
                case ev.AskRunstate():
                    self.questions += 1
                case ev.Replay():
                    self.replays += 1
                case ev.AnswerSave():
                    self._answered(Call.SAVE, True)
                case ev.RefuseSave():
                    self._answered(Call.SAVE, False)
                case ev.AnswerLoad():
                    self._answered(Call.LOAD, True)
                case ev.RefuseLoad():
                    self._answered(Call.LOAD, False)
                case ev.Leave():
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
        self.queue.clear()
        self.devices = {name: Device() for name in NAMES}
        for device in self.devices.values():
            device.live = runstate == "running"
        if not self.record.functions:
            self.record = Record(functions=tuple(map(Function, NAMES)), carrier=self.carrier)
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

    def tell(self, event: ev.Event) -> None:
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
        self.feed(ev.SaveAsked() if call is Call.SAVE else ev.LoadAsked())

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
        done: ev.Event = ev.Did(deed.function, deed.deed)
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
        self.record = Record.from_json(self.record.to_json())
        if self.call is not None and self.answer is None:
            self.answer = False
        self.feed(ev.Started())

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
    """A VM's source and destination."""

    def __init__(self) -> None:
        super().__init__()
        self.source = Host(Carrier.DBUS_VMSTATE)
        self.destination = Host(Carrier.DBUS_VMSTATE)
        self.paused_start = False
        self.source.start("running")

    @property
    def hosts(self) -> list[Host]:
        """Both."""
        return [self.source, self.destination]

    def _migrating(self) -> bool:
        return self.source.status in {"setup", "active", "device"}

    # Users

    @rule(early=st.booleans(), carrier=st.sampled_from(Carrier))
    @precondition(lambda self: self.source.alive and not self._migrating() and not self.destination.alive)
    def prepare(self, early: bool, carrier: Carrier) -> None:
        """A destination is started."""
        if self.source.runstate in {"postmigrate"} or self.source.status == "completed":
            return
        self.paused_start = early
        self.destination.start("inmigrate")

    @rule()
    @precondition(
        lambda self: (
            self.source.alive
            and self.destination.alive
            and self.destination.runstate == "inmigrate"
            and self.destination.status == ""
            and not self._migrating()
            and self.source.runstate in {"running", "paused"}
        )
    )
    def migrate(self) -> None:
        """A migration begins."""
        for host in self.hosts:
            host.is_("setup")
            host.is_("active")

    @rule()
    @precondition(lambda self: self.source.alive and self.source.call is None and self.source.status != "device")
    def pause(self) -> None:
        """A user pauses the source."""
        if self.source.runs:
            self.source.stop("paused")

    @rule()
    @precondition(lambda self: self.source.alive and self.source.call is None and self.source.status != "device")
    def go_on(self) -> None:
        """A user resumes the source; after it has moved, only if the destination has gone."""
        if self.source.runstate == "paused" or (self.source.runstate == "postmigrate" and not self.destination.alive):
            self.source.resume()

    # QEMU

    @rule()
    @precondition(lambda self: self.source.status == "active" and self.source.alive and self.destination.alive)
    def switch_over(self) -> None:
        """The source stops, and asks for the state."""
        self.source.was_running = self.source.runs
        self.source.stop("finish-migrate")
        self.source.is_("device")
        self.source.asks(Call.SAVE)

    @rule()
    @precondition(lambda self: self.source.call is Call.SAVE and self.source.answer is not None)
    def saved(self) -> None:
        """The source has its answer, and the destination asks for the load, or the source fails."""
        self.source.call = None
        if not self.source.answer or not self.destination.alive or self.destination.runstate != "inmigrate":
            self._fail()
            return
        self.destination.asks(Call.LOAD)

    @rule()
    @precondition(lambda self: self.destination.call is Call.LOAD and self.destination.answer is not None)
    def loaded(self) -> None:
        """The destination has its answer, and both complete, or both fail."""
        self.destination.call = None
        if not self.destination.answer or self.source.status != "device":
            self._fail()
            return
        if self.paused_start:
            self.destination.runstate = "paused"
        else:
            self.destination.resume()
        self.destination.is_("completed")
        if self.source.alive:
            self.source.runstate = "postmigrate"
            self.source.is_("completed")

    @rule()
    @precondition(lambda self: self.destination.alive and self.destination.runstate == "paused")
    def cont(self) -> None:
        """The destination is told to run, by whoever knows that the source does not."""
        if not self.source.runs:
            self.destination.resume()

    @rule()
    @precondition(lambda self: self.source.alive and self._migrating() and self.source.call is None)
    def cancel(self) -> None:
        """The migration is cancelled, at any time before it was completed."""
        self._fail("cancelling", "cancelled")

    def _fail(self, first: str = "failing", last: str = "failed") -> None:
        if self.source.alive and self._migrating():
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

    @rule()
    @precondition(lambda self: self.destination.alive)
    def destination_dies(self) -> None:
        """The destination is killed."""
        self.destination.end()
        if self.source.alive and self._migrating() and self.source.call is None:
            self._fail()

    @rule()
    @precondition(lambda self: self.source.alive and (self.destination.alive or not self._migrating()))
    def source_dies(self) -> None:
        """The source is killed; a destination that has everything is completed, another one fails."""
        self.source.end()
        self.source.status = ""
        if self.destination.alive and self.destination.runstate == "inmigrate":
            if self.destination.call is None:
                self._fail()
        elif self.destination.alive:
            self._swap()

    @rule()
    @precondition(lambda self: not self.source.alive and not self.destination.alive)
    def start_anew(self) -> None:
        """Everything has ended, and the VM is started again."""
        self.source.start("running")

    @rule()
    @precondition(lambda self: not self.source.alive and self.destination.alive)
    def go_the_other_way(self) -> None:
        """The next migration is from where it is."""
        if self.destination.runstate in {"running", "paused"} and self.destination.call is None:
            self._swap()

    def _swap(self) -> None:
        self.source, self.destination = self.destination, self.source

    # Daemons

    @rule(at_source=st.booleans())
    def read(self, at_source: bool) -> None:
        """A daemon reads an event."""
        self._host(at_source).read()

    @rule(at_source=st.booleans(), index=st.integers(0, 3), fate=st.sampled_from([0, 0, 0, 1, 2]))
    def work(self, at_source: bool, index: int, fate: int) -> None:
        """A deed ends."""
        host = self._host(at_source)
        if host.deeds:
            host.work(index, fate)

    @rule(at_source=st.booleans())
    def try_again(self, at_source: bool) -> None:
        """An attempt is due."""
        host = self._host(at_source)
        if host.due:
            host.feed(ev.Due(host.due.pop(0)))

    @rule(at_source=st.booleans())
    def answer(self, at_source: bool) -> None:
        """QEMU answers."""
        self._host(at_source).answer_question()

    @rule(at_source=st.booleans(), well=st.sampled_from([True, True, True, False]))
    def replayed(self, at_source: bool, well: bool) -> None:
        """A replay was read back."""
        host = self._host(at_source)
        if host.replays:
            host.replayed(well)

    @rule(at_source=st.booleans())
    def lose_monitor(self, at_source: bool) -> None:
        """A monitor's connection ends."""
        host = self._host(at_source)
        if host.monitor and host.alive:
            host.disconnect()

    @rule(at_source=st.booleans())
    def connect(self, at_source: bool) -> None:
        """QEMU comes back, if it is not waiting for the carrier."""
        host = self._host(at_source)
        if host.alive and not host.monitor and host.call is None:
            host.connect()

    @rule(at_source=st.booleans())
    def restart(self, at_source: bool) -> None:
        """A daemon is started anew."""
        host = self._host(at_source)
        if host.alive:
            host.restart()

    def _host(self, at_source: bool) -> Host:
        return self.source if at_source else self.destination

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
        """A function whose VM runs here after it came has its state, or is being barred."""
        for host in self.hosts:
            if host.record.phase in {Phase.RUNNING, Phase.ARMED}:
                for name, device in host.devices.items():
                    function = host.record.function(name)
                    assert device.live or not host.alive or function is None or function.place is Place.FRESH

    @rule()
    def quiet(self) -> None:
        """Once everybody has done what they owe, the functions follow their VM."""
        for host in self.hosts:
            host.quiet()
        for host in self.hosts:
            if not host.alive or host.call is not None:
                continue
            whole = all(device.live and not device.barred for device in host.devices.values())
            if host.runs and whole and host.record.phase is not Phase.BARRED:
                assert all(device.runs for device in host.devices.values()), host.record
            if host.record.phase is Phase.BARRED:
                assert not any(device.runs for device in host.devices.values())
            if host.runstate == "postmigrate":
                assert not any(device.runs for device in host.devices.values())


Lives.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestLives = Lives.TestCase
