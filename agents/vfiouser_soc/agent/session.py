"""The agent interface of the simulated functions, in the device process."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import trio

from vfiouser_agents.api import (
    Agent,
    AgentInfo,
    AgentState,
    Capabilities,
    Chunk,
    Descriptor,
    DirtyReport,
    Estimate,
    Event,
    FunctionInfo,
    Outcome,
    Phase,
    Range,
    Role,
    Session,
    Status,
)
from vfiouser_agents.dirtylog import PageLog
from vfiouser_agents.errors import NotFound
from vfiouser_agents.operations import Op, Operation
from vfiouser_agents.rules import STILL, SessionRules, logged, require_same
from vfiouser_oob._version import __version__
from vfiouser_soc.agent.function import CAPABILITIES, AgentFunction
from vfiouser_soc.agent.payload import StateReader


class NvmeSession(Session):
    """A session for a simulated function.

    Args:
        function: the function.
    """

    def __init__(self, function: AgentFunction) -> None:
        self._function = function
        self._open = True
        self._rules = SessionRules(self, function)

    @property
    def function_id(self) -> str:
        """The function's name."""
        return self._function.name

    @property
    def caps(self) -> Capabilities:
        """What can be done with it."""
        return CAPABILITIES

    # What it is

    async def describe(self) -> Descriptor:
        """What the function is."""
        await self._enter(Operation.DESCRIBE)
        return self._function.describe()

    async def check(self, descriptor: Descriptor) -> None:
        """Compare everything that a guest could notice."""
        await self._enter(Operation.CHECK)
        require_same(descriptor, self._function.describe())

    async def status(self) -> Status:
        """Where the function is."""
        await trio.lowlevel.checkpoint()
        return self._function.status()

    # Beginning and end

    async def begin(self, role: Role, migration_id: str) -> None:
        """Become the owner of the function's migration."""
        await self._enter(Operation.BEGIN)
        function = self._function
        self._rules.migratable(migration_id)
        self._rules.make_way(role, migration_id)
        function.role, function.migration_id, function.owner = role, migration_id, self

    async def abort(self) -> None:
        """Drop buffers."""
        await self._enter(Operation.ABORT)
        self._function.drop_buffers()

    async def end(self, outcome: Outcome) -> None:
        """Leave the migration."""
        await self._enter(Operation.END)
        self._function.forget_migration()

    async def reset(self) -> None:
        """Begin anew."""
        await self._enter(Operation.RESET)
        self._function.reset()

    # What the function does

    async def quiesce(self) -> None:
        """No DMA and no interrupts."""
        await self._enter(Operation.QUIESCE)
        if self._function.state is AgentState.RUNNING:
            await self._function.hold(AgentState.QUIESCED)

    async def stop(self) -> None:
        """Hold still."""
        await self._enter(Operation.STOP)
        if self._function.state not in STILL:
            await self._function.hold(AgentState.STOPPED)

    async def resume(self) -> None:
        """Run."""
        await self._enter(Operation.RESUME)
        self._rules.committed()
        self._function.run()

    # Saving

    async def estimate(self) -> Estimate:
        """How much there is to save."""
        await self._enter(Operation.ESTIMATE)
        function = self._function
        function.memory.advance()
        writer = function.outgoing or function.new_writer()
        return Estimate(writer.remaining, writer.initial, writer.again, exact=function.state in STILL)

    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """Give the next piece."""
        await self._enter(Operation.SAVE)
        function = self._function
        self._rules.saveable_piece(offset, limit, phase)
        self._rules.saveable_now(phase)
        function.memory.advance()
        writer = function.outgoing
        if writer is None or (offset == 0 and not writer.repeats(offset)):
            writer = function.begin_saving()
        return writer.take(offset, min(limit, self.caps.max_chunk), final=phase is Phase.FINAL)

    # Loading

    async def load_begin(self, total: int | None) -> None:
        """Get ready."""
        await self._enter(Operation.LOAD_BEGIN)
        self._rules.loadable(total)
        self._function.begin_loading()

    async def load(self, offset: int, data: bytes) -> None:
        """Take a piece."""
        await self._enter(Operation.LOAD)
        self._rules.loadable_piece(data)
        await self._incoming().put(offset, data)

    async def load_commit(self, total: int, digest: bytes) -> None:
        """Verify and apply."""
        await self._enter(Operation.LOAD_COMMIT)
        self._function.commit(self._incoming().finish(total, digest))

    def _incoming(self) -> StateReader:
        incoming = self._function.incoming
        if incoming is None:
            raise self._rules.nothing_is_loaded()
        return incoming

    # Dirty pages

    async def dirty_start(self, ranges: Sequence[Range], page_size: int) -> int:
        """Log."""
        await self._enter(Operation.DIRTY_START)
        self._rules.loggable(self._function.log, ranges)
        log = PageLog(ranges, page_size, self.caps.page_sizes)
        self._function.start_logging(log)
        return log.page_size

    async def dirty_report(self, iova: int, length: int) -> DirtyReport:
        """Report and forget."""
        await self._enter(Operation.DIRTY_REPORT)
        return DirtyReport(logged(self._function.log).take(iova, length), final=self._function.state in STILL)

    async def dirty_stop(self) -> None:
        """Forget."""
        await self._enter(Operation.DIRTY_STOP)
        self._function.stop_logging()

    # The session itself

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """What happens to the function."""
        return self._function.feed.watch()

    async def aclose(self) -> None:
        """Let go; a migration stays, for whoever takes it over."""
        self._open = False
        if self._function.owner is self:
            self._function.owner = None
        await trio.lowlevel.checkpoint()

    async def _enter(self, op: Op[..., Any]) -> None:
        """What all calls have in common: the migration of another session is in their way."""
        await trio.lowlevel.checkpoint()
        self._rules.admit(op, is_open=self._open)


class NvmeAgent(Agent):
    """The agent of all functions of one device process.

    Args:
        functions: the functions.
    """

    def __init__(self, functions: Sequence[AgentFunction]) -> None:
        self._functions = {function.name: function for function in functions}
        self._info = AgentInfo("vfiouser-oob", "simulated SoC", __version__, instance=uuid.uuid4().hex)

    async def connect(self) -> AgentInfo:
        """Nothing to reach."""
        await trio.lowlevel.checkpoint()
        return self._info

    async def aclose(self) -> None:
        """Nothing to let go of; the functions stay as they are."""
        await trio.lowlevel.checkpoint()

    async def open(self, function_id: str) -> NvmeSession:
        """A session for a function."""
        await trio.lowlevel.checkpoint()
        function = self._functions.get(function_id)
        if function is None:
            raise NotFound(f"no function {function_id[:100]!r} (there are: {', '.join(self._functions)})")
        return NvmeSession(function)

    async def functions(self) -> Sequence[FunctionInfo]:
        """All functions."""
        await trio.lowlevel.checkpoint()
        return [function.info for function in self._functions.values()]
