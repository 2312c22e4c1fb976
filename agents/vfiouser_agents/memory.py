"""An agent in memory: the interface as an executable specification, and a function to test engines with.

The function's state is a number of bytes that make no sense, and a counter of the work that it did. It writes guest
memory only when a test says so (`MemoryFunction.work`), and only while it runs. Its stream is a sequence of records
(see `_Outgoing`), so that a state that is applied in another order, or with a byte changed, is not the same.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import trio

from .api import (
    Agent,
    AgentInfo,
    AgentState,
    Capabilities,
    Chunk,
    Descriptor,
    DirtyReport,
    Estimate,
    Event,
    EventKind,
    FunctionInfo,
    Outcome,
    Phase,
    Range,
    Role,
    Session,
    Status,
)
from .dirtylog import PageLog
from .errors import InvalidState, NotFound
from .events import EventFeed
from .memory_state import Content, Incoming, Outgoing
from .operations import Op, Operation
from .rules import STILL, SessionRules, logged, require_same

FORMAT = "memory-agent"
#: Everything that a function of the in-memory agent can do.
ALL_CAPABILITIES = Capabilities(
    p2p=True,
    precopy=True,
    dirty=True,
    formats=(FORMAT,),
    max_state=4 << 30,
    page_sizes=(4096, 65536, 2 << 20),
    max_ranges=1024,
)


@dataclass
class MemoryFunction:
    """One function; it lives as long as the agent, and longer than any session.

    Args:
        function_id: its name.
        state_size: bytes of its state.
        seed: what its state is made of at the beginning.
        churn: bytes that change after each pass of pre-copy while it runs.
        caps: what its agent shall be able to do.
        firmware: for the descriptor; another one is incompatible.
        fingerprint: for the descriptor; anything else is incompatible.
    """

    function_id: str = "f0"
    state_size: int = 256 << 10
    seed: int = 1
    churn: int = 0
    caps: Capabilities = ALL_CAPABILITIES
    firmware: str = "1.0"
    fingerprint: Mapping[str, str] = field(default_factory=lambda: {"queues": "8"})

    def __post_init__(self) -> None:
        self.state = AgentState.RUNNING
        self.role: Role | None = None
        self.migration_id = ""
        self.owner: MemorySession | None = None
        self.content = Content(self.state_size, self.seed)
        self.counter = 0
        self.log: PageLog | None = None
        self.outgoing: Outgoing | None = None
        self.incoming: Incoming | None = None
        #: A load was begun and not committed: what the function holds is not to be run.
        self.spoiled = False
        #: Names of the calls in the order of their execution.
        self.calls: list[str] = []
        self.feed = EventFeed()
        self._random = random.Random(self.seed)

    @property
    def running(self) -> bool:
        """It may write guest memory and change its state."""
        return self.state is AgentState.RUNNING

    def digest(self) -> bytes:
        """Return the SHA-256 of everything that a migration carries; equal on both sides after a good one."""
        return hashlib.sha256(self.content.digest() + self.counter.to_bytes(8, "little")).digest()

    def work(self, iova: int = 0, length: int = 0, changes: int = 0) -> None:
        """Do what a guest would have asked for: count, write guest memory, change state.

        Args:
            iova: beginning of the guest memory written.
            length: bytes of guest memory written.
            changes: bytes of state that change.

        Raises:
            RuntimeError: it does not run; a device that does this anyway loses the guest's data.
        """
        if not self.running:
            raise RuntimeError(f"function {self.function_id} worked while {self.state.value}")
        self.counter += 1
        if self.log is not None and length:
            self.log.mark(iova, length)
        self._change(changes)

    def fail(self, detail: str = "the device failed") -> None:
        """Break it, as hardware breaks.

        Args:
            detail: what the event says about it.
        """
        self.move(AgentState.ERROR)
        self.feed.put(Event(EventKind.DEVICE_ERROR, detail, self.status()))

    def status(self) -> Status:
        """Return its state and its part in a migration."""
        return Status(self.state, self.role, self.migration_id, self.log is not None)

    def move(self, state: AgentState) -> None:
        """Go to a state and tell the watchers; do nothing if it is there already.

        Args:
            state: where to go.
        """
        if state is not self.state:
            self.state = state
            self.feed.put(Event(EventKind.STATE_CHANGED, f"now {state.value}", self.status()))

    def describe(self) -> Descriptor:
        """Return its descriptor."""
        return Descriptor(
            FORMAT, 1, "vfiouser-oob", "memory", "test", self.firmware, self.state_size, dict(self.fingerprint)
        )

    def after_pass(self) -> None:
        """Change as a device at work would have during a pass of pre-copy, if it runs."""
        if self.running:
            self._change(self.churn)

    def forget_migration(self) -> None:
        """Leave the migration; what the function does stays."""
        self.drop_buffers()
        self.role, self.migration_id, self.owner = None, "", None

    def drop_buffers(self) -> None:
        """Drop what was being saved or loaded."""
        self.outgoing = None
        self.incoming = None
        if self.state is AgentState.LOADING:
            self.move(AgentState.STOPPED)

    def reset(self) -> None:
        """Become what it was at the beginning, as after a function-level reset."""
        self.forget_migration()
        self.log = None
        self.spoiled = False
        self.content = Content(self.state_size, self.seed)
        self.counter = 0
        self.move(AgentState.RUNNING)

    def _change(self, count: int) -> None:
        while count > 0:
            piece = min(count, 4096, self.state_size)
            offset = self._random.randrange(self.state_size - piece + 1)
            self.content.write(offset, self._random.randbytes(piece))
            if self.outgoing is not None:
                self.outgoing.changed(offset, piece)
            count -= piece


class MemorySession(Session):
    """A session for a function in memory; `Session` describes its methods.

    Args:
        function: whose session it is.
    """

    def __init__(self, function: MemoryFunction) -> None:
        self.function = function
        self.open = True
        self._rules = SessionRules(self, function)

    @property
    def function_id(self) -> str:
        """The function's name."""
        return self.function.function_id

    @property
    def caps(self) -> Capabilities:
        """What can be done with it."""
        return self.function.caps

    async def describe(self) -> Descriptor:
        """Return the function's descriptor."""
        await self._enter(Operation.DESCRIBE)
        return self.function.describe()

    async def check(self, descriptor: Descriptor) -> None:
        """Compare everything; sizes need not be equal, but must fit."""
        await self._enter(Operation.CHECK)
        require_same(descriptor, self.function.describe(), self.function.state_size)

    async def begin(self, role: Role, migration_id: str) -> None:
        """Become the owner of the function's migration."""
        await self._enter(Operation.BEGIN)
        function = self.function
        self._rules.migratable(migration_id)
        self._rules.working()
        self._rules.make_way(role, migration_id)
        function.role, function.migration_id, function.owner = role, migration_id, self

    async def status(self) -> Status:
        """Return where the function is."""
        await trio.lowlevel.checkpoint()
        return self.function.status()

    async def quiesce(self) -> None:
        """Stop writing guest memory."""
        await self._enter(Operation.QUIESCE)
        self._rules.working()
        if self.function.state is AgentState.RUNNING:
            self.function.move(AgentState.QUIESCED if self.caps.p2p else AgentState.STOPPED)

    async def stop(self) -> None:
        """Hold still."""
        await self._enter(Operation.STOP)
        self._rules.working()
        if self.function.state not in STILL:
            self.function.move(AgentState.STOPPED)

    async def resume(self) -> None:
        """Run."""
        await self._enter(Operation.RESUME)
        self._rules.working()
        self._rules.committed()
        self.function.outgoing = None
        self.function.move(AgentState.RUNNING)

    async def estimate(self) -> Estimate:
        """Return the exact numbers, since nothing changes by itself."""
        await self._enter(Operation.ESTIMATE)
        outgoing = self.function.outgoing or Outgoing(self.function.content)
        initial, dirty = outgoing.estimate()
        return Estimate(outgoing.remaining(), initial, dirty, exact=True)

    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """Give the next piece."""
        await self._enter(Operation.SAVE)
        function = self.function
        self._rules.saveable_piece(offset, limit, phase)
        self._rules.saveable_now(phase)
        if function.outgoing is None or (offset == 0 and not function.outgoing.repeats(offset)):
            function.outgoing = Outgoing(function.content)
        counter = None if phase is Phase.PRECOPY else function.counter
        chunk = function.outgoing.take(offset, min(limit, self.caps.max_chunk), counter)
        if chunk.drained:
            function.after_pass()
        return chunk

    async def load_begin(self, total: int | None) -> None:
        """Get ready for a state."""
        await self._enter(Operation.LOAD_BEGIN)
        function = self.function
        self._rules.loadable(total)
        function.incoming = Incoming(function.state_size, self.caps.max_state)
        function.spoiled = True
        function.move(AgentState.LOADING)

    async def load(self, offset: int, data: bytes) -> None:
        """Take a piece of the state."""
        await self._enter(Operation.LOAD)
        self._rules.loadable_piece(data)
        self._incoming().put(offset, data)

    async def load_commit(self, total: int, digest: bytes) -> None:
        """Verify and apply the state.

        Raises:
            InvalidState: the state is committed already.
        """
        await self._enter(Operation.LOAD_COMMIT)
        if self.function.state is AgentState.LOADED:
            raise InvalidState("the state is committed already")
        content, counter = self._incoming().finish(total, digest, self.function.seed)
        self.function.content, self.function.counter = content, counter
        self.function.incoming = None
        self.function.spoiled = False
        self.function.move(AgentState.LOADED)

    def _incoming(self) -> Incoming:
        if self.function.incoming is None:
            raise self._rules.nothing_is_loaded()
        return self.function.incoming

    async def abort(self) -> None:
        """Drop buffers."""
        await self._enter(Operation.ABORT)
        self.function.drop_buffers()

    async def dirty_start(self, ranges: Sequence[Range], page_size: int) -> int:
        """Log the pages that `MemoryFunction.work` writes."""
        await self._enter(Operation.DIRTY_START)
        function = self.function
        self._rules.can_log()
        self._rules.loggable(function.log, ranges)
        function.log = PageLog(ranges, page_size, self.caps.page_sizes)
        return function.log.page_size

    async def dirty_report(self, iova: int, length: int) -> DirtyReport:
        """Report the logged pages and forget them."""
        await self._enter(Operation.DIRTY_REPORT)
        return DirtyReport(logged(self.function.log).take(iova, length), final=self.function.state in STILL)

    async def dirty_stop(self) -> None:
        """Forget the log."""
        await self._enter(Operation.DIRTY_STOP)
        self.function.log = None

    async def reset(self) -> None:
        """Start again, as after power-on."""
        await self._enter(Operation.RESET)
        self._rules.resettable()
        self.function.reset()

    async def end(self, outcome: Outcome) -> None:
        """Leave the migration."""
        await self._enter(Operation.END)
        self.function.forget_migration()

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Watch what happens to the function."""
        return self.function.feed.watch()

    async def aclose(self) -> None:
        """Let go; a migration stays, and another session may take it over."""
        self.open = False
        if self.function.owner is self:
            self.function.owner = None
        await trio.lowlevel.checkpoint()

    async def _enter(self, op: Op[..., Any]) -> None:
        """What all calls have in common: they are noted, and the migration of another session is in the way."""
        await trio.lowlevel.checkpoint()
        self.function.calls.append(op.name)
        self._rules.admit(op, is_open=self.open)


class MemoryAgent(Agent):
    """An agent whose functions are objects.

    Args:
        functions: the functions; one called ``f0`` if left out.
        info: what `connect` shall answer.
    """

    def __init__(self, functions: Sequence[MemoryFunction] = (), info: AgentInfo | None = None) -> None:
        self.by_id = {function.function_id: function for function in functions or (MemoryFunction(),)}
        self._info = info or AgentInfo("vfiouser-oob", "memory agent", "1.0", instance=f"memory-{id(self):x}")
        self._sessions: list[MemorySession] = []

    async def connect(self) -> AgentInfo:
        """Nothing to reach."""
        await trio.lowlevel.checkpoint()
        return self._info

    async def aclose(self) -> None:
        """Close the sessions; the functions stay."""
        for session in self._sessions:
            await session.aclose()
        self._sessions.clear()

    async def open(self, function_id: str) -> MemorySession:
        """Open a session for a function.

        Args:
            function_id: the function.

        Raises:
            NotFound: there is no such function.
        """
        await trio.lowlevel.checkpoint()
        if function_id not in self.by_id:
            raise NotFound(f"no function {function_id!r} (there are: {', '.join(self.by_id)})")
        self._sessions = [session for session in self._sessions if session.open]
        session = MemorySession(self.by_id[function_id])
        self._sessions.append(session)
        return session

    async def functions(self) -> Sequence[FunctionInfo]:
        """Return all functions."""
        await trio.lowlevel.checkpoint()
        return [FunctionInfo(name, "test") for name in self.by_id]
