"""Dirty pages of one client: what the device wrote, from whoever saw it.

Three sources, one log. The agent reports what the function wrote by itself. The daemon notes what a `model` device
wrote through its own hands. What went by messages was written by the client, so nobody needs to tell it.

A report that fails, or whose answer is lost, makes its range dirty as a whole: pages that are copied once too often
are slow, pages that are not copied are lost data.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Awaitable, Generator, Iterable, Iterator
from dataclasses import replace

import trio

from vfiouser_agents.answers import check_report as check_answer
from vfiouser_agents.api import DirtyReport, Range
from vfiouser_agents.errors import AgentError
from vfiouser_agents.limits import check_page_size
from vfiouser_agents.operations import Operation
from vfiouser_oob.migration.agent_link import AgentLink
from vfiouser_oob.migration.events import Logging
from vfiouser_oob.migration.host import MigrationHost
from vfiouser_oob.migration.inherited import LogMark, TransferNotes
from vfiouser_oob.migration.trace import Tracer
from vfiouser_oob.transport.turns import FunctionQueue
from vfiouser_protocol.dirty import check_report, fill_in_steps
from vfiouser_protocol.dma import ADDRESS_SPACE, DmaRegion, DmaTable
from vfiouser_protocol.dma_logging import DmaLogging
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.messages import LoggingRange

#: Bytes that the agent is asked about at once: a bitmap of 256 KiB.
_SPAN = 8 << 30
#: Answers in a row that say that there is more; an agent that never ends is not believed.
_MAX_ANSWERS = 4096
#: Regions that are looked up in one step.
_REGIONS_PER_STEP = 1024


class DirtyTracker:
    """The dirty log of one connection.

    Args:
        link: the function's agent.
        tracer: where failures are told.
        host: told whether the agent logs.
        memory: the client's mappings.
        log: where all that is dirty is noted; the client's memory notes its own writes there.
        device_seen: whether every write of the device goes through this process.
        by_message: whether every write of the device goes through the client.
        call_s: seconds that one call to the agent may take.
        notes: takes down what is logged, for another daemon; None: nobody does.
    """

    def __init__(
        self,
        link: AgentLink,
        tracer: Tracer,
        host: MigrationHost,
        memory: DmaTable,
        log: DmaLogging,
        *,
        device_seen: bool,
        by_message: bool,
        call_s: float,
        notes: TransferNotes | None = None,
    ) -> None:
        self._link = link
        self._tracer = tracer
        self._host = host
        self._memory = memory
        self._device_seen = device_seen
        self._by_message = by_message
        self._call_s = call_s
        self._notes = notes
        #: What is taken down.
        self._noted: LogMark | None = None
        self.log = log
        #: Whether it logs for somebody beside the client, from whom the client takes it when it wants it.
        self.lent = False
        #: Bytes per page that the agent uses; 0 while it does not log.
        self._agent_page = 0
        self._blind = False
        #: Memory that is dirty as a whole, sorted and apart: too much of it may be mapped to be marked page by page.
        self._stale: list[tuple[int, int]] = []
        #: What of it the last report has told.
        self._told: list[tuple[int, int]] = []
        self._lane = FunctionQueue()

    # Start and stop

    async def start(self, page_size: int, ranges: tuple[LoggingRange, ...], deadline: float) -> int:
        """Begin to log.

        Args:
            page_size: wished for, bytes.
            ranges: what to log; nothing means everything.
            deadline: when the message has to be answered.

        Returns:
            The page size that is used, bytes.

        Raises:
            CommandError: the request is impossible, or the agent cannot be told.
        """
        chosen, wanted = self.log.plan(page_size, ranges)
        if self.log.active:
            return chosen
        seen = self._device_seen or self._by_message
        if not seen or (self._link.caps is not None and self._link.caps.dirty):
            try:
                await self._start_agent(chosen, wanted, deadline)
            except AgentError as error:
                if not seen:
                    raise CommandError(f"the agent cannot log dirty pages: {error}", error.errno) from error
        if not self.lent:
            wished = tuple((item.iova, item.length) for item in ranges)
            self._note(LogMark(page_size, wished, self._agent_page, self._blind))
        return self.log.start(page_size, ranges)

    def _note(self, mark: LogMark | None) -> None:
        """Take down what is logged; what is lent, its borrower sees to."""
        if self._notes is not None and mark != self._noted:
            self._notes.logs(mark)
        self._noted = mark

    def resume(self, mark: LogMark) -> None:
        """Go on for a client of another daemon; what that one knew is gone, so everything is dirty once.

        Args:
            mark: what was taken down.

        Raises:
            CommandError: it is damaged.
        """
        self.log.start(mark.page_size, [LoggingRange(*item) for item in mark.ranges])
        self._agent_page, self._blind, self._noted = mark.agent_page, mark.blind, mark
        self._all_stale()

    def _all_stale(self) -> None:
        self._stale = merged((region.address, region.end) for region in self._memory)

    async def _start_agent(self, page_size: int, ranges: tuple[LoggingRange, ...], deadline: float) -> None:
        if not self._link.asked:  # what is remembered from before may be out of date
            await self._link.status(min(deadline, trio.current_time() + self._call_s))
        caps = self._link.caps
        assert caps is not None
        if not caps.dirty:
            self._blind = True
            self._tracer.note("the agent logs no dirty pages, so every page is reported dirty every time")
            return
        wanted = [Range(item.iova, min(item.length, ADDRESS_SPACE - page_size)) for item in ranges]
        if caps.max_ranges and len(wanted) > caps.max_ranges:
            end = wanted[-1].iova + wanted[-1].length
            wanted = [Range(wanted[0].iova, end - wanted[0].iova)]
        # One that an earlier life of ours has left behind is ended first.
        await self._link.call(Operation.DIRTY_STOP, deadline)
        agent_page = await self._link.call(Operation.DIRTY_START, deadline, wanted, page_size)
        check_page_size(agent_page)
        self._agent_page = agent_page
        self._host.feed(Logging(True))

    async def stop(self, deadline: float) -> None:
        """End logging; legal at any time."""
        self._note(None)
        self.log.stop()
        self._blind = False
        self._stale, self._told = [], []
        if self._agent_page:
            self._agent_page = 0
            self._host.feed(Logging(False))
            try:
                await self._link.call(Operation.DIRTY_STOP, deadline)
            except AgentError:  # traced; a log that nobody reads does no harm
                pass

    def forget(self) -> bool:
        """The client has gone, and with it its memory; returns whether the agent has to be told."""
        self.log.stop()
        self.lent = False
        logged, self._agent_page = bool(self._agent_page), 0
        return logged

    async def rearm(self, deadline: float) -> None:
        """The agent's log has ended with a reset: begin anew, and take everything for dirty.

        Args:
            deadline: when the message has to be answered.
        """
        if not self.log.active or not self._agent_page:
            return
        page_size, ranges = self.log.page_size, self.log.ranges
        self._agent_page = 0
        self._host.feed(Logging(False))
        try:
            await self._start_agent(page_size, ranges, deadline)
        except AgentError:
            self._blind = True
        if self._noted is not None:
            self._note(replace(self._noted, agent_page=self._agent_page, blind=self._blind))
        self._all_stale()

    # For somebody else

    async def lend(self, page_size: int, deadline: float) -> None:
        """Begin to log for somebody beside the client.

        Args:
            page_size: bytes.
            deadline: when it has to be done.

        Raises:
            CommandError: the client logs, or the agent cannot be told.
        """
        if self.log.active:
            raise CommandError("its client logs dirty pages by itself", errno.EBUSY)
        self.lent = True
        try:
            await self.start(page_size, (), deadline)
        except BaseException:
            self.lent = False
            raise

    async def reclaim(self, deadline: float) -> None:
        """End what was lent; nothing to do if nothing was."""
        if self.lent:
            self.lent = False
            await self.stop(deadline)

    # Reports

    def unmapped(self, iova: int, length: int) -> Awaitable[None] | None:
        """A mapping went away; if it was a large one, forgetting its pages has to be waited for."""
        if not self.log.active:
            return None
        if length > _SPAN or self._stale:
            return self.forget_range(iova, length)
        self.log.unmapped(iova, length)
        return None

    async def forget_range(self, iova: int, length: int) -> None:
        """Forget the dirty pages of memory that went away."""
        self._take_stale(iova, iova + length)
        await self._lane.work(self.log.unmapped_in_steps(iova, length))

    async def report(
        self, iova: int, length: int, page_size: int, deadline: float, regions: list[DmaRegion] | None = None
    ) -> bytearray:
        """Read and clear the dirty pages of a range.

        Args:
            iova: first address.
            length: bytes.
            page_size: bytes per bit.
            deadline: when the message has to be answered.
            regions: what was mapped there until now; None = what is mapped.

        Raises:
            CommandError: nothing is mapped there, nothing is logged, or the request is impossible.
        """
        if regions is None:
            regions = await self._lane.work(_gathered(self._memory.overlapping(iova, length)))
        self.log.require_report(iova, length, mapped=bool(regions))
        check_report(iova, length, page_size, self.log.max_bitmap_size)
        spans = list(self._spans(iova, iova + length, regions))
        if self._agent_page and not self._blind:
            for start, end in spans:
                await self._lane.turn()
                await self._ask(start, end, deadline)
        bitmap = await self._lane.work(self.log.report_in_steps(iova, length, page_size))
        self._told = self._take_stale(iova, iova + length)
        complete = False
        try:
            for start, end in spans if self._blind else self._told:
                await self._lane.work(fill_in_steps(bitmap, iova, page_size, start, end))
            complete = True
        finally:
            if not complete:
                self.undo_report()
        return bitmap

    def undo_report(self) -> None:
        """The last report did not reach the client: what it said is dirty again."""
        self.log.undo_report()
        self._stale = sorted([*self._stale, *self._told])
        self._told = []

    def _take_stale(self, first: int, last: int) -> list[tuple[int, int]]:
        """Cut a range out of what is dirty as a whole; returns what was there."""
        stale = self._stale
        low = bisect_right(stale, first, key=lambda item: item[1])
        high = bisect_left(stale, last, key=lambda item: item[0])
        found = stale[low:high]
        if not found:
            return []
        rest = [(found[0][0], first), (last, found[-1][1])]
        stale[low:high] = [(start, end) for start, end in rest if start < end]
        return [(max(start, first), min(end, last)) for start, end in found]

    def by_file(self, iova: int, length: int) -> bool:
        """Whether any of a range came with a file, so that the device may write it unseen by the client."""
        return any(region.file is not None for region in self._memory.overlapping(iova, length))

    def _spans(self, first: int, last: int, regions: list[DmaRegion]) -> Iterator[tuple[int, int]]:
        """The parts of a range that the device writes by itself: joined where they touch, cut to a bearable size."""
        start = end = first
        for region in regions:
            if region.file is None or self._by_message:
                continue
            low, high = max(first, region.address), min(last, region.end)
            if low != end or high - start > _SPAN:
                yield from _cut(start, end)
                start = low
            end = high
        yield from _cut(start, end)

    async def _ask(self, start: int, end: int, deadline: float) -> None:
        page = self._agent_page
        low, high = start // page * page, min(-(-end // page) * page, ADDRESS_SPACE - page)
        # The last page of the address space, about which nobody can be asked.
        self._mark(max(start, high), end)
        if low == high:
            return
        known = False
        try:
            for _ in range(_MAX_ANSWERS):
                report = await self._link.call(
                    Operation.DIRTY_REPORT, min(deadline, trio.current_time() + self._call_s), low, high - low
                )
                self._take(check_answer(report, low, high - low, page), low, start, end)
                if not report.more:
                    known = True
                    return
        except AgentError:  # traced
            pass
        finally:
            if not known:
                self._mark(start, end)

    def _take(self, report: DirtyReport, low: int, start: int, end: int) -> None:
        if report.bitmap is not None:
            self.log.mark_bitmap(low, self._agent_page, report.bitmap)
        for item in report.ranges:
            first, last = max(start, item.iova), min(end, item.iova + item.length)
            self._mark(first, last)

    def _mark(self, start: int, end: int) -> None:
        if start < end:
            self.log.mark(start, end - start)


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that touch; they come in order, and none overlaps another."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def _gathered(regions: Iterator[DmaRegion]) -> Generator[None, None, list[DmaRegion]]:
    """Make a list, a few entries at each step. The map stays as it is meanwhile: its client waits for this."""
    found = []
    for region in regions:
        found.append(region)
        if not len(found) % _REGIONS_PER_STEP:
            yield
    return found


def _cut(start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end:
        yield start, min(end, start + _SPAN)
        start += _SPAN
