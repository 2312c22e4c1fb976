"""The agent interface of the simulated functions, in the device process."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager

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
from vfiouser_agents.errors import Busy, Incompatible, InvalidArgument, InvalidState, NoResources, NotFound
from vfiouser_oob._version import __version__
from vfiouser_oob.simulator.agent.function import CAPABILITIES, STILL, AgentFunction
from vfiouser_oob.simulator.agent.payload import StateReader

_SAVE_STATES = {
    Phase.PRECOPY: (AgentState.RUNNING, AgentState.QUIESCED),
    Phase.FINAL: (AgentState.STOPPED, AgentState.LOADED),
}


class NvmeSession(Session):
    """A session for a simulated function.

    Args:
        function: the function.
    """

    def __init__(self, function: AgentFunction) -> None:
        self._function = function
        self._open = True

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
        await self._enter("describe", anybody=True)
        return self._function.describe()

    async def check(self, descriptor: Descriptor) -> None:
        """Compare everything that a guest could notice."""
        await self._enter("check", anybody=True)
        reasons = differences(descriptor, self._function.describe())
        if reasons:
            raise Incompatible(reasons)

    async def status(self) -> Status:
        """Where the function is."""
        await trio.lowlevel.checkpoint()
        return self._function.status()

    # Beginning and end

    async def begin(self, role: Role, migration_id: str) -> None:
        """Become the owner of the function's migration."""
        await self._enter("begin", anybody=True)
        function = self._function
        if not migration_id:
            raise InvalidArgument("a migration needs a name")
        if function.role is not None and (role, migration_id) != (function.role, function.migration_id):
            self._replace()
        function.role, function.migration_id, function.owner = role, migration_id, self

    def _replace(self) -> None:
        function = self._function
        which = f"function {function.name} is {function.role and function.role.value} of {function.migration_id!r}"
        if function.owner is self:
            raise InvalidState(f"{which}; end that first")
        if function.owner is not None:
            raise Busy(f"{which}, in another session")
        if function.state is not AgentState.RUNNING:
            raise InvalidState(f"{which}, whose session is gone, and {function.state.value}; end or reset it first")
        function.forget_migration()

    async def abort(self) -> None:
        """Drop buffers."""
        await self._enter("abort")
        self._function.drop_buffers()

    async def end(self, outcome: Outcome) -> None:
        """Leave the migration."""
        await self._enter("end")
        self._function.forget_migration()

    async def reset(self) -> None:
        """Begin anew."""
        await self._enter("reset", anybody=True)
        self._function.reset()

    # What the function does

    async def quiesce(self) -> None:
        """No DMA and no interrupts."""
        await self._enter("quiesce")
        if self._function.state is AgentState.RUNNING:
            await self._function.hold(AgentState.QUIESCED)

    async def stop(self) -> None:
        """Hold still."""
        await self._enter("stop")
        if self._function.state not in STILL:
            await self._function.hold(AgentState.STOPPED)

    async def resume(self) -> None:
        """Run."""
        await self._enter("resume")
        self._not_spoiled()
        self._function.run()

    # Saving

    async def estimate(self) -> Estimate:
        """How much there is to save."""
        await self._enter("estimate")
        function = self._function
        function.memory.advance()
        writer = function.outgoing or function.new_writer()
        return Estimate(writer.remaining, writer.initial, writer.again, exact=function.state in STILL)

    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """Give the next piece."""
        await self._enter("save", Role.SOURCE)
        function = self._function
        if limit <= 0 or offset < 0:
            raise InvalidArgument(f"save of {limit} bytes at {offset}: both must be positive")
        allowed = _SAVE_STATES[phase]
        if function.state not in allowed:
            names = " or ".join(state.value for state in allowed)
            raise InvalidState(f"save({phase.value}) needs a function that is {names}, not {function.state.value}")
        self._not_spoiled()
        function.memory.advance()
        writer = function.outgoing
        if writer is None or (offset == 0 and not writer.repeats(offset)):
            writer = function.begin_saving()
        return writer.take(offset, min(limit, self.caps.max_chunk), final=phase is Phase.FINAL)

    # Loading

    async def load_begin(self, total: int | None) -> None:
        """Get ready."""
        await self._enter("load_begin", Role.DESTINATION)
        function = self._function
        if function.state not in STILL:
            raise InvalidState(f"load_begin needs a function that is stopped, not {function.state.value}")
        if total is not None and not 0 <= total <= self.caps.max_state:
            raise NoResources(f"a state of {total} bytes", {"max_state": self.caps.max_state})
        function.begin_loading()

    async def load(self, offset: int, data: bytes) -> None:
        """Take a piece."""
        await self._enter("load", Role.DESTINATION)
        if len(data) > self.caps.max_chunk:
            raise InvalidArgument(f"load of {len(data)} bytes; at most {self.caps.max_chunk} at once")
        await self._incoming().put(offset, data)

    async def load_commit(self, total: int, sha256: bytes) -> None:
        """Verify and apply."""
        await self._enter("load_commit", Role.DESTINATION)
        self._function.commit(self._incoming().finish(total, sha256))

    def _incoming(self) -> StateReader:
        incoming = self._function.incoming
        if incoming is None:
            raise InvalidState(f"nothing is being loaded; function {self.function_id} is {self._function.state.value}")
        return incoming

    # Dirty pages

    async def dirty_start(self, ranges: Sequence[Range], page_size: int) -> int:
        """Log."""
        await self._enter("dirty_start")
        if self._function.log is not None:
            raise InvalidState("dirty pages are logged already; stop that first")
        if len(ranges) > self.caps.max_ranges:
            raise NoResources(f"{len(ranges)} ranges", {"max_ranges": self.caps.max_ranges})
        log = PageLog(ranges, page_size, self.caps.page_sizes)
        self._function.start_logging(log)
        return log.page_size

    async def dirty_report(self, iova: int, length: int) -> DirtyReport:
        """Report and forget."""
        await self._enter("dirty_report")
        if self._function.log is None:
            raise InvalidState("dirty pages are not being logged")
        return DirtyReport(self._function.log.take(iova, length), final=self._function.state in STILL)

    async def dirty_stop(self) -> None:
        """Forget."""
        await self._enter("dirty_stop")
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

    async def _enter(self, name: str, role: Role | None = None, *, anybody: bool = False) -> None:
        """What all calls have in common: the migration of another session is in their way."""
        await trio.lowlevel.checkpoint()
        function = self._function
        if not self._open:
            raise NotFound(f"this session of function {function.name} is closed")
        if not anybody and function.owner not in (None, self):
            raise Busy(f"function {function.name} is in migration {function.migration_id!r} of another session")
        if role is not None and (function.role is not role or function.owner is not self):
            had = function.role.value if function.role and function.owner is self else "in no migration"
            raise InvalidState(f"{name} needs a session that began as {role.value}; this one is {had}")

    def _not_spoiled(self) -> None:
        if self._function.spoiled:
            raise InvalidState(f"function {self.function_id} holds a state that was not committed; reset it first")


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


def differences(source: Descriptor, here: Descriptor) -> list[str]:
    """Everything in which a source differs from this function, one line each, naming both sides."""
    pairs = [
        (name.replace("_", " "), getattr(source, name), getattr(here, name))
        for name in ("format_id", "format_version", "vendor", "model", "kind", "firmware")
    ]
    names = sorted({*source.fingerprint, *here.fingerprint})
    pairs += [(name, source.fingerprint.get(name), here.fingerprint.get(name)) for name in names]
    return [f"{name} is {theirs!r} there and {ours!r} here" for name, theirs, ours in pairs if theirs != ours]
