"""The source's pipeline: agent → records → client, one chunk ahead of it.

A task fetches chunks and queues them as records; the client takes bytes from the queue in portions of its own size.
While it takes chunk n, chunk n+1 is fetched and n is hashed, and no more: at most two chunks, or what one read wants,
are in memory.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import trio

from vfiouser_agents.api import Chunk, Estimate, Phase
from vfiouser_agents.errors import AgentError
from vfiouser_agents.errors import ProtocolError as AgentProtocolError
from vfiouser_oob.migration.agent_link import AgentLink
from vfiouser_oob.migration.hashing import Hasher
from vfiouser_oob.migration.stream import RecordQueue, StreamWriter
from vfiouser_oob.migration.trace import Tracer
from vfiouser_protocol.errors import CommandError

#: Turns of the scheduler after which a call's request has been written to the agent's socket.
_TURNS_TO_SEND = 4


class SourcePipeline:
    """The state of one function on its way to the client.

    Args:
        link: the agent.
        tracer: where progress is told.
        descriptor: encoded, for the stream's head.
        pci: gives the `pci` record's payload, asked once the function stands still.
        chunk_size: bytes asked for at once.
        data_s: seconds within which a chunk has to come.
        retry_s: seconds before the first repetition of what may be repeated.
        device_failed: told why, when the agent says that the function is broken.
    """

    def __init__(
        self,
        link: AgentLink,
        tracer: Tracer,
        *,
        descriptor: bytes,
        pci: Callable[[], bytes],
        chunk_size: int,
        data_s: float,
        retry_s: float,
        device_failed: Callable[[str], None],
    ) -> None:
        self._link = link
        self._tracer = tracer
        self._descriptor = descriptor
        self._pci = pci
        self._chunk_size = chunk_size
        self._data_s = data_s
        self._retry_s = retry_s
        self._device_failed = device_failed
        self._halted = False
        self._writer = StreamWriter()
        self._queue = RecordQueue()
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
        self.taken = 0
        #: The most bytes that were ever queued, for `status` and tests.
        self.peak = 0
        #: Whether the trailer is in the queue, or was taken from it.
        self.complete = False

    # The task

    async def run(self) -> None:
        """Fetch until everything is queued, or the pipeline is halted."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                hasher = self._open_stream(nursery)
                while not self.complete:
                    if self._restarting:
                        hasher = self._open_stream(nursery)
                    elif self._pci_due:
                        self._pci_due = False
                        self._put(self._writer.pci(self._pci()))
                    elif self._eof:
                        self._put(self._writer.trailer(await hasher.digest()))
                        self.complete = True
                    elif self._may_fetch:
                        await self._fetch(hasher)
                    else:
                        await self._changed.wait()
                nursery.cancel_scope.cancel()
        self._notify()

    def _open_stream(self, nursery: trio.Nursery) -> Hasher:
        """Begin the stream, or begin it anew."""
        self._queue.drop_untouched()
        self._restarting = False
        self._offset = 0
        self._drained = self._eof = False
        self._estimated_at = 0
        self._put(self._writer.header())
        self._put(self._writer.descriptor(self._descriptor))
        return Hasher(nursery)

    @property
    def _may_fetch(self) -> bool:
        waiting = len(self._queue)
        room = waiting <= self._chunk_size or waiting < self._demand
        return room and not (self._held or self._drained or self._error is not None)

    async def _fetch(self, hasher: Hasher) -> None:
        with trio.CancelScope() as self._fetch_scope:
            try:
                chunk = await self._save(self._offset)
                while self._may_ask_ahead(chunk):
                    chunk = await self._save_while_accepting(chunk, hasher)
                await self._accept(chunk, hasher)
            except AgentError as error:
                self._error = error
                if error.fatal:
                    self._device_failed(str(error))
        self._fetch_scope = None
        self._notify()

    def _may_ask_ahead(self, chunk: Chunk) -> bool:
        """Whether to ask for the next chunk before this one is dealt with: a client waits for this one."""
        more = not (chunk.eof or chunk.drained)
        return more and len(self._queue) < self._demand and not (self._held or self._pci_due or self._restarting)

    async def _save_while_accepting(self, chunk: Chunk, hasher: Hasher) -> Chunk:
        """Let the agent work on the next chunk while this one is checked, hashed and sent.

        Asking for the next one acknowledges this one; that it is accepted cannot be given up, so it is never lost.
        """
        answers: list[Chunk | AgentError] = []

        async def ask(offset: int) -> None:
            try:
                answers.append(await self._save(offset))
            except AgentError as error:
                answers.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, self._offset + len(chunk.data))
            # Sending a chunk to the client takes long; the request shall be out before.
            with trio.CancelScope(shield=True):
                for _ in range(_TURNS_TO_SEND):
                    await trio.lowlevel.checkpoint()
                await self._accept(chunk, hasher)
        (answer,) = answers
        if isinstance(answer, AgentError):
            raise answer
        return answer

    async def _save(self, offset: int) -> Chunk:
        limit, phase = self._chunk_size, self._phase
        caps = self._link.caps
        if caps is not None:
            limit = min(limit, caps.max_chunk)
            if phase is Phase.PRECOPY and not caps.precopy:
                return Chunk(b"", drained=True)
        deadline = trio.current_time() + self._data_s
        pause = self._retry_s
        while True:
            try:
                chunk = await self._link.call(
                    "save", lambda session: session.save(offset, limit, phase), deadline, quiet=True
                )
                return _checked(chunk, limit, phase)
            except AgentError as error:
                if not error.retryable or trio.current_time() + pause >= deadline:
                    raise
            await trio.sleep(pause)
            pause *= 2

    async def _accept(self, chunk: Chunk, hasher: Hasher) -> None:
        # Nothing below may be given up half-way: a chunk is queued and hashed, or asked for again.
        with trio.CancelScope(shield=True):
            if chunk.data:
                await hasher.update(chunk.data)
                self._put(self._writer.data(self._offset, chunk.data))
                self._offset += len(chunk.data)
            self._drained = chunk.drained
            self._eof = chunk.eof
        self._tracer.progress(self._phase.value, self._offset, self.remaining)

    def _put(self, record: tuple[bytes | bytearray | memoryview, ...]) -> None:
        self._queue.put(record)
        self.peak = max(self.peak, len(self._queue))
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

    def finish(self) -> None:
        """The function stands still: fetch the rest."""
        self._phase = Phase.FINAL
        self._pci_due = True
        self._held = self._drained = False
        self._notify()

    def restart(self, descriptor: bytes) -> None:
        """The function was reset while it ran: begin the stream anew, in the next generation.

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
        return len(self._queue)

    @property
    def generation(self) -> int:
        """How often the stream was begun."""
        return self._writer.generation

    @property
    def exhausted(self) -> bool:
        """Whether the client has taken everything, trailer included."""
        return self.complete and not self._queue

    @property
    def remaining(self) -> int:
        """Bytes that are estimated to be fetched still."""
        estimate = self._estimate
        if estimate is None or self._eof:
            return 0
        whole = estimate.stop_copy_bytes if self.final else estimate.initial_bytes + estimate.dirty_bytes
        return max(0, whole - (self._offset - self._estimated_at))

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
        if self._error is not None or (self._drained and not self._queue):
            self._error = None
            self._drained = False
            self._notify()

    def _ready(self, size: int) -> bool:
        if self._halted:
            raise CommandError(f"the state cannot be fetched any more: {self._error or 'it was dropped'}", errno.EIO)
        if len(self._queue) >= size or self.complete:
            return True
        if self._error is not None:
            if self.buffered and not self.final:
                return True
            raise CommandError(f"the state could not be fetched: {self._error}", self._error.errno)
        return self._drained and not self._restarting

    def take(self, size: int) -> list[memoryview]:
        """Return up to so many bytes of what is there, in the pieces in which it came.

        Args:
            size: bytes wanted.
        """
        data = self._queue.take(size)
        self.taken += sum(map(len, data))
        if data:
            self._notify()
        return data


def _checked(chunk: Chunk, limit: int, phase: Phase) -> Chunk:
    """Refuse a chunk that breaks the interface's rules."""
    if len(chunk.data) > limit:
        raise AgentProtocolError(f"the agent gave {len(chunk.data)} bytes of state when asked for {limit}")
    if not chunk.data and not chunk.eof and not chunk.drained:
        raise AgentProtocolError("the agent gave no state without saying why")
    if chunk.eof and phase is Phase.PRECOPY:
        raise AgentProtocolError("the agent says that the state is complete while the function runs")
    if chunk.drained and phase is Phase.FINAL:
        raise AgentProtocolError("the agent says that it has no more for now while the function stands still")
    return chunk
