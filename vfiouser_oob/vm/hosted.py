"""A function of this daemon, as its VM's migration moves it: by the transfer, and by its client's messages."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial

import trio

from vfiouser_agents.errors import AgentError
from vfiouser_oob.migration.attached_device import AttachedDevice
from vfiouser_oob.migration.descriptor import decode_descriptor
from vfiouser_oob.migration.message_time import message_deadline
from vfiouser_oob.migration.record import Owner
from vfiouser_oob.migration.runner import MigrationRunner
from vfiouser_oob.migration.transfer import Transfer
from vfiouser_oob.server.connection import ClientConnection
from vfiouser_oob.server.function import Function
from vfiouser_oob.vm.agent_reports import AgentReports
from vfiouser_oob.vm.bundle import FunctionState
from vfiouser_oob.vm.carriers.interface import WrittenPagesLog
from vfiouser_oob.vm.counterpart import FunctionOffer
from vfiouser_oob.vm.monitor import MonitorError
from vfiouser_oob.vm.movable import FunctionTrouble, Replaying, VmMonitor
from vfiouser_oob.vm.page_contents import PageContents
from vfiouser_oob.vm.preflight import FunctionFacts
from vfiouser_oob.vm.registers import FunctionRegisters, RegisterReader, RegistersUnknown
from vfiouser_oob.vm.replaying import ReplayFailed, ReplayUnderWay, replay_of
from vfiouser_oob.vm.topology import TopologyError
from vfiouser_oob.vm.untracked import FunctionMemory, UntrackedRefused
from vfiouser_protocol.constants import DeviceState, IrqIndex, IrqSetFlags
from vfiouser_protocol.errors import CommandError, VfioUserError
from vfiouser_protocol.messages import SetIrqs
from vfiouser_protocol.migration_v2 import require_path

#: Bytes of the stream that are read or written at once.
_PIECE = 1 << 20
#: Seconds that QEMU may take to answer while its vCPUs stand: it may be unable to answer anything.
STANDING_S = 0.01
#: Seconds between attempts to have a function run that was stopped for a moment only, to reach its agent, or to find a
#: function that is not served.
_AGAIN_S = 0.2
#: Seconds that it may take until a client that is there is watched, at the beginning or after a restart.
_WATCH_S = 2.0
_SET_IRQS_SIZE = 20


@contextmanager
def _told() -> Iterator[None]:
    """Whatever is in the way, as one kind of error."""
    try:
        yield
    except (UntrackedRefused, RegistersUnknown, ReplayFailed, TopologyError, MonitorError) as error:
        raise FunctionTrouble(str(error)) from error


def _watchable(function: Function) -> bool:
    """Whether there is a client for which it can be known what a function writes."""
    device = None if function.migration is None else function.migration.steps.device
    return device is not None and function.attached is not None and device.session.memory.recorder is not None


class _Watched:
    """A function with the client that it has.

    Args:
        name: the function's.
        connection: the client's.
        device: the function's, as that client has it.
        reports: who knows what it writes unseen by us; None if nobody does.
    """

    def __init__(
        self, name: str, connection: ClientConnection, device: AttachedDevice, reports: AgentReports | None
    ) -> None:
        self.connection = connection
        self.memory = FunctionMemory(name, device.session, reports=reports, inherited=connection.inherited)
        self.registers = RegisterReader(name, device.session, device.shadow, connection.link)
        #: Ends the watching of its registers.
        self.armed: trio.CancelScope | None = None


class HostedFunction:
    """One function of a VM.

    Args:
        name: its name.
        find: finds it among those that are served; None if it is not.
        untracked_max: bytes of guest memory that may travel with its state.
        came: its state has come to a daemon before this one, and it has not run since.
    """

    def __init__(
        self, name: str, find: Callable[[str], Function | None], untracked_max: int, *, came: bool = False
    ) -> None:
        self.name = name
        self._find = find
        self._untracked_max = untracked_max
        self._now: _Watched | None = None
        self._seen = trio.Event()
        #: QEMU's log, which may be there before anything is watched.
        self._log: WrittenPagesLog | None = None
        self._nursery: trio.Nursery
        #: Whether what is to run came from another host, so that the guest may wait for an interrupt that was lost.
        self._came = came

    # What it consists of now

    @property
    def _function(self) -> Function:
        function = self._find(self.name)
        if function is None:
            raise CommandError("it is not served any more", errno.ENODEV)
        return function

    @property
    def _runner(self) -> MigrationRunner:
        migration = self._function.migration
        if migration is None:
            raise CommandError("it has no agent, so it cannot be migrated", errno.ENOTSUP)
        return migration

    @property
    def _device(self) -> AttachedDevice:
        device = self._runner.steps.device
        if device is None or self._function.attached is None:
            raise CommandError("no QEMU uses it", errno.ENODEV)
        return device

    @property
    def _watched(self) -> _Watched:
        if self._now is None or self._now.connection is not self._function.connection:
            raise CommandError("the daemon did not watch its DMA for this QEMU", errno.ENODEV)
        return self._now

    @property
    def _transfer(self) -> Transfer:
        return Transfer(self._runner, Owner.CARRIER)

    @property
    def by_client(self) -> bool:
        """Whether its client moves it by itself."""
        function = self._find(self.name)
        return function is not None and function.migration is not None and function.migration.record.moved_by_client

    async def _go(self, state: DeviceState) -> None:
        await self._transfer.request(partial(require_path, target=state, precopy=False))

    def facts(self) -> FunctionFacts:
        """What is known of it, for the judgement whether it can migrate."""
        function = self._find(self.name)
        if function is None:
            return FunctionFacts(self.name, attached=False)
        runner = function.migration
        unfit = "it has no agent" if runner is None else runner.record.blocked or ""
        if runner is not None and runner.link.caps is not None and not runner.link.caps.stop_copy:
            unfit = "its agent cannot save its state"
        if not unfit and self._now is not None:
            unfit = self._now.memory.refusal
        return FunctionFacts(
            self.name,
            attached=function.attached is not None,
            unfit=unfit or function.failed or "",
            away=runner is not None and runner.link.away_since is not None,
            by_client=self.by_client,
        )

    async def offer(self, deadline: float) -> FunctionOffer:
        """What this host says of it to another one; asks its agent."""
        try:
            runner = self._runner
            descriptor = decode_descriptor(await runner.steps.describe(deadline))
        except (CommandError, AgentError) as error:
            return FunctionOffer(problem=str(error))
        if runner.record.begun is None and not runner.record.logging:  # else its session is needed
            runner.link.close()
        caps = runner.link.caps
        return FunctionOffer(descriptor, () if caps is None else tuple(caps.formats))

    # While the VM runs

    async def watch(self, *, coming: bool) -> None:
        """Know at any time what it writes, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            while True:
                with suppress(VfioUserError, trio.TooSlowError):  # a migration would be refused
                    await self._watch_client(coming)
                await self._chance()

    async def _chance(self) -> None:
        """Wait until it may be possible to watch: until another client comes, where only that can help."""
        function = self._find(self.name)
        if function is not None and not function.retired and not _watchable(function):
            await function.changed()
        else:
            await trio.sleep(_AGAIN_S)

    async def _watch_client(self, coming: bool) -> None:
        device, connection = self._device, self._function.connection
        assert connection is not None
        if device.session.memory.recorder is None:
            raise CommandError("the daemon does not record what it writes for this client", errno.ENOTSUP)
        reports = None if coming or self.by_client else await self._reports(device)
        self._now = _Watched(self.name, connection, device, reports)
        if self._log is not None:
            self._now.memory.use_log(self._log)
        self._seen.set()
        self._seen = trio.Event()
        try:
            await self._now.memory.watch()
            await trio.sleep_forever()
        finally:
            self._now = None
            if reports is not None:
                with trio.move_on_after(self._runner.config.call_s, shield=True), suppress(VfioUserError):
                    await device.dirty.reclaim(message_deadline())

    async def _reports(self, device: AttachedDevice) -> AgentReports | None:
        if device.session.device_seen:
            return None
        with trio.fail_after(self._runner.config.call_s):
            if self._runner.link.caps is None:  # nobody may have asked yet since the daemon was started anew
                with suppress(AgentError, CommandError):
                    await self._runner.steps.describe(message_deadline())
            caps = self._runner.link.caps
            return await AgentReports.begin(device) if caps is not None and caps.dirty else None

    # A migration

    async def arm(self, monitor: VmMonitor, began: float | None) -> None:
        """Keep what it writes and what QEMU keeps of it, until it is disarmed."""
        if self.by_client:
            return
        await self._beginning_of_watch()
        watched = self._watched
        with _told():
            await watched.registers.locate(monitor)
            if watched.armed is None:
                watched.armed = trio.CancelScope()
                self._nursery.start_soon(self._watch_registers, watched.registers, watched.armed)
            await watched.memory.arm(began, self._still)

    async def _beginning_of_watch(self) -> None:
        """Wait until it is watched, if it can be: a migration may be under way when the daemon begins."""
        function = self._find(self.name)
        if self._now is None and function is not None and _watchable(function):
            with trio.move_on_after(_WATCH_S):
                await self._seen.wait()

    async def _watch_registers(self, registers: RegisterReader, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                with suppress(VfioUserError):
                    await registers.watch()
                await trio.sleep(_AGAIN_S)

    @asynccontextmanager
    async def _still(self) -> AsyncIterator[None]:
        """Have it stand for a moment while the VM runs; it runs again, whatever happens."""
        await self._go(DeviceState.STOP)
        try:
            yield
        finally:
            while True:
                try:
                    await self._go(DeviceState.RUNNING)
                    break
                except VfioUserError:
                    await trio.sleep(_AGAIN_S)

    async def disarm(self) -> None:
        """Go on as before the migration."""
        watched = self._now
        if watched is None or watched.armed is None:
            return
        watched.armed.cancel()
        watched.armed = None
        await watched.memory.disarm(self._still)

    def use_log(self, log: WrittenPagesLog | None) -> None:
        """Tell what it writes to QEMU's log, or to none any more."""
        self._log = log
        if self._now is not None:
            self._now.memory.use_log(log)

    def hold(self) -> None:
        """The vCPUs stand: QEMU may answer nothing any more."""
        if self._now is not None and self._now.armed is not None:
            self._now.memory.hold()

    async def stop(self) -> None:
        """Have it stand."""
        if self.by_client:
            return
        await self._go(DeviceState.STOP)
        if self._now is not None:
            await self._now.memory.stands()

    async def save(self) -> FunctionState:
        """The state of the function, which stands."""
        if self.by_client:
            return FunctionState(self.name, by_client=True)
        watched = self._watched
        with _told():
            memory = await watched.memory.take(self._untracked_max)
            registers = await watched.registers.collect(STANDING_S)
        await self._go(DeviceState.STOP_COPY)
        stream = b"".join([piece async for piece in self._pieces()])
        return FunctionState(self.name, stream, registers=registers.to_bytes(), memory=memory.to_bytes())

    async def _pieces(self) -> AsyncIterator[bytes]:
        transfer = self._transfer
        while True:
            await transfer.prepare(_PIECE)
            yield b"".join(transfer.read(_PIECE))
            left = transfer.left
            if left is None or left.exhausted:
                return

    def handed(self) -> None:
        """The state has been handed over."""
        if not self.by_client:
            self._transfer.delivered()

    # The destination

    async def load(self, state: FunctionState) -> None:
        """Take a state, and stand."""
        if state.by_client:
            return
        watched = self._watched
        with _told():
            try:
                contents = PageContents.from_bytes(state.memory)
            except ValueError as error:
                raise FunctionTrouble(str(error)) from error
            await watched.memory.apply(contents)
        await self._go(DeviceState.RESUMING)
        view = memoryview(state.stream)
        for start in range(0, len(view), _PIECE):
            await self._transfer.write(view[start : start + _PIECE])
        await self._go(DeviceState.STOP)
        await watched.memory.stands()
        self._came = True

    def replay(self, state: FunctionState, *, sent: bool = False) -> Replaying:
        """Send what brings QEMU to what it had of the function at the source; nothing is waited for."""
        if state.by_client:
            return _NothingSent()
        try:
            registers = FunctionRegisters.from_bytes(state.registers)
        except ValueError as error:
            raise FunctionTrouble(f"{self.name}: {error}") from error
        with _told():
            replay = replay_of(self.name, registers, self._device.session)
            return _SentReplay(ReplayUnderWay(replay, self._watched.connection.link, sent=sent))

    # Going on

    async def resume(self) -> None:
        """Have it run."""
        if self.by_client:
            return
        if self._now is not None:
            self._now.memory.runs()
        await self._go(DeviceState.RUNNING)
        if self._came:
            self._came = False
            await self._fire()

    async def _fire(self) -> None:
        """Fire every vector that has an eventfd once: one may have been lost on the way, and one more is no harm."""
        session = self._device.session
        for index in (IrqIndex.MSIX, IrqIndex.MSI):
            if not session.irq_summary().get(index.name, 0):
                continue
            flags = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
            vectors = session.description.irqs[index].count
            with suppress(VfioUserError):  # who cannot do that has lost none
                done = session.set_irqs(SetIrqs(_SET_IRQS_SIZE, flags, index, 0, vectors), ())
                if done is not None:
                    await done

    async def bar(self, reason: str) -> None:
        """Never let it run for this client, and have the guest find out."""
        function = self._find(self.name)
        connection = None if function is None else function.connection
        if connection is None or self.by_client:
            return
        connection.link.fail(f"it must not run: {reason}")
        # It was reset and does nothing by itself; that it stands as well is one reason more.
        with suppress(VfioUserError):
            await self._go(DeviceState.STOP)


class _SentReplay:
    """A replay, whose failure is told as every other one.

    Args:
        replay: what was sent.
    """

    def __init__(self, replay: ReplayUnderWay) -> None:
        self._replay = replay

    async def finish(self, may_write: Callable[[], bool]) -> None:
        """Wait until it is carried out, and judge it."""
        with _told():
            await self._replay.finish(may_write)


class _NothingSent:
    """The replay of a function that its client moves by itself."""

    async def finish(self, may_write: Callable[[], bool]) -> None:
        """Nothing is to be judged."""
        await trio.lowlevel.checkpoint()
