"""The session of a function that is a `Primitive`: roles, order, offsets and digests are kept on this side."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio

from vfiouser_agents.api import (
    AgentState,
    Capabilities,
    Chunk,
    Descriptor,
    DirtyReport,
    Estimate,
    Outcome,
    Phase,
    Range,
    Role,
    Session,
    Status,
)
from vfiouser_agents.delivery import sending
from vfiouser_agents.dirtylog import PageLog
from vfiouser_agents.errors import (
    AgentError,
    CorruptState,
    InvalidArgument,
    InvalidState,
    ProtocolError,
)
from vfiouser_agents.operations import Op, Operation
from vfiouser_agents.rules import SAVES_IN, STILL, SessionRules, logged

from .primitive import FunctionRecord
from .primitive_state import IncomingState, SavedStream, StateFeed

T = TypeVar("T")
_log = logging.getLogger(__name__)
_UNCERTAIN = (
    "the device may be in another state: the last call failed, or there was none and the device does not report it"
)


class PrimitiveSession(Session):
    """A session for a `Primitive`; `PrimitiveAgent.open` makes it.

    Args:
        function_id: the function's name.
        book: what is known of it.
        on_close: told when it is closed.
    """

    def __init__(self, function_id: str, book: FunctionRecord, on_close: Callable[[PrimitiveSession], None]) -> None:
        self._function_id = function_id
        self._book = book
        self._device = book.primitive
        self._on_close = on_close
        self._closed = False
        self._rules = SessionRules(self, book)

    @property
    def function_id(self) -> str:
        """The function's name."""
        return self._function_id

    @property
    def caps(self) -> Capabilities:
        """What can be done with it."""
        return self._device.caps

    async def describe(self) -> Descriptor:
        """Ask the device, or tell what was configured."""
        return await self._call(Operation.DESCRIBE, self._device.describe)

    async def check(self, descriptor: Descriptor) -> None:
        """Ask the device, or compare."""

        async def work() -> None:
            await self._device.check(descriptor)

        await self._call(Operation.CHECK, work)

    async def begin(self, role: Role, migration_id: str) -> None:
        """Become the owner of the function's migration."""
        self._rules.migratable(migration_id)

        async def work() -> None:
            book = self._book
            await book.refresh()
            self._rules.working()
            mine = self._rules.make_way(role, migration_id)
            if not mine:
                await self._device.begin(role, migration_id)
            book.role, book.migration_id, book.owner = role, migration_id, self

        await self._call(Operation.BEGIN, work)

    async def status(self) -> Status:
        """Ask the device if it tells and nothing is under way; otherwise what it was last known to do."""
        book = self._book
        if not book.pending:
            await book.call(Operation.STATUS, book.refresh)
        await trio.lowlevel.checkpoint()
        detail = _UNCERTAIN if book.uncertain else ""
        role = book.role or self._device.role_told
        return Status(book.state, role, book.migration_id, book.log is not None, book.pending, detail)

    async def quiesce(self) -> None:
        """Stop DMA, or everything where that is one."""
        if not self.caps.p2p:
            await self.stop()
            return

        async def work() -> None:
            book = self._book
            await book.refresh()
            self._rules.working()
            if book.uncertain or book.state is AgentState.RUNNING:
                async with book.changing():
                    await self._device.quiesce()
                book.state = AgentState.QUIESCED

        await self._call(Operation.QUIESCE, work)

    async def stop(self) -> None:
        """Hold still."""

        async def work() -> None:
            book = self._book
            await book.refresh()
            self._rules.working()
            if book.uncertain or book.state not in STILL:
                async with book.changing():
                    await self._device.stop(book.role)
                book.state = book.state if book.state in STILL else AgentState.STOPPED

        await self._call(Operation.STOP, work)

    async def resume(self) -> None:
        """Run."""

        async def work() -> None:
            book = self._book
            await book.refresh()
            self._rules.working()
            self._rules.committed()
            if book.uncertain or book.state is not AgentState.RUNNING:
                silent = book.uncertain and not self.caps.status_query
                async with book.changing():
                    await self._resume(silent=silent)
                book.state = AgentState.RUNNING
            book.forget_states()

        await self._call(Operation.RESUME, work)

    async def _resume(self, *, silent: bool) -> None:
        try:
            await self._device.resume()
        except (InvalidState, InvalidArgument):
            if not silent:
                raise
            # That is how a device that does not tell its state says that it runs already.

    async def estimate(self) -> Estimate:
        """What the device says, or else the most that it may be."""

        async def work() -> Estimate:
            book = self._book
            if book.stream is not None and book.stream.complete:
                return Estimate(book.stream.end, exact=True)
            size = None
            if book.role is Role.SOURCE and book.state in SAVES_IN[Phase.FINAL]:
                size = await self._device.estimate()
            most = (await self._device.describe()).state_max
            return Estimate(min(most if size is None else size, self.caps.max_state))

        return await self._call(Operation.ESTIMATE, work)

    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """Give the next piece, or one that was given before."""
        self._rules.saveable_piece(offset, limit, phase)

        async def work() -> Chunk:
            book = self._book
            if book.uncertain or book.stream is None:
                await book.refresh()
            self._rules.saveable_now(phase)
            if book.stream is None or book.stream.restarts(offset):
                book.stream = SavedStream(self.caps.max_state)
            if book.stream.wants(offset):
                await self._fetch(book.stream, offset, min(limit, self.caps.max_chunk), phase)
            return book.stream.piece(offset, min(limit, self.caps.max_chunk), phase)

        return await self._call(Operation.SAVE, work)

    async def _fetch(self, stream: SavedStream, offset: int, limit: int, phase: Phase) -> None:
        arrived = False
        try:
            stream.add(await self._device.save(offset, limit, phase), limit, phase)
            arrived = True
        finally:
            if not arrived:
                # Nobody knows how far the device came, so what follows would not fit to what is here.
                self._book.stream = None
        if stream.complete:
            await self._tell_saved()

    async def _tell_saved(self) -> None:
        try:
            await self._device.saved()
        except AgentError as error:
            # The state is here as a whole, which is what counts.
            _log.warning(
                "function %s gave its whole state, but did not leave the saving state: %s", self._function_id, error
            )

    async def load_begin(self, total: int | None) -> None:
        """Get ready to collect a state."""

        async def work() -> None:
            book = self._book
            await book.refresh()
            self._rules.loadable(total)
            book.stream = None
            book.loading = IncomingState(self.caps.max_state)
            book.feed = StateFeed(self._device, book.loading, self.caps.max_chunk) if self._device.streams else None
            book.spoiled = True
            if book.feed is not None:
                sending()
                await book.feed.catch_up()
            book.state = AgentState.LOADING

        await self._call(Operation.LOAD_BEGIN, work)

    async def load(self, offset: int, data: bytes) -> None:
        """Collect a piece."""

        async def work() -> None:
            self._rules.loadable_piece(data)
            await trio.lowlevel.checkpoint()
            self._loading().put(offset, data)
            await self._feed()

        await self._call(Operation.LOAD, work)

    async def load_commit(self, total: int, digest: bytes) -> None:
        """Verify the state and give it to the device."""

        async def work() -> None:
            book = self._book
            if book.state is AgentState.LOADED:
                raise InvalidState("the state is committed already")
            state = self._loading().finish(total, digest)
            book.loading = None
            book.touched = True
            async with book.changing():
                try:
                    await self._commit(state, digest)
                except InvalidArgument as error:
                    raise CorruptState(f"the device refuses the state: {error}") from error
            book.feed = None
            book.stream = SavedStream.of(state)
            book.spoiled = book.touched = False
            book.state = AgentState.LOADED

        await self._call(Operation.LOAD_COMMIT, work)

    async def _feed(self) -> None:
        """Hand on what came in, to a device that takes it by and by."""
        if self._book.feed is not None:
            self._book.touched = True
            await self._book.feed.catch_up()

    async def _commit(self, state: bytes, digest: bytes) -> None:
        if self._book.feed is None:
            await self._device.apply(state, digest)
        else:
            await self._feed()
            await self._device.load_close(len(state), digest)

    def _loading(self) -> IncomingState:
        if self._book.loading is None:
            raise self._rules.nothing_is_loaded()
        return self._book.loading

    async def abort(self) -> None:
        """Drop buffers."""

        async def work() -> None:
            await trio.lowlevel.checkpoint()
            self._book.drop_buffers()

        await self._call(Operation.ABORT, work)

    async def dirty_start(self, ranges: Sequence[Range], page_size: int) -> int:
        """Log."""
        caps = self.caps
        self._rules.can_log()

        async def work() -> int:
            self._rules.loggable(self._book.log, ranges)
            wish = PageLog(ranges, page_size, caps.page_sizes).page_size
            chosen = await self._device.dirty_start(ranges, wish)
            if chosen not in caps.page_sizes:
                await self._device.dirty_stop()
                raise ProtocolError(f"the device logs pages of {chosen} bytes; allowed are {list(caps.page_sizes)}")
            self._book.log = PageLog(ranges, chosen, (chosen,))
            return chosen

        return await self._call(Operation.DIRTY_START, work)

    async def dirty_report(self, iova: int, length: int) -> DirtyReport:
        """Report and forget."""

        async def work() -> DirtyReport:
            # Its own pages are all clean; this checks the arguments.
            wanted = len(logged(self._book.log).take(iova, length))
            bitmap = await self._device.dirty_report(iova, length)
            if len(bitmap) != wanted:
                raise ProtocolError(f"the device's dirty bitmap has {len(bitmap)} bytes; {wanted} are needed")
            return DirtyReport(bitmap, final=self._book.state in STILL)

        return await self._call(Operation.DIRTY_REPORT, work)

    async def dirty_stop(self) -> None:
        """Forget."""

        async def work() -> None:
            if self._book.log is not None:
                await self._device.dirty_stop()
                self._book.log = None

        await self._call(Operation.DIRTY_STOP, work)

    async def reset(self) -> None:
        """Begin anew."""
        self._rules.resettable()

        async def work() -> None:
            book = self._book
            async with book.changing():
                await self._device.reset()
            book.forget_migration()
            book.forget_states()
            book.log = None
            book.state = AgentState.RUNNING

        await self._call(Operation.RESET, work)

    async def was_reset(self) -> None:
        """Forget what the device has forgotten."""

        async def work() -> None:
            await self._device.was_reset()
            self._book.forget_migration()
            self._book.forget_states()
            await self._book.refresh()

        await self._call(Operation.WAS_RESET, work)

    async def end(self, outcome: Outcome) -> None:
        """Leave the migration."""

        async def work() -> None:
            if self._book.role is not None:
                await self._device.end(outcome)
            self._book.forget_migration()

        await self._call(Operation.END, work)

    async def aclose(self) -> None:
        """Let go; a migration stays, for another session of this agent to take over."""
        if not self._closed:
            self._closed = True
            self._on_close(self)
            if self._book.owner is self:
                self._book.owner = None
        await trio.lowlevel.checkpoint()

    async def _call(self, op: Op[..., T], work: Callable[[], Awaitable[T]]) -> T:
        """Have a call executed in its turn, if it is allowed then."""

        async def admitted() -> T:
            self._rules.admit(op, is_open=not self._closed)
            return await work()

        return await self._book.call(op, admitted)
