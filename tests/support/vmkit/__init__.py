"""A VM in memory: its QEMU's monitor, its carrier and its functions, each a real implementation of its interface."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from typing import Any

import trio
import trio.testing

from vfiouser_oob.config.vms import VmConfig
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.server.ledger import Ledger
from vfiouser_oob.transport.peer import Peer
from vfiouser_oob.vm.bundle import FunctionState
from vfiouser_oob.vm.carriers.at_desk import CarrierAtDesk
from vfiouser_oob.vm.carriers.desk import Answer
from vfiouser_oob.vm.carriers.interface import (
    CarrierEvent,
    Lost,
    MonitorCommand,
    QemuAttached,
    Question,
    WrittenPagesLog,
)
from vfiouser_oob.vm.counterpart import FunctionOffer
from vfiouser_oob.vm.monitor import ANSWER_S, Found, GoneError, RefusedError
from vfiouser_oob.vm.movable import FunctionTrouble, VmMonitor
from vfiouser_oob.vm.notes import VmNotes
from vfiouser_oob.vm.preflight import FunctionFacts
from vfiouser_oob.vm.qmp import QmpEvent, QmpGreeting
from vfiouser_oob.vm.record import CarrierKind, Deed
from vfiouser_oob.vm.runner import VmRunner
from vfiouser_protocol.errors import CommandError
from vmkit.keeping import KeepingManager

__all__ = ["InMemoryFunction", "MemoryCarrier", "MemoryMonitor", "VmBed", "vm_bed"]

QEMU = Peer(1000, 0, 0, "qemu")
#: What QEMU says of itself, so that nothing is in the way of a migration.
ANSWERS: Mapping[str, Any] = {
    "query-migrate-capabilities": [{"capability": "return-path", "state": True}],
    "query-migrate": {},
    "migrate_cancel": {},
    "object-add": {},
    "human-monitor-command": "",
    "query-pci": [{"devices": [{"qdev_id": f"f{n}", "bus": 0, "slot": 4 + n, "function": 0} for n in range(2)]}],
}
DEVICES = {"f0": "vfio-user-pci", "f1": "vfio-user-pci", "oobcompanion": "vhost-user-fs-pci"}
OBJECTS = {"/objects": {"oobvmstate": "dbus-vmstate"}, "/machine/peripheral": DEVICES}
#: What the VM does after an event.
AFTER = {"STOP": "finish-migrate", "RESUME": "running"}


class MemoryMonitor:
    """A monitor whose QEMU is the test.

    Args:
        runstate: what it is doing.
        migration: the status of its migration.
    """

    def __init__(self, runstate: str = "running", migration: str = "") -> None:
        self.peer: Peer | None = QEMU
        self.greeting = QmpGreeting((11, 1, 3))
        self.found = Found(runstate, migration)
        self.answers: dict[str, Any] = {**ANSWERS, "query-status": {"status": runstate}}
        self.commands: list[str] = []
        self._send, self._receive = trio.open_memory_channel[QmpEvent](math.inf)

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, seconds: float = ANSWER_S
    ) -> Any:
        """Answer by the table."""
        await trio.lowlevel.checkpoint()
        self.commands.append(command)
        if command == "qom-list" and arguments is not None:
            return [{"name": name, "type": f"child<{kind}>"} for name, kind in OBJECTS[arguments["path"]].items()]
        if command == "qom-get" and arguments is not None:
            return {"addr": 32, "parent_bus": "/machine/q35/pcie.0", "MCFG": 0xB000_0000}[arguments["property"]]
        if command not in self.answers:
            raise RefusedError(command, "CommandNotFound", "there is none")
        return self.answers[command]

    async def hmp(self, line: str, *, seconds: float = ANSWER_S) -> str:
        """Note the line."""
        await trio.lowlevel.checkpoint()
        self.commands.append(line)
        return ""

    def say(self, name: str, **data: Any) -> None:
        """QEMU tells something."""
        if name in AFTER:
            self.answers["query-status"] = {"status": AFTER[name]}
        self._send.send_nowait(QmpEvent(name, data, 1000.0))

    def lose(self) -> None:
        """The connection ends."""
        self._send.close()

    async def next_event(self) -> QmpEvent:
        """Wait for what QEMU tells."""
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise GoneError("the test has lost it") from None

    def pending_events(self) -> list[QmpEvent]:
        """What it has told already."""
        found = []
        try:
            while True:
                found.append(self._receive.receive_nowait())
        except (trio.WouldBlock, trio.EndOfChannel):
            return found


class MemoryCarrier(CarrierAtDesk):
    """A carrier whose QEMU is the test.

    Args:
        name: what it is called.
        most_bytes: of the largest state.
    """

    def __init__(self, name: str, most_bytes: int = 1 << 20) -> None:
        super().__init__()
        self.name = name
        self.most_bytes = most_bytes
        self.expects: int | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """There is nobody to serve."""
        task_status.started()
        await trio.sleep_forever()

    def expect(self, most_bytes: int) -> None:
        """Note it."""
        self.expects = most_bytes

    def reset(self) -> None:
        """Forget it."""
        self.expects = None
        self._desk.withdraw("given up")

    def repair(self) -> tuple[MonitorCommand, ...]:
        """One command."""
        return (MonitorCommand("object-add", {"id": self.name}),)

    # What QEMU does

    async def tell(self, *events: CarrierEvent) -> None:
        """Tell something."""
        for event in events:
            await self._desk.tell(event)
        await trio.testing.wait_all_tasks_blocked()

    def delivers(self, on_its_way: bool) -> None:
        """Whether QEMU is still taking the state."""
        (self._desk.gives if on_its_way else self._desk.gave)()

    async def ask(self, question: Question) -> Answer:
        """Ask, and wait for the answer."""
        return await self._desk.ask(question)


class InMemoryFunction:
    """A function that does what it is told, unless it shall fail.

    Args:
        name: its name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.runs = True
        self.state = f"the state of {name}".encode()
        #: Whether this side may run it: it never left, or has come.
        self.recorded = False
        self.handed_over = False
        self.barred = ""
        self.deeds: list[Deed] = []
        #: What fails, and how often.
        self.fails: dict[Deed, int] = {}
        #: What is not done before the test says so.
        self.held: dict[Deed, trio.Event] = {}
        self.unreplayed = ""
        #: Whether each replay was only read back.
        self.replays: list[bool] = []
        self.verified = trio.Event()
        self.verified.set()
        self.held_back = False
        self.log: WrittenPagesLog | None = None
        self.unarmed = ""
        self.began: float | None = None
        self.loaded: FunctionState | None = None
        self.unfit = ""

    async def _do(self, deed: Deed) -> None:
        await trio.lowlevel.checkpoint()
        if deed in self.held:
            await self.held[deed].wait()
        self.deeds.append(deed)
        if self.fails.get(deed, 0):
            self.fails[deed] -= 1
            raise CommandError("because the test says so")

    def facts(self) -> FunctionFacts:
        """It can migrate, unless it cannot."""
        return FunctionFacts(self.name, unfit=self.unfit)

    async def offer(self, deadline: float) -> FunctionOffer:
        """Nobody asks."""
        raise AssertionError("asked what this host says of it")

    async def watch(self, *, coming: bool) -> None:
        """What it writes is known as long as this lasts."""
        try:
            await trio.sleep_forever()
        finally:
            self.recorded = self.held_back = False

    async def arm(self, monitor: VmMonitor, began: float | None) -> None:
        """Note that it is recorded."""
        await trio.lowlevel.checkpoint()
        if self.unarmed:
            raise FunctionTrouble(self.unarmed)
        self.recorded, self.began = True, began

    async def disarm(self) -> None:
        """Note that it is not any more."""
        await trio.lowlevel.checkpoint()
        self.recorded = self.held_back = False

    def use_log(self, log: WrittenPagesLog | None) -> None:
        """Tell it what is written."""
        self.log = log

    def hold(self) -> None:
        """Note it."""
        assert self.runs
        self.held_back = True

    async def stop(self) -> None:
        """Stand."""
        await self._do(Deed.STOP)
        if self.log is not None:
            self.log.mark(0x1000, 4096)
        self.runs = False

    async def save(self) -> FunctionState:
        """Give the state."""
        assert not self.runs
        await self._do(Deed.SAVE)
        return FunctionState(self.name, self.state)

    def handed(self) -> None:
        """Note it."""
        self.handed_over = True

    async def load(self, state: FunctionState) -> None:
        """Take the state."""
        self.runs = False
        await self._do(Deed.LOAD)
        self.loaded, self.state = state, state.stream

    def replay(self, state: FunctionState, *, sent: bool = False) -> InMemoryFunction:
        """The replay is judged when the test says so."""
        assert self.loaded is not None
        assert self.loaded.registers == state.registers
        self.replays.append(sent)
        return self

    async def finish(self, may_write: Callable[[], bool]) -> None:
        """Say what is wrong."""
        await self.verified.wait()
        if self.unreplayed:
            raise FunctionTrouble(self.unreplayed)

    async def resume(self) -> None:
        """Run."""
        assert not self.barred
        await self._do(Deed.RESUME)
        self.runs, self.handed_over = True, False

    async def bar(self, reason: str) -> None:
        """Never run."""
        await self._do(Deed.BAR)
        self.runs, self.barred = False, reason


class VmBed:
    """A running VM.

    Args:
        functions: its functions.
        kinds: what may carry their states.
    """

    def __init__(self, functions: Sequence[InMemoryFunction], kinds: Sequence[CarrierKind]) -> None:
        self.functions = functions
        self._kinds = kinds
        #: Where QEMU and the daemons live.
        self.nursery: trio.Nursery
        self._daemon: trio.Nursery
        self._config = VmConfig(name="vm", functions=tuple(function.name for function in functions))
        self._manager = KeepingManager()
        self._ledger: Ledger | None
        self._notes: VmNotes
        self.monitor: MemoryMonitor
        self.carriers: dict[CarrierKind, MemoryCarrier]
        self.runner: VmRunner

    async def begin(self) -> None:
        """A daemon begins, with what the one before it has left."""
        self.carriers = {kind: MemoryCarrier(kind.value) for kind in self._kinds}
        with self._manager.daemon() as survival:
            self._ledger = survival.ledger_of("vm")
            self._notes = VmNotes(self._config, self._ledger, log.get("vm"))
        self.runner = VmRunner(self._config, self.functions, self.carriers, EventHub(), self._notes)
        await self.nursery.start(self._live)

    async def _live(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as self._daemon:
            await self._daemon.start(self.runner.run)
            task_status.started()

    async def kill(self) -> None:
        """The daemon ends as it is; functions and QEMU stay as they are."""
        assert self._ledger is not None
        self._notes.close()
        self._daemon.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        self._ledger.close()
        for function in self.functions:
            function.recorded = function.held_back = False
            function.held.clear()

    def close(self) -> None:
        """Give up what is kept."""
        assert self._ledger is not None
        self._ledger.close()
        self._manager.close()

    @property
    def phase(self) -> str:
        """Where the VM is."""
        return self.runner.record.phase.value

    @property
    def runs(self) -> list[bool]:
        """Which of the functions do."""
        return [function.runs for function in self.functions]

    async def qemu(
        self,
        runstate: str = "running",
        *,
        kind: CarrierKind = CarrierKind.DBUS_VMSTATE,
        qemu: str = "1",
        migration: str = "",
        carrier: bool = True,
    ) -> None:
        """A QEMU comes with its carrier and its monitor, or its monitor comes back."""
        if self.runner.record.qemu != qemu:
            for function in self.functions:  # it is another client, for which they are reset
                function.barred, function.runs = "", True
        if carrier:
            await self.attaches(kind)
        self.monitor = MemoryMonitor(runstate, migration)
        self._daemon.start_soon(self.runner.attend, self.monitor, qemu)
        await trio.testing.wait_all_tasks_blocked()

    async def says(self, *events: str) -> None:
        """QEMU tells events: STOP, RESUME, or the status of a migration."""
        for event in events:
            if event.isupper():
                self.monitor.say(event)
            else:
                self.monitor.say("MIGRATION", status=event)
        await trio.testing.wait_all_tasks_blocked()

    def asks(self, question: Question, *, kind: CarrierKind = CarrierKind.DBUS_VMSTATE) -> list[Answer]:
        """QEMU asks; the answer is put into the list."""
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await self.carriers[kind].ask(question))

        self.nursery.start_soon(ask)
        return answers

    async def attaches(self, kind: CarrierKind = CarrierKind.DBUS_VMSTATE) -> None:
        """QEMU connects its end of the carrier."""
        await self.carriers[kind].tell(QemuAttached(QEMU))

    async def loses_carrier(self, kind: CarrierKind = CarrierKind.DBUS_VMSTATE) -> None:
        """QEMU's end of the carrier goes."""
        await self.carriers[kind].tell(Lost("the test says so"))


@asynccontextmanager
async def vm_bed(*names: str, kinds: Sequence[CarrierKind] = (CarrierKind.DBUS_VMSTATE,)) -> AsyncIterator[VmBed]:
    """A VM of which no QEMU has connected yet."""
    functions = [InMemoryFunction(name) for name in names or ("f0", "f1")]
    with closing(VmBed(functions, kinds)) as bed:
        async with trio.open_nursery() as bed.nursery:
            await bed.begin()
            yield bed
            bed.nursery.cancel_scope.cancel()
