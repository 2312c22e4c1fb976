"""Queue engines: from doorbells to executed commands to completion entries to interrupts.

An idle queue has no task. A doorbell starts one if there is work for it, and it ends when there is none left.

Rule 1 (submission): a worker that is about to execute a command first makes sure that another worker will
go on with the next one. As a task starts only when the running one yields, commands that never wait (memory
to memory) are executed one after the other by one worker at no cost, and only a command that really waits
is overtaken. Between two commands a worker asks for its turn (`FunctionQueue`); one that waits for it is
enough for a queue.

Rule 2 (completion): one writer per queue. It takes all completions that have gathered and fit, writes them
with one access, and raises one interrupt for them. A completion is handed to it after the command's data
transfer, and the interrupt is raised after the entry is written: a host never sees one before what it
announces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import trio

from vfiouser_oob.transport.turns import FunctionQueue
from vfiouser_protocol.errors import DmaFault
from vfiouser_soc.nvme.command import Completion, SubmissionEntry, parse_commands
from vfiouser_soc.nvme.epoch import DmaPort, Epoch
from vfiouser_soc.nvme.spec import CQE_SIZE, SQE_SIZE
from vfiouser_soc.nvme.state import CompletionQueue, SubmissionQueue

#: Commands of one queue that are executed at once or wait for their completion entry.
MAX_IN_FLIGHT = 64
#: Completion entries that are made and written with one access.
_MAX_ENTRIES_AT_ONCE = 256

FatalError = Callable[[str], None]


class CompletionEngine:
    """Writes the entries of one completion queue.

    Args:
        queue: the state.
        epoch: where the writer runs.
        dma: memory.
        lane: the function's turns.
        notify: called after entries became visible to the host.
        fatal: called with a reason when the queue's memory cannot be written.
    """

    def __init__(
        self,
        queue: CompletionQueue,
        epoch: Epoch,
        dma: DmaPort,
        lane: FunctionQueue,
        notify: Callable[[CompletionQueue], None],
        fatal: FatalError,
    ) -> None:
        self.queue = queue
        #: Engines whose completions go here, by submission queue id.
        self.sources: dict[int, SubmissionEngine] = {}
        self._epoch = epoch
        self._dma = dma
        self._lane = lane
        self._notify = notify
        self._fatal = fatal
        self._active = False
        self._ended = trio.Event()

    def post(self, completion: Completion) -> None:
        """Hand over a finished command."""
        self.queue.pending.append(completion)
        self.kick()

    def kick(self) -> None:
        """Start the writer if there is something to write and room for it."""
        if not self._active and self.queue.pending and (self.queue.room or self.queue.writing):
            self._active = True
            self._epoch.start_soon(self._write)

    def forget(self, sqid: int) -> None:
        """Drop what waits for a submission queue that was deleted and does not fit; what fits is being written."""
        # Else a host that takes no completions could pile up more of them with every queue that it creates anew.
        queue = self.queue
        fits = max(queue.writing, queue.room)
        queue.pending = deque(
            completion for place, completion in enumerate(queue.pending) if place < fits or completion.sqid != sqid
        )

    async def drain(self) -> None:
        """Wait until every entry that fits is written."""
        while self._active:
            await self._ended.wait()

    async def _write(self) -> None:
        queue = self.queue
        try:
            # What a cancelled writer was writing is written again first: the host may have consumed it already, so
            # that there seems to be no room for it.
            while queue.pending and (room := queue.writing or queue.room):
                count = min(len(queue.pending), room, queue.size - queue.tail, _MAX_ENTRIES_AT_ONCE)
                entries = b"".join(
                    completion.pack(self._head_of(completion.sqid), queue.phase)
                    for completion, _ in zip(queue.pending, range(count), strict=False)
                )
                queue.writing = count
                await self._dma.write(queue.base + queue.tail * CQE_SIZE, entries)
                self._advance(count)
                self._notify(queue)
                if queue.pending:
                    await self._lane.turn()
        except DmaFault as error:
            queue.writing = 0
            self._fatal(f"completion queue {queue.qid} cannot be written: {error}")
        finally:
            self._active = False
            self._ended = _pulse(self._ended)

    def _advance(self, count: int) -> None:
        queue = self.queue
        queue.writing = 0
        for _ in range(count):
            queue.pending.popleft()
        queue.tail += count
        if queue.tail == queue.size:
            queue.tail = 0
            queue.phase ^= 1
        for source in self.sources.values():
            source.kick()

    def _head_of(self, sqid: int) -> int:
        source = self.sources.get(sqid)
        return source.queue.head if source is not None else 0


class SubmissionEngine:
    """Fetches and executes the commands of one submission queue.

    Args:
        queue: the state.
        completions: where its completions go.
        epoch: where the workers run.
        dma: memory.
        lane: the function's turns.
        execute: executes a command up to its completion; raises nothing but cancellation.
        fatal: called with a reason when the queue's memory cannot be read.
    """

    def __init__(
        self,
        queue: SubmissionQueue,
        completions: CompletionEngine,
        epoch: Epoch,
        dma: DmaPort,
        lane: FunctionQueue,
        execute: Callable[[SubmissionQueue, SubmissionEntry], Awaitable[None]],
        fatal: FatalError,
    ) -> None:
        self.queue = queue
        self.completions = completions
        self._epoch = epoch
        self._dma = dma
        self._lane = lane
        self._execute = execute
        self._fatal = fatal
        self._fetching = False
        self._starting = False
        #: A worker without a command waits for its turn; it goes on with whatever there is then.
        self._pausing = False
        self._begun = 0
        self._workers = 0
        self._stopped = False
        self._closed = False
        self._idle = trio.Event()

    def kick(self) -> None:
        """Start a worker if there is work that none has begun to look for."""
        if self._starting or self._pausing or self._workers >= MAX_IN_FLIGHT or not self._has_work():
            return
        self._starting = True
        self._workers += 1
        self._epoch.start_soon(self._work)

    @property
    def is_busy(self) -> bool:
        """Whether any command is under way."""
        return bool(self._workers)

    def take_back(self, cid: int) -> bool:
        """Withdraw a command that was fetched and not begun.

        Args:
            cid: its command id.

        Returns:
            Whether there was one; the caller completes it.
        """
        for command in self.queue.fetched:
            if command.cid == cid:
                self.queue.fetched.remove(command)
                return True
        return False

    def halt(self) -> None:
        """Fetch and begin nothing more; what was fetched and not begun is dropped."""
        self._stopped = True
        for command in self.queue.fetched:
            self.queue.inflight.pop(command.cid, None)
        self.queue.fetched.clear()

    async def stop(self) -> None:
        """Fetch and begin nothing more, and wait until every command that was begun has been executed."""
        self.halt()
        while self.queue.executing or self._fetching:
            await self._idle.wait()

    def close(self) -> None:
        """Fetch nothing more; what was fetched is executed."""
        self._closed = True

    def reopen(self) -> None:
        """Fetch again."""
        self._closed = False
        self.kick()

    async def drain(self) -> None:
        """Wait until every command that was fetched has been executed, or the epoch ends; `close` comes first."""
        while self._epoch.alive and (self.queue.executing or self.queue.fetched or self._fetching):
            await self._idle.wait()

    def _has_work(self) -> bool:
        return not self._stopped and bool(self.queue.fetched or self._may_fetch())

    def _may_fetch(self) -> bool:
        return not self._closed and not self._fetching and bool(self._fetchable())

    def _fetchable(self) -> int:
        """Entries to fetch with one access: up to the tail, the end of the ring, or the limit in flight."""
        queue = self.queue
        room = MAX_IN_FLIGHT - len(queue.inflight) - len(self.completions.queue.pending)
        return max(0, min(queue.waiting, queue.size - queue.head, room))

    async def _work(self) -> None:
        self._starting = False
        try:
            while self._has_work():
                if self._lane.must_wait:
                    if self._pausing:
                        return
                    await self._pause()
                    continue
                if not self.queue.fetched:
                    await self._fetch()
                    continue
                self._begun += 1
                serial = self._begun
                self.queue.executing[serial] = command = self.queue.fetched.popleft()
                self.kick()
                await self._execute(self.queue, command)
                # A cancelled command stays where it is, to be executed again if the epoch is only suspended.
                self.queue.executing.pop(serial, None)
        except DmaFault as error:
            self._fatal(f"submission queue {self.queue.qid} cannot be read: {error}")
        finally:
            self._workers -= 1
            self._idle = _pulse(self._idle)

    async def _pause(self) -> None:
        self._pausing = True
        try:
            await self._lane.turn()
        finally:
            self._pausing = False

    async def _fetch(self) -> None:
        queue = self.queue
        count = self._fetchable()
        self._fetching = True
        try:
            data = await self._dma.read(queue.base + queue.head * SQE_SIZE, count * SQE_SIZE)
        finally:
            self._fetching = False
        if self._stopped or self._closed:
            return
        queue.head = (queue.head + count) % queue.size
        for command in parse_commands(data):
            # A command id that is in use stays with its first owner; the second is refused when its turn
            # comes.
            queue.inflight.setdefault(command.cid, command)
            queue.fetched.append(command)


def _pulse(event: trio.Event) -> trio.Event:
    """Wake whoever waits to look again; returns what to wait for next."""
    event.set()
    return trio.Event()
