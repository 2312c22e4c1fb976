"""A live migration as QEMU performs it: setup, pre-copy with dirty pages, the stop, the rest, and the switch."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import trio

from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.client.nursery import background_nursery
from vfiouser_oob.lab.vmm.attachment import Attachment, ConfigState
from vfiouser_oob.lab.vmm.pages import MemoryCopier
from vfiouser_oob.lab.vmm.side import MigrationLost, MigrationSide, Portion
from vfiouser_protocol.errors import ReplyError, VfioUserError

#: Portions that are on their way between the two VMMs.
_IN_TRANSIT = 4
#: How long giving up may take.
_CANCEL_S = 20.0


class MigrationPhase(Enum):
    """Where a migration is."""

    SETUP = "setup"
    PRE_COPY = "pre-copy"
    STOP = "stop"
    STOP_COPY = "stop-copy"
    SWITCH = "switch"
    DONE = "done"
    CANCELLED = "cancelled"


class VirtualMachine(abc.ABC):
    """What runs in the VM and is carried along."""

    @abc.abstractmethod
    async def stop(self) -> None:
        """Stop the processors."""

    @abc.abstractmethod
    def go(self) -> None:
        """Let the processors go on where they were."""

    @abc.abstractmethod
    async def save(self) -> ConfigState:
        """Return what the VMM carries of the function itself; the processors stand still."""

    @abc.abstractmethod
    async def arrive(self, place: Attachment) -> None:
        """Go on at the destination, with its function and its memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveOptions:
    """How a migration is done.

    Args:
        precopy: False: stop first, then copy everything.
        rounds: the most rounds of pre-copy.
        enough_pages: so few dirty pages are left for the time after the stop.
        precopy_s: seconds after which pre-copy ends even if it does not converge.
        compare: whether both guest memories are compared after the last page was carried; the time for that does not
            count as downtime.
    """

    precopy: bool = True
    rounds: int = 5
    enough_pages: int = 64
    precopy_s: float = 30.0
    compare: bool = False


@dataclass(slots=True)
class LiveProgress:
    """How far a migration has come, and how it ended.

    Args:
        phase: where it is.
        rounds: rounds of pre-copy that were done.
        state_bytes: bytes of the function's state, by phase.
        memory_bytes: bytes of guest memory, by phase.
        dirty_by_device: pages that the function's log named.
        seconds: duration of each phase that is over.
        downtime_s: how long the processors stood still.
        memory_equal: whether both guest memories were equal when the destination took over; None: not compared.
    """

    phase: MigrationPhase = MigrationPhase.SETUP
    rounds: int = 0
    state_bytes: dict[str, int] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)
    dirty_by_device: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    downtime_s: float = 0.0
    memory_equal: bool | None = None

    @property
    def total_state(self) -> int:
        """Bytes of state in all phases."""
        return sum(self.state_bytes.values())

    @property
    def total_memory(self) -> int:
        """Bytes of guest memory in all phases."""
        return sum(self.memory_bytes.values())


#: Called whenever something has moved; an error that it raises cancels the migration.
Observer = Callable[[LiveProgress], None]


class LiveMigration:
    """One migration of one function with its VM.

    Args:
        machine: what runs in the VM.
        source: the function's migration interface here.
        destination: the function's migration interface there.
        memory: guest memory here.
        place: the destination, attached.
        options: how to do it.
        observe: told of every step.
    """

    def __init__(
        self,
        machine: VirtualMachine,
        source: MigrationSide,
        destination: MigrationSide,
        memory: ClientMemory,
        place: Attachment,
        *,
        options: LiveOptions | None = None,
        observe: Observer | None = None,
    ) -> None:
        self._machine = machine
        self._source = source
        self._destination = destination
        self._memory = memory
        self._place = place
        self._options = options or LiveOptions()
        self._observe = observe
        self._copier = MemoryCopier(memory, place.memory)
        self._since = 0.0
        self._logging = False
        self._committed = False
        self.progress = LiveProgress()

    async def run(self) -> LiveProgress:
        """Migrate.

        Returns:
            What was done.

        Raises:
            MigrationLost: it failed in such a way that nobody knows where the function runs; the VM stands still.
            VfioUserError: it failed, and the VM runs at the source.
            BaseException: what the observer raised, or a cancellation; the VM runs at the source.
        """
        self._since = time.perf_counter()
        try:
            await self._setup()
            if self._options.precopy:
                await self._precopy()
            await self._move()
        except BaseException:
            # Whatever it was: until the destination has been told to run, the source has to go on.
            if not self._committed:
                await self._cancel()
            raise
        return self.progress

    def _enter(self, phase: MigrationPhase) -> None:
        now = time.perf_counter()
        self.progress.seconds[self.progress.phase.value] = now - self._since
        self._since = now
        self.progress.phase = phase
        self._tell()

    def _tell(self) -> None:
        if self._observe is not None:
            self._observe(self.progress)

    # Phases

    async def _setup(self) -> None:
        self._tell()
        self._memory.log_writes()
        self._copier.mark_all()
        await self._source.start_logging(self._memory)
        self._logging = True
        await self._destination.load_setup()

    async def _precopy(self) -> None:
        if not await self._source.save_setup():
            return
        self._enter(MigrationPhase.PRE_COPY)
        began = time.perf_counter()
        while True:
            self._copy_memory()
            await self._transfer(began + self._options.precopy_s)
            await self._sync()
            self.progress.rounds += 1
            few = self._copier.dirty_pages <= self._options.enough_pages
            late = time.perf_counter() - began >= self._options.precopy_s
            if few or late or self.progress.rounds >= self._options.rounds:
                break

    async def _move(self) -> None:
        stopped_at = time.perf_counter()
        self._enter(MigrationPhase.STOP)
        await self._machine.stop()
        config = await self._machine.save()
        await self._source.stop()
        self._enter(MigrationPhase.STOP_COPY)
        await self._transfer()
        await self._source.save_cleanup()
        # Nothing writes any more, so this is the last of it.
        await self._sync()
        await self._source.stop_logging()
        self._logging = False
        self._copy_memory()
        self._memory.log_writes(False)
        compared_s = self._compare() if self._options.compare else 0.0
        self._enter(MigrationPhase.SWITCH)
        await self._place.restore(config)
        with trio.CancelScope(shield=True):
            await self._commit()
            await self._machine.arrive(self._place)
        self.progress.downtime_s = time.perf_counter() - stopped_at - compared_s
        self._enter(MigrationPhase.DONE)

    async def _commit(self) -> None:
        """Let the destination run; there is a way back only if it refuses."""
        self._committed = True
        try:
            await self._destination.start()
        except ReplyError:
            self._committed = False
            raise
        except VfioUserError as error:
            raise MigrationLost(f"nobody knows whether the destination runs: {error}") from error

    async def _cancel(self) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CANCEL_S):
            self._memory.log_writes(False)
            try:
                await self._source.cancel()
                if self._logging:
                    await self._source.stop_logging()
            except VfioUserError as error:
                raise MigrationLost(f"the source could not be brought back: {error}") from error
            finally:
                self.progress.phase = MigrationPhase.CANCELLED
            self._machine.go()

    # Data

    async def _transfer(self, until: float | None = None) -> None:
        """Carry state to the destination until there is no more, reading ahead of writing."""
        phase = self.progress.phase.value
        send, receive = trio.open_memory_channel[Portion](_IN_TRANSIT)

        async def read() -> None:
            # Not `async with`: its checkpoint after closing can be cancelled, and a read's error would be lost with it.
            with send:
                while True:
                    portion = await self._source.read()
                    await send.send(portion)
                    if portion.last or (until is not None and time.perf_counter() >= until):
                        return

        async with background_nursery() as nursery:
            nursery.start_soon(read)
            async for data, _ in receive:
                if data:
                    await self._destination.load(data)
                    self.progress.state_bytes[phase] = self.progress.state_bytes.get(phase, 0) + len(data)
                    self._tell()

    async def _sync(self) -> None:
        """Learn which pages the function and the processors have written."""
        self.progress.dirty_by_device += self._copier.mark(await self._source.dirty(self._memory))
        self._copier.mark(self._memory.take_written())

    def _compare(self) -> float:
        """Compare both memories; returns how many seconds that took."""
        began = time.perf_counter()
        self.progress.memory_equal = self._copier.equal()
        return time.perf_counter() - began

    def _copy_memory(self) -> None:
        phase = self.progress.phase.value
        count = self._copier.copy()
        self.progress.memory_bytes[phase] = self.progress.memory_bytes.get(phase, 0) + count
        self._tell()
