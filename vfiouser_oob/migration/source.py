"""The source's pipeline: agent → records → client, one chunk ahead of it.

A task fetches chunks, each of which becomes a record when the client takes it, in portions of its own size. While it
takes chunk n, chunk n+1 is fetched, and no more: at most two chunks, or what one read wants, are in
memory.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable

import trio

from vfiouser_agents.answers import check_chunk
from vfiouser_agents.api import Chunk, Estimate, Phase
from vfiouser_agents.errors import AgentError
from vfiouser_agents.errors import ProtocolError as AgentProtocolError
from vfiouser_agents.operations import Operation
from vfiouser_oob.migration.agent_link import AgentLink
from vfiouser_oob.migration.backoff import WAITING_PAUSE_MAX_S, Backoff, persist
from vfiouser_oob.migration.inherited import NO_STREAM, StreamMark
from vfiouser_oob.migration.sharing import BufferShare
from vfiouser_oob.migration.stream import RecordQueue, StreamWriter
from vfiouser_oob.migration.stream_format import HEAD_SIZE
from vfiouser_oob.migration.trace import Tracer
from vfiouser_protocol.errors import CommandError, LocalProtocolError

#: Bytes of an estimate that are believed: what is shown of it has to fit into 64 bits.
_MOST_REMAINING = 1 << 62


class SourcePipeline:
    """The state of one function on its way to the client.

    Args:
        link: the agent.
        tracer: where progress is told.
        pci: gives the `pci` record's payload, asked once the function stands still.
        chunk_size: bytes asked for at once.
        data_s: seconds within which a chunk has to come.
        retry_s: seconds before the first repetition of what may be repeated.
        device_failed: told why, when the agent says that the function is broken.
        sharing: with whom the memory is shared.
        mark: how far the client has come with a stream that another daemon has begun; it goes on with another epoch.
    """

    def __init__(
        self,
        link: AgentLink,
        tracer: Tracer,
        *,
        pci: Callable[[], bytes],
        chunk_size: int,
        data_s: float,
        retry_s: float,
        device_failed: Callable[[str], None],
        sharing: BufferShare,
        mark: StreamMark = NO_STREAM,
    ) -> None:
        self._link = link
        self._tracer = tracer
        #: Encoded, for the stream's head; until it is known, nothing can be taken.
        self._descriptor: bytes | None = None
        self._pci = pci
        self._chunk_size = chunk_size
        self._data_s = data_s
        self._retry_s = retry_s
        self._device_failed = device_failed
        self._sharing = sharing
        self._halted = False
        self._writer = StreamWriter(mark.epoch + 1)
        self._queue = RecordQueue()
        self._queue.resume(mark.head, mark.done, mark.rest)
        self._mark_epoch = mark.epoch
        #: State behind what is in the queue, of which no records were made yet, and how many bytes those will have.
        self._fetched: deque[memoryview] = deque()
        self._fetched_size = 0
        self._scope = trio.CancelScope()
        self._fetch_scope: trio.CancelScope | None = None
        self._changed = trio.Event()
        self._phase = Phase.PRECOPY
        self._offset = 0
        # Whoever opens the stream says what is to be fetched first.
        self._held = True
        self._restarting = False
        self._pci_due = False
        self._drained = False
        self._eof = False
        self._demand = 0
        self._error: AgentError | None = None
        self._estimate: Estimate | None = None
        self._estimated_at = 0
        #: Bytes of the stream that the client took.
        self.taken = mark.taken
        #: The most bytes that were ever queued, for `status` and tests.
        self.peak = 0
        #: Whether the trailer is in the queue, or was taken from it.
        self.complete = False

    # The task

    async def run(self) -> None:
        """Fetch until everything is queued, or the pipeline is halted."""
        with self._scope, self._sharing.joined():
            try:
                await self._fill()
            except LocalProtocolError as error:
                # What cannot be a stream ends this stream, not whoever runs it.
                self._error = AgentProtocolError(str(error))
                self._halted = True
        self._notify()

    async def _fill(self) -> None:
        while not self.complete:
            if self._restarting:
                self._begin_anew()
            elif self._pci_due and self._descriptor is not None:
                self._pci_due = False
                self._make_records()
                self._put(self._writer.pci(self._pci()))
            elif self._eof and self._descriptor is not None:
                self._make_records()
                self._put(self._writer.trailer())
                self.complete = True
                self._notify()
            elif self._may_fetch:
                await self._fetch()
            else:
                await self._changed.wait()

    def _begin_anew(self) -> None:
        """Forget what was fetched, for the stream begins once more."""
        self._queue.drop_untouched()
        self._fetched.clear()
        self._fetched_size = 0
        self._restarting = False
        self._offset = 0
        self._drained = self._eof = False
        self._estimated_at = 0
        self._put_head()

    def _put_head(self) -> None:
        if self._descriptor is not None:
            self._put(self._writer.header())
            self._put(self._writer.descriptor(self._descriptor))

    @property
    def _may_fetch(self) -> bool:
        if self._held or self._drained or self._eof or self._error is not None or self._restarting:
            return False
        if self._pci_due and self._descriptor is not None:
            return False
        # What a client waits for is as good as gone.
        piece = self._piece
        return self.buffered <= piece or self.buffered < self._demand + piece // 2

    async def _fetch(self) -> None:
        with trio.CancelScope() as self._fetch_scope:
            try:
                while self._may_fetch:
                    self._accept(await self._save(self._offset))
            except AgentError as error:
                self._error = error
                if error.fatal:
                    self._device_failed(str(error))
        self._fetch_scope = None
        self._notify()

    @property
    def _piece(self) -> int:
        """Bytes of state to ask for at once."""
        caps = self._link.caps
        piece = self._sharing.part(self._chunk_size)
        return piece if caps is None else min(piece, caps.max_chunk)

    async def _save(self, offset: int) -> Chunk:
        limit, phase = self._piece, self._phase
        caps = self._link.caps
        if caps is not None and phase is Phase.PRECOPY and not caps.precopy:
            return Chunk(b"", drained=True)
        deadline = trio.current_time() + self._data_s

        async def save() -> Chunk:
            chunk = await self._link.call(Operation.SAVE, deadline, offset, limit, phase)
            return check_chunk(chunk, limit, phase)

        return await persist(save, Backoff(self._retry_s, WAITING_PAUSE_MAX_S, deadline))

    def _accept(self, chunk: Chunk) -> None:
        # Nothing may be awaited in here: a chunk is taken, or asked for again.
        if chunk.data:
            self._fetched.append(memoryview(chunk.data))
            self._fetched_size += HEAD_SIZE + len(chunk.data)
            self._offset += len(chunk.data)
            self.peak = max(self.peak, self.buffered)
        self._drained = chunk.drained
        self._eof = chunk.eof
        self._tracer.progress(self._phase.value, self._offset, self.remaining)
        self._notify()

    def _make_records(self, size: int | None = None) -> None:
        """Make records of what was fetched, for a read of so many bytes, or of everything.

        As late as can be: the next chunk was asked for by now, so the agent works while the digest is computed.
        """
        while self._fetched and (size is None or len(self._queue) < size):
            data = self._fetched.popleft()
            self._fetched_size -= HEAD_SIZE + len(data)
            self._queue.put(self._writer.data(self._writer.total, data))

    def _put(self, record: tuple[bytes | bytearray | memoryview, ...]) -> None:
        self._queue.put(record)
        self.peak = max(self.peak, self.buffered)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # For the engine

    async def hold(self, deadline: float) -> None:
        """Fetch nothing more; a chunk that is under way is waited for, so that it survives the stop.

        Args:
            deadline: when to give that chunk up; it is asked for again later.
        """
        self._held = True
        with trio.move_on_at(deadline):
            while self._fetch_scope is not None:
                await self._changed.wait()
        if self._fetch_scope is not None:
            self._fetch_scope.cancel()
            while self._fetch_scope is not None:
                await self._changed.wait()

    def release(self) -> None:
        """Go on after `hold`, in the same phase."""
        self._held = False
        self._notify()

    def described(self, descriptor: bytes) -> None:
        """Begin the stream with what the function is; fetching may have begun before.

        Args:
            descriptor: encoded.
        """
        self._descriptor = descriptor
        self._put_head()

    def finish(self) -> None:
        """The function stands still: fetch the rest."""
        self._phase = Phase.FINAL
        self._estimated_at = self._offset
        self._pci_due = True
        self._held = self._drained = False
        self._notify()

    def restart(self, descriptor: bytes) -> None:
        """The function was reset while it ran: begin the stream anew, in the next epoch.

        Args:
            descriptor: what the function is now.
        """
        self._descriptor = descriptor
        self._estimate = None
        self._restarting = True
        self._held = False
        self._error = None
        if self._fetch_scope is not None:
            self._fetch_scope.cancel()
        self._notify()

    def halt(self) -> None:
        """Drop everything."""
        self._halted = True
        self._scope.cancel()
        self._queue = RecordQueue()
        self._fetched.clear()
        self._fetched_size = 0
        self._notify()

    def estimated(self, estimate: Estimate) -> None:
        """Take what the agent thinks that is still to come."""
        self._estimate = estimate
        self._estimated_at = self._offset

    # For the client

    @property
    def final(self) -> bool:
        """Whether the function stands still, so that the stream has an end."""
        return self._phase is Phase.FINAL

    @property
    def buffered(self) -> int:
        """Bytes that can be taken at once."""
        return len(self._queue) + self._fetched_size

    @property
    def epoch(self) -> int:
        """How often the stream was begun."""
        return self._writer.epoch

    @property
    def mark(self) -> StreamMark:
        """How far the client has come."""
        # A record of the epoch before may still be first; whoever begins anew behind it takes a higher one.
        epoch = self._writer.epoch or self._mark_epoch
        return StreamMark(epoch, self.taken, *self._queue.begun, whole=self.exhausted)

    @property
    def exhausted(self) -> bool:
        """Whether the client has taken everything, trailer included."""
        return self.complete and not self.buffered

    @property
    def was_estimated(self) -> bool:
        """Whether the agent has said how much there is."""
        return self._estimate is not None

    @property
    def remaining(self) -> int:
        """Bytes that are estimated to be fetched still."""
        estimate = self._estimate
        if estimate is None or self._eof:
            return 0
        whole = estimate.stop_copy_bytes if self.final else estimate.initial_bytes + estimate.dirty_bytes
        return max(0, min(whole, _MOST_REMAINING) - (self._offset - self._estimated_at))

    def has(self, size: int) -> bool:
        """Whether a read of so many bytes can be answered without waiting for more.

        Args:
            size: bytes wanted.
        """
        return not self._halted and (self.buffered >= size or self.complete)

    async def prepare(self, size: int, deadline: float) -> None:
        """Wait until a read of so many bytes can be answered: with all of them, or with what there is.

        Args:
            size: bytes wanted.
            deadline: when to stop waiting, as trio's clock has it.

        Raises:
            CommandError: fetching failed, or the function stands still and the deadline came before enough data.
        """
        self._ask_again()
        self._demand = size
        self._notify()
        try:
            with trio.move_on_at(deadline):
                while not self._ready(size):
                    await self._changed.wait()
                return
        finally:
            self._demand = 0
        if self.final:
            raise CommandError(
                f"the agent gave {self.buffered} of {size} bytes of state in time; ask again", errno.ETIMEDOUT
            )

    def _ask_again(self) -> None:
        """A new read is a new chance for an agent that had nothing, or had failed."""
        if self._error is not None or (self._drained and not self.buffered):
            self._error = None
            self._drained = False
            self._notify()

    def _ready(self, size: int) -> bool:
        if self._halted:
            raise CommandError(f"the state cannot be fetched any more: {self._error or 'it was dropped'}", errno.EIO)
        if self.buffered >= size or self.complete:
            return True
        if self._error is not None:
            if self.buffered and not self.final:
                return True
            raise CommandError(f"fetching the state failed: {self._error}", self._error.errno)
        return self._drained and not self._restarting

    def take(self, size: int) -> list[memoryview]:
        """Return up to so many bytes of what is there, in the pieces in which it came.

        Args:
            size: bytes wanted.
        """
        self._make_records(size)
        data = self._queue.take(size)
        self.taken += sum(map(len, data))
        if data:
            self._notify()
        return data
