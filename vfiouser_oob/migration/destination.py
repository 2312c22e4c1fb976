"""The destination's pipeline: client → checks → agent, one piece behind it.

Every byte was copied out of the client's reach before it comes here. A record is checked before anything of it is
forwarded, the descriptor before any state; one piece is at the agent while the client sends the next.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import cast

import trio
from xxhash import xxh3_128

from vfiouser_agents.api import Session
from vfiouser_agents.errors import AgentError
from vfiouser_agents.operations import Operation
from vfiouser_oob.migration.agent_link import AgentLink
from vfiouser_oob.migration.backoff import WAITING_PAUSE_MAX_S, Backoff, persist
from vfiouser_oob.migration.host import Background
from vfiouser_oob.migration.stream import Data, DescriptorRecord, PciConfig, StreamHeader, StreamReader, Trailer
from vfiouser_oob.migration.trace import Tracer
from vfiouser_protocol.errors import CommandError

#: Judges a source's encoded descriptor by a deadline.
Check = Callable[[bytes, float], Awaitable[None]]


class DestinationPipeline:
    """The state of a function on its way to the agent.

    Args:
        link: the agent, which was told that a load begins.
        tracer: where progress is told.
        background: where pieces are forwarded.
        check: judges the source's descriptor.
        data_s: seconds within which the agent has to take a piece.
        retry_s: seconds before the first repetition of what may be repeated.
        device_failed: told why, when the agent says that the function is broken.
        begun: the agent waits for the first piece; if not, it is told to before.
    """

    def __init__(
        self,
        link: AgentLink,
        tracer: Tracer,
        background: Background,
        *,
        check: Check,
        data_s: float,
        retry_s: float,
        device_failed: Callable[[str], None],
        begun: bool = True,
    ) -> None:
        self._link = link
        self._tracer = tracer
        self._background = background
        self._check = check
        self._data_s = data_s
        self._retry_s = retry_s
        self._device_failed = device_failed
        self._begun = begun
        self._reader = StreamReader()
        #: Of all state since the stream was begun, for the agent; the stream itself is proven by its records.
        self._digest = xxh3_128()
        self._scope = trio.CancelScope()
        self._landed = trio.Event()
        self._landed.set()
        self._error: AgentError | None = None
        #: Bytes of state that went to the agent.
        self.loaded = 0
        #: Payload of the `pci` record, once it came.
        self.pci: bytes | None = None

    async def write(self, data: bytes | memoryview, deadline: float) -> None:
        """Take the next bytes of the stream.

        Args:
            data: the bytes; nobody changes them any more.
            deadline: when the message has to be answered.

        Raises:
            CommandError: the stream is refused; the load is lost.
            AgentError: the agent refused a piece, or what it is of; the load is lost.
        """
        if not self._begun:
            await self._restart(deadline)
            self._begun = True
        for record in self._reader.feed(data):
            if isinstance(record, Data):
                await self._take_data(record, deadline)
            elif isinstance(record, DescriptorRecord):
                await self._check(record.payload, deadline)
            elif isinstance(record, PciConfig):
                self.pci = record.payload
            elif isinstance(record, StreamHeader) and record.restart:
                await self._restart(deadline)
            else:
                assert isinstance(record, StreamHeader | Trailer)

    async def _restart(self, deadline: float) -> None:
        """The source's function was reset: what came before is void."""
        await self._wait_landed()
        self._digest = xxh3_128()
        self.pci = None
        self.loaded = 0
        await self._link.call(Operation.ABORT, deadline)
        await self._link.call(Operation.LOAD_BEGIN, deadline, None)

    async def _take_data(self, record: Data, deadline: float) -> None:
        caps = self._link.caps
        assert caps is not None
        end = record.offset + len(record.data)
        if end > caps.max_state:
            raise CommandError(f"the state has {end} bytes or more, this function takes {caps.max_state}")
        self._digest.update(record.data)
        for start in range(0, len(record.data), caps.max_chunk):
            await self._wait_landed()
            self._landed = trio.Event()
            piece = record.data[start : start + caps.max_chunk]
            if not self._background.begin(self._forward, record.offset + start, piece):
                self._landed.set()
                raise CommandError("the daemon is stopping; nothing is loaded any more", errno.EIO)

    async def _wait_landed(self) -> None:
        await self._landed.wait()
        if self._error is not None:
            raise self._error

    async def _forward(self, offset: int, data: memoryview) -> None:
        try:
            with trio.CancelScope() as self._scope:
                await self._load(offset, data)
                self.loaded = offset + len(data)
                self._tracer.progress("resuming", self.loaded, 0)
        except AgentError as error:
            self._error = error
            if error.fatal:
                self._device_failed(str(error))
        finally:
            self._landed.set()

    async def _load(self, offset: int, data: memoryview) -> None:
        async def load(session: Session) -> None:
            await session.load(offset, cast("bytes", data) if session.takes_views else _as_bytes(data))

        deadline = trio.current_time() + self._data_s
        await persist(
            lambda: self._link.make(Operation.LOAD, deadline, load),
            Backoff(self._retry_s, WAITING_PAUSE_MAX_S, deadline),
        )

    async def finish(self, deadline: float) -> None:
        """Verify what came and let the agent apply it.

        Args:
            deadline: when the message has to be answered.

        Raises:
            CommandError: the stream is not whole.
            AgentError: the agent does not apply it.
        """
        await self._wait_landed()
        trailer = self._reader.finish()
        await persist(
            lambda: self._link.call(Operation.LOAD_COMMIT, deadline, trailer.total, self._digest.digest()),
            Backoff(self._retry_s, WAITING_PAUSE_MAX_S, deadline),
            # What may have been applied is not applied twice.
            lambda error: error.unsent,
        )

    def halt(self) -> None:
        """Drop everything."""
        self._scope.cancel()


def _as_bytes(piece: memoryview) -> bytes:
    """The bytes of a view, copied only if they are a part of more."""
    whole = piece.obj
    return whole if type(whole) is bytes and len(whole) == len(piece) else bytes(piece)
