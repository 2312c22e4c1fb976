"""The companion's queues at work: a thread that waits for kicks and refuses what a guest asks a file system for.

Everything here is QEMU's: guest memory, kicks and calls. So one thread does all of it, and may be held up; only the
answer to the stop waits for it, and not for long.

Rule 1: *the thread works on what it was given*. What is replaced meanwhile is closed once the thread is through.
Rule 2: *what was written is marked before the stop is answered*, as whatever a device writes.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio

from vfiouser_oob.memory.files import GuestFile
from vfiouser_oob.observability import log
from vfiouser_oob.transport.fds import ForeignFd, OwnedFd
from vfiouser_oob.transport.reaper import Account
from vfiouser_oob.transport.worker import Worker
from vfiouser_oob.vm.carriers.vhost_messages import MemoryTable, VhostRegion, VringAddress
from vfiouser_oob.vm.carriers.vring import Vring, VringError, VringPlace
from vfiouser_protocol.errors import DmaFault

#: Seconds for which the answer to the stop waits for the thread.
PATIENCE_S = 2.0
#: Seconds of rest after requests were refused: nobody is in a hurry to be refused, and a thread that is always at it
#: would take its time from every function.
REST_S = 0.01
_ONE = (1).to_bytes(8, "little")


class GuestTable:
    """Guest memory, as QEMU's table of regions says it.

    Args:
        regions: where memory is.
        fds: the file of each region; taken.
        account: whose files they are.
    """

    def __init__(self, regions: Iterable[VhostRegion], fds: Iterable[ForeignFd], account: Account) -> None:
        self._regions = [
            (region, GuestFile((0, 0, index), fd.take(), in_memory=False, account=account))
            for index, (region, fd) in enumerate(zip(regions, fds, strict=False))
        ]
        #: Guest physical addresses and lengths of what was written and not marked yet.
        self.written: list[tuple[int, int]] = []

    def read(self, address: int, length: int) -> bytes:
        """Read guest memory (in the thread).

        Raises:
            VringError: there is none, or it cannot be read.
        """
        file, offset = self._find(address, length)
        try:
            return file.read(offset, length)
        except (DmaFault, OverflowError) as fault:
            raise VringError(str(fault)) from fault

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory (in the thread).

        Raises:
            VringError: there is none, or it cannot be written.
        """
        file, offset = self._find(address, len(data))
        self.written.append((address, len(data)))
        try:
            file.write(offset, data)
        except (DmaFault, OverflowError) as fault:
            raise VringError(str(fault)) from fault

    def guest_address(self, user_address: int) -> int:
        """Return where in the guest something is that QEMU has at an address of its own.

        Raises:
            VringError: it is not guest memory.
        """
        for region, _ in self._regions:
            if 0 <= user_address - region.user_address < region.size:
                return region.guest_address + user_address - region.user_address
        raise VringError(f"{user_address:#x} is in no region of guest memory")

    def _find(self, address: int, length: int) -> tuple[GuestFile, int]:
        for region, file in self._regions:
            at = address - region.guest_address
            if at >= 0 and at + length <= region.size:
                return file, region.offset + at
        raise VringError(f"{address:#x}+{length:#x} is in no region of guest memory")

    def close(self) -> None:
        """Close the files."""
        for _, file in self._regions:
            file.close()


@dataclass(slots=True)
class _Setting:
    """What QEMU has said about one queue."""

    size: int = 0
    address: VringAddress | None = None
    kick: ForeignFd | None = None
    call: ForeignFd | None = None
    vring: Vring | None = None


@dataclass(frozen=True, slots=True)
class _Round:
    """What the thread is given.

    Args:
        memory: the guest's.
        rings: the queues that are served.
        wake: ours, to end the waiting.
        broken: told of queues that make no sense.
    """

    memory: GuestTable
    rings: tuple[_Setting, ...]
    wake: OwnedFd
    broken: list[str] = field(default_factory=list)

    def work(self) -> None:
        """Refuse what waits, or wait for more (in the thread)."""
        for ring in self.rings:
            self._serve(ring)
        if self.memory.written:
            return
        waiting = select.poll()
        kicks = [ring.kick for ring in self.rings if ring.vring is not None and ring.kick is not None]
        for fd in (*kicks, self.wake):
            waiting.register(fd.fileno(), select.POLLIN)
        ready = {number for number, _ in waiting.poll()}
        for fd in (*kicks, self.wake):
            if fd.fileno() in ready:
                os.read(fd.fileno(), 8)

    def _serve(self, ring: _Setting) -> None:
        if ring.vring is None:
            return
        try:
            if ring.vring.serve(self.memory) and ring.call is not None:
                os.write(ring.call.fileno(), _ONE)
        except (VringError, OSError) as error:
            ring.vring = None
            self.broken.append(str(error))


class Rings:
    """The queues of one companion.

    Args:
        account: whose descriptors they are.
        mark: told of guest memory that was written.
    """

    def __init__(self, account: Account, mark: Callable[[int, int], None]) -> None:
        self._account = account
        self._mark = mark
        self._worker = Worker(account)
        self._log = log.RateLimited(log.get("carrier"))
        self._memory: GuestTable | None = None
        self._settings: dict[int, _Setting] = {}
        self._wake = OwnedFd(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        self._runs = False
        self._started = trio.Event()
        self._stopped = trio.Event()
        self._stopped.set()
        self._busy = False
        self._retired: list[ForeignFd | GuestTable | OwnedFd] = []

    # What QEMU says

    def set_memory(self, table: MemoryTable, fds: list[ForeignFd]) -> None:
        """Take the guest's memory.

        Args:
            table: where it is.
            fds: its files; taken.
        """
        self._retire(self._memory)
        self._memory = GuestTable(table.regions, fds, self._account)

    def set_size(self, index: int, size: int) -> None:
        """Say how many descriptors a queue has."""
        self._setting(index).size = size

    def set_address(self, address: VringAddress) -> None:
        """Say where a queue is."""
        self._setting(address.index).address = address

    def set_kick(self, index: int, fd: ForeignFd | None) -> None:
        """Say what QEMU signals when requests wait; it is taken."""
        setting = self._setting(index)
        self._retire(setting.kick)
        setting.kick = fd and fd.take()

    def set_call(self, index: int, fd: ForeignFd | None) -> None:
        """Say what is to be signalled when requests were given back; it is taken."""
        setting = self._setting(index)
        self._retire(setting.call)
        setting.call = fd and fd.take()

    def _setting(self, index: int) -> _Setting:
        return self._settings.setdefault(index, _Setting())

    def _retire(self, what: ForeignFd | GuestTable | OwnedFd | None) -> None:
        if what is None:
            return
        if not self._busy:
            what.close()
            return
        self._retired.append(what)
        os.eventfd_write(self._wake.fileno(), 1)

    # Life

    def start(self, bases: dict[int, int]) -> None:
        """Serve from now on.

        Args:
            bases: where each queue's next request is.
        """
        for index, base in bases.items():
            setting = self._setting(index)
            setting.vring = None
            try:
                if self._memory is not None:
                    setting.vring = _vring(self._memory, setting, base)
            except VringError as error:
                self._log.warning("a companion's queue is not served", queue=index, reason=error)
        self._runs = True
        self._started.set()

    async def stop(self) -> dict[int, int]:
        """Serve no more, and wait until what was written is marked.

        Returns:
            Where the next request of each queue that was served is.
        """
        if self._runs:
            self._runs = False
            os.eventfd_write(self._wake.fileno(), 1)
            with trio.move_on_after(PATIENCE_S):
                await self._stopped.wait()
        return self.bases

    @property
    def bases(self) -> dict[int, int]:
        """Where the next request of each queue that was served is."""
        return {index: each.vring.base for index, each in self._settings.items() if each.vring is not None}

    async def run(self) -> None:
        """Serve whenever it is started, until cancelled."""
        while True:
            await self._started.wait()
            self._started, self._stopped = trio.Event(), trio.Event()
            try:
                while self._runs and self._memory is not None:
                    await self._round(self._memory)
            except OSError as error:
                self._log.warning("a companion's queues are not served", reason=error)
            self._stopped.set()

    async def _round(self, memory: GuestTable) -> None:
        job = _Round(memory, tuple(self._settings.values()), self._wake)
        self._busy = True
        await self._worker.run(job.work, self._landed)
        served = bool(memory.written)
        for address, length in memory.written:
            self._mark(address, length)
        memory.written.clear()
        if served:
            await trio.sleep(REST_S)
        for reason in job.broken:
            self._log.warning("a companion's queue makes no sense", reason=reason)

    def _landed(self) -> None:
        self._busy = False
        retired, self._retired = self._retired, []
        for each in retired:
            each.close()

    def close(self) -> None:
        """Give everything back, once the thread is through with it."""
        for setting in self._settings.values():
            self._retire(setting.kick)
            self._retire(setting.call)
        self._retire(self._memory)
        self._retire(self._wake)
        self._worker.close()


def _vring(memory: GuestTable, setting: _Setting, base: int) -> Vring | None:
    if setting.address is None:
        return None
    parts = (setting.address.descriptors, setting.address.available, setting.address.used)
    return Vring(VringPlace(setting.size, *map(memory.guest_address, parts)), base)
