"""The interface to an agent: `Agent` for a service on an SoC, `Session` for one of its functions.

An adapter implements both as a client of a vendor's protocol; an agent written with `rpc.server` implements both as the
thing itself. The rules, which `testing.check_agent` proves:

1. Every call runs under the caller's cancel scope; there are no deadlines of our own in here. A cancelled call may
   still take effect: ask `status`, or `reset`. The session stays usable.
2. `quiesce`, `stop`, `resume`, `abort`, `dirty_stop`, `end` and a repeated `begin` are idempotent. Where
   `Capabilities.p2p` is false, `quiesce` does what `stop` does.
3. `save(FINAL)` is for STOPPED and LOADED, `save(PRECOPY)` for RUNNING and QUIESCED. Offsets count the bytes of one
   stream over both phases. The last chunk may be asked for again; asking for the offset after it acknowledges it. Any
   other offset needs `random_access_save`. 0 begins anew, and a function that stayed stopped gives the same bytes.
4. `load_begin`, `load` and `load_commit` need the role DESTINATION, and `load_begin` a function in STOPPED, LOADING or
   LOADED. Bytes arrive in order. The commit verifies total and digest, applies, and leaves LOADED; `resume` then runs
   the function.
5. On a source, `resume` is the way back at any time. After a load that was begun and did not commit, also after
   `abort`, only `reset` or another load leads out.
6. A dirty report that fails, or whose answer is lost, makes everything in its range dirty.
7. What is not supported raises `Unsupported`, and `caps` never claims it.
8. The calls of one function are executed in the order of their arrival, except `status`, which is answered at once,
   and `reset`, which ends what is under way.
9. A migration belongs to the session that began it. Calls of others that change something raise `Busy`, except
   `reset`; once that session is gone, they may `quiesce`, `stop`, `resume`, `abort`, `end`, or take over by `begin`.
10. The function's state belongs to the function. Losing a connection, closing a session or restarting the agent changes
    nothing: what was stopped stays stopped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Self

from .errors import Unsupported


class Role(Enum):
    """Which side of a migration a session is."""

    SOURCE = "source"
    DESTINATION = "destination"


class Phase(Enum):
    """What `save` shall give."""

    #: What can be had while the function runs; comes again if it changes.
    PRECOPY = "precopy"
    #: The rest, from a stopped function.
    FINAL = "final"


class Outcome(Enum):
    """How a migration ended."""

    SUCCESS = "success"
    CANCELLED = "cancelled"
    FAILED = "failed"


class AgentState(Enum):
    """What a function does."""

    RUNNING = "running"
    #: Starts no DMA and no interrupts, but still answers registers.
    QUIESCED = "quiesced"
    #: Everything drained; nothing changes any more.
    STOPPED = "stopped"
    #: Stopped, and taking a state in.
    LOADING = "loading"
    #: Stopped, with a verified state applied; never run since.
    LOADED = "loaded"
    #: Only a reset leads out.
    ERROR = "error"


class EventKind(Enum):
    """What `watch` reports."""

    DEVICE_ERROR = "device-error"
    SIZE_CHANGED = "size-changed"
    STATE_CHANGED = "state-changed"
    #: From the adapter: the connection is gone; the function's state is not known.
    CONNECTION_LOST = "connection-lost"
    #: From the adapter: connected again; `status` is what the agent says now.
    RECONNECTED = "reconnected"
    #: As RECONNECTED, to an agent that was started since.
    AGENT_RESTARTED = "agent-restarted"


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """Who answers.

    Args:
        vendor: who made the agent.
        product: what it is called.
        firmware: its version, for people.
        protocol: name of the protocol spoken.
        protocol_version: its version.
        max_sessions: sessions that one connection may have open.
        max_message: bytes of the longest message that the agent takes.
        instance: differs after each start of the agent.
    """

    vendor: str
    product: str
    firmware: str = ""
    protocol: str = ""
    protocol_version: int = 1
    max_sessions: int = 1024
    max_message: int = 16 << 20
    instance: str = ""


@dataclass(frozen=True, slots=True)
class FunctionInfo:
    """One function of an agent.

    Args:
        function_id: the agent's own name for it; opaque.
        kind: `nvme`, `virtio-blk`, `virtio-net` …
        bdf: PCI address on the host, if the agent knows it.
        pf: number of the physical function, if it has one.
        vf: number of the virtual function below it, if it is one.
        labels: anything else.
    """

    function_id: str
    kind: str = ""
    bdf: str | None = None
    pf: int | None = None
    vf: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a function's agent can do with it.

    Args:
        stop_copy: state can be saved and loaded; without it the function is not migratable.
        p2p: `quiesce` is a step of its own.
        precopy: `save(PRECOPY)` works.
        dirty: the agent logs which guest pages the function writes.
        reset: `reset` works.
        status_query: `status` tells the truth rather than what was asked for last.
        random_access_save: `save` takes any offset that was given before.
        formats: ids of the state formats that can be loaded; the first is what is saved.
        max_state: bytes that a state may have at most.
        max_chunk: bytes of one `save` or `load` at most.
        page_sizes: page sizes that the dirty log can use, ascending.
        max_ranges: ranges that the dirty log takes at most.
    """

    stop_copy: bool = True
    p2p: bool = False
    precopy: bool = False
    dirty: bool = False
    reset: bool = True
    status_query: bool = True
    random_access_save: bool = False
    formats: tuple[str, ...] = ()
    max_state: int = 64 << 20
    max_chunk: int = 1 << 20
    page_sizes: tuple[int, ...] = (4096,)
    max_ranges: int = 0


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a function is, so that a destination can tell whether its state fits.

    Args:
        format_id: name of the state's format.
        format_version: its version.
        vendor: who made the function.
        model: what it is called.
        kind: `nvme`, `virtio-blk` …
        firmware: version of what runs on it.
        state_max: bytes that its state may have at most.
        fingerprint: everything else that must fit: features, queue limits, identity of namespaces.
    """

    format_id: str
    format_version: int
    vendor: str
    model: str
    kind: str
    firmware: str
    state_max: int
    fingerprint: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    """Where a function is.

    Args:
        state: what it does.
        role: its side in the migration that was begun, if any.
        migration_id: the name of that migration, or empty.
        dirty_active: guest pages are being logged.
        pending: the call that is being executed now, or empty.
        detail: one line for people.
    """

    state: AgentState
    role: Role | None = None
    migration_id: str = ""
    dirty_active: bool = False
    pending: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """How much there is to save.

    Args:
        stop_copy_bytes: bytes still to come if the function were stopped now.
        initial_bytes: bytes of the first pass of pre-copy not yet given.
        dirty_bytes: bytes that changed after they were given.
        exact: the figures are no guesses.
    """

    stop_copy_bytes: int
    initial_bytes: int = 0
    dirty_bytes: int = 0
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of state.

    Args:
        data: the bytes; may be empty only with `eof` or `drained`.
        eof: the state is complete with it (FINAL only).
        drained: nothing more for now (PRECOPY only).
    """

    data: bytes
    eof: bool = False
    drained: bool = False


@dataclass(frozen=True, slots=True)
class Range:
    """A stretch of the guest's I/O address space, in bytes."""

    iova: int
    length: int


@dataclass(frozen=True, slots=True)
class DirtyReport:
    """Guest pages written since they were last reported: a bitmap, or a list of ranges.

    Args:
        bitmap: bit n (LSB first) is the page at iova + n × page size; None if `ranges` is used.
        ranges: the dirty ranges, in whole pages.
        more: there is more to report for the same range; ask again.
        final: the function is stopped, so nothing will be added.
    """

    bitmap: bytes | None = None
    ranges: tuple[Range, ...] = ()
    more: bool = False
    final: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened without having been asked for.

    Args:
        kind: what.
        detail: one line for people.
        status: where the function is now, if known.
        lost: events that were dropped before this one because the watcher was slow.
    """

    kind: EventKind
    detail: str = ""
    status: Status | None = None
    lost: int = 0


class Session(ABC):
    """One function of an agent. See the rules at the head of this module; all sizes are in bytes.

    Any method may raise `TransportLost` (effect unknown), `Busy`, `DeviceFailed` or `ProtocolError`; only what is
    special to a method is listed there.
    """

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

        Raises:
            Incompatible: it could not, for these reasons.
        """

    @abstractmethod
    async def begin(self, role: Role, migration_id: str) -> None:
        """Take part in a migration. Does not change what the function does.

        Calling it again with the same arguments takes the migration over, also from another session: that is how a
        client goes on after it has connected again.

        Raises:
            Busy: another open session is in another migration.
            InvalidState: this session is in another migration, or the function is, its session is gone, and it does
                not run: then only `end` or `reset` concludes it.
            DeviceFailed: in ERROR.
            Unsupported: the function cannot be migrated.
        """

    @abstractmethod
    async def status(self) -> Status:
        """Where the function is, answered at once also while another call is being executed."""

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
            InvalidState: a load was begun and not committed; only `reset` or another load leads out.
            DeviceFailed: in ERROR.
        """

    @abstractmethod
    async def estimate(self) -> Estimate:
        """How much there is to save."""

    @abstractmethod
    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """Give the next piece of the state.

        Args:
            offset: where in the stream; 0 begins it anew.
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

        Raises:
            InvalidArgument: it does not begin where the last one ended.
        """

    @abstractmethod
    async def load_commit(self, total: int, sha256: bytes) -> None:
        """Verify and apply everything. LOADING → LOADED.

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

    @abstractmethod
    async def end(self, outcome: Outcome) -> None:
        """Leave the migration. Buffers are dropped; what the function does stays (LOADING becomes STOPPED)."""

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

        Raises:
            NotFound: there is no such function.
            NoResources: too many sessions are open.
        """

    async def functions(self) -> Sequence[FunctionInfo]:
        """The functions that there are.

        Raises:
            Unsupported: the agent does not tell.
        """
        raise Unsupported("this agent does not list its functions")
