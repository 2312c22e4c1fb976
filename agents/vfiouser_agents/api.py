"""The interface to an agent: `Agent` for a service on an SoC, `Session` for one of its functions.

An adapter implements both as a client of a vendor's protocol; an agent written with `rpc.server` implements both as the
thing itself. The rules, which `testing.check_agent` proves:

1. Every call runs under the caller's cancel scope; there are no deadlines of our own in here. A cancelled call may
   still take effect: ask `status`, or `reset`. The session stays usable.
2. `quiesce`, `stop`, `resume`, `abort`, `dirty_stop`, `end` and a repeated `begin` are idempotent. Where
   `Capabilities.p2p` is false, `quiesce` does what `stop` does.
3. `save(FINAL)` is for STOPPED and LOADED, `save(PRECOPY)` for RUNNING and QUIESCED. Offsets count the bytes of one
   stream over both phases. The last chunk may be asked for again; asking for the offset after it acknowledges it. Any
   other offset needs `random_access_save`. 0 starts again, and a function that stayed stopped gives the same bytes.
4. `load_begin`, `load` and `load_commit` need the role DESTINATION, and `load_begin` a function in STOPPED, LOADING or
   LOADED. Bytes arrive in order. The commit verifies total and digest, applies, and leaves LOADED; `resume` then runs
   the function.
5. On a source, `resume` is the way back at any time. After a load that did not commit, even after `abort`, the
   function needs a `reset` or another load. If no part of the load has reached the function, `end` may do, too.
6. A dirty report that fails, or whose answer is lost, makes everything in its range dirty.
7. What is not supported raises `Unsupported`, and `caps` never claims it.
8. The calls of one function are executed in the order of their arrival, except `status`, which is answered at once,
   and `reset`, which ends what is under way.
9. A migration belongs to the session that began it. Calls of others that change something raise `Busy`, except
   `reset`; once that session is gone, they may `quiesce`, `stop`, `resume`, `abort`, `end`, or take over by `begin`.
   This binds other connections, and lets them take over, only where `takeover` is claimed.
10. The function's state belongs to the function. Losing a connection, closing a session or restarting the agent changes
    nothing: what was stopped stays stopped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Self

from .errors import Unsupported
from .values import (
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
    Status,
)

__all__ = [
    "Agent",
    "AgentInfo",
    "AgentState",
    "Capabilities",
    "Chunk",
    "Descriptor",
    "DirtyReport",
    "Estimate",
    "Event",
    "EventKind",
    "FunctionInfo",
    "Outcome",
    "Phase",
    "Range",
    "Role",
    "Session",
    "Status",
]


class Session(ABC):
    """One function of an agent. See the rules at the head of this module; all sizes are in bytes.

    Any method may raise `TransportLost` (effect unknown), `Busy`, `DeviceFailed` or `ProtocolError`; only what is
    special to a method is listed there.
    """

    #: Whether `load` takes a read-only `memoryview`, too. That saves a copy of all state. Its memory is used again once
    #: every view of it is gone, so what is to be kept for long is better copied.
    takes_views = False

    @property
    @abstractmethod
    def function_id(self) -> str:
        """The function's name."""

    @property
    @abstractmethod
    def caps(self) -> Capabilities:
        """What can be done with it; does not change while the session is open."""

    @abstractmethod
    async def describe(self) -> Descriptor:
        """What the function is; the first thing that a source's stream carries."""

    @abstractmethod
    async def check(self, descriptor: Descriptor) -> None:
        """Decide whether the state of such a function could be loaded here. Changes nothing.

        Args:
            descriptor: the source function's, as `describe` gave it there.

        Raises:
            Incompatible: it could not, for these reasons.
        """

    @abstractmethod
    async def begin(self, role: Role, migration_id: str) -> None:
        """Take part in a migration. Does not change what the function does.

        Calling it again with the same arguments takes the migration over, also from another session: that is how a
        client goes on after it has connected again.

        Args:
            role: SOURCE or DESTINATION.
            migration_id: the migration's name, the same on both sides.

        Raises:
            Busy: another open session is in another migration.
            InvalidState: this session is in another migration, or the function is, its session is gone, and it does
                not run: then only `end` or `reset` concludes it.
            DeviceFailed: in ERROR.
            Unsupported: the function cannot be migrated.
        """

    @abstractmethod
    async def status(self) -> Status:
        """Return where the function is, at once, even while another call runs."""

    @abstractmethod
    async def quiesce(self) -> None:
        """Start no DMA and no interrupts any more; registers still answer."""

    @abstractmethod
    async def stop(self) -> None:
        """Drain everything and hold still: when this returns, nothing changes any more."""

    @abstractmethod
    async def resume(self) -> None:
        """Run: from QUIESCED, STOPPED or LOADED.

        Raises:
            InvalidState: a load has started and was not committed; call `reset`, or load again.
            DeviceFailed: in ERROR.
        """

    @abstractmethod
    async def estimate(self) -> Estimate:
        """How much there is to save."""

    @abstractmethod
    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """Give the next piece of the state.

        Args:
            offset: where in the stream; 0 starts it again.
            limit: bytes wanted at most; the agent may give less, but not nothing without `eof` or `drained`.
            phase: whether the function runs.

        Raises:
            InvalidArgument: an offset that cannot be given.
            InvalidState: not a source, or the state does not fit the phase.
        """

    @abstractmethod
    async def load_begin(self, total: int | None) -> None:
        """Get ready for a state, dropping what was loaded before. STOPPED → LOADING.

        Args:
            total: its size if known.

        Raises:
            NoResources: there is no room for that many bytes.
        """

    @abstractmethod
    async def load(self, offset: int, data: bytes) -> None:
        """Take the next piece. Sending the last piece again is allowed and changes nothing.

        Args:
            offset: where it belongs.
            data: the piece; a `memoryview` only where `takes_views` says so.

        Raises:
            InvalidArgument: it does not begin where the last one ended.
        """

    @abstractmethod
    async def load_commit(self, total: int, digest: bytes) -> None:
        """Verify and apply everything. LOADING → LOADED.

        Args:
            total: bytes of the whole state.
            digest: XXH3-128 of the whole state, 16 bytes.

        Raises:
            CorruptState: size or digest differ, or the state makes no sense; nothing was applied.
        """

    @abstractmethod
    async def abort(self) -> None:
        """Drop what was being saved or loaded. LOADING → STOPPED; any other state stays."""

    @abstractmethod
    async def dirty_start(self, ranges: Sequence[Range], page_size: int) -> int:
        """Log the guest pages that the function writes, beginning with none.

        Args:
            ranges: where the function may write.
            page_size: a wish.

        Returns:
            The page size that is used.

        Raises:
            InvalidState: it is logging already.
            NoResources: too many ranges.
        """

    @abstractmethod
    async def dirty_report(self, iova: int, length: int) -> DirtyReport:
        """Report the pages written in a range since they were last reported, and forget them.

        Args:
            iova: beginning; a multiple of the page size.
            length: bytes; a multiple of the page size.

        Raises:
            InvalidArgument: not in whole pages, or not in the ranges that are logged.
            InvalidState: nothing is being logged.
        """

    @abstractmethod
    async def dirty_stop(self) -> None:
        """End logging and forget."""

    @abstractmethod
    async def reset(self) -> None:
        """Make the function as after a function-level reset, RUNNING, from every state.

        Ends what is under way: other calls fail with `InvalidState`, a migration is over, logging stops.
        """

    async def was_reset(self) -> None:  # noqa: B027  an agent that sees the device itself need not be told
        """The function was reset through its device: nothing holds that was saved from it or loaded into it before.

        Only called where `Capabilities.reset` is not claimed; afterwards `resume` is allowed.
        """

    @abstractmethod
    async def end(self, outcome: Outcome) -> None:
        """Leave the migration. Buffers are dropped; what the function does stays (LOADING becomes STOPPED).

        Args:
            outcome: how the migration ended.
        """

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Events as they happen, for as long as the block lasts. A slow watcher loses the oldest.

        Raises:
            Unsupported: this agent has none.
        """
        raise Unsupported("this agent reports no events; ask status instead")

    async def aclose(self) -> None:  # noqa: B027  an agent without handles has nothing to do
        """Let go of the session. The function and its migration stay as they are."""


class Agent(ABC):
    """A service on an SoC; shared by all its functions. Used as ``async with agent:``, and only inside it.

    `connect` may be left to the first call that needs it.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def verify(self) -> None:  # noqa: B027  most can tell nothing before they connect
        """Look, without connecting, whether what is configured can work at all; used outside of an event loop.

        Raises:
            OptionError: it cannot, such as a library that cannot be loaded.
        """

    @abstractmethod
    async def connect(self) -> AgentInfo:
        """Reach the agent and agree on a version; does nothing but answer if that is done already.

        Raises:
            ConnectError: it cannot be reached.
            AuthError: it does not let us in, or we do not trust it.
            ProtocolError: it speaks something else.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of the agent; functions stay as they are."""

    @abstractmethod
    async def open(self, function_id: str) -> Session:
        """A session for a function. Changes nothing there; several sessions for one function are allowed.

        Args:
            function_id: the function's name in the agent, as `functions` lists it.

        Returns:
            The session, which the caller closes.

        Raises:
            NotFound: there is no such function.
            NoResources: too many sessions are open.
        """

    async def functions(self) -> Sequence[FunctionInfo]:
        """Return the agent's functions.

        Raises:
            Unsupported: the agent does not tell.
        """
        raise Unsupported("this agent does not list its functions")
