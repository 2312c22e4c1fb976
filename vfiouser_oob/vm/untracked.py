"""A function's writes to guest memory while its VM migrates: those that QEMU cannot know of are marked, or travel.

QEMU marks what the guest writes, and what comes by DMA_WRITE. What a device writes into the memory's files goes past
it.

    arm ────────► hold ────► the function stands ────► stands ────► take ────► (travels) ────► apply
     by messages   by files   all it has to write       reports      contents                   written
     from now on   again      is written                are asked                               before it runs

| device | seen by us | while armed |
|---|---|---|
| `model` | every write | by messages; into files and the log if QEMU gave one |
| `vfio-user` | only what it writes by messages | by messages: its memory is mapped anew without files |
| `kernel-vfio` | none | into memory; reports say where, and go into the log, or contents travel |

Rule 1: *a gap is known as one*. From the moment at which the migration began every write has to be seen by somebody;
        if one may not have been, there is a reason not to migrate, and never silence. QEMU's log heals that: all of
        the memory is marked, and sent once more.
Rule 2: *QEMU does not answer while it waits for us*. So once the guest's processors stand, writes go into files, and
        nothing is waited for; what was not answered until then travels.
Rule 3: *contents are read when the function stands*, and are what the guest would find here.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, TypeAlias

import trio

from vfiouser_oob.devices.base import BackendSession
from vfiouser_oob.memory.recorder import PAGE_SIZE, DmaRoute, PageJournal, SentWrite
from vfiouser_oob.vm.carriers.interface import WrittenPagesLog
from vfiouser_oob.vm.page_contents import PageContents
from vfiouser_protocol.dirty import DirtyLog
from vfiouser_protocol.errors import CommandError, DmaFault, VfioUserError

#: Has the function stand as long as it is entered.
Stillness: TypeAlias = Callable[[], AbstractAsyncContextManager[None]]
#: Seconds between two questions for what a device wrote unseen by us.
LOOK_S = 1.0
#: Passes of the event loop for which answers that are here already may be read, before they count as missing.
_LOOKS = 64


class UntrackedRefused(Exception):
    """Guest memory would be wrong at the destination; the text says why."""


class WrittenReports(Protocol):
    """Somebody who knows what a function wrote by itself, such as its agent or the IOMMU."""

    async def collect(self) -> DirtyLog:
        """The pages that were written since it was asked last, or since it was begun; all of them if it is not sure.

        Raises:
            VfioUserError: it cannot be asked.
        """
        ...


@asynccontextmanager
async def undisturbed() -> AsyncIterator[None]:
    """The function stands anyway, or need not."""
    await trio.lowlevel.checkpoint()
    yield


class FunctionMemory:
    """One function's way into its client's memory, as its VM's migration sees it; made when the client has attached.

    Args:
        name: the function's, for people.
        session: the device as its client has it; its memory has a recorder.
        reports: who knows what the device writes unseen by us, since it was made; None if nobody does.
        inherited: another daemon has served the client before, and nobody knows what was written meanwhile.
        clock: the recorder's.
        wall_clock: seconds since 1970, as QEMU stamps its events.

    Raises:
        ValueError: nothing is recorded.
    """

    def __init__(
        self,
        name: str,
        session: BackendSession,
        *,
        reports: WrittenReports | None = None,
        inherited: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if session.memory.recorder is None:
            raise ValueError(f"the daemon does not record what {name} writes")
        self.name = name
        self._session = session
        self._memory = session.memory
        self._recorder = session.memory.recorder
        self._reports = reports
        self._clock = clock
        self._wall_clock = wall_clock
        #: No migration of this client that is under way has begun before.
        self._attached = -math.inf if inherited else self._recorder.journal.complete_from
        self._armed = False
        #: Whether the device writes by messages whatever we would not see.
        self._routed = False
        #: The moment at which the function stood; None while it runs.
        self._stands: float | None = None
        #: The moment from which on every write is seen.
        begun = self._recorder.journal.complete_from
        self._seen_from = begun if self._sees_all else math.inf if reports is None else clock()
        #: Why a write may have been missed; empty if none was.
        self._gap = ""
        #: When somebody reported last that all of the memory may have been written, which is told only in the end.
        self._owed: float | None = None

    @property
    def armed(self) -> bool:
        """Whether writes are kept that QEMU cannot know of."""
        return self._armed

    @property
    def refusal(self) -> str:
        """Why the migration that is under way would leave wrong memory, for people; empty if it would not."""
        return self._gap

    @property
    def _sees_all(self) -> bool:
        """Whether every write goes through this process, without anything being done for that."""
        return self._session.device_seen or self._memory.by_message

    @property
    def _journal(self) -> PageJournal:
        return self._recorder.journal

    @property
    def _running_route(self) -> DmaRoute:
        """The way of the function's writes as long as the guest runs."""
        logged = self._recorder.mark is not None and self._session.device_seen
        return DmaRoute.MESSAGES if self._routed and not logged else DmaRoute.FILES

    # The source: while the VM runs

    async def arm(self, began: float | None, still: Stillness = undisturbed) -> None:
        """Keep from now on what QEMU cannot know of; to do that early, and once more when a migration begins, is best.

        Args:
            began: when the migration began, as QEMU's event says, in seconds since 1970, or now if it has not; None if
                that is not known.
            still: has the function stand for a moment, where that is needed.

        Raises:
            UntrackedRefused: the device's writes cannot be known. Nothing has changed.
        """
        since = self._moment(began)
        known = self._journal.keep(since)
        self._gap = ""
        if self._owed is not None and self._owed < since:
            self._owed = None
        if not self._routed:
            await self._go_over(still)
            await self._ask()
        self._armed = True
        stood = self._stands is not None and self._stands <= since
        if not stood and not (known and since >= self._seen_from):
            self._gap = self._gap or self._why()
        self._heal()

    def _moment(self, began: float | None) -> float:
        """A moment of the wall clock by ours; what cannot be right counts as the beginning of everything."""
        ago = math.inf if began is None else self._wall_clock() - began
        return max(self._attached, self._clock() - ago) if ago >= 0 else self._attached

    async def _go_over(self, still: Stillness) -> None:
        try:
            async with self._stillness(still):
                await self._session.route_dma(by_message=True)
                self._routed = True
                self._seen_from = min(self._seen_from, math.nextafter(self._clock(), math.inf))
        except CommandError as error:
            if self._reports is None:
                self._journal.release()
                raise UntrackedRefused(f"nothing shows what {self.name} writes: {error}") from error
        if self._recorder.route is DmaRoute.FILES:
            self._recorder.route = self._running_route

    def _stillness(self, still: Stillness) -> AbstractAsyncContextManager[None]:
        return still() if self._session.routing_disturbs and self._stands is None else undisturbed()

    def _why(self) -> str:
        if self._sees_all or self._reports is not None:
            return f"the migration may have begun before the daemon recorded what {self.name} writes"
        return (
            f"the daemon does not know what {self.name} wrote between the start of the migration and the switch to "
            f'messages, because nothing reports it. Use dma = "messages" for this function, an agent that logs dirty '
            f"pages, or arm it before the migration begins"
        )

    def _heal(self) -> None:
        """With a log, whatever may have been missed is sent once more."""
        mark = self._recorder.mark
        if self._gap and mark is not None:
            for region in self._memory:
                mark(region.address, region.size)
            self._gap = ""

    def use_log(self, log: WrittenPagesLog | None) -> None:
        """Tell QEMU's log from now on what is written into files; or no longer, before QEMU reads it for the last time.

        Args:
            log: where to tell; None if there is none any more.
        """
        self._recorder.mark = None if log is None else log.mark
        if log is not None:
            for address, length in self._journal.pages().ranges():
                log.mark(address, length)
            self._journal.discard()
            self._heal()
        if self._recorder.route is not DmaRoute.HELD:
            self._recorder.route = self._running_route

    async def watch(self, period_s: float = LOOK_S) -> None:
        """Ask now and then what was reported, until cancelled; nothing to do for a device whose writes are seen.

        So QEMU's log is told early, and of what was written before a migration little is taken for a part of it.

        Args:
            period_s: seconds between two questions.
        """
        while self._reports is not None:
            await trio.sleep(period_s)
            await self.look()

    async def look(self) -> None:
        """Ask once what was reported."""
        if not self._routed:
            await self._ask()

    async def _ask(self) -> None:
        """Note what is reported; where nobody can say, there is a gap.

        Who reports everything, as an IOMMU does that cannot tell, does so each time; while the guest runs it would
        only be sent again and again.
        """
        if self._reports is None:
            return
        try:
            pages = await self._reports.collect()
        except VfioUserError as error:
            self._gap = f"nothing shows what {self.name} has written: {error}"
            self._heal()
            return
        if pages.pages * PAGE_SIZE >= self._reportable:
            self._owed = self._clock()
        else:
            self._note(pages)

    @property
    def _reportable(self) -> int:
        """Bytes of memory that a device can write unseen by us."""
        return max(PAGE_SIZE * 2, sum(region.size for region in self._memory if region.owner is not None))

    def _note(self, pages: DirtyLog) -> None:
        for address, length in pages.ranges():
            self._recorder.wrote(address, length)

    def _pay(self) -> None:
        """Tell now what was only reported as a whole."""
        if self._owed is not None:
            for region in self._memory:
                if region.owner is not None:
                    self._recorder.wrote(region.address, region.size)
            self._owed = None

    # The source: the VM stands

    def hold(self) -> None:
        """The guest's processors stand: from now on the function writes into files, and waits for no answer of QEMU."""
        self._recorder.hold()

    async def stands(self) -> None:
        """The function stands: what it wrote last is found out."""
        self._stands = self._clock()
        await self._memory.quiet()
        if not self._routed:
            await self._ask()
        self._pay()

    async def take(self, limit: int) -> PageContents:
        """Read the memory that QEMU does not know of; the function stands, and QEMU need not answer.

        Args:
            limit: bytes that may travel.

        Raises:
            UntrackedRefused: it is too much, not known, or not there any more.
        """
        if not self._armed:
            raise UntrackedRefused(f"the daemon did not record what {self.name} writes while its VM migrates")
        await self._memory.quiet()
        for _ in range(_LOOKS):
            if not self._recorder.to_come:
                break
            await trio.lowlevel.checkpoint()
        if self._gap:
            raise UntrackedRefused(self._gap)
        to_come = [(each.address, each.data) for each in self._recorder.to_come]
        pages = self._journal.pages()
        size = pages.pages * PAGE_SIZE + sum(len(data) for _, data in to_come)
        if size > limit:
            raise UntrackedRefused(
                f"{self.name} wrote {size >> 10} KiB of guest memory without QEMU's knowledge; {limit >> 10} KiB may "
                f"travel with its state"
            )
        parts = [(address, await self._read(address, length)) for address, length in self._mapped(pages)]
        return PageContents((*parts, *to_come))

    def _mapped(self, pages: DirtyLog) -> list[tuple[int, int]]:
        """The parts of pages that are in files.

        Raises:
            UntrackedRefused: a page is not mapped any more.
        """
        found = []
        for address, length in pages.ranges():
            position, end = address, address + length
            for region in self._memory.map.overlapping(address, length):
                self._require_mapped(position, region.address)
                if region.owner is not None:
                    first = max(address, region.address)
                    found.append((first, min(end, region.end) - first))
                position = region.end
            self._require_mapped(position, end)
        return found

    def _require_mapped(self, start: int, end: int) -> None:
        """Refuse a hole with a whole page in it; a smaller one is what a page has beside its mapping."""
        if end - start >= PAGE_SIZE:
            raise UntrackedRefused(f"{self.name} wrote guest memory at {start:#x}, which is not mapped any more")

    async def _read(self, address: int, length: int) -> bytes:
        try:
            return await self._memory.read(address, length)
        except DmaFault as error:
            raise UntrackedRefused(f"cannot read guest memory that {self.name} wrote: {error}") from error

    # The source: it comes back

    async def disarm(self, still: Stillness = undisturbed) -> None:
        """Go on as before: the migration is over, and the function is here.

        Args:
            still: has the function stand for a moment, where that is needed and it runs.

        Raises:
            CommandError: the device goes on writing by messages, which is slower and does no harm.
        """
        self._armed = self._routed = False
        self._gap = ""
        self._recorder.mark = None
        self._recorder.route = DmaRoute.FILES
        self._journal.release()
        if not self._sees_all and self._reports is None:
            self._seen_from = math.inf
        async with self._stillness(still):
            await self._session.route_dma(by_message=False)

    def runs(self) -> None:
        """The function runs again, or for the first time."""
        self._stands = None
        self._recorder.route = self._running_route

    # The destination

    async def apply(self, contents: PageContents) -> tuple[SentWrite, ...]:
        """Write what travelled, before the function runs and after QEMU has loaded the memory.

        Args:
            contents: what came.

        Returns:
            What was sent to QEMU by messages and need not be waited for: it is carried out before anything that is sent
            later, and before the guest runs.

        Raises:
            UntrackedRefused: it cannot be written.
        """
        sent: list[SentWrite] = []
        for address, data in contents.parts:
            try:
                sent += await self._memory.place(address, data)
            except DmaFault as error:
                raise UntrackedRefused(
                    f"guest memory that {self.name} wrote cannot be written here: {error}"
                ) from error
        return tuple(sent)
