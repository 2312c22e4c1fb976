"""A function of this daemon, as its VM's migration moves it: by the transfer, and by its client's messages."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial

import trio

from vfiouser_oob.devices.base import BackendSession
from vfiouser_oob.migration.config_shadow import ConfigShadow
from vfiouser_oob.migration.dirty import DirtyTracker
from vfiouser_oob.migration.message_time import message_deadline
from vfiouser_oob.migration.record import Owner
from vfiouser_oob.migration.runner import MigrationRunner
from vfiouser_oob.migration.steps import AttachedDevice
from vfiouser_oob.migration.transfer import Transfer
from vfiouser_oob.server.dma_link import DmaLink
from vfiouser_oob.server.function import Function
from vfiouser_oob.vm.bundle import BARS, FunctionState, Whereabouts
from vfiouser_oob.vm.carriers.interface import WrittenPagesLog
from vfiouser_oob.vm.preflight import FunctionFacts
from vfiouser_oob.vm.replay import FunctionShape, SourceView, plan_replay, table_at, written_bytes
from vfiouser_oob.vm.replay_run import SentReplay
from vfiouser_protocol.constants import DeviceState, IrqIndex, IrqSetFlags, RegionIndex
from vfiouser_protocol.errors import CommandError, DmaFault, VfioUserError
from vfiouser_protocol.messages import SetIrqs
from vfiouser_protocol.migration_v2 import require_path

PAGE = 4096
HEAD = 256
#: Bytes of the stream that are read or written at once.
_PIECE = 1 << 20
#: Seconds after which the MSI-X table is read again while the VM is being migrated: QEMU does not tell of its changes.
TABLE_S = 0.1
#: Seconds that QEMU may take to answer while its vCPUs are being stopped: then it may answer nothing at all.
STOPPING_S = 0.01
_CLIENTS = frozenset({Owner.V1, Owner.V2})
_SET_IRQS_SIZE = 20


class HostedFunction:
    """One function of a VM.

    Args:
        name: its name.
        find: finds it among those that are served; None if it is not.
        untracked_max: bytes of guest memory that may travel with its state.
    """

    def __init__(self, name: str, find: Callable[[str], Function | None], untracked_max: int) -> None:
        self.name = name
        self._find = find
        self._untracked_max = untracked_max
        self._recorded: _Recorded | None = None
        #: The MSI-X table as it was read last, and whoever wants it to be read, or waits for that.
        self._table = b""
        self._wanted, self._read = trio.Event(), trio.Event()
        #: Whether what is to run came from another host, so that the guest may wait for an interrupt that was lost.
        self._came = False

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
        if device is None:
            raise CommandError("no QEMU uses it", errno.ENODEV)
        return device

    @property
    def _dma(self) -> DmaLink:
        attached = self._function.attached
        if attached is None:
            raise CommandError("no QEMU uses it", errno.ENODEV)
        return attached.dma

    @property
    def _transfer(self) -> Transfer:
        return Transfer(self._runner, Owner.CARRIER)

    @property
    def by_client(self) -> bool:
        """Whether its client moves it by itself."""
        function = self._find(self.name)
        return function is not None and function.migration is not None and function.migration.record.owner in _CLIENTS

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
        return FunctionFacts(
            self.name,
            attached=function.attached is not None,
            unfit=unfit or function.failed or "",
            away=runner is not None and runner.link.away_since is not None,
            unrecorded=0 if self._recorded is None else self._recorded.untracked,
            unrecorded_max=self._untracked_max,
        )

    # Recording

    async def record(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Record what it writes, until cancelled; what was recorded is then forgotten."""
        if self.by_client:
            task_status.started()
            return
        device = self._device
        recorded = _Recorded(device.session, device.dirty)
        await device.dirty.start(PAGE, (), message_deadline())
        self._recorded = recorded
        try:
            await self._read_table()
            task_status.started()
            while True:
                with trio.move_on_after(TABLE_S):
                    await self._wanted.wait()
                self._wanted = trio.Event()
                with suppress(VfioUserError):
                    await self._read_table()
                self._read.set()
        finally:
            self._recorded = None
            with trio.move_on_after(self._runner.config.call_s, shield=True):
                await device.dirty.stop(message_deadline())

    async def _read_table(self) -> None:
        """Read the MSI-X table, if the guest has it where it can be read."""
        device = self._device
        found = table_at(written_bytes(device.shadow.writes()), await self._shape(device.session))
        if found is not None:
            self._table = await self._dma.bus_read(*found)

    async def _shape(self, session: BackendSession) -> FunctionShape:
        answer = session.region_read(RegionIndex.CONFIG, 0, HEAD)
        head = answer if isinstance(answer, bytes) else await answer
        regions = session.description.regions
        sizes = {bar: regions[bar].size for bar in range(BARS) if regions[bar].size}
        return FunctionShape(head, sizes, regions[RegionIndex.ROM].size)

    # The source

    async def stop(self, log: WrittenPagesLog | None) -> None:
        """Have it stand."""
        if self.by_client:
            return
        await self._go(DeviceState.STOP)
        if self._recorded is not None:
            await self._recorded.take(log)
            self._read = trio.Event()
            self._wanted.set()
            with trio.move_on_after(STOPPING_S):
                await self._read.wait()

    async def save(self, whereabouts: Whereabouts | None) -> FunctionState:
        """The state of the function, which stands."""
        if self.by_client:
            return FunctionState(self.name, by_client=True)
        device = self._device
        await self._go(DeviceState.STOP_COPY)
        stream = b"".join([piece async for piece in self._pieces()])
        shape = await self._shape(device.session)
        return FunctionState(
            self.name,
            stream,
            written=device.shadow.encode(),
            head=shape.head,
            sizes=shape.sizes,
            rom_size=shape.rom_size,
            table=self._table,
            whereabouts=whereabouts,
            pages=await self._pages(),
        )

    async def _pieces(self) -> AsyncIterator[bytes]:
        transfer = self._transfer
        while True:
            await transfer.prepare(_PIECE)
            yield b"".join(transfer.read(_PIECE))
            left = transfer.left
            if left is None or left.exhausted:
                return

    async def _pages(self) -> tuple[tuple[int, bytes], ...]:
        recorded = self._recorded
        if recorded is None:
            return ()
        if recorded.untracked > self._untracked_max:
            raise CommandError(
                f"it has written {recorded.untracked} bytes of guest memory that QEMU does not know of, and at most "
                f"{self._untracked_max} may travel with its state"
            )
        return tuple([run async for run in recorded.contents()])

    def handed(self) -> None:
        """The state has been handed over."""
        if not self.by_client:
            self._transfer.delivered()

    # The destination

    async def load(self, state: FunctionState) -> None:
        """Take a state, and stand."""
        if state.by_client:
            return
        memory = self._device.session.memory
        for address, data in state.pages:
            await memory.write(address, data)
        await self._go(DeviceState.RESUMING)
        view = memoryview(state.stream)
        for start in range(0, len(view), _PIECE):
            await self._transfer.write(view[start : start + _PIECE])
        await self._go(DeviceState.STOP)
        self._came = True

    def replay(self, state: FunctionState, *, free: bool) -> SentReplay:
        """Send what brings QEMU to what it had of the function at the source; nothing is waited for."""
        if state.by_client:
            return SentReplay.nothing()
        where = state.whereabouts
        if where is None or where.ecam is None:
            raise DmaFault(f"{self.name}: its source did not say where it is in the guest's configuration space")
        shadow = ConfigShadow()
        try:
            shadow.decode_under(state.written)
            plan = plan_replay(
                SourceView(written_bytes(shadow.writes()), state.table),
                FunctionShape(state.head, state.sizes, state.rom_size),
            )
        except ValueError as error:
            raise DmaFault(f"{self.name}: {error}") from error
        return SentReplay.send(self._dma, plan, where.place, where.ecam, free=free)

    # Going on

    async def resume(self) -> None:
        """Have it run."""
        if self.by_client:
            return
        await self._go(DeviceState.RUNNING)
        if self._came:
            self._came = False
            await self._fire()

    async def _fire(self) -> None:
        """Fire every vector that has an eventfd once: one may have been lost on the way, and one more is no harm."""
        session = self._device.session
        for index in (IrqIndex.MSIX, IrqIndex.MSI):
            count = session.irq_summary().get(index.name, 0)
            if not count:
                continue
            flags = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
            vectors = session.description.irqs[index].count
            with suppress(CommandError):  # who cannot do that has lost none
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


class _Recorded:
    """What a function has written since it is recorded.

    Args:
        session: its device.
        dirty: its log of dirty pages.
    """

    def __init__(self, session: BackendSession, dirty: DirtyTracker) -> None:
        self._session = session
        self._dirty = dirty
        self._pages: set[int] = set()

    @property
    def untracked(self) -> int:
        """Bytes that have to travel with the state."""
        return len(self._pages) * PAGE

    async def take(self, log: WrittenPagesLog | None) -> None:
        """Take what was written until now.

        Args:
            log: where to tell it; without one it has to travel with the state.
        """
        memory = self._session.memory
        for region in [each for each in memory.map if each.owner is not None]:
            bitmap = await self._dirty.report(region.address, region.size, PAGE, message_deadline())
            for page in _set_bits(bitmap):
                if log is None:
                    self._pages.add(region.address // PAGE + page)
                else:
                    log.mark(region.address + page * PAGE, PAGE)

    async def contents(self) -> AsyncIterator[tuple[int, bytes]]:
        """What has to travel: runs of pages."""
        for first, last in _runs(sorted(self._pages)):
            yield first * PAGE, await self._session.memory.read(first * PAGE, (last - first) * PAGE)


def _set_bits(bitmap: bytes | bytearray) -> Iterator[int]:
    for index, byte in enumerate(bitmap):
        if byte:
            yield from (8 * index + bit for bit in range(8) if byte >> bit & 1)


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    start = end = -1
    for page in pages:
        if page != end:
            if end > start:
                yield start, end
            start = page
        end = page + 1
    if end > start:
        yield start, end
