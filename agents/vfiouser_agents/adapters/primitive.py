"""What devices with few commands have in common: the whole contract of a session on top of stop, resume, save, load.

Vendors' interfaces have no roles, offsets, digests or names of migrations. This module keeps those on our side, for as
long as the agent is open, and asks the device only for what it can do:

- A state that is loaded is collected and verified. A device that takes it piece by piece (`Primitive.streams`) gets
  each piece as it comes, so that the commit does not take the time of the whole; one that was not committed never runs.
  Any other device gets it as a whole by the commit. Then a state that is cut or corrupt never reaches a device that
  could not tell, and the function may run again once its migration has ended.
- A state that was saved from a stopped function is kept until the function runs again, since such a device gives it
  once only. Each of the two takes up to `max_state` bytes of memory.
- Another connection knows nothing of a migration: `Capabilities.takeover` is not claimed.

`primitive_session` holds the session; adapters derive from `Primitive` and `PrimitiveAgent`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from vfiouser_agents.api import AgentState, Capabilities, Chunk, Descriptor, Outcome, Phase, Range, Role
from vfiouser_agents.delivery import carried, preparing, sending
from vfiouser_agents.dirtylog import PageLog
from vfiouser_agents.errors import AgentError, ConnectError, InvalidState, TransportLost, Unsupported
from vfiouser_agents.operations import Op
from vfiouser_agents.ordering import CallQueue
from vfiouser_agents.rules import require_same

from .primitive_state import IncomingState, SavedStream, StateFeed
from .tasks import AgentWithTasks

if TYPE_CHECKING:
    from .primitive_session import PrimitiveSession

_log = logging.getLogger(__name__)
T = TypeVar("T")
#: Seconds in which the calls under way may come to their end when an agent is closed.
_CLOSE_S = 3.0


class Primitive(ABC):
    """One function, as its vendor's interface shows it. Calls come one at a time."""

    @property
    @abstractmethod
    def caps(self) -> Capabilities:
        """What can be done with it."""

    @abstractmethod
    async def describe(self) -> Descriptor:
        """What it is."""

    async def check(self, descriptor: Descriptor) -> None:
        """Decide whether the state of such a function could be loaded here; everything must be equal.

        Raises:
            Incompatible: it could not.
        """
        here = await self.describe()
        require_same(descriptor, here, self.caps.max_state)

    async def state(self) -> AgentState | None:
        """What the device says that it does; None if it does not tell."""
        return None

    @property
    def role_told(self) -> Role | None:
        """The side of a migration that the device itself said it is on, when it was last asked; None if it does not."""
        return None

    async def begin(self, role: Role, migration_id: str) -> None:  # noqa: B027
        """A migration begins; does nothing unless the device wants to know."""

    async def end(self, outcome: Outcome) -> None:  # noqa: B027
        """A migration is over; does nothing unless the device wants to know."""

    async def quiesce(self) -> None:
        """Start no DMA any more; only called with `Capabilities.p2p`."""
        raise Unsupported("this device has no state between running and stopped")

    @abstractmethod
    async def stop(self, role: Role | None) -> None:
        """Hold still; not called for a function that does."""

    @abstractmethod
    async def resume(self) -> None:
        """Run."""

    async def estimate(self) -> int | None:
        """Bytes of the state of a stopped source; None if there is no telling."""
        return None

    @abstractmethod
    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """The next piece; offsets only grow, and 0 begins anew."""

    async def saved(self) -> None:  # noqa: B027
        """The whole state of a stopped function was given; whatever is asked for again is kept on this side."""

    @property
    def streams(self) -> bool:
        """It takes a state as it comes, by `load_open` and `load_piece`; otherwise `apply` has it as a whole."""
        return False

    async def load_open(self) -> None:
        """Get ready for a state from its beginning; only called with `streams`."""
        raise Unsupported("this device accepts no state in pieces")

    async def load_piece(self, offset: int, data: bytes) -> None:
        """Take the next piece; only called with `streams`."""
        raise Unsupported("this device accepts no state in pieces")

    async def load_close(self, total: int, digest: bytes) -> None:  # noqa: B027
        """Everything came, and is what it should be; only called with `streams`."""

    async def apply(self, state: bytes, digest: bytes) -> None:
        """Load a whole state into the stopped device; only called without `streams`."""
        raise Unsupported("this device accepts no whole state")

    async def dirty_start(self, ranges: Sequence[Range], page_size: int) -> int:
        """Log the pages that it writes, and tell the page size; only called with `Capabilities.dirty`."""
        raise Unsupported("this device has no dirty log")

    async def dirty_report(self, iova: int, length: int) -> bytes:
        """The bitmap of a range, and forget."""
        raise Unsupported("this device has no dirty log")

    async def dirty_stop(self) -> None:  # noqa: B027
        """End logging."""

    async def reset(self) -> None:
        """As after a function-level reset; only called with `Capabilities.reset`."""
        raise Unsupported("this device cannot be reset by its agent")

    async def reach(self) -> None:  # noqa: B027
        """Make the connection that the next call needs, where nothing was asked before that call.

        Raises:
            ConnectError: it cannot be made; nothing was sent.
        """

    async def was_reset(self) -> None:  # noqa: B027
        """The function was reset through the device itself; only called without `Capabilities.reset`."""

    async def release(self) -> None:  # noqa: B027
        """No call and no migration is under way, or no more of its state is needed: others may have the device."""

    async def aclose(self) -> None:  # noqa: B027
        """Let go of it."""


class FunctionRecord:
    """What is known of one function on this side, shared by its sessions.

    Args:
        primitive: the function.
        queue: executes calls also when nobody waits for them any more; None = they are cancelled with their caller.
    """

    def __init__(self, primitive: Primitive, queue: CallQueue | None) -> None:
        self.primitive = primitive
        #: One that does not tell may have been stopped before we came, for a copy of it that runs elsewhere.
        silent = not primitive.caps.status_query
        self.state = AgentState.STOPPED if silent else AgentState.RUNNING
        #: The last call that changes the state did not end well, or there was none and the device does not tell: it may
        #: be in another one.
        self.uncertain = silent
        #: A load was begun and not committed.
        self.spoiled = False
        #: Bytes of that load may have reached the device.
        self.touched = False
        self.role: Role | None = None
        self.migration_id = ""
        self.owner: PrimitiveSession | None = None
        self.stream: SavedStream | None = None
        self.loading: IncomingState | None = None
        self.feed: StateFeed | None = None
        self.log: PageLog | None = None
        self._queue = queue
        self._lock = trio.Lock()
        self._pending = ""

    @property
    def pending(self) -> str:
        """The call that is being executed, or empty."""
        return self._queue.pending if self._queue is not None else self._pending

    async def call(self, op: Op[..., Any], work: Callable[[], Awaitable[T]]) -> T:
        """Execute a call after all that came before it; without a queue, one that overtakes waits for them, too.

        Args:
            op: what is called. If it changes what the function does, `sending` is noted before the device is told.
            work: does it.
        """
        if op.changes:
            preparing()
        if self._queue is not None:
            try:
                return await self._queue.call(op.name, carried(partial(self._work, work)), overtakes=op.overtakes)
            except trio.Cancelled:
                # It is executed even when its caller gives it up, so then nobody can say that it was not sent.
                sending()
                raise
        async with self._lock:
            self._pending = op.name
            try:
                return await self._work(work)
            finally:
                self._pending = ""

    async def _work(self, work: Callable[[], Awaitable[T]]) -> T:
        try:
            return await work()
        finally:
            if self.role is None or self._given:
                await self._release()

    @property
    def _given(self) -> bool:
        """It is a source whose whole state is here, so that the device is not needed for it any more."""
        return self.role is Role.SOURCE and self.stream is not None and self.stream.complete

    async def close(self) -> None:
        """Let go of the device, behind the calls that are under way if they come to an end."""
        if self._queue is not None:
            with trio.move_on_after(_CLOSE_S):
                try:
                    await self._queue.call("close", trio.lowlevel.checkpoint)
                except InvalidState:
                    pass  # nothing is executed any more
            self._queue.abandon("the end")
        with trio.move_on_after(_CLOSE_S):
            await self.primitive.aclose()

    async def _release(self) -> None:
        try:
            await self.primitive.release()
        except AgentError as error:
            # The call itself is over, and its outcome is what matters.
            _log.warning("closing a device failed: %s", error)

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Whatever ends the block early leaves the device in a state that is not known."""
        await self.primitive.reach()
        sending()
        before, self.uncertain = self.uncertain, True
        try:
            yield
        except Unsupported:
            self.uncertain = before
            raise
        except ConnectError as error:
            # The way was there when this began; it may have been lost behind the first of several messages.
            raise TransportLost(error.message) from error
        self.uncertain = False

    async def refresh(self) -> None:
        """Ask the device what it does, if it tells."""
        told = await self.primitive.state()
        if told is None:
            return
        self.uncertain = False
        ours = (AgentState.STOPPED, AgentState.LOADING, AgentState.LOADED)
        if told in ours and self.state in ours and (self.spoiled or self.state is AgentState.LOADED):
            return  # the device does not know how far a load is; we do
        if told is AgentState.LOADING:
            self.spoiled = self.touched = True  # by somebody else, and nobody knows how far
        if told is AgentState.RUNNING:
            self.forget_states()
        self.state = told

    def forget_states(self) -> None:
        """The function runs: whatever was saved or loaded is of the past."""
        self.stream = None
        self.loading = self.feed = None
        self.spoiled = False
        self.touched = False

    def forget_migration(self) -> None:
        """Leave the migration; what the function does stays."""
        self.role, self.migration_id, self.owner = None, "", None
        self.drop_buffers()
        if not self.touched:
            # What was collected never left this side, so the function holds what it held before.
            self.spoiled = False

    def drop_buffers(self) -> None:
        """Drop what was being saved or loaded, but for a state that could not be had again."""
        self.loading = self.feed = None
        if self.stream is not None and not self.stream.final_only:
            self.stream = None
        if self.state is AgentState.LOADING:
            self.state = AgentState.STOPPED


class PrimitiveAgent(AgentWithTasks):
    """An agent whose functions are `Primitive`s; derived classes say how to find one.

    Args:
        detached: calls go on when their caller is cancelled, as a device does that cannot tell how far it came.
    """

    def __init__(self, *, detached: bool) -> None:
        super().__init__()
        self._detached = detached
        self.books: dict[str, FunctionRecord] = {}
        self._opening = trio.Lock()
        self._sessions: list[PrimitiveSession] = []

    @abstractmethod
    async def find(self, function_id: str) -> Primitive:
        """A function by its name.

        Raises:
            NotFound: there is no such function.
        """

    async def aclose(self) -> None:
        """Let go of everything; functions stay as they are."""
        # Also at the end of a daemon, which cancels us: what is under way ends in order, and others get the device.
        with trio.CancelScope(shield=True):
            for session in list(self._sessions):
                await session.aclose()
            books, self.books = self.books, {}
            for book in books.values():
                await book.close()

    async def open(self, function_id: str) -> PrimitiveSession:
        """A session for a function."""
        from .primitive_session import PrimitiveSession

        nursery = self.nursery
        async with self._opening:
            book = self.books.get(function_id)
            if book is None:
                primitive = await self.find(function_id)
                queue = CallQueue(nursery) if self._detached else None
                book = self.books[function_id] = FunctionRecord(primitive, queue)
        session = PrimitiveSession(function_id, book, self._sessions.remove)
        self._sessions.append(session)
        return session
